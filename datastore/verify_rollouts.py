"""The rollouts' part of `vpmoe-data verify`: one shard beside its token shard, then what the manifest states."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import AlignmentError, FormatError
from common.tokenizer import PAD
from datastore.codec_target import MAX_REALISED_ERROR
from datastore.faults import Faults, verify_file
from datastore.manifest import MANIFEST_NAME, RolloutsInfo, SampledCounts
from datastore.rollout_shard import LogprobShard, RolloutShard, StoredRollout
from datastore.rollout_write import require_grammar, rollout_id, sampled_counts
from datastore.shard import FileEntry
from datastore.types import SPAN_IGNORED, DocTarget, PackedRow, Split

PREFIX = "rollouts/"
# A realised logprob further below the threshold than this is held there by the codec (docs/format.md, "Masses").
_HELD_NATS = 256.0


@dataclass(frozen=True)
class RolloutJob:
    """The rollouts beside a token shard. folder: rollouts/ of the dataset."""

    folder: Path
    entry: FileEntry
    dataset_id: str
    split: Split
    shard: int


class RolloutCheck:
    """The rollouts of one shard, held against its rows one by one. stored: those that could be read, by number."""

    def __init__(self, job: RolloutJob, faults: Faults) -> None:
        self._file, self._faults = PREFIX + job.entry.name, faults
        self.is_whole = True
        self.stored: dict[int, tuple[StoredRollout, int]] = {}
        self._places: dict[tuple[int, int], int] = {}
        verify_file(job.folder, job.entry, PREFIX, faults)
        try:
            place = {"dataset_id": job.dataset_id, "split": job.split, "shard": job.shard}
            shard = RolloutShard(job.folder, job.entry, **place)
        except FormatError as error:
            self._unreadable("rollout shard", None, error)
            return
        for index in range(shard.num_rows):
            try:
                self._take(index, *shard.rollout(index))
            except FormatError as error:
                self._unreadable("rollout", index, error)
        self._check_prompts()

    @property
    def counts(self) -> SampledCounts | None:
        """What the shard holds; None where not all of it could be read."""
        return sampled_counts([one for one, _ in self.stored.values()]) if self.is_whole else None

    def number_at(self, row: int, document: int) -> int | None:
        """The rollout that a document is; None where it could not be read."""
        return self._places.get((row, document))

    def see(self, index: int, row: PackedRow) -> None:
        """Hold the documents of row `index` against their rollouts."""
        for document, where in enumerate(row.documents()):
            number = self.number_at(index, document)
            if number is None:
                if self.is_whole:
                    message = f"row {index} document {document} has no rollout"
                    self._faults.add("rollout", self._file, None, message)
                continue
            tokens_T, spans_T = row.tokens_T[where], row.spans_T[where]
            one = self.stored[number][0]
            try:
                _require_same(one, row.row_hash, row.doc_ids[document])
                _require_lengths(one, tokens_T, spans_T)
                sampled = slice(one.prompt_tokens, -1)
                require_grammar(tokens_T[sampled], spans_T[sampled], one.verdict, "the grammar")
            except FormatError as error:
                self._faults.add("rollout", self._file, number, str(error))

    def _take(self, index: int, one: StoredRollout, of: int) -> None:
        self.stored[index] = one, of
        place = one.row, one.document
        if place in self._places:
            message = f"it lies where rollout {self._places[place]} does"
            self._faults.add("rollout", self._file, index, message)
        self._places[place] = index
        if not np.all(np.isfinite(one.logprobs_S) & (one.logprobs_S <= 0)):
            message = "a sampling logprob is not finite or above 0"
            self._faults.add("rollout logprobs", self._file, index, message)
        if min(one.prompt, one.sample, one.policy_version) < 0:
            message = "a prompt, sample or policy version is below 0"
            self._faults.add("rollout", self._file, index, message)

    def _check_prompts(self) -> None:
        """All rollouts of one prompt come from one document, at one length, for one effort of the teacher."""
        first: dict[int, StoredRollout] = {}
        for index, (one, _) in self.stored.items():
            other = first.setdefault(one.prompt, one)
            mine, theirs = ((r.prompt_id, r.prompt_tokens, r.reasoning) for r in (one, other))
            if mine != theirs:
                message = f"prompt {one.prompt} is another one before"
                self._faults.add("rollout prompts", self._file, index, message)

    def _unreadable(self, kind: str, index: int | None, error: FormatError) -> None:
        self._faults.add(kind, self._file, index, str(error))
        self.is_whole = False


def _require_same(one: StoredRollout, row_hash: int, doc_id: bytes) -> None:
    if one.row_hash != row_hash:
        raise FormatError(
            "the row of its tokens is another",
            got=f"row hash {row_hash:016x}",
            expected=f"{one.row_hash:016x}",
        )
    wanted = rollout_id(one.prompt_id, one.prompt, one.sample, one.policy_version)
    if doc_id != wanted:
        raise FormatError("the id of its document", got=doc_id.hex(), expected=wanted.hex())


def _require_lengths(one: StoredRollout, tokens_T: np.ndarray, spans_T: np.ndarray) -> None:
    found = np.bincount(spans_T[:-1], minlength=3).tolist()
    stated = [one.prompt_tokens, one.reasoning_tokens, one.final_tokens]
    if found != stated:
        raise FormatError("tokens by span", got=stated, expected=found)
    if len(one.logprobs_S) != one.reasoning_tokens + one.final_tokens:
        raise FormatError(
            "sampling logprobs",
            got=len(one.logprobs_S),
            expected=one.reasoning_tokens + one.final_tokens,
        )
    if (tokens_T[-1], spans_T[-1]) != (PAD, SPAN_IGNORED) or spans_T[: one.prompt_tokens].any():
        raise FormatError("a rollout is a prompt of span 0, the sampled tokens and <|endoftext|>")


class LogprobCheck:
    """The exact teacher logprobs beside one target shard, held against what the targets store of them."""

    def __init__(
        self,
        folder: Path,
        entry: FileEntry,
        prefix: str,
        rollouts: RolloutCheck,
        faults: Faults,
        **place: object,
    ) -> None:
        self._rollouts, self._faults = rollouts, faults
        self._file = f"{prefix}logprobs/{entry.name}"
        self._shard: LogprobShard | None = None
        verify_file(folder / "logprobs", entry, f"{prefix}logprobs/", faults)
        try:
            self._shard = LogprobShard(folder / "logprobs", entry, **place)  # type: ignore[arg-type]
        except FormatError as error:
            faults.add("logprob shard", self._file, None, str(error))
            return
        if rollouts.is_whole and self._shard.num_rows != len(rollouts.stored):
            message = f"{self._shard.num_rows} rows for {len(rollouts.stored)} rollouts"
            faults.add("teacher logprobs", self._file, None, message)

    def see(self, index: int, documents: list[DocTarget | None]) -> None:
        """Check the documents of row `index`, as decoded from its blob."""
        if self._shard is None:
            return
        for document, target in enumerate(documents):
            number = self._rollouts.number_at(index, document)
            if target is None or number is None:
                continue
            try:
                exact_S = self._shard.logprobs(number, self._rollouts.stored[number][1])
            except (FormatError, AlignmentError, IndexError) as error:
                self._faults.add("teacher logprobs", self._file, number, str(error))
                continue
            for message in _logprob_faults(exact_S, target):
                self._faults.add("teacher logprobs", self._file, number, message)


def _logprob_faults(exact_S: np.ndarray, document: DocTarget) -> Iterator[str]:
    stored_S = document.target.realised_logprob_P
    if len(exact_S) != len(stored_S):
        yield f"{len(exact_S)} logprobs of {len(stored_S)} targets"
    elif not np.all(np.isfinite(exact_S) & (exact_S <= 0)):
        yield "a logprob is not finite or above 0"
    else:
        lowest = np.log(document.target.threshold) - _HELD_NATS
        off_S = np.abs(np.maximum(exact_S, lowest) - stored_S)
        # float32 of values up to 260 nats rounds by 2e-5.
        if (worst := float(off_S.max(initial=0.0))) > MAX_REALISED_ERROR + 1e-4:
            yield f"a logprob is {worst:.4f} nats from that of the targets, which store it to 3/64"


def verify_rollout_counts(
    info: RolloutsInfo, found: dict[Split, list[SampledCounts | None]], faults: Faults
) -> None:
    """What the manifest states of the rollouts, against the counts of its shards in order."""
    for split, parts in found.items():
        counts = [part for part in parts if part is not None]
        if len(counts) < len(parts):
            continue
        total = None
        for shard, part in enumerate(counts):
            if shard and part.first_version < counts[shard - 1].last_version:
                message = f"{split} shard {shard} is sampled by older weights than the one before"
                faults.add("policy versions", MANIFEST_NAME, None, message)
            total = part if total is None else total.merged(part)
        if info.counts.get(split) != total:
            message = f"{split}: the manifest states {info.counts.get(split)}, stored are {total}"
            faults.add("rollout counts", MANIFEST_NAME, None, message)
