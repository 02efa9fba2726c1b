"""A made-up teacher served until SIGTERM: `python -m tests.trainer.opd.line_server PORT`; see served.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from common.config import load_config, named_config
from datastore.serve import TOKEN_VARIABLE, listening, read_token, run_server
from datastore.serve_app import ServeConfig, make_app
from datastore.serve_engine import ScoringQueue
from tests.trainer.opd.bigram_engine import BigramEngine
from tests.trainer.opd.served import NAME, bigram_teacher, identity, teacher_config


def main() -> None:
    parser = argparse.ArgumentParser(epilog=f"{TOKEN_VARIABLE}: the token, if any.")
    parser.add_argument("port", type=int)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--name", default=NAME)
    parser.add_argument("--weights", default="first", help="another word is another teacher")
    parser.add_argument("--seconds", type=float, default=0.0, help="of a step of the engine")
    given = parser.parse_args()
    teacher = teacher_config(given.name)
    config = load_config(ServeConfig, named_config("serve", "default"), ("drain_sec=5",))
    engine = BigramEngine(bigram_teacher(given.dataset), seconds=given.seconds)
    with listening("127.0.0.1", given.port) as sock:
        start = lambda: (engine, identity(teacher, given.weights))  # noqa: E731
        queue = ScoringQueue(start, queue_tokens=config.queue_tokens, batch_tokens=4096)
        run_server(
            queue, make_app(queue, teacher, config, read_token(None)), sock, config.drain_sec
        )


if __name__ == "__main__":
    main()
