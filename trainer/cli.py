"""The command line of vpmoe-train. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
from pathlib import Path

import click

from common.cli import CONTEXT, Program


@click.group(cls=Program, context_settings=CONTEXT)
def main() -> None:
    """Train and evaluate the student.

    \b
    Examples:
      vpmoe-train kd configs/demo.yaml
      vpmoe-train kd configs/base.yaml optimizer.lr=2e-4 run=runs/lr2e-4
      torchrun --nproc-per-node 8 --no-python vpmoe-train kd configs/base.yaml
      vpmoe-train opd configs/opd.yaml init_from.run=runs/base
      vpmoe-train eval runs/demo
      vpmoe-train params configs/base.yaml
    """


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
def kd(config: Path, overrides: tuple[str, ...]) -> None:
    """Distil from stored teacher targets. Run again after a stop, it goes on from the newest checkpoint.

    \b
    Examples:
      vpmoe-train kd configs/demo.yaml
      vpmoe-train kd configs/demo.yaml steps=20 checkpoint.every=10 run=runs/short
      torchrun --nproc-per-node 2 --no-python vpmoe-train kd configs/demo.yaml
    """
    # When a rank dies, c10d prints a C++ stack for every failed call, and buries the message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from common.config import load_config
    from trainer.config import KDConfig
    from trainer.kd import run_kd

    run_kd(load_config(KDConfig, config, overrides))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
def opd(config: Path, overrides: tuple[str, ...]) -> None:
    """Distil on-policy: the student samples, the teacher at `teacher.url` scores. Run again, it goes on.

    \b
    The teacher is a `vpmoe-data serve`; its token is read from $VPMOE_TOKEN. Examples:
      vpmoe-train opd configs/demo-opd.yaml
      vpmoe-train opd configs/opd.yaml init_from.run=runs/stage2 teacher.url=http://teacher:8765
      torchrun --nproc-per-node 7 --no-python vpmoe-train opd configs/opd.yaml
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from common.config import load_config
    from trainer.opd.config import OPDConfig
    from trainer.opd.run import run_opd

    run_opd(load_config(OPDConfig, config, overrides))


@main.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
def eval_(run: Path, overrides: tuple[str, ...]) -> None:
    """Evaluate the newest checkpoint of RUN, a run folder or the config of one, on the valid split.

    \b
    Of an OPD run too, as if it were one of `kd`: CE, and KL where its dataset has targets of its teacher. Examples:
      vpmoe-train eval runs/demo
      vpmoe-train eval configs/demo.yaml eval.rows=64
      vpmoe-train eval runs/opd eval.rows=512
    """
    from trainer.eval import load_eval_config
    from trainer.kd import run_eval

    run_eval(load_eval_config(run / "config.yaml" if run.is_dir() else run, overrides))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--seq-len", default=2048, show_default=True, help="Row length for the FLOPs.")
@click.option("--check", is_flag=True, help="Build the modules, without memory, and compare them.")
def params(config: Path, overrides: tuple[str, ...], seq_len: int, check: bool) -> None:
    """Show the student's parameters by component, the active ones, and FLOPs a token.

    \b
    Examples:
      vpmoe-train params configs/base.yaml
      vpmoe-train params configs/base.yaml --check student.layers=8
    """
    from rich.console import Console

    from common.config import load_config
    from trainer.config import KDConfig
    from trainer.params import print_parameters, require_equal

    student = load_config(KDConfig, config, overrides).student
    print_parameters(student, seq_len, Console())
    if check:
        from trainer.megatron.built import built_counts

        require_equal(student, built_counts(student))
        click.echo("the built modules hold exactly these parameters")


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Default: RUN/exports/step-N-DTYPE.")
@click.option("--step", type=click.IntRange(min=1), help="Of the checkpoint; default: the newest.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Default: the run's precision.")
@click.option(
    "--dataset", type=click.Path(path_type=Path), help="Where the run's dataset lies now."
)
def export(
    run: Path, out: Path | None, step: int | None, dtype: str | None, dataset: Path | None
) -> None:
    """Write a checkpoint of RUN as a folder that Hugging Face transformers loads. Needs no GPU.

    \b
    Examples:
      vpmoe-train export runs/demo
      vpmoe-train export runs/base --step 20000 --dtype bf16 --out exports/vpmoe
    """
    from trainer.export import run_export

    run_export(run, out=out, step=step, dtype=dtype, dataset=dataset)
