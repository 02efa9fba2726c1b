"""Work of rank 0 that others wait for: all ranks stay in step with the watch, so that a signal or a loss is heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from common.errors import VpmoeError
from trainer.megatron.topology import Topology
from trainer.megatron.watch import Watch

Value = TypeVar("Value")


def work_of_first(
    work: Callable[[Callable[[], None]], Value] | None, topology: Topology, watch: Watch
) -> Value:
    """What `work` returns on rank 0 (None elsewhere), on every rank.

    work is given a function to call now and then while it waits. Its VpmoeError stops every rank as RunStopped.
    """
    if work is None:
        while True:
            watch.agree()
            if topology.from_first(False):
                return topology.from_first(None)  # type: ignore[arg-type]
            watch.phase_again()

    def poll() -> None:
        watch.agree()
        topology.from_first(False)
        watch.phase_again()

    value, problem = None, None
    try:
        value = work(poll)
    except VpmoeError as error:
        if getattr(error, "collective", False):  # by `poll`: every rank has it
            raise
        problem = str(error).rstrip(".")
    watch.agree(problem)
    topology.from_first(True)
    return topology.from_first(value)  # type: ignore[return-value]
