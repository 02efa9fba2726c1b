"""The optimizer benchmark: the full student's matrices, and every way at a tiny size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.optimizer import floor, main, matrix_shapes
from common.config import load_config
from trainer.config import KDConfig

CONFIG = Path("configs/base.yaml")


def test_matrices_embeddings_and_vectors_are_the_student() -> None:
    student = load_config(KDConfig, CONFIG, ()).student
    shapes = matrix_shapes(student)
    stacked = sum(count * shape[0] for shape, count in shapes.items() if len(shape) == 3)
    assert stacked == 40_448
    assert stacked + sum(count for shape, count in shapes.items() if len(shape) == 2) == 41_147
    biases = 80 * (1536 + 1024) + (128 + 1024) + 79 * (512 + 1024 + 256 + 256 * (128 + 1024))
    others = 164_864 + 20_480 + 640 + 64 + 79
    weights = floor(shapes, bandwidth=1.0, flops=1.0)["weights"]
    assert weights + 2 * 205_914_112 + biases + others == 6_021_784_719


def test_every_way_is_measured(tmp_path, monkeypatch) -> None:
    out = tmp_path / "optimizer.json"
    tiny = "layers=4 experts=8 hidden=32 heads=2 head_dim=16 shared_width=24 expert_width=8"
    overrides = [f"student.{change}" for change in f"{tiny} vocab_size=64".split()]
    options = ["--device", "cpu", "--repeats", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["optimizer", str(CONFIG), *overrides, *options])
    main()
    report = json.loads(out.read_text())
    for way in ("loop", "adamw_rest", "normuon chunk 33554432", "adamw_all"):
        assert report[way]["ms"] > 0
    matrices = (
        3 * 2 * 8 + 4 + 1 + 6 * 3 + 2 + 3 * 3
    )  # experts, projections, QKV, TPA, dense, shared and router
    assert report["loop"]["of_matrices"] == report["loop"]["measured_matrices"] == matrices
