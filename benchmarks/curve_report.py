"""The report of benchmarks/kd_curve.py: one JSON with curves and checks, its picture and its tables in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.curve_data import STUDENT_DATA, seen
from benchmarks.curve_runs import SLUG, evaluations, order_hash, overall
from common.config import load_config
from datastore.manifest import load_dataset_manifest, load_target_manifest
from trainer.batch import CLASSES
from trainer.config import KDConfig
from trainer.parameters import parameter_counts

ARMS = {"kd": "KD", "ce": "CE alone"}
SPANS = ("reasoning", "final")
QUANTITIES = ("ce", "kl", "teacher_top1")
_COLOURS = {"kd": "#0072B2", "ce": "#D55E00"}


def curves_of(students: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """{arm: {seed: {step: {"ce/reasoning": ..., "ce/all": ...}}}} of finished runs."""
    return {
        arm: {
            str(seed): {
                str(record["step"]): _values(record)
                for record in evaluations(students / f"{arm}-{seed}")
            }
            for seed in seeds
        }
        for arm in ARMS
    }


def _values(record: dict[str, Any]) -> dict[str, float]:
    by_class = {
        f"{quantity}/{name}": record[f"eval/{quantity}/{name}"]
        for quantity in QUANTITIES
        for name in CLASSES
        if f"eval/{quantity}/{name}" in record
    }
    return by_class | {f"{q}/all": overall(record, q) for q in ("ce", "kl")}


def compare(curves: dict[str, Any]) -> dict[str, Any]:
    """What KD gains over CE alone at equal steps, nats, positive where KD is better; and each arm's best valid CE."""
    steps = list(next(iter(curves["kd"].values())))
    names = [f"{q}/{c}" for q in ("ce", "kl") for c in (*CLASSES, "all")]
    gains = {}
    for step in steps:
        gains[step] = {}
        for name in names:
            by_seed = [
                curves["ce"][seed][step][name] - curves["kd"][seed][step][name]
                for seed in curves["kd"]
            ]
            gains[step][name] = {"mean": statistics.mean(by_seed), "least": min(by_seed)}
    best = {}
    for arm, by_seed in curves.items():
        lows = {
            seed: min(curve.items(), key=lambda item: item[1]["ce/all"])
            for seed, curve in by_seed.items()
        }
        best[arm] = {
            "mean": statistics.mean(low["ce/all"] for _, low in lows.values()),
            "by_seed": {seed: {"step": int(step), **low} for seed, (step, low) in lows.items()},
        }
    later = [step for step in steps if int(step)]
    wins = {name: all(gains[s][name]["least"] > 0 for s in later) for name in names}
    last = {name: gains[steps[-1]][name]["least"] > 0 for name in names}
    return {
        "gain_at_equal_steps": gains,
        "best_valid_ce": best,
        "kd_wins_at_every_step_with_every_seed": wins,
        "kd_wins_at_the_last_step_with_every_seed": last,
    }


def checks(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Same tokens for both arms, same valid documents for teacher and students; what each saw, and their sizes.

    Raises ValueError when the arms' tokens or the valid documents differ.
    """
    students = work / "students"
    orders = {s: {a: order_hash(students / f"{a}-{s}") for a in ARMS} for s in seeds}
    if any(len(set(hashes.values())) > 1 for hashes in orders.values()):
        raise ValueError(f"the arms saw other tokens: {orders}")
    config = load_config(KDConfig, students / f"kd-{seeds[0]}" / "config.yaml")
    first = evaluations(students / f"kd-{seeds[0]}")[-1]
    dataset = load_dataset_manifest(work / STUDENT_DATA)
    return {
        "order_sha256": {str(seed): hashes["kd"] for seed, hashes in orders.items()},
        "seen": seen(work),
        "student": parameter_counts(config.student),
        "teacher_valid_nll": {
            **{name: first[f"eval/teacher_nll/{name}"] for name in CLASSES},
            "all": overall(first, "teacher_nll"),
        },
        "valid_positions": {name: first[f"eval/positions/{name}"] for name in CLASSES},
        "tokens_a_step": config.batch.global_batch_size * dataset.seq_len,
        "epochs": config.steps * config.batch.global_batch_size / dataset.counts["train"].rows,
        "dataset": dataset.fingerprint,
        "counts": {split: counts.resolved() for split, counts in dataset.counts.items()},
        "targets": load_target_manifest(work / STUDENT_DATA, SLUG).target_id,
        "budget": load_target_manifest(work / STUDENT_DATA, SLUG).budget,
    }


def plot(result: dict[str, Any], picture: Path) -> None:
    """Valid CE and KL by span over steps: a thin line a seed, a thick one their mean, the teacher's own NLL dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), dpi=100, sharex=True)
    for row, (quantity, label) in enumerate({"ce": "CE", "kl": "KL to the teacher"}.items()):
        for panel, span in zip(panels[row], SPANS, strict=True):
            lows = [_draw(panel, result["curves"][arm], arm, f"{quantity}/{span}") for arm in ARMS]
            floor = min(low for low, _ in lows)
            top = max(high for _, high in lows)
            if quantity == "ce":
                nll = result["checks"]["teacher_valid_nll"][span]
                panel.axhline(nll, color="black", ls="--", lw=1, label="the teacher itself")
                floor = min(floor, nll)
            panel.set_ylim(floor - 0.05 * (top - floor), top)
            panel.set_title(f"{label}, {span}", fontsize=11)
            panel.grid(color="#dddddd", linewidth=0.6)
    for panel in panels[:, 0]:
        panel.set_ylabel("nats, valid split")
    for panel in panels[1]:
        panel.set_xlabel("optimizer steps")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=10, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def _draw(panel: Any, by_seed: dict[str, Any], arm: str, name: str) -> tuple[float, float]:
    """Returns the range of the lines from the second evaluation after the start on, which the panel shows."""
    steps = [int(step) for step in next(iter(by_seed.values()))]
    lines = [[values[name] for values in curve.values()] for curve in by_seed.values()]
    for line in lines:
        panel.plot(steps, line, color=_COLOURS[arm], lw=0.7, alpha=0.6)
    mean = [statistics.mean(column) for column in zip(*lines, strict=True)]
    panel.plot(steps, mean, color=_COLOURS[arm], lw=2.4, label=f"{ARMS[arm]} (mean, seeds thin)")
    shown = [value for line in lines for value in line[min(2, len(line) - 1) :]]
    return min(shown), max(shown)


def markdown(result: dict[str, Any]) -> str:
    """The tables for docs/numerics.md."""
    found, checked = result["comparison"], result["checks"]
    steps = list(found["gain_at_equal_steps"])
    rows = [
        "| step | CE, KD | CE, CE alone | least gain of a seed | KL, KD | KL, CE alone | least gain of a seed |"
    ]
    rows += ["|---|---|---|---|---|---|---|"]
    for step in steps:
        cells = [step]
        for quantity in ("ce/all", "kl/all"):
            cells += [f"{_mean(result['curves'][arm], step, quantity):.3f}" for arm in ARMS]
            cells += [f"{found['gain_at_equal_steps'][step][quantity]['least']:.3f}"]
        rows.append(f"| {' | '.join(cells)} |")
    best = {arm: found["best_valid_ce"][arm]["mean"] for arm in ARMS}
    nll = checked["teacher_valid_nll"]
    totals = {
        "teacher": result["teacher"]["parameters"]["total"],
        "students": checked["student"]["total"],
    }
    sizes = {
        who: f"{total:,} | {checked['seen'][who]['documents']:,} ({checked['seen'][who]['tokens']:,})"
        for who, total in totals.items()
    }
    return "\n".join(
        [
            *rows,
            "",
            "| | parameters | train documents (tokens) | valid CE |",
            "|---|---|---|---|",
            f"| teacher | {sizes['teacher']} | {nll['all']:.3f} |",
            f"| student, KD, best of the run | {sizes['students']} | {best['kd']:.3f} |",
            f"| student, CE alone, best of the run | {sizes['students']} | {best['ce']:.3f} |",
            "",
            f"The {checked['seen']['valid_documents_of_both']} valid documents are the same for all.",
        ]
    )


def _mean(by_seed: dict[str, Any], step: str, name: str) -> float:
    return statistics.mean(curve[step][name] for curve in by_seed.values())
