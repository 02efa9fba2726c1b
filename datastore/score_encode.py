"""What the engine returns to blobs, in processes of their own: the engine's process hands memory over and goes on.

Measured by benchmarks/score.py: together they must take at least 3 times what an engine gives (docs/numerics.md).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import EngineError, FormatError
from common.files import write_json
from datastore import alignment, budget
from datastore.codec import encode_blob
from datastore.id_order import IdOrder
from datastore.manifest import QuarantinedDocument
from datastore.packed import unpack
from datastore.reader import Dataset
from datastore.score_job import (
    ShardJob,
    ShardRecord,
    require_lease,
    selected_documents,
)
from datastore.score_pieces import (
    Piece,
    PieceHeader,
    piece_path,
    plan,
    read_piece,
    write_piece,
)
from datastore.shard import write_target_shard
from datastore.target import content_key, entropy_sums, row_target, target_positions
from datastore.types import DocTarget, PackedRow, SparseTarget
from datastore.workers import end_with_parent

# Targets of each piece that the alignment gate judges: a wrong setup stops within minutes, not at the end of the run.
# Few are left to the closing gate, as the standard error of few could refuse good ones.
GATE_POSITIONS = 2048
# Two, so that the last piece of a shard does not wait behind the one before it.
ENCODERS = 2


@dataclass(frozen=True, eq=False)
class SharedRows:
    """Packed rows of a piece's selected documents in memory that another process can map; None: quarantined.

    A memfd of the engine's process, not /dev/shm, which containers keep at 64 MB: a piece is about 1 GB. Pickling it
    would hold the engine's interpreter for a second. It lives as long as `file` is open in the process that made it.
    """

    pid: int
    file: int
    width: int
    lengths: tuple[int | None, ...]

    @classmethod
    def of(cls, packed: Sequence[np.ndarray | None]) -> SharedRows:
        """Copy packed rows int32 [P, C] into shared memory; `close` frees it."""
        lengths = tuple(None if rows is None else len(rows) for rows in packed)
        width = next((rows.shape[1] for rows in packed if rows is not None), 0)
        shared = cls(os.getpid(), os.memfd_create("vpmoe-piece"), width, lengths)
        if shared.total:
            os.ftruncate(shared.file, shared.total * width * 4)
            with mmap.mmap(shared.file, 0) as memory:
                rows_PC = np.frombuffer(memory, np.int32).reshape(shared.total, width)
                start = 0
                for rows in packed:
                    if rows is not None:
                        rows_PC[start : start + len(rows)] = rows
                        start += len(rows)
                del rows_PC
        return shared

    @property
    def total(self) -> int:
        return sum(length or 0 for length in self.lengths)

    def read(self) -> list[np.ndarray | None]:
        """The packed rows, in the other process."""
        rows_PC = np.empty((0, self.width), np.int32)
        if self.total:
            path = f"/proc/{self.pid}/fd/{self.file}"
            rows_PC = np.memmap(path, np.int32, mode="r", shape=(self.total, self.width))
        ends = np.cumsum([length or 0 for length in self.lengths]).tolist()
        return [
            None if length is None else rows_PC[end - length : end]
            for length, end in zip(self.lengths, ends, strict=True)
        ]

    def close(self) -> None:
        os.close(self.file)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PieceJob:
    """A scored piece on its way to its file. mark: of the lease. quarantine: selected document -> reason."""

    job: ShardJob
    mark: str
    piece: Piece
    packed: SharedRows
    quarantine: dict[int, str]
    seconds: float


def document_target(
    packed_PC: np.ndarray, tokens_T: np.ndarray, spans_T: np.ndarray, threshold: float
) -> DocTarget:
    """The targets of a document from its packed rows."""
    target = unpack(packed_PC, target_positions(tokens_T, spans_T), threshold)
    return DocTarget(
        content_key=content_key(tokens_T),
        target=target,
        entropy_sums=entropy_sums(target.entropy_P, tokens_T, spans_T, target.positions_P),
    )


def encode_row(
    row: PackedRow, packed: list[np.ndarray | None], *, threshold: float, order: IdOrder
) -> tuple[bytes | None, list[DocTarget | None], budget.BudgetSums]:
    """Blob, targets and budget sums of a row from the packed rows of its documents (None: not scored).

    Raises EngineError when they are no targets of a distribution.
    """
    documents: list[DocTarget | None] = [
        None
        if packed_PC is None
        else document_target(packed_PC, row.tokens_T[where], row.spans_T[where], threshold)
        for packed_PC, where in zip(packed, row.documents(), strict=True)
    ]
    if all(document is None for document in documents):
        return None, documents, budget.BudgetSums()
    try:
        blob = encode_blob(documents, row, order)
        return blob, documents, budget.row_budget(documents, blob, row, order)
    except FormatError as error:
        raise EngineError(
            f"the engine returned targets that cannot be: {error}",
            remedy="another attention_backend or moe_backend in the teacher's config",
        ) from error


def encode_piece(task: PieceJob) -> None:
    """Write the file of a scored piece. Raises EngineError (targets that cannot be), AlignmentError (the gate)."""
    job, piece = task.job, task.piece
    content, gate = _Content(), _Gate()
    packed, numbers = iter(task.packed.read()), iter(range(piece.documents))
    rows = _dataset(job).shard_rows(job.split, job.shard, piece.first, piece.end)
    for index, row in enumerate(rows, piece.first):
        chosen = {document: next(packed) for document in selected_documents(job.run, row)}
        blob, documents, sums = encode_row(
            row,
            [chosen.get(document) for document in range(len(row.doc_ids))],
            threshold=job.run.teacher.threshold,
            order=_order(job),
        )
        content.add(row, blob, documents, sums)
        gate.see(row, documents)
        for document in chosen:
            if reason := task.quarantine.get(next(numbers)):
                content.quarantine.append(_quarantined(job, index, row, document, reason))
    gate.judge()
    require_lease(job, task.mark)
    write_piece(piece_path(job, piece), content.header(task.seconds), content.blobs)


def _quarantined(
    job: ShardJob, index: int, row: PackedRow, document: int, reason: str
) -> QuarantinedDocument:
    return QuarantinedDocument(
        split=job.split,
        shard=job.shard,
        row=index,
        document=document,
        doc_id=row.doc_ids[document].hex(),
        reason=reason,
    )


@dataclass
class _Content:
    """What a piece holds, row by row."""

    blobs: list[bytes | None] = field(default_factory=list)
    row_hashes: list[int] = field(default_factory=list)
    quarantine: list[QuarantinedDocument] = field(default_factory=list)
    documents: int = 0
    tokens: int = 0
    sums: budget.BudgetSums = field(default_factory=budget.BudgetSums)

    def add(
        self,
        row: PackedRow,
        blob: bytes | None,
        documents: list[DocTarget | None],
        sums: budget.BudgetSums,
    ) -> None:
        is_scored_D = np.array([document is not None for document in documents])
        self.blobs.append(blob)
        self.row_hashes.append(row.row_hash)
        self.documents += int(is_scored_D.sum())
        self.tokens += int(np.diff(row.doc_ends_D, prepend=0)[is_scored_D].sum())
        self.sums = self.sums.merged(sums)

    def header(self, seconds: float) -> PieceHeader:
        return PieceHeader(
            row_hashes=tuple(self.row_hashes),
            sizes=tuple(None if blob is None else len(blob) for blob in self.blobs),
            documents=self.documents,
            tokens=self.tokens,
            sums=self.sums,
            quarantine=tuple(self.quarantine),
            seconds=seconds,
        )


@dataclass
class _Gate:
    """The alignment gate over the first targets of a piece."""

    pairs: list[tuple[np.ndarray, SparseTarget]] = field(default_factory=list)
    positions: int = 0

    def see(self, row: PackedRow, documents: list[DocTarget | None]) -> None:
        if self.positions < GATE_POSITIONS and any(document is not None for document in documents):
            target = row_target(documents, row)
            self.pairs.append((row.tokens_T, target))
            self.positions += len(target.positions_P)

    def judge(self) -> None:
        """AlignmentError unless the targets fit their tokens; too few are left to the gate at the end of the stage."""
        if self.positions >= GATE_POSITIONS:
            alignment.require_aligned(alignment.alignment_report(self.pairs))


def assemble(job: ShardJob, mark: str, device: str) -> ShardRecord:
    """The target shard from its finished pieces, and its record, written last.

    Raises AlignmentError when the shard breaks the teacher's limits, FormatError when a piece is damaged.
    """
    pieces, headers = plan(job, _dataset(job)), list[PieceHeader]()

    def blobs() -> Iterator[tuple[int, bytes | None]]:
        for piece in pieces:
            path = piece_path(job, piece)
            if (found := read_piece(path)) is None:
                raise FormatError(
                    f"{path} is damaged", remedy="delete it and run the same command again"
                )
            headers.append(found[0])
            yield from zip(found[0].row_hashes, found[1], strict=True)

    require_lease(job, mark)
    entry = write_target_shard(
        job.run.folder,
        blobs(),
        target_id=job.run.target_id,
        split=job.split,
        shard=job.shard,
    )
    record = ShardRecord(
        entry=entry,
        documents=sum(header.documents for header in headers),
        tokens=sum(header.tokens for header in headers),
        row_tokens=sum(piece.tokens for piece in pieces),
        sums=functools.reduce(
            budget.BudgetSums.merged, (h.sums for h in headers), budget.BudgetSums()
        ),
        quarantine=tuple(document for header in headers for document in header.quarantine),
        seconds=sum(header.seconds for header in headers),
        devices=job.run.teacher.engine.tensor_parallel_size,
        device=device,
    )
    budget.require_shard_budget(record.sums, job.run.teacher.limits, entry.name)
    require_lease(job, mark)
    write_json(job.record_path, record.resolved())
    return record


class Encoders:
    """The encoder processes of one engine. They end with the process that made them."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop_reader, self._stop_writer = context.Pipe(duplex=False)
        self._pool = ProcessPoolExecutor(ENCODERS, context, end_with_parent, (self._stop_reader,))
        self._senders = ThreadPoolExecutor(ENCODERS)

    def encode(
        self,
        job: ShardJob,
        mark: str,
        piece: Piece,
        packed: Sequence[np.ndarray | None],
        quarantine: dict[int, str],
        seconds: float,
    ) -> Future[None]:
        """Encode a piece in the background: a thread copies its rows, which releases the interpreter, and waits.

        packed: of its selected documents in order, None for those in `quarantine` (document -> reason).
        """

        def send() -> None:
            with contextlib.closing(SharedRows.of(packed)) as shared:
                task = PieceJob(
                    job=job,
                    mark=mark,
                    piece=piece,
                    packed=shared,
                    quarantine=quarantine,
                    seconds=seconds,
                )
                self._pool.submit(encode_piece, task).result()

        return self._senders.submit(send)

    def assemble(self, job: ShardJob, mark: str, device: str) -> Future[ShardRecord]:
        """Write a shard in the background; all its pieces must be finished."""
        return self._pool.submit(assemble, job, mark, device)

    def close(self) -> None:
        self._senders.shutdown(cancel_futures=True)
        self._pool.shutdown(cancel_futures=True)
        self._stop_writer.close()
        self._stop_reader.close()


@functools.lru_cache(maxsize=1)
def _open(path: Path) -> Dataset:
    return Dataset.open(path, check_sizes=False)


def _dataset(job: ShardJob) -> Dataset:
    return _open(job.run.dataset)


@functools.lru_cache(maxsize=1)
def _read_order(folder: Path, sha256: str) -> IdOrder:
    return IdOrder.read(folder, sha256)


def _order(job: ShardJob) -> IdOrder:
    return _read_order(job.run.folder, job.run.order_sha256)
