"""Rollouts and their targets into the shards of a buffer: one function for each of the two durable steps."""

from __future__ import annotations

import collections
import hashlib
import struct
from collections.abc import Sequence

import numpy as np

from common.errors import AlignmentError, FormatError
from common.tokenizer import PAD
from datastore.budget import BudgetSums, row_budget
from datastore.codec import encode_blob
from datastore.harmony_grammar import spans, verdict
from datastore.id_order import NAME, IdOrder
from datastore.manifest import SampledCounts
from datastore.packing import PackConfig, pack_documents
from datastore.rollout import Rollout
from datastore.rollout_records import (
    BufferPlace,
    BufferRecord,
    SampledRecord,
    ScoredRecord,
    write_record,
)
from datastore.rollout_shard import StoredRollout, write_logprob_shard, write_rollout_shard
from datastore.scoring_protocol import REASONING, ScoreDocument
from datastore.shard import hash_row, write_target_shard, write_token_shard
from datastore.target import content_key, entropy_sums, target_positions
from datastore.types import (
    SPAN_FINAL,
    SPAN_IGNORED,
    SPAN_REASONING,
    DocTarget,
    PackedRow,
    RenderedDoc,
    SparseTarget,
    Split,
)
from datastore.unit import RowCounter

_SAMPLE = struct.Struct("<qiq")


def rollout_id(prompt_id: bytes, prompt: int, sample: int, policy_version: int) -> bytes:
    """The doc_id of a rollout: blake2b-128 of its prompt's doc_id, then prompt (int64), sample (int32) and version."""
    content = prompt_id + _SAMPLE.pack(prompt, sample, policy_version)
    return hashlib.blake2b(content, digest_size=16).digest()


def rollout_document(rollout: Rollout) -> RenderedDoc:
    """The document that is stored of a rollout: its tokens and one <|endoftext|> of span 0."""
    return RenderedDoc(
        doc_id=rollout_id(rollout.doc_id, rollout.prompt, rollout.sample, rollout.policy_version),
        tokens_T=np.append(rollout.tokens_T, np.int32(PAD)),
        spans_T=np.append(rollout.spans_T, np.uint8(SPAN_IGNORED)),
        language=rollout.language,
        exercise=rollout.exercise,
    )


def score_document(rollout: Rollout) -> ScoreDocument:
    """What the teacher is asked to score: the stored document, since its content key seeds the draws."""
    document = rollout_document(rollout)
    return ScoreDocument(
        tokens_T=document.tokens_T, spans_T=document.spans_T, reasoning=rollout.reasoning
    )


def require_rollout(rollout: Rollout, name: str) -> None:
    """FormatError, led by `name`, unless a rollout is what datastore/rollout.py says."""
    tokens_T, spans_T, logprobs_S = rollout.tokens_T, rollout.spans_T, rollout.logprobs_S
    sampled = np.flatnonzero(spans_T)
    if tokens_T.dtype != np.int32 or spans_T.dtype != np.uint8 or logprobs_S.dtype != np.float32:
        raise FormatError(
            f"{name}: the dtypes of tokens, spans and logprobs",
            got=f"{tokens_T.dtype}, {spans_T.dtype}, {logprobs_S.dtype}",
            expected="int32, uint8, float32",
        )
    first = len(tokens_T) - len(logprobs_S)
    faults = [
        (tokens_T.shape != spans_T.shape, "as many spans as tokens"),
        (not len(logprobs_S), "at least one sampled token"),
        (first < 1, "a prompt"),
        (not np.array_equal(sampled, np.arange(first, len(tokens_T))), "a span on sampled tokens"),
        (not np.all(np.isfinite(logprobs_S) & (logprobs_S <= 0)), "logprobs finite, at most 0"),
        (len(rollout.doc_id) != 16, "16 bytes of prompt id"),
        (min(rollout.prompt, rollout.sample, rollout.policy_version) < 0, "numbers from 0 on"),
        (rollout.reasoning not in REASONING, f"a reasoning of {', '.join(REASONING)}"),
    ]
    for wrong, expected in faults:
        if wrong:
            raise FormatError(f"{name} is no rollout", expected=expected)
    require_grammar(tokens_T[first:], spans_T[first:], rollout.verdict, name)


def require_grammar(
    tokens_S: np.ndarray, spans_S: np.ndarray, stated_verdict: str, name: str
) -> None:
    """FormatError, led by `name`, unless spans and verdict of sampled tokens are those of the grammar."""
    if not np.array_equal(spans_S, wanted_S := spans(tokens_S)):
        wrong = int(np.flatnonzero(spans_S != wanted_S)[0])
        raise FormatError(
            f"{name}: the span of sampled token {wrong}",
            got=int(spans_S[wrong]),
            expected=int(wanted_S[wrong]),
        )
    if stated_verdict != (wanted := verdict(tokens_S)):
        raise FormatError(f"{name}: its verdict", got=stated_verdict, expected=wanted.value)


def write_sampled(
    place: BufferPlace, buffer: BufferRecord, split: Split, shard: int, rollouts: Sequence[Rollout]
) -> SampledRecord:
    """Pack and write rollouts as one shard of a split; the same rollouts always give the same bytes.

    Raises FormatError for what is no rollout, for two with one identity, and for one that no row can hold.
    """
    for number, rollout in enumerate(rollouts):
        require_rollout(rollout, f"{split} shard {shard}: rollout {number}")
    documents = [rollout_document(rollout) for rollout in rollouts]
    numbers = {document.doc_id: number for number, document in enumerate(documents)}
    if not rollouts or len(numbers) < len(rollouts):
        raise FormatError(
            f"the rollouts of {split} shard {shard}",
            got=f"{len(rollouts)}, {len(numbers)} of them distinct",
            expected="at least one; each prompt, sample and policy version once",
        )
    counter = RowCounter()
    packed = pack_documents(documents, seq_len=buffer.seq_len, config=PackConfig())
    rows = list(counter.count(packed))
    where = {"dataset_id": buffer.dataset_id, "split": split, "shard": shard}
    entry = write_token_shard(place.folder, rows, **where, seq_len=buffer.seq_len)
    hashes = [hash_row(row, **where, index=index) for index, row in enumerate(rows)]
    stored = _stored_rollouts(rollouts, rows, hashes, numbers)
    record = SampledRecord(
        **where,
        entry=entry,
        rollouts=write_rollout_shard(place.rollouts, stored, **where),
        row_counts=counter.counts,
        counts=sampled_counts(stored),
    )
    write_record(place.sampled(split, shard), record)
    return record


def _stored_rollouts(
    rollouts: Sequence[Rollout],
    rows: Sequence[PackedRow],
    hashes: Sequence[int],
    numbers: dict[bytes, int],
) -> list[StoredRollout]:
    places = {
        numbers[doc_id]: (row, document)
        for row, packed in enumerate(rows)
        for document, doc_id in enumerate(packed.doc_ids)
    }
    stored = []
    for number, rollout in enumerate(rollouts):
        row, document = places[number]
        by_span = np.bincount(rollout.spans_T, minlength=3).tolist()
        stored.append(
            StoredRollout(
                row=row,
                document=document,
                prompt_id=rollout.doc_id,
                prompt=rollout.prompt,
                sample=rollout.sample,
                policy_version=rollout.policy_version,
                reasoning=rollout.reasoning,
                verdict=str(rollout.verdict),
                prompt_tokens=by_span[SPAN_IGNORED],
                reasoning_tokens=by_span[SPAN_REASONING],
                final_tokens=by_span[SPAN_FINAL],
                logprobs_S=rollout.logprobs_S,
                row_hash=hashes[row],
            )
        )
    return stored


def sampled_counts(stored: Sequence[StoredRollout]) -> SampledCounts:
    """The counts of a shard (at least one rollout)."""
    versions = [one.policy_version for one in stored]
    return SampledCounts(
        rollouts=len(stored),
        rows=len({one.row for one in stored}),
        reasoning=sum(one.reasoning_tokens for one in stored),
        final=sum(one.final_tokens for one in stored),
        verdicts=dict(sorted(collections.Counter(one.verdict for one in stored).items())),
        modes=dict(sorted(collections.Counter(one.reasoning for one in stored).items())),
        first_version=min(versions),
        last_version=max(versions),
    )


def write_scored(
    place: BufferPlace,
    buffer: BufferRecord,
    sampled: SampledRecord,
    rows: Sequence[PackedRow],
    stored: Sequence[tuple[StoredRollout, int]],
    targets: Sequence[SparseTarget],
    order: IdOrder,
) -> ScoredRecord:
    """Encode the targets of a sampled shard, one a rollout, and write them with their exact logprobs.

    rows, stored: of the shard. Raises AlignmentError when the targets are not those of its rollouts, FormatError when
    they have another threshold or no entropies.
    """
    split, shard = sampled.split, sampled.shard
    name = f"{split} shard {shard}"
    if len(targets) != len(stored):
        raise AlignmentError(f"targets of {name}", got=len(targets), expected=len(stored))
    if wrong := {t.threshold for t in targets} - {buffer.threshold}:
        raise FormatError(
            f"the threshold of the targets of {name}", got=wrong, expected=buffer.threshold
        )
    by_row: list[list[DocTarget | None]] = [[None] * len(row.doc_ids) for row in rows]
    for number, ((one, _), target) in enumerate(zip(stored, targets, strict=True)):
        document = _document_target(rows[one.row], one.document, target, f"{name} rollout {number}")
        by_row[one.row][one.document] = document
    sums, blobs = BudgetSums(), []
    for index, (row, documents) in enumerate(zip(rows, by_row, strict=True)):
        blob, of_row = _encoded(row, documents, order, f"{name} row {index}")
        blobs.append((row.row_hash, blob))
        sums = sums.merged(of_row)
    where = {"target_id": buffer.target_id(order.sha256), "split": split, "shard": shard}
    exact = [
        (of, target.realised_logprob_P) for (_, of), target in zip(stored, targets, strict=True)
    ]
    if not (place.targets / NAME).exists():
        order.write(place.targets)
    record = ScoredRecord(
        **where,
        id_order_sha256=order.sha256,
        entry=write_target_shard(place.targets, blobs, **where),
        logprobs=write_logprob_shard(place.logprobs, exact, **where),
        documents=len(stored),
        tokens=sum(int(row.doc_ends_D[-1]) for row in rows),
        sums=sums,
    )
    write_record(place.scored(split, shard), record)
    return record


def _document_target(row: PackedRow, document: int, target: SparseTarget, name: str) -> DocTarget:
    where = row.documents()[document]
    tokens_T, spans_T = row.tokens_T[where], row.spans_T[where]
    positions_P = target_positions(tokens_T, spans_T)
    if not np.array_equal(target.positions_P, positions_P):
        raise AlignmentError(
            f"the targets of {name} stand at other positions",
            got=f"{len(target.positions_P)} positions",
            expected=f"{len(positions_P)}, those whose next token was sampled",
            remedy="score the documents that `score_documents` gives, in their order",
        )
    if target.entropy_P is None:
        raise FormatError(f"the targets of {name} have no entropies")
    return DocTarget(
        content_key=content_key(tokens_T),
        target=target,
        entropy_sums=entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P),
    )


def _encoded(
    row: PackedRow, documents: list[DocTarget | None], order: IdOrder, name: str
) -> tuple[bytes, BudgetSums]:
    try:
        blob = encode_blob(documents, row, order)
        return blob, row_budget(documents, blob, row, order)
    except FormatError as error:
        # The numbers of draws follow from a document's tokens, and so do the ids of realised logprobs.
        raise AlignmentError(
            f"the targets of {name} are not those of its tokens: {error}",
            remedy="score the documents that `score_documents` gives, in their order",
        ) from error
