"""The commands of vpmoe-data that only read. Heavy imports happen inside them, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from common.errors import FormatError


def default_dataset() -> Path:
    """The `out` of configs/data/synth.yaml: where a command without DATASET looks."""
    from common.config import CONFIG_ROOT, load_config
    from datastore.data_config import DataConfig

    return Path(load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml").out)


@click.command()
@click.argument("dataset", required=False, type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
def verify(dataset: Path | None, workers: int | None) -> None:
    """Check every hash and every invariant of DATASET and of the targets beside it.

    Prints the first fault of each kind with its file and row, and exits with 1 when there is any. Of a buffer of
    rollouts that is not sealed, it checks the shards that are there.

    \b
    vpmoe-data verify
    vpmoe-data verify data/demo --workers 2
    """
    import os

    from datastore.verify import summary, verify_dataset
    from datastore.verify_buffer import buffer_summary, is_unsealed_buffer, verify_buffer

    folder = dataset or default_dataset()
    is_unsealed = is_unsealed_buffer(folder)
    check = verify_buffer if is_unsealed else verify_dataset
    faults = check(folder, workers=workers or len(os.sched_getaffinity(0)))
    for fault in faults:
        click.echo(fault)
    if faults:
        kinds = "kind" if len(faults) == 1 else "kinds"
        raise FormatError(f"{folder} has {len(faults)} {kinds} of faults, listed above")
    click.echo(buffer_summary(folder) if is_unsealed else summary(folder))


def _positions(_ctx: click.Context, _option: click.Parameter, text: str | None) -> slice | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
        raise click.BadParameter(f"{text!r} is not a:b, e.g. 100:140 or 100:")
    return slice(int(first) if first else None, int(last) if last else None)


@click.command()
@click.argument("dataset", required=False, type=click.Path(path_type=Path))
@click.option("--row", "index", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--split", type=click.Choice(["train", "valid"]), default="train", show_default=True)
@click.option("--teacher", help="Whose targets to show; needed when there are several.")
@click.option(
    "--positions",
    callback=_positions,
    metavar="A:B",
    help="Show the targets at these positions of the row. [default: the first 20 of each span]",
)
def inspect(
    dataset: Path | None,
    index: int,
    split: Literal["train", "valid"],
    teacher: str | None,
    positions: slice | None,
) -> None:
    """Print a row of DATASET as a person reads it: spans in colour, the teacher's top ids beside the text.

    Control tokens are shown as <|start|>; the same letters in ordinary text as <\\|start|>.

    \b
    vpmoe-data inspect --row 3
    vpmoe-data inspect data/demo --split valid --teacher tiny --positions 100:140
    """
    from datastore.show import make_console, print_row

    print_row(
        dataset or default_dataset(),
        split=split,
        index=index,
        teacher=teacher,
        positions=positions,
        console=make_console(),
    )


@click.command()
@click.argument("dataset", required=False, type=click.Path(path_type=Path))
def stats(dataset: Path | None) -> None:
    """Print what DATASET holds: counts, document lengths, rejects, and the error budget of its targets.

    \b
    vpmoe-data stats
    vpmoe-data stats data/demo
    """
    from datastore.show import make_console
    from datastore.stats import print_stats

    print_stats(dataset or default_dataset(), make_console())


@click.command()
@click.argument("dataset", required=False, type=click.Path(path_type=Path))
@click.option("--teacher", required=True, help="Whose targets to read.")
@click.option("--split", type=click.Choice(["train", "valid"]), help="[default: both]")
@click.option("--rows", type=click.IntRange(min=1), help="Scored rows, evenly. [default: all]")
@click.option("--worst", type=click.IntRange(min=0), default=10, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write it here.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
def audit(
    dataset: Path | None,
    teacher: str,
    split: Literal["train", "valid"] | None,
    rows: int | None,
    worst: int,
    file: Path | None,
    workers: int | None,
) -> None:
    """Tell how well a teacher likes the text of DATASET, from its stored targets: does cross entropy fight it?

    Mean logprob of the text's own tokens beside the teacher's entropy, by span, language, exercise and position;
    improbable stretches; the worst documents. No engine runs: score a small fraction first.

    \b
    vpmoe-data audit --teacher gpt-oss-120b-pilot
    vpmoe-data audit data/demo --teacher tiny --rows 1000 --worst 20 --json audit.json
    """
    import os

    from common.files import write_json
    from datastore.audit import audit_targets
    from datastore.audit_report import print_audit
    from datastore.show import make_console
    from datastore.types import SPLITS

    report = audit_targets(
        dataset or default_dataset(),
        teacher,
        splits=(split,) if split else SPLITS,
        max_rows=rows,
        worst=worst,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    if file:
        write_json(file, report.resolved())
    print_audit(report, make_console())


@click.command()
@click.argument("dataset", required=False, type=click.Path(path_type=Path))
@click.option("--teacher", required=True, help="Whose targets are the pilot.")
@click.option("--documents", type=click.IntRange(min=1), help="[default: all of DATASET]")
@click.option("--tokens", type=click.IntRange(min=1), help="Instead of --documents.")
@click.option("--gpus", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--gpu-hour-price", "price", type=click.FloatRange(min=0), help="USD.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Also write it here.")
def plan(
    dataset: Path | None,
    teacher: str,
    documents: int | None,
    tokens: int | None,
    gpus: int,
    price: float | None,
    file: Path | None,
) -> None:
    """Predict bytes, GPU-hours and cost of a whole scoring from a pilot, each with its error.

    \b
    vpmoe-data score --teacher gpt-oss-120b --fraction 0.001 name=gpt-oss-120b-pilot
    vpmoe-data plan --teacher gpt-oss-120b-pilot --gpus 8 --gpu-hour-price 2.5
    vpmoe-data plan data/part --teacher gpt-oss-120b --documents 76000000 --json plan.json
    """
    from common.files import write_json
    from datastore.plan import plan_scoring
    from datastore.plan_report import print_plan
    from datastore.show import make_console

    if documents and tokens:
        raise click.UsageError("give --documents or --tokens, not both")
    folder = dataset or default_dataset()
    planned = plan_scoring(
        folder, teacher, documents=documents, tokens=tokens, gpus=gpus, price=price
    )
    if file:
        write_json(file, planned.resolved())
    print_plan(planned, make_console())
