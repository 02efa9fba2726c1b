"""Teachers that a TeacherLink accepts, for tests of the OPD loop: in this process, or in one that can be killed.

`served_teacher` serves a BigramEngine in a thread. `ServerProcess` is the same as a process of its own:
`python -m tests.trainer.opd.line_server PORT [--dataset FOLDER] [--name NAME] [--weights WORD] [--seconds S]`.
The teacher's name is `bigram`, its threshold 0.02; it was made from the train split of a dataset, or from
`handmade_documents`.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import httpx

from common.files import sha256_bytes
from datastore.reader import Dataset
from datastore.serve import server_identity
from datastore.teacher import TeacherConfig
from tests.datastore import line_engine
from tests.datastore.conftest import document
from tests.datastore.served import Served, serving
from tests.datastore.waiting import wait_until
from tests.trainer.opd.bigram_engine import BigramEngine, BigramTeacher

NAME = "bigram"


def handmade_documents(count: int = 64) -> list[Any]:
    """The documents that the teacher is made from where there is no dataset."""
    return [document(number) for number in range(count)]


def bigram_teacher(dataset: Path | None = None) -> BigramTeacher:
    """The teacher of a dataset's train split, or of `handmade_documents`."""
    if dataset is None:
        return BigramTeacher((d.tokens_T, d.spans_T) for d in handmade_documents())
    data = Dataset.open(dataset)
    rows = [data.row("train", index) for index in range(data.num_rows("train"))]
    return BigramTeacher(
        (row.tokens_T[where], row.spans_T[where]) for row in rows for where in row.documents()
    )


def teacher_config(name: str = NAME, *overrides: str) -> TeacherConfig:
    return line_engine.teacher(f"name={name}", *overrides)


def identity(config: TeacherConfig, weights: str = "first", **changes: Any) -> dict[str, Any]:
    """What the server states. weights: any word; another word is another teacher."""
    files = [{"name": "made-up", "bytes": 1, "sha256": sha256_bytes(weights.encode())}]
    figures = {"mean_realised": 0.0, "max_realised": 0.0, "mean_entropy": 0.0, "top1": 0.0}
    return {
        **server_identity(
            config,
            Path("made-up"),
            weights={"config_sha256": "0" * 64, "weights": files},
            engine={"versions": {}, "device": "cpu"},
            canary={"documents": 9, "positions": 400, **figures, "top1_positions": 300},
        ),
        **changes,
    }


@contextlib.contextmanager
def served_teacher(
    *,
    port: int = 0,
    token: str | None = None,
    dataset: Path | None = None,
    overrides: tuple[str, ...] = (),
    queue_tokens: int = 100_000,
    limits: tuple[str, ...] = (),
    weights: str = "first",
    **changes: Any,
) -> Iterator[Served]:
    """The teacher in a thread. changes: keys of its identity that are stated otherwise."""
    config = teacher_config(NAME, *overrides)
    with serving(
        BigramEngine(bigram_teacher(dataset)),
        config,
        identity(config, weights, **changes),
        port=port,
        token=token,
        queue_tokens=queue_tokens,
        limits=limits,
    ) as served:
        yield served


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class ServerProcess:
    """The teacher as a process on one port, started and killed as often as a test wants."""

    def __init__(self, *arguments: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._arguments = arguments
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self, *more: str) -> None:
        """Start it, and wait until it is ready."""
        module = "tests.trainer.opd.line_server"
        command = [sys.executable, "-m", module, str(self.port), *self._arguments, *more]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
        wait_until(self._is_ready, 120)

    def kill(self) -> None:
        """SIGKILL; nothing when it does not run."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM: it answers what is in flight and ends."""
        self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered. `kill` ends it all the same."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def metric(self, name: str) -> float:
        """A figure of /metrics (docs/serve.md)."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30, trust_env=False).text.splitlines()
        (value,) = [line.split()[-1] for line in lines if line.startswith(f"{name} ")]
        return float(value)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(30)
            self._process = None

    def _is_ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "the server ended"
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False
