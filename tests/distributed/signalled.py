"""`vpmoe-train opd CONFIG KEY=VALUE...` that is told to end as it begins to sample for the evaluation of a step.

Usage: signalled.py STEP opd CONFIG ...
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _install(step: int) -> None:
    from trainer.opd.produce import Producer

    sample = Producer.held_out

    def held_out(self: Producer, version: int, *rest: Any) -> Any:
        if version == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, version, *rest)

    Producer.held_out = held_out  # type: ignore[method-assign]


if __name__ == "__main__":
    _install(int(sys.argv[1]))
    from trainer.cli import main

    main(sys.argv[2:])
