"""Logging for people: plain lines on stderr; a progress bar only on a terminal and only on rank 0."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

_LINE_EVERY_SEC = 15.0


def setup(rank: int = 0) -> None:
    """Configure the root logger once: rank 0 speaks from INFO, the others from WARNING."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it tells every request


class Progress(Protocol):
    """What long work reports to."""

    def advance(self, amount: int) -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Progress of `total` units with rate and time left: a bar on a terminal, a line now and then elsewhere.

    `done` units were finished by an earlier run and do not count in the rate.
    """
    if sys.stderr.isatty():
        with _bar(title, total, unit, done) as bar:
            yield bar
    else:
        yield _Lines(title, total, unit, done)


class _Lines:
    def __init__(self, title: str, total: int, unit: str, done: int) -> None:
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self.start_done, self.start = done, time.monotonic()
        self.last = self.start

    def advance(self, amount: int) -> None:
        self.done += amount
        now = time.monotonic()
        if now - self.last < _LINE_EVERY_SEC and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.start_done) / max(now - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        logging.getLogger(__name__).info(
            "%s %s/%s %s (%.0f %%), %.4g %s/s, %.0f s left",
            *(self.title, f"{self.done:,}", f"{self.total:,}", self.unit),
            *(100 * self.done / max(self.total, 1), rate, self.unit, left),
        )


@contextlib.contextmanager
def _bar(title: str, total: int, unit: str, done: int) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit=unit, unit_scale=True, initial=done) as bar:

        class Bar:
            def advance(self, amount: int) -> None:
                bar.update(amount)

        yield Bar()
