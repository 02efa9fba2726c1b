"""The bars of the step's picture from results."""

from __future__ import annotations

import pytest

from benchmarks.step_picture import bars


def test_bars_hold_phases_without_their_sum_and_kernels_of_all_layers() -> None:
    one = {"tokens_a_step": 4096, "seconds": {"forward": 1.0, "backward": 2.0, "step": 3.1}}
    two = {"tokens_a_step": 4096, "seconds": {"forward": 0.5, "backward": 1.0, "step": 1.6}}
    of_layer = {"forward": {"classes": {"experts": 300.0}}, "backward": {"classes": {"other": 5.0}}}
    got = bars(one, two, {"layers": 8, "one GPU": of_layer})
    assert list(got.values()) == [
        {"forward": 1000.0, "backward": 2000.0},
        {"forward": 500.0, "backward": 1000.0},
        {"experts": pytest.approx(2.4)},
        {"other": pytest.approx(0.04)},
    ]
    assert next(iter(got)) == "phases of a step of 4,096 tokens, one GPU"


def test_results_that_are_there_are_drawn(tmp_path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")
    from benchmarks import step_picture

    monkeypatch.setattr("sys.argv", ["step_picture", "--out", str(tmp_path / "step.png")])
    step_picture.main()
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
