"""Does distillation bring the student nearer to the teacher than cross entropy on the same tokens does?

    make demo && python -m benchmarks.kd_vs_ce

Trains the embedded default with kd_weight 1 and with 0, everything else equal: same rows in the same order, same
initial weights a seed, same steps. Early on a student learns little more than which tokens are frequent, and both
ways are equal; they part as it nears the teacher. Writes KL and CE by span on the whole valid split, at equal
steps, to benchmarks/results/kd_vs_ce.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.report import header
from common.config import PROJECT_ROOT
from common.files import write_json
from datastore.manifest import load_dataset_manifest, load_target_manifest

RESULTS = Path(__file__).parent / "results"
CLASSES = ("reasoning", "final", "control")


def train(
    folder: Path, *, seed: int, steps: int, every: int, overrides: list[str]
) -> list[dict[str, Any]]:
    """One run through the command line; its evaluations in order."""
    command = [
        str(Path(sys.executable).parent / "vpmoe-train"),
        *("kd", "configs/demo.yaml", f"run={folder}"),
        *(f"seed={seed}", f"steps={steps}", f"checkpoint.every={steps}"),
        *(f"eval.every={every}", "eval.rows=null", *overrides),
    ]
    subprocess.run(command, cwd=PROJECT_ROOT, check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if "eval/kl/final" in (record := json.loads(line))]


def curve(records: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """KL and CE by class, for each step."""
    return {
        str(record["step"]): {
            f"{quantity}/{name}": record[f"eval/{quantity}/{name}"]
            for quantity in ("kl", "ce")
            for name in CLASSES
        }
        for record in records
    }


def compare(curves: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    """Mean over seeds at the last step, for both ways, and the least advantage of any seed."""
    last = str(steps)
    result: dict[str, Any] = {}
    for name in CLASSES:
        kd, ce = (
            [runs[last][f"kl/{name}"] for runs in curves[way].values()] for way in ("kd", "ce")
        )
        result[name] = {
            "kl_with_kd": statistics.mean(kd),
            "kl_with_ce_alone": statistics.mean(ce),
            "least_advantage_of_a_seed": min(c - k for k, c in zip(kd, ce, strict=True)),
        }
    return result


def main() -> None:
    """Run both ways for each seed and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--dataset", type=Path, default=PROJECT_ROOT / "data" / "demo")
    arguments = parser.parse_args()
    dataset = load_dataset_manifest(arguments.dataset)
    targets = load_target_manifest(arguments.dataset, "tiny")
    start, curves = time.monotonic(), {}
    batch = f"batch={{global_batch_size: {arguments.rows}, micro_batch_size: {arguments.rows}}}"
    common = [f"dataset={arguments.dataset.resolve()}", batch]
    ways = {
        way: [*common, f"loss.kd_weight={weight}"] for way, weight in {"kd": 1, "ce": 0}.items()
    }
    with tempfile.TemporaryDirectory() as work:
        for way, overrides in ways.items():
            curves[way] = {}
            for seed in arguments.seeds:
                folder = Path(work) / f"{way}-{seed}"
                cut = {"seed": seed, "steps": arguments.steps, "every": arguments.every}
                curves[way][str(seed)] = curve(train(folder, **cut, overrides=overrides))
                shutil.rmtree(folder)
    result = {
        "config": "configs/demo.yaml",
        "dataset": dataset.fingerprint,
        "targets": targets.target_id,
        "steps": arguments.steps,
        "rows_of_a_step": arguments.rows,
        "at_the_last_step": compare(curves, arguments.steps),
        "curves": curves,
        "seconds": time.monotonic() - start,
    } | header(("torch", "megatron-core"))
    write_json(RESULTS / "kd_vs_ce.json", result)
    print(json.dumps(result["at_the_last_step"], indent=2))


if __name__ == "__main__":
    main()
