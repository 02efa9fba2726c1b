"""The manifest of a scored dataset, and the alignment gate that stands before it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

import numpy as np

from datastore import alignment
from datastore.budget import BudgetSums
from datastore.codec import CODEC_VERSION
from datastore.manifest import TargetManifest, TokenizerInfo
from datastore.prompt import document_prefix
from datastore.reader import Dataset, TargetStore
from datastore.score_job import ScoreRun, ShardJob, ShardRecord
from datastore.shard import FORMAT_VERSION
from datastore.target import row_target
from datastore.types import SPLITS, SparseTarget

# Scored rows of each split that the gate reads back from disk.
GATE_ROWS = 16


def target_manifest(
    dataset: Dataset, run: ScoreRun, records: list[tuple[ShardJob, ShardRecord]]
) -> TargetManifest:
    """The manifest of finished shards, in order, once the gate has read some of them back.

    Raises AlignmentError from the gate.
    """
    engine = json.loads((run.work / "engine.json").read_bytes())
    prefix = document_prefix(dataset.manifest, run.teacher)
    sums = functools.reduce(BudgetSums.merged, (r.sums for _, r in records), BudgetSums())
    by_split = {
        split: [record for job, record in records if job.split == split] for split in SPLITS
    }
    manifest = TargetManifest(
        format_version=FORMAT_VERSION,
        codec_version=CODEC_VERSION,
        target_id=run.target_id,
        dataset_fingerprint=dataset.manifest.fingerprint,
        teacher=run.teacher.resolved(),
        slug=run.teacher.name,
        engine={**engine["engine"], **run.weights},
        mode={"system": prefix.system_text, "reasoning": prefix.reasoning},
        temperature=run.teacher.temperature,
        threshold=run.teacher.threshold,
        tokenizer=TokenizerInfo(),
        budget=sums.budget().resolved(),
        alignment={},
        counts={
            split: {
                "documents": sum(r.documents for r in found),
                "tokens": sum(r.tokens for r in found),
            }
            for split, found in by_split.items()
        },
        files={split: tuple(r.entry for r in found) for split, found in by_split.items()},
        id_order_sha256=run.order_sha256,
        selection=run.selection.resolved(),
        shard_budgets={
            split: tuple(r.sums.budget().resolved() for r in found)
            for split, found in by_split.items()
        },
        quarantine=tuple(document for _, record in records for document in record.quarantine),
        canary=engine["canary"],
        self_noise=json.loads((run.work / "self_noise.json").read_bytes()),
    )
    return gated(dataset, manifest)


def gated(dataset: Dataset, manifest: TargetManifest) -> TargetManifest:
    """The manifest with the report of the alignment gate over some rows read back. Raises AlignmentError."""
    report = alignment.alignment_report(_stored_pairs(TargetStore(dataset, manifest)))
    alignment.require_aligned(report)
    return manifest.model_copy(update={"alignment": report.resolved()})


def _stored_pairs(store: TargetStore) -> Iterator[tuple[np.ndarray, SparseTarget]]:
    """Scored rows evenly over each split, as a trainer would read them back."""
    for split in SPLITS:
        scored = store.scored_rows(split)
        ranks_K = np.unique(np.arange(GATE_ROWS) * scored.size // GATE_ROWS)
        for index in scored.select(ranks_K[ranks_K < scored.size]).tolist():
            row = store.dataset.row(split, index)
            documents = store.documents(split, index, row)
            assert documents is not None, "a scored row has targets"
            yield row.tokens_T, row_target(documents, row)
