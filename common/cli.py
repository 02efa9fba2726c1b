"""What both command lines share: a click group that turns the project's errors into one line and their exit code."""

from __future__ import annotations

import os
import sys

import click

from common import logs
from common.errors import ConfigError, VpmoeError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Program(click.Group):
    """A group of commands. Exit codes: 0 done, 1 the data or the run is at fault, 2 the command line or a config is.

    Under torchrun an error that every rank meets alike (`collective`) is told once, by rank 0.
    """

    def invoke(self, ctx: click.Context) -> object:
        rank = int(os.environ.get("RANK", "0"))
        logs.setup(rank)
        try:
            return super().invoke(ctx)
        except VpmoeError as error:
            collective = isinstance(error, ConfigError) or getattr(error, "collective", False)
            if rank == 0 or not collective:
                who = f"rank {rank}: " if rank else ""
                click.echo(f"error: {who}{error}", err=True)
            sys.exit(error.exit_code)
