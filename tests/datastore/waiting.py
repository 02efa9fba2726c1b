"""Waiting for what another thread or process does."""

from __future__ import annotations

import threading
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: int = 30) -> None:
    """Return as soon as `condition` holds; AssertionError after `seconds`."""
    waiting = threading.Event()
    for _ in range(100 * seconds):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it never came true")
