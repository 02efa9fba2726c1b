"""The command line of vpmoe-data. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

from pathlib import Path

import click

from common.cli import CONTEXT, Program


def default_dataset() -> Path:
    """The `out` of configs/data/synth.yaml: where a command without DATASET looks."""
    from common.config import CONFIG_ROOT, load_config
    from datastore.build import DataConfig

    return Path(load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml").out)


@click.group(cls=Program, context_settings=CONTEXT)
def main() -> None:
    """SYNTH to packed shards of Harmony tokens, span tags and teacher targets."""


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

    overrides = tuple(argument for argument in arguments if "=" in argument)
    folders = [argument for argument in arguments if "=" not in argument]
    if len(folders) > 1:
        raise click.UsageError(f"more than one DATASET: {', '.join(folders)}")
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    dataset = Path(folders[0]) if folders else default_dataset()
    manifest = score_dataset(dataset, teacher)
    tokens = sum(counts["tokens"] for counts in manifest.counts.values())
    click.echo(f"{dataset}/targets/{manifest.slug}: {tokens:,} tokens, target {manifest.target_id}")
