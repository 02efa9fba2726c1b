"""Work of rank 0 that others wait for: all ranks stay in step with the watch, so that a signal or a loss is heard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from common.errors import VpmoeError
from trainer.megatron.topology import Topology
from trainer.megatron.watch import Watch

Value = TypeVar("Value")


def from_first(value: Value, topology: Topology) -> Value:
    """The value of rank 0 on every rank."""
    if topology.world_size == 1:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0, device=topology.device)
    return values[0]


def work_of_first(
    work: Callable[[Callable[[], None]], Value] | None, topology: Topology, watch: Watch
) -> Value:
    """What `work` returns on rank 0 (None elsewhere), on every rank.

    work is given a function to call now and then while it waits. Its VpmoeError stops every rank as RunStopped.
    """
    if work is None:
        while True:
            watch.agree()
            if from_first(False, topology):
                return from_first(None, topology)  # type: ignore[arg-type]
            watch.phase_again()

    def poll() -> None:
        watch.agree()
        from_first(False, topology)
        watch.phase_again()

    value, problem = None, None
    try:
        value = work(poll)
    except VpmoeError as error:
        if getattr(error, "collective", False):  # by `poll`: every rank has it
            raise
        problem = str(error).rstrip(".")
    watch.agree(problem)
    from_first(True, topology)
    return from_first(value, topology)  # type: ignore[return-value]
