"""The manifest of a scored dataset, and the alignment gate that stands before it."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from datastore import alignment
from datastore.budget import BudgetSums
from datastore.codec import CODEC_VERSION
from datastore.manifest import QuarantinedDocument, TargetManifest, TokenizerInfo
from datastore.prompt import document_prefix
from datastore.reader import Dataset, TargetStore
from datastore.score_job import ScoreRun, ShardJob, ShardRecord
from datastore.shard import FORMAT_VERSION, FileEntry
from datastore.target import row_target
from datastore.types import SPLITS, SparseTarget, Split

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
        alignment={},
        id_order_sha256=run.order_sha256,
        selection=run.selection.resolved(),
        canary=engine["canary"],
        self_noise=json.loads((run.work / "self_noise.json").read_bytes()),
        **shard_facts(by_split),
    )
    return gated(dataset, manifest)


class FinishedShard(Protocol):
    """What a manifest takes from the record of a target shard. documents, tokens: scored ones."""

    entry: FileEntry
    documents: int
    tokens: int
    sums: BudgetSums
    quarantine: tuple[QuarantinedDocument, ...]


def shard_facts(by_split: Mapping[Split, Sequence[FinishedShard]]) -> dict[str, Any]:
    """The fields of a target manifest that its shards, in order, add up to."""
    shards = [shard for split in SPLITS for shard in by_split[split]]
    whole = functools.reduce(BudgetSums.merged, (shard.sums for shard in shards), BudgetSums())
    return {
        "files": {split: tuple(s.entry for s in found) for split, found in by_split.items()},
        "counts": {
            split: {
                "documents": sum(shard.documents for shard in found),
                "tokens": sum(shard.tokens for shard in found),
            }
            for split, found in by_split.items()
        },
        "budget": whole.budget().resolved(),
        "shard_budgets": {
            split: tuple(shard.sums.budget().resolved() for shard in found)
            for split, found in by_split.items()
        },
        "quarantine": tuple(document for shard in shards for document in shard.quarantine),
    }


def gated(
    dataset: Dataset, manifest: TargetManifest, *, too_few: str = "score more rows"
) -> TargetManifest:
    """The manifest with the report of the alignment gate over some rows read back. Raises AlignmentError.

    too_few: what to do about too few positions.
    """
    pairs = _stored_pairs(TargetStore(dataset, manifest))
    report = alignment.alignment_report(pairs, too_few=too_few)
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
