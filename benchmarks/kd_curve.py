"""A training curve on real SYNTH rows: KD from a teacher that is better, against CE alone, on the same tokens.

The teacher trains on all documents, the students on a part of them (curve_data).

    python -m benchmarks.kd_curve --work runs/kd_curve prepare
    python -m benchmarks.kd_curve --work runs/kd_curve teacher
    python -m benchmarks.kd_curve --work runs/kd_curve score
    python -m benchmarks.kd_curve --work runs/kd_curve students
    python -m benchmarks.kd_curve --work runs/kd_curve report
    python -m benchmarks.kd_curve plot

Each stage goes on where it was stopped. `prepare` needs the rows of VPMOE_SYNTH; `teacher`, `score` and `students`
are for one GPU (`--device cpu` and small numbers try them anywhere) and need no vLLM: the teacher is trained here
(curve_teacher) and scores in transformers (torch_teacher). `noise` measures the noise floor of the same student and
what a kill adds to it; `pack` leaves datasets and targets as a tar in parts.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import click

from benchmarks.curve_data import (
    STUDENT_DATA,
    TEACHER_DATA,
    first_rows,
    prepare_datasets,
)
from benchmarks.curve_report import ARMS, checks, compare, curves_of, markdown, plot
from benchmarks.curve_runs import LIMITS, PROFILES, SLUG, run_jobs, student_job
from benchmarks.report import header
from benchmarks.torch_serve import small_teacher
from common import logs
from common.config import PROJECT_ROOT
from common.files import write_json
from datastore.teacher import TeacherConfig

RESULTS = Path(__file__).parent / "results"
PICTURE = PROJECT_ROOT / "docs" / "img" / "kd_curve.png"
PART_BYTES = 15 << 20


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--work", type=click.Path(path_type=Path), default=PROJECT_ROOT / "runs/kd_curve")
@click.option("--device", type=click.Choice(sorted(PROFILES)), default="cuda")
@click.pass_context
def main(context: click.Context, work: Path, device: str) -> None:
    """KD against CE alone on real SYNTH rows, stage by stage."""
    logs.setup()
    context.obj = {"work": work.resolve(), "device": device}


@main.command()
@click.option("--valid-fraction", default=0.12)
@click.option("--student-share", default=0.2, help="Of the train documents, for the students.")
@click.option("--rows", type=int, default=None, help="Only so many rows, for trials.")
@click.pass_obj
def prepare(
    given: dict[str, Any], valid_fraction: float, student_share: float, rows: int | None
) -> None:
    """Build both datasets from the real rows: the teacher's and, with fewer train documents, the students'."""
    work, sources = given["work"], sorted(Path(os.environ["VPMOE_SYNTH"]).glob("synth_*.parquet"))
    if not sources:
        raise click.ClickException("VPMOE_SYNTH names a folder without synth_*.parquet")
    if rows is not None:
        sources = [first_rows(work, sources[0], rows)]
    shares = {"valid_fraction": valid_fraction, "student_share": student_share}
    for name, manifest in prepare_datasets(work, sources, **shares).items():
        for split, counts in manifest.counts.items():
            click.echo(f"{name} {split}: {counts.resolved()}")


@main.command()
@click.option("--steps", default=260)
@click.option("--hidden", default=512)
@click.option("--layers", default=6)
@click.option("--experts", default=4)
@click.option("--lr", default=1e-3, help="AdamW: embeddings, lm_head, norms, biases, sinks.")
@click.option("--normuon-lr", default=1e-2, help="NorMuon: the layers' matrices.")
@click.option("--dropouts", default="0.1,0.2,0.3", help="One teacher each; the best is kept.")
@click.option("--weight-decay", default=0.1)
@click.option("--batch-documents", default=16)
@click.option("--every", default=10, help="Steps between evaluations.")
@click.option("--patience", default=4, help="Evaluations without a better one, then it stops.")
@click.option("--max-sec", default=45.0, help="Of each teacher.")
@click.pass_obj
def teacher(
    given: dict[str, Any], hidden: int, layers: int, experts: int, dropouts: str, **plan: Any
) -> None:
    """Train teachers of one size and keep the best weights by valid CE."""
    from benchmarks.curve_teacher import TeacherPlan, train_curve_teacher
    from demo.tiny_teacher import Shape

    folder = given["work"] / "teacher"
    if (folder / "canary.json").is_file():
        click.echo(f"{folder} is there")
        return
    heads = max(2, hidden // 64)
    size = {"heads": heads, "kv_heads": heads // 2, "head_dim": hidden // heads}
    shape = Shape(hidden=hidden, layers=layers, experts=experts, **size)
    plans = [
        TeacherPlan(shape=shape, device=given["device"], dropout=float(dropout), **plan)
        for dropout in dropouts.split(",")
    ]
    made = train_curve_teacher(folder, given["work"] / TEACHER_DATA, plans)
    click.echo(f"valid CE {made['valid_ce']:.4f}, step {made['best_step']}: {made['plan']}")


@main.command()
@click.pass_obj
def score(given: dict[str, Any]) -> None:
    """Score both splits of the students' dataset with the teacher, through the real codec, gates and manifest."""
    from benchmarks.torch_teacher import start_engine
    from datastore.score import score_dataset

    manifest = score_dataset(
        given["work"] / STUDENT_DATA, _teacher_config(given), engines=1, start=start_engine
    )
    click.echo(json.dumps({"counts": manifest.counts, "budget": manifest.budget}, indent=2))


def _teacher_config(given: dict[str, Any]) -> TeacherConfig:
    limits = (f"limits.{limit}" for limit in LIMITS)
    return small_teacher(SLUG, given["work"] / "teacher", given["device"], *limits)


@main.command()
@click.option("--steps", default=120)
@click.option("--every", default=10, help="Steps between evaluations.")
@click.option("--eval-rows", default=24, help="Valid rows: whole micro-batches, one shape.")
@click.option("--seeds", default="0,1,2")
@click.option("--kd-weight", default=1.0, help="Of the KD arm.")
@click.option("--at-once", default=3, help="Runs at a time, over all GPUs.")
@click.option("--limit-sec", default=560.0)
@click.option("--set", "extra", multiple=True, help="KEY=VALUE of every run's config.")
@click.pass_obj
def students(
    given: dict[str, Any],
    steps: int,
    every: int,
    eval_rows: int,
    seeds: str,
    kd_weight: float,
    at_once: int,
    limit_sec: float,
    extra: tuple[str, ...],
) -> None:
    """Train both arms with each seed: the same config but for loss.kd_weight."""
    weights = {"kd": kd_weight, "ce": 0.0}
    fixed = (
        f"steps={steps}",
        f"eval.every={every}",
        f"eval.rows={eval_rows}",
        f"checkpoint.every={steps}",
    )
    names = [(arm, seed) for seed in _numbers(seeds) for arm in ARMS]
    jobs = [
        student_job(
            given["work"],
            f"students/{arm}-{seed}",
            given["device"],
            extra,
            (*fixed, "checkpoint.keep=1", f"seed={seed}", f"loss.kd_weight={weights[arm]}"),
            slot,
        )
        for slot, (arm, seed) in enumerate(names)
    ]
    run_jobs(jobs, given["work"], at_once=at_once, limit_sec=limit_sec)


@main.command()
@click.option("--seeds", default="0,1,2")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "kd_curve.json")
@click.pass_obj
def report(given: dict[str, Any], seeds: str, out: Path) -> None:
    """Curves, checks and the comparison as JSON; prints the tables."""
    work, numbers = given["work"], _numbers(seeds)
    curves = curves_of(work / "students", numbers)
    made = json.loads((work / "teacher" / "provenance.json").read_bytes())
    result = {
        "what": "KD from a trained teacher against CE alone on real SYNTH rows, same tokens; valid split, nats",
        **_where(work / "students" / f"kd-{numbers[0]}", given["device"]),
        "config": (work / "students" / f"kd-{numbers[0]}" / "config.yaml").read_text(),
        "teacher": made,
        "checks": checks(work, numbers),
        "comparison": compare(curves),
        "curves": curves,
    }
    write_json(out, result)
    click.echo(markdown(result))


@main.command("plot")
@click.option("--json", "path", type=click.Path(path_type=Path), default=RESULTS / "kd_curve.json")
@click.option("--picture", type=click.Path(path_type=Path), default=PICTURE)
def plot_command(path: Path, picture: Path) -> None:
    """The picture of a report, and its tables."""
    result = json.loads(path.read_bytes())
    plot(result, picture)
    click.echo(markdown(result))


@main.command()
@click.option("--steps", default=24)
@click.option("--at-once", default=4, help="Runs at a time, over all GPUs.")
@click.option("--limit-sec", default=280.0, help="Of each run.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "resume_cuda.json")
@click.option("--set", "extra", multiple=True, help="KEY=VALUE of every run's config.")
@click.pass_obj
def noise(
    given: dict[str, Any],
    steps: int,
    at_once: int,
    limit_sec: float,
    out: Path,
    extra: tuple[str, ...],
) -> None:
    """Unbroken runs against each other and against a killed and resumed one, in both modes."""
    from benchmarks.curve_noise import measure_noise

    limits = {"at_once": at_once, "limit_sec": limit_sec}
    found = measure_noise(given["work"], given["device"], steps, extra, **limits)
    result = {
        "what": "resume: runs never stopped against each other, and against one killed (SIGKILL) past the checkpoint "
        "in the middle and started again; largest relative differences by step",
        **_where(found.pop("run"), given["device"]),
        **found,
    }
    write_json(out, result)
    click.echo(json.dumps(result["figures"], indent=2))


@main.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.pass_obj
def pack(given: dict[str, Any], out: Path) -> None:
    """Both datasets, the targets and the teacher's provenance as a tar in parts of 15 MiB.

    `cat OUT/data.tar.* | tar x -C WORK` gives a WORK where `students` goes on.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in (TEACHER_DATA, STUDENT_DATA):
            tar.add(given["work"] / name, name, filter=_without_work)
        tar.add(given["work"] / "teacher" / "provenance.json", "teacher/provenance.json")
    whole = buffer.getvalue()
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(whole), PART_BYTES)):
        (out / f"data.tar.{number:02d}").write_bytes(whole[start : start + PART_BYTES])
    click.echo(f"{len(whole):,} bytes in {number + 1} parts")


def _without_work(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "/.work" in member.name else member


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _where(run: Path, device: str) -> dict[str, Any]:
    """The header of a result, with the versions that the run itself noted."""
    versions = json.loads((run / "run.json").read_bytes())["versions"]
    return header((), device=device) | {"versions": versions}


if __name__ == "__main__":
    main()
