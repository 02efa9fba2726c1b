"""Shares of a pass from its kernels' times."""

from __future__ import annotations

import pytest

from benchmarks.timeline import shares


def test_what_runs_alone_between_ranks_and_what_idles() -> None:
    events = [
        ("_up_kernel", 0.0, 10.0),
        ("Memcpy PtoP (Device -> Device)", 8.0, 14.0),
        ("c10d::symmetric_memory::barrier_kernel", 13.0, 16.0),
        ("_down_kernel", 20.0, 30.0),
        ("choose_kernel", 22.0, 28.0),
    ]
    got = shares(reversed(events), layers=2)
    assert got["span"] == 15.0 and got["busy"] == 10.0
    assert got["exposed"] == 3.0 and got["idle"] == 2.0
    assert got["classes"]["experts"] == 10.0 and got["classes"]["routing"] == 3.0


def test_kernels_beside_each_other_count_once() -> None:
    got = shares([("a", 0.0, 4.0), ("b", 1.0, 2.0), ("c", 3.0, 5.0)], layers=1)
    assert got["busy"] == pytest.approx(5.0) and got["idle"] == pytest.approx(0.0)
