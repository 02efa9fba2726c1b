"""A child process that is killed just before its n-th rename: what is renamed into place is there, nothing else."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable


def run_killed(work: Callable[[], object], kill_at: int | None) -> int:
    """Exit code of a fork that does `work`: 0 when it came to its end, -SIGKILL when it was killed. None: it is not."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    real, calls = os.replace, 0

    def replace(*names: str) -> None:
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*names)

    os.replace = replace
    work()
    os._exit(0)
