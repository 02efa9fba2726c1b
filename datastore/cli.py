"""The command line of vpmoe-data. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from common import logs
from common.errors import VpmoeError

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Program(click.Group):
    """A group of commands that turns project errors into one line and their exit code."""

    def invoke(self, ctx: click.Context) -> object:
        logs.setup()
        try:
            return super().invoke(ctx)
        except VpmoeError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)


def default_dataset() -> Path:
    """The `out` of configs/data/synth.yaml: where a command without DATASET looks."""
    from common.config import CONFIG_ROOT, load_config
    from datastore.build import DataConfig

    return Path(load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml").out)


@click.group(cls=Program, context_settings=_CONTEXT)
def main() -> None:
    """SYNTH to packed shards of Harmony tokens, span tags and teacher targets."""
