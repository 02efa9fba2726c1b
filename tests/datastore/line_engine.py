"""A teacher that can be computed by hand, behind the interface of the scoring server's engine.

At position p of a document it gives one entry, the id one above the token there, and values that are p's fractions.
Run as a program it is served until SIGTERM, for tests of a whole process:
`python -m tests.datastore.line_engine TOKEN_FILE SECONDS_A_STEP`.
"""

from __future__ import annotations

import sys
import threading
import time

import numpy as np

from common.config import load_config, named_config
from common.errors import EngineError
from datastore.prompt import ScoreRequest
from datastore.teacher import TeacherConfig

THRESHOLD = 0.02
MOST = 50
FATAL, POISON = 13, 14
IDENTITY = {"protocol": 1, "teacher": "line", "teacher_id": "ab" * 32, "threshold": THRESHOLD}


def teacher(*overrides: str) -> TeacherConfig:
    return load_config(TeacherConfig, named_config("teacher", "tiny"), overrides)


def packed_rows(request: ScoreRequest) -> np.ndarray:
    """Packed rows as datastore/reduce.py lays them out."""
    rows = np.zeros((len(request.positions_P), 5 + (MOST + 1) + MOST), np.int32)
    for row, position in zip(rows, request.positions_P.tolist(), strict=True):
        row[0] = 1
        row[2:5] = np.array([-position / 8, -np.inf, position / 16], np.float32).view(np.int32)
        row[5] = request.prompt_T[position - request.shift] + 1
        row[5 + MOST + 1] = np.float32(-1 / (1 + position)).view(np.int32)
    return rows


class LineEngine:
    """Takes documents first in, first out; a step finishes those that begin within `batch_tokens`.

    open: steps wait while it is cleared. added, aborted: every request id, in order. fatal, poison: tokens that end the
    engine, and that fail their document.
    """

    fatal, poison = FATAL, POISON

    def __init__(self, batch_tokens: int = 64, seconds: float = 0.0) -> None:
        self.batch_tokens, self.seconds = batch_tokens, seconds
        self.open = threading.Event()
        self.open.set()
        self.added: list[str] = []
        self.aborted: list[str] = []
        self.closed = False
        self._inside: dict[str, ScoreRequest] = {}

    def add(self, request_id: str, request: ScoreRequest) -> None:
        self.added.append(request_id)
        self._inside[request_id] = request

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        self._inside.pop(request_id, None)

    def step(self) -> list[tuple[str, np.ndarray | EngineError]]:
        assert self.open.wait(60)
        time.sleep(self.seconds)
        finished: list[tuple[str, np.ndarray | EngineError]] = []
        room = self.batch_tokens
        for request_id, request in list(self._inside.items()):
            if room <= 0:
                break
            room -= len(request.prompt_T)
            del self._inside[request_id]
            if self.fatal in request.prompt_T:
                raise RuntimeError("device lost")
            poison = self.poison in request.prompt_T
            fault = EngineError("NaN in a document")
            finished.append((request_id, fault if poison else self.packed(request)))
        return finished

    def packed(self, request: ScoreRequest) -> np.ndarray:
        return packed_rows(request)

    def close(self) -> None:
        self.closed = True


def main() -> None:
    from pathlib import Path

    import click

    from common.cli import Program
    from datastore.serve import listening, read_token, run_server
    from datastore.serve_app import ServeConfig, make_app
    from datastore.serve_engine import ScoringQueue

    @click.group(cls=Program)
    def program() -> None: ...

    @program.command()
    @click.argument("token_file", type=click.Path(path_type=Path))
    @click.argument("seconds", type=float)
    def serve(token_file: Path, seconds: float) -> None:
        engine = LineEngine(seconds=seconds)
        config = load_config(ServeConfig, named_config("serve", "default"), ("drain_sec=5",))
        with listening("127.0.0.1", 0) as sock:
            print(sock.getsockname()[1], flush=True)
            start = lambda: (engine, IDENTITY)  # noqa: E731
            queue = ScoringQueue(start, queue_tokens=1000, batch_tokens=128)
            app = make_app(queue, teacher(), config, read_token(token_file))
            run_server(queue, app, sock, config.drain_sec)

    program.main(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
