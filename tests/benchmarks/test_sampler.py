"""The sampler's benchmark runs and its figures fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_it_runs_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "sampler.json"
    command = [sys.executable, "-m", "benchmarks.sampler", "--device", "cpu", "--slots", "4"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (of_slots,) = json.loads(out.read_text())["by_slots"].values()
    figures = of_slots["eager"]
    assert 0 < figures["occupied"] <= 1 and 0 < figures["prefill_share"] < 1
    assert figures["tokens_per_sec"] > figures["rollouts_per_sec"] > 0
