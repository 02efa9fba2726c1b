"""Runs of the real command to be disturbed while they go: their processes, what they say, where they stand."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.distributed.runs import environment, records

_START_SEC = 240.0  # imports and the first step of several processes on a busy machine


class Processes:
    """A started command: its processes by rank and what they say."""

    def __init__(self, launched: list[subprocess.Popen[bytes]], said: Path, ranks: int) -> None:
        self.launched, self._said, self._ranks = launched, said, ranks

    def said(self) -> str:
        """stdout and stderr of all processes so far."""
        return self._said.read_text(errors="replace")

    def errors(self) -> list[str]:
        """The lines that tell why it ended."""
        return [line for line in self.said().splitlines() if line.startswith("error: ")]

    def error(self) -> str:
        """The one line that tells why it ended."""
        errors = self.errors()
        assert len(errors) == 1, self.said()[-5000:]
        return errors[0]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Return as soon as it holds; fails when the command ends before."""
        deadline = time.monotonic() + _START_SEC
        while not holds():
            ended = [process.poll() for process in self.launched]
            assert any(code is None for code in ended), (ended, self.said()[-5000:])
            assert time.monotonic() < deadline, self.said()[-5000:]
            time.sleep(0.05)

    def codes(self, timeout_sec: float) -> list[int]:
        """Exit codes of what was launched, once it has ended."""
        deadline = time.monotonic() + timeout_sec
        try:
            return [p.wait(max(deadline - time.monotonic(), 0.01)) for p in self.launched]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout_sec} s:\n{self.said()}") from None

    def pid(self, rank: int) -> int:
        """The process of a rank, by its environment."""
        for pid in self.pids():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"RANK=%d" % rank in environment and b"distributed.run" not in command:
                    return pid
        raise AssertionError(f"no rank {rank} runs:\n{self.said()}")

    def pids(self) -> list[int]:
        """All of its processes, parents before children."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
        found: list[int] = []
        waiting = [process.pid for process in self.launched]
        while waiting:
            found.append(waiting.pop(0))
            waiting += children.get(found[-1], [])
        return found

    def kill(self) -> None:
        """End what still runs."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.launched:
            process.wait()


@contextlib.contextmanager
def torchrun(ranks: int, *command: str) -> Iterator[Processes]:
    """The command on `ranks` processes under torchrun, whose agent holds their store."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    with _started([[sys.executable, *launch, "--no-python", *command]], [{}], ranks) as started:
        yield started


@contextlib.contextmanager
def plain(ranks: int, *command: str) -> Iterator[Processes]:
    """The command on `ranks` processes without a launcher: rank 0 holds their store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    everywhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    places = [everywhere | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(ranks)]
    with _started([list(command)] * ranks, places if ranks > 1 else [{}], ranks) as started:
        yield started


@contextlib.contextmanager
def _started(
    commands: list[list[str]], environments: list[dict[str, str]], ranks: int
) -> Iterator[Processes]:
    with tempfile.TemporaryDirectory(prefix="vpmoe-run-") as folder:
        said = Path(folder) / "said"
        with open(said, "wb") as out:
            launched = [
                subprocess.Popen(
                    command,
                    stdout=out,
                    stderr=out,
                    env=environment() | places,
                )
                for command, places in zip(commands, environments, strict=True)
            ]
        processes = Processes(launched, said, ranks)
        try:
            yield processes
        finally:
            processes.kill()


def steps(run: Path) -> int:
    """The last step of metrics.jsonl, 0 when there is none."""
    return max((record["step"] for record in records(run)), default=0)


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
