"""A scoring server without vLLM: the teacher in transformers behind the HTTP of `vpmoe-data serve`, for small teachers.

    python -m benchmarks.torch_serve --model runs/kd_curve/teacher --name curve --port 8765 --device cuda

On one GPU beside a small student, where vLLM is not there or cannot load the teacher. Protocol, queue, identity and
canary are the server's own (datastore/serve.py); the engine is that of benchmarks/torch_teacher.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.torch_teacher import TorchScorer
from common import logs
from common.config import load_config, named_config
from common.errors import EngineError
from datastore.canary import require_canary
from datastore.packed import has_nan
from datastore.prompt import ScoreRequest
from datastore.serve import listening, run_server, server_identity
from datastore.serve_app import ServeConfig, make_app
from datastore.serve_engine import ScoringQueue
from datastore.teacher import TeacherConfig, weights_identity

ON_CUDA = (
    "engine.device=cuda",
    "engine.kv_cache_gib=null",
    "engine.gpu_memory_utilization=0.5",
    "engine.vocab_chunk_tokens=2048",
    "engine.max_num_batched_tokens=16384",
)


class TorchEngine:
    """What the server's queue drives: every `step` scores all documents that have come since the last."""

    def __init__(self, scorer: TorchScorer) -> None:
        self._scorer = scorer
        self._held: dict[str, ScoreRequest] = {}

    def add(self, request_id: str, request: ScoreRequest) -> None:
        """Take a document."""
        self._held[request_id] = request

    def step(self) -> list[tuple[str, np.ndarray | EngineError]]:
        """Packed rows of each, or why there are none."""
        held, self._held = self._held, {}
        scored = self._scorer.score_packed(list(held.values()))
        return [
            (name, EngineError("the teacher gives NaN") if has_nan(packed_PC) else packed_PC)
            for name, packed_PC in zip(held, scored, strict=True)
        ]

    def abort(self, request_id: str) -> None:
        """Forget a document."""
        self._held.pop(request_id, None)

    def close(self) -> None:
        """Nothing runs beside it."""


def small_teacher(name: str, model: Path, device: str, *overrides: str) -> TeacherConfig:
    """The config of a teacher of the size of `tiny` or somewhat larger, in the folder `model`."""
    where = ON_CUDA if device == "cuda" else ()
    values = (f"name={name}", f"model={model}", *where, *overrides)
    return load_config(TeacherConfig, named_config("teacher", "tiny"), values)


def start(teacher: TeacherConfig, model: Path) -> tuple[TorchEngine, dict[str, Any]]:
    """The engine, once it gives its canary's values, and the server's identity."""
    weights = weights_identity(teacher, model)
    scorer = TorchScorer(teacher, model)
    canary = require_canary(scorer, teacher, model, weights=weights)
    identity = server_identity(
        teacher, model, weights=weights, engine=scorer.identity(), canary=canary
    )
    return TorchEngine(scorer), identity


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--model", type=click.Path(path_type=Path), required=True)
@click.option("--name", required=True, help="Its slug.")
@click.option("--port", type=int, required=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda")
def main(model: Path, name: str, port: int, device: str) -> None:
    """Serve on 127.0.0.1 until SIGTERM."""
    logs.setup()
    teacher = small_teacher(name, model, device)
    config = load_config(ServeConfig, named_config("serve", "default"))
    with listening("127.0.0.1", port) as sock:
        queue = ScoringQueue(
            lambda: start(teacher, model),
            queue_tokens=config.queue_tokens,
            batch_tokens=teacher.engine.max_num_batched_tokens,
        )
        run_server(queue, make_app(queue, teacher, config, None), sock, config.drain_sec)


if __name__ == "__main__":
    main()
