"""The command line of vpmoe-data. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from common.cli import CONTEXT, Program
from common.errors import FormatError


def default_dataset() -> Path:
    """The `out` of configs/data/synth.yaml: where a command without DATASET looks."""
    from common.config import CONFIG_ROOT, load_config
    from datastore.build import DataConfig

    return Path(load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml").out)


def _dataset_and_overrides(arguments: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """[DATASET] [KEY=VALUE]... apart; the default dataset when none is named."""
    overrides = tuple(argument for argument in arguments if "=" in argument)
    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) > 1:
        raise click.UsageError(f"more than one DATASET: {', '.join(folders)}")
    return Path(folders[0]) if folders else default_dataset(), overrides


@click.group(cls=Program, context_settings=CONTEXT)
def main() -> None:
    """SYNTH to packed shards of Harmony tokens, span tags and teacher targets."""


@main.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--manifest", type=click.Path(path_type=Path), required=True, help="A config of configs/data/."
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
def build(overrides: tuple[str, ...], manifest: Path, workers: int | None) -> None:
    """Build a dataset: render, split, pack and write shards; the manifest comes last.

    The output is the same for any number of workers. Started again with the same command after a crash it keeps the
    finished shards; a finished dataset is left as it is. Exit codes: 0 done, 1 source, disk or another build, 2 config.

    \b
    vpmoe-data build --manifest configs/data/synth.yaml
    vpmoe-data build --manifest configs/data/synth.yaml 'source.files=[/data/synth_*.parquet]' out=data/local
    vpmoe-data build --manifest configs/data/demo.yaml --workers 2 seq_len=1024 render.reasoning=low
    """
    import os

    from common.config import load_config
    from datastore.build import DataConfig, build_dataset
    from datastore.summary import print_summary

    config = load_config(DataConfig, manifest, overrides)
    dataset = build_dataset(config, workers=workers or len(os.sched_getaffinity(0)))
    print_summary(Path(config.out), dataset)


@main.command()
@click.argument("arguments", nargs=-1, metavar="[DATASET] [KEY=VALUE]...")
@click.option("--teacher", "name", required=True, help="NAME of configs/teacher/NAME.yaml.")
def score(arguments: tuple[str, ...], name: str) -> None:
    """Score a dataset with a teacher: sparse targets for both splits, one shard beside each token shard.

    Started again with the same command it keeps finished shards.

    \b
    vpmoe-data score --teacher gpt-oss-120b
    vpmoe-data score --teacher tiny data/demo engine.max_num_seqs=16
    """
    from common.config import load_config, named_config
    from datastore.score import score_dataset
    from datastore.teacher import TeacherConfig

    dataset, overrides = _dataset_and_overrides(arguments)
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    manifest = score_dataset(dataset, teacher)
    tokens = sum(counts["tokens"] for counts in manifest.counts.values())
    click.echo(f"{dataset}/targets/{manifest.slug}: {tokens:,} tokens, target {manifest.target_id}")


@main.command()
@click.argument("arguments", nargs=-1, metavar="[DATASET] [KEY=VALUE]...")
@click.option("--teacher", "name", required=True, help="NAME of configs/teacher/NAME.yaml.")
@click.option("--write", is_flag=True, help="Make the reference, with transformers.")
@click.option(
    "--documents",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="With --write: how many documents of DATASET.",
)
def canary(arguments: tuple[str, ...], name: str, write: bool, documents: int) -> None:
    """Compare the engine with the reference values of a teacher, as each scoring does before it starts.

    With --write the reference is made from documents of DATASET with transformers, which shares no kernel with the
    engine. Exit codes: 0 the engine agrees, 1 it does not or there is no reference, 2 config.

    \b
    vpmoe-data canary --teacher gpt-oss-120b
    vpmoe-data canary data/synth --teacher gpt-oss-120b --write
    """
    from common.config import load_config, named_config
    from datastore.teacher import TeacherConfig

    dataset, overrides = _dataset_and_overrides(arguments)
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    if write:
        from datastore.canary_reference import write_reference

        click.echo(f"wrote {write_reference(dataset, teacher, documents)}")
        return
    import json

    from datastore.canary import require_canary
    from datastore.teacher import local_model
    from datastore.vllm_scorer import VllmScorer

    model = local_model(teacher)
    with VllmScorer(teacher, model) as scorer:
        click.echo(json.dumps(require_canary(scorer, teacher, model), indent=2))


@main.command()
@click.argument("dataset", required=False, type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
def verify(dataset: Path | None, workers: int | None) -> None:
    """Check every hash and every invariant of DATASET and of the targets beside it.

    Prints the first fault of each kind with its file and row, and exits with 1 when there is any.

    \b
    vpmoe-data verify
    vpmoe-data verify data/demo --workers 2
    """
    import os

    from datastore.verify import summary, verify_dataset

    folder = dataset or default_dataset()
    faults = verify_dataset(folder, workers=workers or len(os.sched_getaffinity(0)))
    for fault in faults:
        click.echo(fault)
    if faults:
        kinds = "kind" if len(faults) == 1 else "kinds"
        raise FormatError(f"{folder} has {len(faults)} {kinds} of faults, listed above")
    click.echo(summary(folder))


def _positions(_ctx: click.Context, _option: click.Parameter, text: str | None) -> slice | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part == "" or part.isdecimal() for part in (first, last)):
        raise click.BadParameter(f"{text!r} is not a:b, e.g. 100:140 or 100:")
    return slice(int(first) if first else None, int(last) if last else None)


@main.command()
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


@main.command()
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
