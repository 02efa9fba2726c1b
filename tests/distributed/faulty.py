"""`vpmoe-train kd CONFIG KEY=VALUE...` whose reader goes wrong on one rank at one row, as storage does.

Usage: faulty.py FAULT SPLIT RANK NTH kd CONFIG ... ; the NTH read of a row of SPLIT on RANK goes wrong:
  stall    it never returns
  nan      the row's targets hold a NaN, which no stored file can (its hash is right, its numbers are checked)
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
from typing import Any


def _install(fault: str, split: str, rank: int, nth: int) -> None:
    from trainer.data import RunData

    if int(os.environ.get("RANK", "0")) != rank:
        return
    read, counted = RunData.batch, [0]

    def batch(self: RunData, of_split: str, rows: Any, *rest: Any, **named: Any) -> Any:
        made = read(self, of_split, rows, *rest, **named)
        before = counted[0]
        counted[0] += len(rows) if of_split == split else 0
        if not before < nth <= counted[0]:
            return made
        if fault == "stall":
            threading.Event().wait()
        return dataclasses.replace(made, target_weights_BTK=made.target_weights_BTK * float("nan"))

    RunData.batch = batch  # type: ignore[method-assign]


if __name__ == "__main__":
    _install(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    from trainer.cli import main

    main(sys.argv[5:])
