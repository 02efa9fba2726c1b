"""A rollout buffer becomes a dataset: the two manifests, from the records of its shards."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from common.files import canonical_json, sha256_bytes
from common.provenance import git_sha
from datastore.codec import CODEC_VERSION
from datastore.manifest import (
    DatasetManifest,
    RolloutsInfo,
    SampledCounts,
    TargetManifest,
    TokenizerInfo,
    commit_manifest,
    dataset_fingerprint,
)
from datastore.packing import PackConfig
from datastore.reader import Dataset
from datastore.rollout_records import BufferRecord, SampledRecord, ScoredRecord
from datastore.score_manifest import gated, shard_facts
from datastore.selection import Selection
from datastore.shard import FORMAT_VERSION
from datastore.types import SPLITS, Split
from datastore.unit import RowCounts

if TYPE_CHECKING:
    from datastore.rollouts import RolloutBuffer


def sealed(
    buffer: RolloutBuffer,
    teacher: Mapping[str, Any],
    prompts: DatasetManifest,
    splits: Sequence[Split],
) -> tuple[DatasetManifest, TargetManifest]:
    """Write the manifests of a buffer of which every shard of `splits` is scored; that of the dataset comes last.

    Raises AlignmentError from the gate, ConfigError when `teacher` is none whose targets these can be.
    """
    _require_teacher(buffer.buffer, teacher)
    numbers = {"train": range(buffer.num_sampled), "valid": range("valid" in splits)}
    sampled = {
        split: [buffer.sampled_record(split, shard) for shard in numbers[split]] for split in SPLITS
    }
    scored = {
        split: [buffer.scored_record(split, shard) for shard in numbers[split]] for split in SPLITS
    }
    manifest = dataset_manifest(buffer.buffer, prompts, sampled)
    targets = _target_manifest(buffer.buffer, manifest, dict(teacher), scored)
    too_few = (
        f"{buffer.folder} stays a buffer, as checkpoints stay: sample more rollouts, or longer ones"
    )
    targets = gated(Dataset(buffer.folder, manifest), targets, too_few=too_few)
    commit_manifest(buffer.place.targets, targets)
    commit_manifest(buffer.folder, manifest)
    return manifest, targets


def _require_teacher(buffer: BufferRecord, teacher: Mapping[str, Any]) -> None:
    wanted = {"codec_version": CODEC_VERSION, "threshold": buffer.threshold, "temperature": 1.0}
    wrong = {key: value for key, value in wanted.items() if teacher.get(key, value) != value}
    if wrong:
        raise ConfigError(
            "the teacher is not the one whose targets the buffer holds",
            got=", ".join(f"{key} {teacher[key]}" for key in wrong),
            expected=", ".join(f"{key} {value}" for key, value in wrong.items()),
        )


def dataset_manifest(
    buffer: BufferRecord,
    prompts: DatasetManifest,
    sampled: Mapping[Split, Sequence[SampledRecord]],
) -> DatasetManifest:
    """The manifest of sampled shards. Where the text comes from is told by that of the dataset of the prompts."""
    files = {split: tuple(record.entry for record in found) for split, found in sampled.items()}
    config = prompts.config | {
        "seq_len": buffer.seq_len,
        "max_doc_tokens": buffer.seq_len,
        "pack": PackConfig().resolved(),
    }
    return DatasetManifest(
        format_version=FORMAT_VERSION,
        dataset_id=buffer.dataset_id,
        fingerprint=dataset_fingerprint(buffer.dataset_id, buffer.seq_len, files),
        seq_len=buffer.seq_len,
        git_sha=git_sha(),
        config=config,
        config_hash=sha256_bytes(canonical_json(config)),
        tokenizer=TokenizerInfo(),
        renderer_version=prompts.renderer_version,
        sources=prompts.sources,
        split_rule=prompts.split_rule,
        counts={
            split: sum((record.row_counts for record in found), RowCounts()).of_split(
                buffer.seq_len
            )
            for split, found in sampled.items()
        },
        rejects={},
        truncated={},
        rollouts=RolloutsInfo(
            prompts=prompts.fingerprint,
            identity=buffer.identity,
            files={split: tuple(r.rollouts for r in found) for split, found in sampled.items()},
            counts={
                split: functools.reduce(SampledCounts.merged, (r.counts for r in found))
                for split, found in sampled.items()
                if found
            },
        ),
        files=files,
    )


def _target_manifest(
    buffer: BufferRecord,
    dataset: DatasetManifest,
    teacher: dict[str, Any],
    scored: Mapping[Split, Sequence[ScoredRecord]],
) -> TargetManifest:
    assert dataset.rollouts is not None, "a buffer's manifest has rollouts"
    first = scored["train"][0]
    modes = sorted({mode for counts in dataset.rollouts.counts.values() for mode in counts.modes})
    return TargetManifest(
        format_version=FORMAT_VERSION,
        codec_version=CODEC_VERSION,
        target_id=first.target_id,
        dataset_fingerprint=dataset.fingerprint,
        teacher=teacher,
        slug=buffer.slug,
        engine={**teacher.get("engine", {}), **teacher.get("weights", {})},
        mode={"system": teacher.get("system"), "reasoning": ", ".join(modes)},
        temperature=1.0,
        threshold=buffer.threshold,
        tokenizer=TokenizerInfo(),
        alignment={},
        id_order_sha256=first.id_order_sha256,
        selection=Selection().resolved(),
        canary=teacher.get("canary", {}),
        self_noise={},
        logprobs={split: tuple(r.logprobs for r in found) for split, found in scored.items()},
        **shard_facts(scored),
    )
