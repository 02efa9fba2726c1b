"""The MoE benchmark compares like with like: Megatron's own layer, with the same weights, gives the same outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_megatrons_layer_gives_the_same_outputs(tmp_path: Path) -> None:
    out = tmp_path / "moe_layer.json"
    command = [sys.executable, "-m", "benchmarks.moe_layer", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    (figures,) = json.loads(out.read_text())["by_tokens"].values()
    assert figures["relative_gap_of_outputs"] < 1e-6
    assert figures["ours"]["wall_ms"] > 0 and figures["megatron"]["wall_ms"] > 0
