"""The picture of docs/performance.md: where the time of a step goes on one GPU, and on two with experts spread.

    python -m benchmarks.step_picture
    python -m benchmarks.step_picture --out step.png

From results that are there: phases of student_step-dp1-256-graph.json and -ep2-256-graph.json (student_step.py),
kernels of both passes of timeline.json (timeline.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.kernel_classes import draw_bar
from benchmarks.student_step import phases_ms
from common.config import PROJECT_ROOT

RESULTS = Path(__file__).parent / "results"
PICTURE = PROJECT_ROOT / "docs" / "img" / "step_h200.png"


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    one, two = (_read(f"student_step-{name}-256-graph.json")["timing"] for name in ("dp1", "ep2"))
    title = f"one H200: {one['tokens_per_sec_a_device']:,.0f} tokens/s, MFU {one['mfu']:.1%}"
    draw_bar(bars(one, two, _read("timeline.json")), arguments.out, title)


def bars(one: dict[str, Any], two: dict[str, Any], passes: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of each part by bar: timings of one GPU and of two, and the passes of a few recorded layers."""
    layers = passes["layers"]
    of_kernels = {
        f"{name} kernels of {layers} layers, one GPU": {
            kind: us * layers / 1e3 for kind, us in passes["one GPU"][name]["classes"].items()
        }
        for name in ("forward", "backward")
    }
    what = f"phases of a step of {one['tokens_a_step']:,} tokens"
    both = {f"{what}, one GPU": phases_ms(one), f"{what}, two, experts spread": phases_ms(two)}
    return both | of_kernels


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_bytes())


if __name__ == "__main__":
    main()
