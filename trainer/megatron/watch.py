"""The watch over a run: every rank hears the others, and all stop with one message when one dies, hangs or fails.

A collective that waits for a lost rank cannot be interrupted, so the process is ended under it. Two threads on each
rank: one talks through the process group's store and may block with it; one judges, and does nothing that can block.
Whoever finds a fault first puts it into the store by compare-and-set; that rank tells it, the others end quietly.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from common.errors import ConfigError
from trainer.config import WatchConfig
from trainer.megatron.topology import Topology
from trainer.signals import Signals
from trainer.stops import DataStopped, SignalledStop
from trainer.watching import Beat, Peers, places

_LOG = logging.getLogger(__name__)
_BEAT_SEC, _TICK_SEC = 2.0, 0.25
_NEWEST_SEC = 2.0  # for asking the disk, which may be what hangs
_numbers = itertools.count()


class Watch:
    """Guards the block it is entered for. newest: the step of the newest complete checkpoint, None without one."""

    def __init__(
        self, config: WatchConfig, topology: Topology, newest: Callable[[], int | None]
    ) -> None:
        self._config, self._topology, self._newest = config, topology, newest
        self._alone = topology.world_size == 1
        self._beat_sec = min(_BEAT_SEC, config.silent_sec / 5)
        self._peers = Peers(config.silent_sec)
        # The judge's clock: it stands still while this process does, so a suspended machine blames nobody.
        self._awake_sec = self._heard_sec = 0.0
        self._woke_at = -math.inf  # when this process last went on after it had stood still
        self._step, self._phase, self._left = 0, ("starting", 0.0), None
        self._lost: str | None = None
        self._proposal = self._verdict = ""
        self._told_by_main = False
        self._over, self._kick = threading.Event(), threading.Event()
        self._exchanges = 0
        self._threads = [
            threading.Thread(target=target, name=target.__name__, daemon=True)
            for target in ([self._judge] if self._alone else [self._judge, self._talk])
        ]

    def __enter__(self) -> Self:
        self._signals = Signals()
        if not self._alone:
            store = _get_default_store().clone()
            store.set_timeout(timedelta(seconds=self._config.silent_sec))
            self._store = dist.PrefixStore(f"watch-{next(_numbers)}", store)
            self._store.set(self._key(self._topology.rank), self._beat().to_json())
            self._topology.barrier()  # from here on every rank has a beat to read
            self._exchange()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._leave("")
            self._signals.restore()
        elif _collective(error) and not _of_peers(error):
            self._leave(str(error))
        elif not self._alone:
            if _of_peers(error):
                self._wait_for_judge()
            self._told_by_main = True
            if not self._propose(stacks=False):
                self._end()
            if _collective(error) and self._topology.rank:  # common/cli.py would leave it to rank 0
                os.write(2, f"error: {error}\n".encode())
            # Until the others have read it: the store may end with this process.
            time.sleep(2 * self._beat_sec)
            self._leave(str(error))
        # After an error the signals stay caught: torchrun ends all ranks once one has left, before rank 0 has spoken.

    def phase(self, name: str) -> None:
        """What the main thread begins now; it may last `watch.stuck_sec`."""
        self._phase = name, self._awake_sec

    def phase_again(self) -> None:
        """The same phase goes on, and has come further."""
        self.phase(self._phase[0])

    def finished(self, step: int) -> None:
        """Optimizer steps that are done."""
        self._step = step

    def agree(self, problem: str | None = None) -> None:
        """Between two steps, on every rank: stop alike when a rank's rows do not come or a signal asks for the end.

        problem: why this rank cannot go on. Raises DataStopped, SignalledStop.
        """
        signal = self._signals.first
        flags = torch.tensor(
            [int(problem is not None), int(signal is not None)], device=self._topology.device
        )
        if not self._alone:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if not int(flags.max()):
            return
        said: list[tuple[str | None, str | None]] = [(problem, signal.name if signal else None)]
        if not self._alone:
            said = [said[0]] * self._topology.world_size
            dist.all_gather_object(said, (problem, signal.name if signal else None))
        self._raise_said(said)

    def _raise_said(self, said: list[tuple[str | None, str | None]]) -> NoReturn:
        for rank, (problem, _) in enumerate(said):
            if problem is not None:
                who = problem if self._alone else f"rank {rank} {problem}"
                raise DataStopped(who, remedy="mend that, then run the same command to go on")
        rank, name = next((rank, name) for rank, (_, name) in enumerate(said) if name)
        by = name if self._alone or all(n for _, n in said) else f"{name} to rank {rank}"
        raise SignalledStop(f"stopped by {by}", remedy="run the same command to go on")

    # The thread that talks.

    def _talk(self) -> None:
        try:
            while not self._over.is_set():
                self._exchange()
                self._kick.wait(self._beat_sec)
                self._kick.clear()
        except RuntimeError as error:  # DistError, and what gloo's FileStore raises
            self._lost = str(error).splitlines()[0]

    def _exchange(self) -> None:
        world, rank = range(self._topology.world_size), self._topology.rank
        self._store.set(self._key(rank), self._beat().to_json())
        beats = [
            Beat.of_json(text.decode()) for text in self._store.multi_get([*map(self._key, world)])
        ]
        verdict = self._store.compare_set("verdict", "", self._proposal).decode()
        self._peers.hear([beat for beat in beats if beat.rank != rank], self._awake_sec)
        self._heard_sec, self._verdict = self._awake_sec, verdict
        self._exchanges += 1

    def _beat(self) -> Beat:
        name, since = self._phase
        return Beat(
            rank=self._topology.rank,
            number=self._exchanges,
            pid=os.getpid(),
            place=_place(),
            node=int(os.environ.get("GROUP_RANK", "0")),
            step=self._step,
            phase=name,
            phase_sec=self._awake_sec - since,
            left=self._left,
        )

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat-{rank}"

    # The thread that judges.

    def _judge(self) -> None:
        last = time.monotonic()
        while not self._over.is_set():
            self._signals.wait(_TICK_SEC)
            if self._told_by_main:
                return
            now = time.monotonic()
            if now - last > self._config.silent_sec:
                self._woke_at = now
            self._awake_sec += min(now - last, 4 * _TICK_SEC)
            last = now
            if self._verdict:
                self._end()
            if cause := self._fault():
                self._stop(cause)
            if cause := self._stuck():
                self._stop(cause, stacks=True)

    def _fault(self) -> str | None:
        if self._signals.again:
            return "a second signal asked for the end at once"
        if self._alone:
            return None
        if fault := self._peers.fault(self._heard_sec, _dead):
            return fault
        silence = self._awake_sec - self._heard_sec
        if self._lost is None and silence <= self._config.silent_sec + self._beat_sec:
            return None
        if any(beat.left for beat in self._peers.beats()) and silence <= self._config.silent_sec:
            return None  # its host ended with an error that this rank is about to raise as well
        why = self._lost or f"not heard for {silence:.0f} s"
        holder = "torchrun on the first node" if _agent_holds_store() else "rank 0"
        return f"{holder}, through which the ranks hear each other, is lost ({why})"

    def _stuck(self) -> str | None:
        seconds = self._awake_sec - self._phase[1]
        if seconds <= self._config.stuck_sec:
            return None
        where = places([self._beat(), *self._peers.beats()])
        return f"nothing was finished for {seconds:.0f} s ({where})"

    def _stop(self, cause: str, *, stacks: bool = False) -> NoReturn:
        line = f"error: {cause}; step {self._step} was the last finished; {self._advice()}.\n"
        # A process that has just stood still, and is the last, was the silent one: the others have told it.
        just_woke = time.monotonic() - self._woke_at <= self._config.silent_sec
        mute = just_woke and not self._alone and not self._peers.running(_dead)
        told = self._propose(stacks=stacks) and not mute
        if told:
            os.write(2, line.encode())
        self._end(late="" if told or mute else line)

    def _end(self, late: str = "") -> NoReturn:
        """late: what to tell if this rank turns out to be the one after all, since the store was slow to answer."""
        if self._verdict and json.loads(self._verdict)["stacks"]:
            os.write(2, f"rank {self._topology.rank} stands here:\n".encode() + _stacks())
        if not self._alone:
            time.sleep(2 * self._beat_sec)  # until the others have read the verdict
        if late and self._verdict and self._verdict == self._proposal:
            os.write(2, late.encode())
        os._exit(1)

    def _propose(self, *, stacks: bool) -> bool:
        """Whether this rank is the one to tell why the run ends."""
        mine = json.dumps({"rank": self._topology.rank, "stacks": stacks})
        if self._alone:
            self._verdict = mine
            return True
        self._proposal = mine
        # A store that was heard lately is slow, not lost: who gives up too early leaves a verdict that nobody tells.
        lately = self._awake_sec - self._heard_sec <= 3 * self._beat_sec
        patience = self._config.silent_sec if lately else 3 * self._beat_sec
        deadline = time.monotonic() + patience
        while not self._verdict and self._lost is None and time.monotonic() < deadline:
            self._kick.set()
            time.sleep(0.05)
        if self._verdict:
            return self._verdict == mine
        # Nobody can be asked. Whoever holds the store is at fault, so the lowest of the others speaks.
        others = set(self._peers.running(_dead)) - (set() if _agent_holds_store() else {0})
        return self._topology.rank < min(others, default=self._topology.world_size)

    def _advice(self) -> str:
        found: list[int | None] = []
        thread = threading.Thread(target=lambda: found.append(self._newest()), daemon=True)
        thread.start()
        thread.join(_NEWEST_SEC)
        if not found:
            return "run the same command to go on from the newest checkpoint"
        if found[0] is None:
            return "no checkpoint is complete yet: the same command begins anew"
        return f"run the same command to go on from step {found[0]}"

    def _wait_for_judge(self) -> None:
        """A collective failed: another rank is at fault, and the judge ends this process as soon as it knows whose."""
        time.sleep(self._config.silent_sec + 4 * self._beat_sec)

    def _leave(self, how: str) -> None:
        """Say that this rank is done, and end the threads."""
        self._left = how
        before, deadline = self._exchanges, time.monotonic() + 3 * self._beat_sec
        while not self._alone and self._lost is None and time.monotonic() < deadline:
            if self._exchanges > before + 1:  # one may have been under way
                break
            self._kick.set()
            time.sleep(0.01)
        self._over.set()
        self._kick.set()
        for thread in self._threads:
            thread.join(self._beat_sec)


def _collective(error: BaseException) -> bool:
    """Whether every rank raises it; rank 0 tells it (common/cli.py)."""
    return isinstance(error, ConfigError) or getattr(error, "collective", False)


def _of_peers(error: BaseException | None) -> bool:
    """Whether a collective failed, as it does when another rank has gone."""
    while error is not None:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _agent_holds_store() -> bool:
    """Else rank 0 does (torch/distributed/rendezvous.py)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _place() -> str:
    """Equal for processes that see each other's pids: one boot of one kernel, one pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _stacks() -> bytes:
    """Where every thread of this process stands. Made whole in memory: ranks share stderr, and lines in pieces mix."""
    with os.fdopen(os.memfd_create("stacks"), "w+b") as memory:
        faulthandler.dump_traceback(file=memory)
        memory.seek(0)
        return memory.read()


def _dead(beat: Beat) -> bool:
    if beat.place != _place():
        return False
    try:
        stat = Path(f"/proc/{beat.pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"
