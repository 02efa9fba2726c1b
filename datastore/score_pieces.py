"""A shard in pieces: consecutive rows that an engine scores in one go, with nothing else, so that its batches repeat.

The state of an unfinished shard lies in targets/<teacher>/.work/<split>-<shard>, all of it durable:

    lock                          held by the worker that scores the shard; its content names the holder
    plan.json                     the pieces: rows with about engine.documents_per_call selected documents
    piece-00012.bin               a finished piece: its blobs
    piece-00012.json              the tries of an unfinished one, counted before an engine sees it
    piece-00012-00064-00128.npz   its documents 64..127, scored apart after they failed together with others

A piece that fails MAX_TRIES times is halved, again and again, down to one document, which is quarantined.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from pydantic import Field

from common.config import Config
from common.files import atomic_writer, sweep_temporaries, write_json
from datastore.budget import BudgetSums
from datastore.manifest import QuarantinedDocument
from datastore.reader import Dataset
from datastore.score_job import (
    ShardJob,
    require_few_quarantined,
    selected_documents,
)
from datastore.types import PackedRow

# Whole pieces and single documents get three tries, as a death may be chance. A part in between gets one: to halve it
# wrongly costs a smaller batch, to try it again a start of the engine.
MAX_TRIES = 3
_DIED = "the process died"
_PLAN = "plan.json"
_HEAD = struct.Struct("<4sQI")
_MAGIC = b"VPP1"


class Piece(Config):
    """Rows first..end-1 of a shard. documents: the selected ones in them. tokens: of all their documents."""

    number: int
    first: int
    end: int
    documents: int
    tokens: int


class Part(Config):
    """Selected documents first..end-1 of a piece, how often they were tried together, and how that ended last."""

    first: int
    end: int
    tries: int = 0
    error: str = ""


class Tries(Config):
    """An unfinished piece. parts: still to score. done: scored apart, (first, end). quarantine: document -> reason."""

    parts: tuple[Part, ...]
    done: tuple[tuple[int, int], ...] = ()
    quarantine: dict[int, str] = Field(default_factory=dict)

    def replaced(self, part: Part, by: tuple[Part, ...]) -> Tries:
        """The same with other parts in the place of `part`."""
        parts = tuple(new for old in self.parts for new in (by if old == part else (old,)))
        return self.model_copy(update={"parts": parts})

    def settled(self, documents: int) -> Tries:
        """Parts out of tries in halves, single documents out of tries in quarantine."""
        result = self
        for part in self.parts:
            size = part.end - part.first
            limit = MAX_TRIES if size in (1, documents) else 1
            if part.tries < limit:
                continue
            if size == 1:
                reason = f"{part.error}, {part.tries} times"
                result = result.replaced(part, ()).model_copy(
                    update={"quarantine": result.quarantine | {part.first: reason}}
                )
            else:
                middle = part.first + size // 2
                halves = (
                    Part(first=part.first, end=middle),
                    Part(first=middle, end=part.end),
                )
                result = result.replaced(part, halves)
        return result


class PieceHeader(Config):
    """What a finished piece holds beside its blobs; sizes: of each row's blob, None where no document is scored."""

    row_hashes: tuple[int, ...]
    sizes: tuple[int | None, ...]
    documents: int
    tokens: int
    sums: BudgetSums
    quarantine: tuple[QuarantinedDocument, ...]
    seconds: float


def piece_path(job: ShardJob, piece: Piece) -> Path:
    """The file of a finished piece."""
    return job.folder / f"piece-{piece.number:05d}.bin"


def write_piece(path: Path, header: PieceHeader, blobs: list[bytes | None]) -> None:
    """Write a finished piece, atomically and with a hash of its content."""
    text = header.model_dump_json().encode()
    content = b"".join([text, *(blob for blob in blobs if blob is not None)])
    with atomic_writer(path) as handle:
        handle.write(_HEAD.pack(_MAGIC, xxhash.xxh3_64_intdigest(content), len(text)))
        handle.write(content)


def read_piece(path: Path) -> tuple[PieceHeader, list[bytes | None]] | None:
    """A finished piece; None when there is none or its bytes are not those that were written."""
    try:
        raw = path.read_bytes()
        magic, digest, size = _HEAD.unpack_from(raw)
    except (FileNotFoundError, struct.error):
        return None
    content = memoryview(raw)[_HEAD.size :]
    if magic != _MAGIC or xxhash.xxh3_64_intdigest(content) != digest:
        return None
    header = PieceHeader.model_validate_json(bytes(content[:size]))
    ends = np.cumsum([size, *(blob or 0 for blob in header.sizes)]).tolist()
    blobs = [
        None if length is None else bytes(content[end - length : end])
        for length, end in zip(header.sizes, ends[1:], strict=True)
    ]
    return header, blobs


class ShardWork:
    """The pieces of a shard, for the worker that holds it."""

    def __init__(self, job: ShardJob, dataset: Dataset) -> None:
        sweep_temporaries(job.folder)
        self.job, self._dataset = job, dataset
        self.pieces = plan(job, dataset)
        self._tries: dict[int, Tries] = {}
        self._quarantined = 0
        for piece in self.pieces:
            if finished := read_piece(piece_path(job, piece)):
                self._quarantined += len(finished[0].quarantine)
            else:
                self._tries[piece.number] = self._read(piece).settled(piece.documents)
        self.require_few_quarantined(0)

    def rows(self, piece: Piece) -> list[PackedRow]:
        """The rows of a piece."""
        job = self.job
        return list(self._dataset.shard_rows(job.split, job.shard, piece.first, piece.end))

    def next(self) -> tuple[Piece, Part | None] | None:
        """What to do next: a part to score, a piece whose parts are all scored (None), or nothing more.

        What failed before comes last and larger parts first, so that a poison document delays no other.
        """
        for number, tries in self._tries.items():
            if not tries.parts:
                return self.pieces[number], None
        found = [(number, part) for number, tries in self._tries.items() for part in tries.parts]
        if not found:
            return None
        number, part = min(
            found, key=lambda c: (c[1].tries, c[1].first - c[1].end, c[0], c[1].first)
        )
        return self.pieces[number], part

    def begin(self, piece: Piece, part: Part) -> Part:
        """Count a try of `part`, durably, before an engine sees it; returns it as counted."""
        begun = part.model_copy(update={"tries": part.tries + 1, "error": _DIED})
        self._write(piece, self._tries[piece.number].replaced(part, (begun,)))
        return begun

    def fail(self, piece: Piece, part: Part, error: str) -> None:
        """Note how a try ended, and halve or quarantine what is out of tries."""
        noted = self._tries[piece.number].replaced(
            part, (part.model_copy(update={"error": error}),)
        )
        self._write(piece, noted.settled(piece.documents))

    def keep(self, piece: Piece, part: Part, packed: list[np.ndarray]) -> None:
        """Store the packed rows of a part of a piece; the whole piece goes to the encoder instead."""
        with atomic_writer(self._part_path(piece, part.first, part.end)) as handle:
            np.savez(handle, **{str(part.first + i): rows for i, rows in enumerate(packed)})
        tries = self._tries[piece.number].replaced(part, ())
        done = (*tries.done, (part.first, part.end))
        self._write(piece, tries.model_copy(update={"done": done}))

    def gather(self, piece: Piece) -> tuple[list[np.ndarray | None], dict[int, str]]:
        """The packed rows of a piece that was scored in parts, and the reasons of its quarantined documents."""
        tries = self._tries[piece.number]
        packed: list[np.ndarray | None] = [None] * piece.documents
        for first, end in tries.done:
            with np.load(self._part_path(piece, first, end)) as arrays:
                for name in arrays.files:
                    packed[int(name)] = arrays[name]
        return packed, tries.quarantine

    def hand_over(self, piece: Piece) -> None:
        """An encoder has the piece now: it is not offered again."""
        del self._tries[piece.number]

    def note_lost(self, piece: Piece, error: str) -> None:
        """The encoder could not make a piece of what the engine returned: that try failed."""
        tries = self._read(piece)
        parts = tuple(part.model_copy(update={"error": error}) for part in tries.parts)
        self._write(piece, tries.model_copy(update={"parts": parts}).settled(piece.documents))

    def require_few_quarantined(self, more: int) -> None:
        """QuarantineError when the shard has too many quarantined documents, `more` new ones among them."""
        held = sum(len(tries.quarantine) for tries in self._tries.values())
        documents = sum(piece.documents for piece in self.pieces)
        require_few_quarantined(self._quarantined + held + more, documents, self.job.name)

    def _read(self, piece: Piece) -> Tries:
        path = _tries_path(self.job, piece)
        if not path.exists():
            return Tries(parts=(Part(first=0, end=piece.documents),))
        return Tries.model_validate_json(path.read_bytes())

    def _write(self, piece: Piece, tries: Tries) -> None:
        write_json(_tries_path(self.job, piece), tries.resolved())
        self._tries[piece.number] = tries
        self.require_few_quarantined(0)

    def _part_path(self, piece: Piece, first: int, end: int) -> Path:
        return self.job.folder / f"piece-{piece.number:05d}-{first:05d}-{end:05d}.npz"


def plan(job: ShardJob, dataset: Dataset) -> list[Piece]:
    """The pieces of a shard, as a worker cut them when it was begun."""
    path = job.folder / _PLAN
    if not path.exists():
        write_json(path, [piece.resolved() for piece in _cut(job, dataset)])
    return _read_plan(path)


def _read_plan(path: Path) -> list[Piece]:
    return [Piece.model_validate(piece) for piece in json.loads(path.read_bytes())]


def _cut(job: ShardJob, dataset: Dataset) -> Iterator[Piece]:
    full = job.run.teacher.engine.documents_per_call
    number = first = documents = tokens = end = 0
    for end, row in enumerate(dataset.shard_rows(job.split, job.shard), start=1):
        documents += len(selected_documents(job.run, row))
        tokens += int(row.doc_ends_D[-1])
        if documents >= full:
            yield Piece(number=number, first=first, end=end, documents=documents, tokens=tokens)
            number, first, documents, tokens = number + 1, end, 0, 0
    if first < end:
        yield Piece(number=number, first=first, end=end, documents=documents, tokens=tokens)


def scored_tokens(job: ShardJob) -> int:
    """Tokens of an unfinished shard whose piece is finished, for the progress display."""
    path = job.folder / _PLAN
    if not path.exists():
        return 0
    return sum(piece.tokens for piece in _read_plan(path) if piece_path(job, piece).exists())


def forgive(job: ShardJob) -> None:
    """Take back the tries of what was under way: its engines were ended from outside, which is no fault of theirs."""
    for path in job.folder.glob("piece-*.json"):
        tries = Tries.model_validate_json(path.read_bytes())
        parts = tuple(
            part.model_copy(update={"tries": part.tries - (part.error == _DIED)})
            for part in tries.parts
        )
        write_json(path, tries.model_copy(update={"parts": parts}).resolved())


def finished_parts(job: ShardJob) -> int:
    """Files of scored pieces and parts: it grows with every success."""
    return sum(path.suffix in (".bin", ".npz") for path in job.folder.glob("piece-*"))


def _tries_path(job: ShardJob, piece: Piece) -> Path:
    return job.folder / f"piece-{piece.number:05d}.json"
