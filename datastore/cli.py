"""The command line of vpmoe-data. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

from pathlib import Path

import click

from common.cli import CONTEXT, Program
from datastore.cli_reports import audit, default_dataset, inspect, plan, stats, verify


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
@click.option("--ray", metavar="ADDRESS", help="Build in Ray: auto, local or HOST:PORT.")
def build(overrides: tuple[str, ...], manifest: Path, workers: int | None, ray: str | None) -> None:
    """Build a dataset: render, split, pack and write shards; the manifest comes last.

    The output is the same for any number of workers, here or in Ray. Started again with the same command after a crash
    it keeps the finished shards; a finished dataset is left as it is. Exit codes: 0 done, 1 source, disk or another
    build, 2 config.

    \b
    vpmoe-data build --manifest configs/data/synth.yaml
    vpmoe-data build --manifest configs/data/synth.yaml 'source.files=[/data/synth_*.parquet]' out=data/local
    vpmoe-data build --manifest configs/data/demo.yaml --workers 2 seq_len=1024 render.reasoning=low
    """
    import os

    from common.config import load_config
    from datastore.build import build_dataset
    from datastore.data_config import DataConfig
    from datastore.summary import print_summary

    config = load_config(DataConfig, manifest, overrides)
    dataset = build_dataset(config, workers=workers or len(os.sched_getaffinity(0)), ray=ray)
    print_summary(Path(config.out), dataset)


@main.command()
@click.argument("arguments", nargs=-1, metavar="[DATASET] [KEY=VALUE]...")
@click.option("--teacher", "name", required=True, help="NAME of configs/teacher/NAME.yaml.")
@click.option("--fraction", type=float, help="Score this share of the rows, by hash. [default: 1]")
@click.option("--language", "languages", multiple=True, help="Only these documents; repeatable.")
@click.option("--exercise", "exercises", multiple=True, help="Only these documents; repeatable.")
@click.option("--min-tokens", type=int, help="Only documents of at least so many tokens.")
@click.option("--max-tokens", type=int, help="Only documents of at most so many tokens.")
@click.option("--engines", type=click.IntRange(min=1), help="At most so many. [default: all GPUs]")
@click.option("--ray", metavar="ADDRESS", help="Score in Ray: auto, local or HOST:PORT.")
def score(
    arguments: tuple[str, ...],
    name: str,
    ray: str | None,
    engines: int | None,
    **selected: float | tuple[str, ...] | None,
) -> None:
    """Score a dataset with a teacher: sparse targets for both splits, one shard beside each token shard.

    One engine runs on each visible GPU (or tensor-parallel group), with --ray on each of the cluster. Killed at any
    moment and started again with the same command it keeps what is scored. A document that no engine can score is
    quarantined, with the reason in the manifest.

    \b
    vpmoe-data score --teacher gpt-oss-120b
    vpmoe-data score --teacher gpt-oss-120b name=gpt-oss-120b-pilot --fraction 0.001
    vpmoe-data score --teacher gpt-oss-120b --ray auto
    vpmoe-data score --teacher tiny data/demo engine.max_num_seqs=16
    """
    from common.config import load_config, named_config, parse_config
    from datastore.score import score_dataset
    from datastore.selection import Selection
    from datastore.teacher import TeacherConfig

    dataset, overrides = _dataset_and_overrides(arguments)
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    chosen = {key: value for key, value in selected.items() if value is not None}
    selection = parse_config(Selection, chosen, "the options of score")
    manifest = score_dataset(dataset, teacher, selection=selection, ray=ray, engines=engines)
    tokens = sum(counts["tokens"] for counts in manifest.counts.values())
    click.echo(f"{dataset}/targets/{manifest.slug}: {tokens:,} tokens, target {manifest.target_id}")
    for document in manifest.quarantine:
        click.echo(f"quarantined: {document.doc_id} ({document.reason})", err=True)


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

    from datastore.canary import reference_of, require_canary
    from datastore.teacher import local_model
    from datastore.vllm_scorer import VllmScorer

    model = local_model(teacher)
    reference_of(teacher, model)  # refuses before an engine starts in vain
    with VllmScorer(teacher, model) as scorer:
        click.echo(json.dumps(require_canary(scorer, teacher, model), indent=2))


@main.command()
@click.argument("arguments", nargs=-1, metavar="[DATASET] [pack.KEY=VALUE]...")
@click.option("--seq-len", type=click.IntRange(min=2), help="[default: that of DATASET]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The new folder.")
@click.option("--teacher", "teachers", multiple=True, help="Repeatable. [default: all complete]")
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: usable cores]")
def repack(
    arguments: tuple[str, ...],
    seq_len: int | None,
    out: Path,
    teachers: tuple[str, ...],
    workers: int | None,
) -> None:
    """Pack the documents of DATASET into rows of another length; their targets are carried over, not scored again.

    Documents longer than --seq-len are left out and counted. Started again after a crash, it keeps finished shards.

    \b
    vpmoe-data repack --seq-len 4096 --out data/synth-4096
    vpmoe-data repack data/demo --seq-len 1024 --out data/demo-1024 --teacher tiny pack.window=1024
    """
    import os

    from datastore.repack import repack_dataset
    from datastore.summary import print_summary

    dataset, overrides = _dataset_and_overrides(arguments)
    manifest, stores = repack_dataset(
        dataset,
        out,
        seq_len=seq_len,
        overrides=overrides,
        teachers=teachers,
        workers=workers or len(os.sched_getaffinity(0)),
    )
    print_summary(out, manifest)
    for store in stores:
        click.echo(f"{out}/targets/{store.slug}: target {store.target_id}")


@main.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--teacher", "name", required=True, help="NAME of configs/teacher/NAME.yaml.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="A file with the bearer token that clients must send. [default: $VPMOE_TOKEN, or none]",
)
@click.option("--no-token", is_flag=True, help="Serve another HOST than loopback without a token.")
def serve(
    overrides: tuple[str, ...],
    name: str,
    host: str,
    port: int,
    token_file: Path | None,
    no_token: bool,
) -> None:
    """Serve a teacher over HTTP: token ids and spans in, sparse targets out (docs/serve.md).

    Ready once the engine has passed its canary. SIGTERM finishes the requests in flight, then exits with 0; a dead
    engine exits with 1, for a supervisor to start it again. KEY=VALUE changes the teacher's config, serve.KEY=VALUE
    configs/serve/default.yaml.

    \b
    vpmoe-data serve --teacher gpt-oss-120b
    vpmoe-data serve --teacher tiny --port 9000 engine.max_num_seqs=16 serve.queue_tokens=100000
    vpmoe-data serve --teacher gpt-oss-120b --host 0.0.0.0 --token-file teacher.token
    """
    from common.config import load_config, named_config
    from datastore import serve as server
    from datastore.serve_app import ServeConfig
    from datastore.teacher import TeacherConfig

    ours = tuple(o.removeprefix("serve.") for o in overrides if o.startswith("serve."))
    others = tuple(o for o in overrides if not o.startswith("serve."))
    teacher = load_config(TeacherConfig, named_config("teacher", name), others)
    config = load_config(ServeConfig, named_config("serve", "default"), ours)
    token = server.read_token(token_file)
    server.require_guarded(host, token, no_token=no_token)
    server.serve_teacher(teacher, config, host=host, port=port, token=token)


for _command in (verify, inspect, stats, audit, plan):
    main.add_command(_command)
