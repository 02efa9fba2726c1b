"""Signals that ask a run to end, taken even while a collective blocks the main thread and with it Python's handlers."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from types import FrameType

ASKS_FOR_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# torchrun passes on what it gets, and a scheduler may reach both: the same request comes twice within moments.
_SAME_REQUEST_SEC = 3.0


class Signals:
    """The first request in `first`; `again` once another came `_SAME_REQUEST_SEC` later.

    The C handler writes the number into a pipe, which `wait` reads on any thread. To be made on the main thread.
    """

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.again = False
        self._since = 0.0
        self._read_fd, write_fd = os.pipe()
        os.set_blocking(self._read_fd, False)
        os.set_blocking(write_fd, False)
        self._write_fd = write_fd
        self._fd_before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        # Under nohup SIGHUP is ignored, and stays so.
        self._before = {
            number: signal.signal(number, _only_wake)
            for number in ASKS_FOR_END
            if signal.getsignal(number) is not signal.SIG_IGN
        }

    def wait(self, seconds: float) -> None:
        """Take what comes; back after `seconds`, or at once when something came."""
        select.select([self._read_fd], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            for number in os.read(self._read_fd, 64):
                if number in ASKS_FOR_END:
                    self._take(signal.Signals(number))

    def restore(self) -> None:
        """Put back the handlers from before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._read_fd)
        os.close(self._write_fd)

    def _take(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self._since = number, now
        elif now - self._since > _SAME_REQUEST_SEC:
            self.again = True


def _only_wake(number: int, frame: FrameType | None) -> None:
    """The pipe has the number already."""
