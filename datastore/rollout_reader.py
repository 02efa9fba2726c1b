"""A rollout buffer as its readers see it, growing or sealed. datastore/rollouts.py tells the whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import FormatError
from datastore.codec import decode_blob
from datastore.id_order import IdOrder, order_of_rows
from datastore.manifest import MANIFEST_NAME, SampledCounts, buffer_path
from datastore.rollout import Rollout, ScoredTokens
from datastore.rollout_records import (
    BufferPlace,
    BufferRecord,
    SampledRecord,
    ScoredRecord,
    read_record,
)
from datastore.rollout_shard import LogprobShard, RolloutShard, StoredRollout
from datastore.rollout_write import score_document
from datastore.scoring_protocol import ScoreDocument
from datastore.shard import TargetShard, TokenShard
from datastore.types import DocTarget, PackedRow, Split


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredRow:
    """A packed row of a scored shard. documents, sampled: one each a document of the row."""

    row: PackedRow
    documents: list[DocTarget | None]
    sampled: list[ScoredTokens]


@dataclass(frozen=True, slots=True, eq=False)
class SampledShard:
    """A sampled shard as read. rollouts: in the order of sampling, with their hashes."""

    record: SampledRecord
    rows: list[PackedRow]
    rollouts: list[tuple[StoredRollout, int]]


class RolloutReader:
    """A rollout buffer opened for reading, in any process, while another one writes it. Train shards unless it says so.

    Every read checks the hashes of what it reads: FormatError names the damaged file.
    """

    def __init__(self, folder: Path, buffer: BufferRecord) -> None:
        self.folder, self.buffer = Path(folder), buffer
        self.place = BufferPlace(folder, buffer.slug)
        self._num_sampled = self._num_scored = 0
        self._order: IdOrder | None = None

    @classmethod
    def open_reader(cls, folder: Path | str) -> RolloutReader:
        """Open the buffer in `folder`. Raises FormatError when there is none."""
        return RolloutReader(Path(folder), read_record(BufferRecord, buffer_path(Path(folder))))

    @property
    def num_sampled(self) -> int:
        """Shards 0..n-1 are sampled and durable; asked of the folder, so it grows."""
        while self.place.sampled("train", self._num_sampled).exists():
            self._num_sampled += 1
        return self._num_sampled

    @property
    def num_scored(self) -> int:
        """Shards 0..n-1 have targets; later ones may have some too (`is_scored`)."""
        while self.is_scored(self._num_scored):
            self._num_scored += 1
        return self._num_scored

    def is_scored(self, shard: int) -> bool:
        """Whether a shard's targets are durable."""
        return self.place.scored("train", shard).exists()

    @property
    def is_sealed(self) -> bool:
        """Whether the buffer is a finished dataset."""
        return (self.folder / MANIFEST_NAME).exists()

    def counts(self, shard: int) -> SampledCounts:
        """What a shard holds, from its record alone."""
        return self.sampled_record("train", shard).counts

    def rollouts(self, shard: int) -> list[Rollout]:
        """The rollouts of a shard in the order of `append`; tokens, spans and logprobs are read-only views."""
        found = self.read_shard("train", shard)
        documents = [row.documents() for row in found.rows]
        return [_rollout(one, found.rows[one.row], documents[one.row]) for one, _ in found.rollouts]

    def score_documents(self, shard: int) -> list[ScoreDocument]:
        """What to ask the teacher for, in the order of `rollouts`: `add_targets` takes the answers in that order."""
        return [score_document(rollout) for rollout in self.rollouts(shard)]

    def rows(self, shard: int, numbers: range | None = None) -> list[ScoredRow]:
        """Packed rows of a scored shard with their targets, decoded, and the logprobs of the sampled tokens.

        numbers: of the rows to read, all of them by default; `counts` says how many there are.
        """
        record, scored = self.sampled_record("train", shard), self.scored_record("train", shard)
        tokens, own = self._shards(record)
        wanted = range(tokens.num_rows) if numbers is None else numbers
        exact, sampled = self._exact(scored), dict[tuple[int, int], ScoredTokens]()
        for index in range(own.num_rows):
            one, of = own.rollout(index)
            if one.row in wanted:
                sampled[one.row, one.document] = _scored(one, exact.logprobs(index, of))
        where = {"target_id": scored.target_id, "split": scored.split, "shard": shard}
        blobs, order = (
            TargetShard(self.place.targets, scored.entry, **where),
            self._id_order(scored),
        )
        rows = []
        for index in wanted:
            row = tokens.row(index)
            blob = blobs.blob(index, row.row_hash)
            if blob is None:
                raise FormatError(f"{blobs.path} row {index} has no targets", expected="targets")
            rows.append(
                ScoredRow(
                    row=row,
                    documents=decode_blob(blob, row, order),
                    sampled=[sampled[index, number] for number in range(len(row.doc_ids))],
                )
            )
        return rows

    def scored_tokens(self, shard: int) -> list[ScoredTokens]:
        """Both logprobs of the sampled tokens of a scored shard, in the order of `rollouts`."""
        found = self.read_shard("train", shard)
        exact = self._exact(self.scored_record("train", shard))
        return [
            _scored(one, exact.logprobs(index, of))
            for index, (one, of) in enumerate(found.rollouts)
        ]

    def _exact(self, record: ScoredRecord) -> LogprobShard:
        where = {"target_id": record.target_id, "split": record.split, "shard": record.shard}
        return LogprobShard(self.place.logprobs, record.logprobs, **where)

    def sampled_record(self, split: Split, shard: int) -> SampledRecord:
        """The record of a sampled shard. Raises FormatError when it is absent, damaged or of another buffer."""
        record = read_record(SampledRecord, self.place.sampled(split, shard))
        place = (record.dataset_id, record.split, record.shard)
        _require_place(record, place, (self.buffer.dataset_id, split, shard))
        return record

    def scored_record(self, split: Split, shard: int) -> ScoredRecord:
        """The record of a shard's targets. Raises FormatError when it is absent, damaged or of another buffer."""
        record = read_record(ScoredRecord, self.place.scored(split, shard))
        place = (record.target_id, record.split, record.shard)
        wanted = self.buffer.target_id(record.id_order_sha256)
        _require_place(record, place, (wanted, split, shard))
        return record

    def read_shard(self, split: Split, shard: int) -> SampledShard:
        """A sampled shard of either split, every hash checked."""
        record = self.sampled_record(split, shard)
        tokens, own = self._shards(record)
        return SampledShard(
            record,
            [tokens.row(index) for index in range(tokens.num_rows)],
            [own.rollout(index) for index in range(own.num_rows)],
        )

    def _shards(self, record: SampledRecord) -> tuple[TokenShard, RolloutShard]:
        where = {"dataset_id": record.dataset_id, "split": record.split, "shard": record.shard}
        return (
            TokenShard(self.folder, record.entry, **where, seq_len=self.buffer.seq_len),
            RolloutShard(self.place.rollouts, record.rollouts, **where),
        )

    def first_order(self) -> IdOrder:
        """The order of ids of all targets of this buffer: by the targets of its first shard."""
        if self._order is None:
            self._order = order_of_rows(self.read_shard("train", 0).rows)
        return self._order

    def _id_order(self, record: ScoredRecord) -> IdOrder:
        if self._order is None or self._order.sha256 != record.id_order_sha256:
            self._order = IdOrder.read(self.place.targets, record.id_order_sha256)
        return self._order


def _scored(one: StoredRollout, teacher_logprob_S: np.ndarray) -> ScoredTokens:
    return ScoredTokens(sampling_logprob_S=one.logprobs_S, teacher_logprob_S=teacher_logprob_S)


def _rollout(one: StoredRollout, row: PackedRow, documents: list[slice]) -> Rollout:
    where = documents[one.document]
    tokens = slice(where.start, where.stop - 1)
    return Rollout(
        prompt=one.prompt,
        sample=one.sample,
        doc_id=one.prompt_id,
        language=row.languages[one.document],
        exercise=row.exercises[one.document],
        tokens_T=row.tokens_T[tokens],
        spans_T=row.spans_T[tokens],
        logprobs_S=one.logprobs_S,
        policy_version=one.policy_version,
        reasoning=one.reasoning,  # type: ignore[arg-type]  # held by its hash
        verdict=one.verdict,
    )


def _require_place(record: object, found: tuple[object, ...], wanted: tuple[object, ...]) -> None:
    if found != wanted:
        raise FormatError(
            f"a {type(record).__name__} of another shard or buffer", got=found, expected=wanted
        )
