"""An engine for the score stage that starts at once: targets of a made-up teacher, and documents that harm it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datastore.packed import SCALARS, most_heads, packed_width, unpack
from datastore.prompt import ScoreRequest
from datastore.score_job import ScoreRun
from datastore.score_worker import StartEngine
from datastore.types import SparseTarget
from tests.datastore.conftest import document_target

# impossible: targets whose masses do not add up, which only the encoder sees. encoders once: kills its encoders.
Harm = Literal["exit", "exit once", "raise", "nan", "impossible", "encoders once"]


class MadeEngine:
    """Logs the content key of each document that it scores; harm: content key -> what that document does to it."""

    def __init__(self, run: ScoreRun, log: Path, harm: dict[int, Harm], delay_sec: float) -> None:
        self._threshold, self._log, self._harm = run.teacher.threshold, log, harm
        self._delay_sec = delay_sec

    def score(self, requests: list[ScoreRequest]) -> list[SparseTarget]:
        return [self._target(request) for request in requests]

    def score_packed(self, requests: list[ScoreRequest]) -> list[np.ndarray]:
        time.sleep(self._delay_sec)
        packed = [pack(self._target(request)) for request in requests]
        for rows_PC, request in zip(packed, requests, strict=True):
            self._suffer(self._harm.get(request.content_key), rows_PC)
        with open(self._log, "a") as log:
            log.writelines(f"{request.content_key}\n" for request in requests)
        return packed

    def _suffer(self, harm: Harm | None, rows_PC: np.ndarray) -> None:
        if harm in ("exit once", "encoders once"):
            if self._log.with_suffix(".once").exists():
                return
            self._log.with_suffix(".once").touch()
        if harm in ("exit", "exit once"):
            os._exit(9)
        if harm == "encoders once":
            for child in multiprocessing.active_children():
                child.kill()
                child.join()
        if harm == "raise":
            raise MemoryError("CUDA out of memory")
        if harm == "nan":
            rows_PC[len(rows_PC) // 2, 2] = np.float32(np.nan).view(np.int32)
        if harm == "impossible":
            rows_PC[len(rows_PC) // 2, 3] = np.float32(0.0).view(np.int32)

    def _target(self, request: ScoreRequest) -> SparseTarget:
        spans_T = np.zeros(len(request.prompt_T), np.uint8)
        spans_T[request.positions_P + 1] = 1
        return document_target(request.prompt_T, spans_T).target

    def close(self) -> None:
        pass


def pack(target: SparseTarget) -> np.ndarray:
    """Packed rows of a target (datastore/reduce.py), checked against `unpack`."""
    most = most_heads(target.threshold)
    packed_PC = np.zeros((len(target.positions_P), packed_width(target.threshold)), np.int32)
    floats_PC = packed_PC.view(np.float32)
    for row, (start, end) in enumerate(
        zip(target.offsets_P1[:-1], target.offsets_P1[1:], strict=True)
    ):
        heads = target.num_head_P[row]
        packed_PC[row, :2] = heads, end - start - heads
        packed_PC[row, SCALARS : SCALARS + end - start] = target.ids_E[start:end]
        weights = target.weights_E[start : start + heads].astype(np.float64)
        floats_PC[row, SCALARS + most + 1 :][:heads] = np.log(weights)
    floats_PC[:, 2], floats_PC[:, 3] = target.realised_logprob_P, target.log_tail_mass_P
    floats_PC[:, 4] = target.entropy_P
    assert np.array_equal(
        unpack(packed_PC, target.positions_P, target.threshold).ids_E, target.ids_E
    )
    return packed_PC


def starting(log: Path, harm: dict[int, Harm] | None = None, delay_sec: float = 0.0) -> StartEngine:
    """What `score_dataset` takes as `start`."""
    return functools.partial(_start, log=log, harm=harm or {}, delay_sec=delay_sec)


def _start(
    run: ScoreRun, *, log: Path, harm: dict[int, Harm], delay_sec: float
) -> tuple[MadeEngine, dict[str, Any]]:
    report = {"engine": {"device": "cpu"}, "canary": {"skipped": "made engine"}}
    return MadeEngine(run, log, harm, delay_sec), report
