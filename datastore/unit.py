"""One unit of a build, as a worker does it: a range of source rows to one train shard and one valid fragment.

A fragment holds the unit's valid documents; the fragments of all units are packed together at the end.
"""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import tokenizer
from common.config import Config
from common.files import atomic_writer, canonical_json, sha256_file, write_json
from datastore.harmony import Reject, RenderConfig, Renderer
from datastore.manifest import SpanTokens, SplitCounts
from datastore.packing import PackConfig, pack_documents
from datastore.shard import FileEntry, write_token_shard
from datastore.source import Segment, read_segment
from datastore.split import split_of
from datastore.types import PackedRow, RenderedDoc

WORK = ".work"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Unit `unit` of a dataset in the making, whose train shard has the same number. folder: the dataset's."""

    folder: Path
    dataset_id: str
    unit: int

    @property
    def record_path(self) -> Path:
        return self.folder / WORK / f"unit-{self.unit:05d}.json"

    @property
    def source_rows(self) -> int:
        """Rows of the input, the measure of the work."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitJob(Unit):
    """Everything that a worker needs to make a unit of a build.

    repeats: numbers of the rows, counted from the unit's first, whose synth_id an earlier row of the input has.
    """

    segments: tuple[Segment, ...]
    repeats: frozenset[int]
    render: RenderConfig
    pack: PackConfig
    valid_bound: int
    seq_len: int
    max_doc_tokens: int

    @property
    def fragment_path(self) -> Path:
        return self.folder / WORK / f"unit-{self.unit:05d}.valid.npz"

    @property
    def source_rows(self) -> int:
        return sum(segment.rows for segment in self.segments)


class RowCounts(Config):
    """Sums over packed rows; padding is in none of the spans."""

    rows: int = 0
    documents: int = 0
    ignored: int = 0
    reasoning: int = 0
    final: int = 0
    control_targets: int = 0

    def __add__(self, other: RowCounts) -> RowCounts:
        mine, theirs = self.model_dump(), other.model_dump()
        return RowCounts(**{key: mine[key] + theirs[key] for key in mine})

    def of_split(self, seq_len: int) -> SplitCounts:
        """The same as a manifest states it."""
        tokens = self.ignored + self.reasoning + self.final
        positions = self.rows * seq_len
        return SplitCounts(
            rows=self.rows,
            documents=self.documents,
            tokens=tokens,
            tokens_by_span=SpanTokens(
                ignored=self.ignored, reasoning=self.reasoning, final=self.final
            ),
            control_targets=self.control_targets,
            padding=positions - tokens,
            fill=tokens / positions if positions else 0.0,
        )


class UnitRecord(Config):
    """What a finished unit left on disk; written after its files.

    work_files: sha256 of those in .work, by their names. rejects, truncated: documents by reason.
    """

    dataset_id: str
    unit: int
    source_rows: int
    train: FileEntry
    train_counts: RowCounts
    work_files: dict[str, str]
    rejects: dict[str, int]
    truncated: dict[str, int]


class RowCounter:
    """Passes packed rows on and counts them."""

    def __init__(self) -> None:
        self._rows = self._documents = self._control_targets = 0
        self._by_span = np.zeros(3, dtype=np.int64)

    def count(self, rows: Iterable[PackedRow]) -> Iterator[PackedRow]:
        for row in rows:
            used = slice(0, int(row.doc_ends_D[-1]))
            tokens_T, spans_T = row.tokens_T[used], row.spans_T[used]
            self._rows += 1
            self._documents += len(row.doc_ids)
            self._by_span += np.bincount(spans_T, minlength=3)
            is_control = tokens_T >= tokenizer.FIRST_CONTROL_ID
            self._control_targets += int(np.count_nonzero(spans_T[is_control]))
            yield row

    @property
    def counts(self) -> RowCounts:
        ignored, reasoning, final = self._by_span.tolist()
        return RowCounts(
            rows=self._rows,
            documents=self._documents,
            ignored=ignored,
            reasoning=reasoning,
            final=final,
            control_targets=self._control_targets,
        )


def build_unit(job: UnitJob) -> UnitRecord:
    """Render, split, pack and write one unit; the same job always writes the same bytes."""
    rejects: collections.Counter[str] = collections.Counter()
    truncated: collections.Counter[str] = collections.Counter()
    valid: list[RenderedDoc] = []
    counter = RowCounter()
    documents = _train_documents(job, valid, rejects, truncated)
    rows = pack_documents(documents, seq_len=job.seq_len, config=job.pack)
    entry = write_token_shard(
        job.folder,
        counter.count(rows),
        dataset_id=job.dataset_id,
        split="train",
        shard=job.unit,
        seq_len=job.seq_len,
    )
    write_fragment(job.fragment_path, valid)
    record = UnitRecord(
        dataset_id=job.dataset_id,
        unit=job.unit,
        source_rows=job.source_rows,
        train=entry,
        train_counts=counter.counts,
        work_files={job.fragment_path.name: sha256_file(job.fragment_path)},
        rejects=dict(rejects),
        truncated=dict(truncated),
    )
    write_json(job.record_path, record.resolved())
    return record


def finished_unit(job: Unit) -> UnitRecord | None:
    """The record of a unit that an earlier run finished, if its files are still exactly those; else None."""
    try:
        record = UnitRecord.model_validate_json(job.record_path.read_bytes())
        is_whole = (
            record.dataset_id == job.dataset_id
            and sha256_file(job.folder / record.train.name) == record.train.sha256
            and all(
                sha256_file(job.folder / WORK / name) == sha256
                for name, sha256 in record.work_files.items()
            )
        )
    except (FileNotFoundError, ValueError):
        return None
    return record if is_whole else None


def write_fragment(path: Path, documents: list[RenderedDoc]) -> None:
    """Store documents as flat arrays; read_fragment gives them back."""
    doc_ids = np.frombuffer(b"".join(d.doc_id for d in documents), dtype=np.uint8)
    labels = canonical_json([[d.language, d.exercise] for d in documents])
    with atomic_writer(path) as handle:
        np.savez(
            handle,
            lengths_D=np.array([len(d.tokens_T) for d in documents], dtype=np.int64),
            tokens_T=np.concatenate([np.zeros(0, np.int32), *(d.tokens_T for d in documents)]),
            spans_T=np.concatenate([np.zeros(0, np.uint8), *(d.spans_T for d in documents)]),
            doc_ids=doc_ids.reshape(-1, 16),
            labels=np.frombuffer(labels, dtype=np.uint8),
        )


def read_fragment(path: Path) -> Iterator[RenderedDoc]:
    """The documents of a fragment, in the order they were written."""
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["lengths_D"])[:-1]
        tokens, spans = np.split(arrays["tokens_T"], ends), np.split(arrays["spans_T"], ends)
        doc_ids = arrays["doc_ids"]
        labels = json.loads(arrays["labels"].tobytes())
    # Of no documents np.split makes one empty part.
    for number, (doc_id, (language, exercise)) in enumerate(zip(doc_ids, labels, strict=True)):
        yield RenderedDoc(
            doc_id=doc_id.tobytes(),
            tokens_T=tokens[number],
            spans_T=spans[number],
            language=language,
            exercise=exercise,
        )


def _train_documents(
    job: UnitJob,
    valid: list[RenderedDoc],
    rejects: collections.Counter[str],
    truncated: collections.Counter[str],
) -> Iterator[RenderedDoc]:
    """The train documents of a unit in source order; valid ones and counts go to the collections given."""
    renderer = Renderer(job.render)
    rows = itertools.chain.from_iterable(map(read_segment, job.segments))
    for number, row in enumerate(rows):
        if number in job.repeats:
            rejects["duplicate_id"] += 1
            continue
        document = renderer.render(row, job.max_doc_tokens)
        if isinstance(document, Reject):
            rejects[document.reason] += 1
            continue
        truncated["analysis"] += document.analysis_cut > 0
        truncated["user"] += document.user_cut > 0
        if split_of(row.synth_id, job.valid_bound) == "valid":
            valid.append(document)
        else:
            yield document
