"""The scored rows of a target store, shard by shard: what the reports read (audit, plan)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from common.errors import AlignmentError
from datastore.codec import decode_blob
from datastore.reader import TargetStore
from datastore.types import DocTarget, PackedRow, Split


@dataclass(frozen=True, eq=False)
class ScoredJob:
    """Rows of one shard, numbered in their split; cheap to pickle. rows_N: int64, ascending."""

    store: TargetStore
    split: Split
    shard: int
    rows_N: np.ndarray


@dataclass(frozen=True, eq=False)
class ScoredRow:
    """A row with its targets. documents: None where one was not scored; at least one was."""

    index: int
    row: PackedRow
    documents: list[DocTarget | None]
    blob_bytes: int


def scored_jobs(
    store: TargetStore, splits: tuple[Split, ...], max_rows: int | None
) -> list[ScoredJob]:
    """The scored rows of `splits` by shard, in order; at most `max_rows` of them, evenly over all.

    Raises AlignmentError when none is scored.
    """
    places = [(split, np.flatnonzero(store.scored_rows(split).mask())) for split in splits]
    total = sum(len(rows_N) for _, rows_N in places)
    if not total:
        raise AlignmentError(
            f"the targets of {store.manifest.slug} score no row of {', '.join(splits)}",
            remedy="score the dataset, or name another split",
        )
    count = min(total, max_rows or total)
    chosen_C = np.arange(count, dtype=np.int64) * total // count
    jobs, before = [], 0
    for split, rows_N in places:
        mine_C = chosen_C[(chosen_C >= before) & (chosen_C < before + len(rows_N))] - before
        before += len(rows_N)
        jobs += _by_shard(store, split, rows_N[mine_C])
    return jobs


def scored_rows(job: ScoredJob) -> Iterator[ScoredRow]:
    """Read and decode the rows of a job, every hash checked."""
    store = job.store
    for index in job.rows_N.tolist():
        row = store.dataset.row(job.split, index)
        blob = store.blob(job.split, index, row.row_hash)
        if blob is None:
            raise AssertionError("a job lists scored rows only")
        yield ScoredRow(index, row, decode_blob(blob, row, store.order), len(blob))


def _by_shard(store: TargetStore, split: Split, rows_N: np.ndarray) -> list[ScoredJob]:
    ends = np.cumsum([entry.rows for entry in store.manifest.entries(split)])
    shards_N = np.searchsorted(ends, rows_N, side="right")
    return [
        ScoredJob(store, split, int(shard), rows_N[shards_N == shard])
        for shard in np.unique(shards_N)
    ]
