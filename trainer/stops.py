"""Stops between two steps, made by every rank alike: the state is that of the last finished step and can be kept."""

from __future__ import annotations

from typing import Self

from common.errors import VpmoeError


class RunStopped(VpmoeError):
    """Every rank raises it at the same place; weights, optimizer and stream are those of the last finished step."""

    collective = True
    worth_keeping = True  # False: what a checkpoint would hold is damaged

    def __init__(self, what: str, *, got: str = "", remedy: str = "") -> None:
        self._parts = {"got": got} if got else {}
        super().__init__(what, **self._parts, remedy=remedy or None)

    def at(self, kept: str) -> Self:
        """The same stop, told with what it left."""
        remedy = f"{kept}; {self.remedy}" if self.remedy else kept
        VpmoeError.__init__(self, self.what, **self._parts, remedy=remedy)
        return self


class DataStopped(RunStopped):
    """A rank's rows do not come, or cannot be read."""


class SignalledStop(RunStopped):
    """Someone asked for an end: SIGTERM, SIGINT, SIGHUP or SIGUSR1 to any rank."""
