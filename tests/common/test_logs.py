"""Progress without a terminal: plain lines, the last one always."""

from __future__ import annotations

import logging

import pytest

from common import logs


def test_last_line_is_written_and_counts_earlier_work(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        logs.progress("score", total=100, unit="rows", done=40) as bar,
    ):
        bar.advance(30)
        bar.advance(30)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("score 100/100 rows (100 %)")


def test_only_rank_zero_speaks_below_warnings() -> None:
    root = logging.getLogger()
    saved = root.level, root.handlers[:]
    try:
        logs.setup(rank=0)
        assert root.isEnabledFor(logging.INFO)
        assert not logging.getLogger("httpx").isEnabledFor(logging.INFO)
        logs.setup(rank=3)
        assert not root.isEnabledFor(logging.INFO) and root.isEnabledFor(logging.WARNING)
    finally:
        root.setLevel(saved[0])
        root.handlers[:] = saved[1]
