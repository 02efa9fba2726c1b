"""Where the time of the recorded layers goes: what computes, what is between ranks with nothing beside it, what idles.

    torchrun --nproc-per-node 2 -m benchmarks.timeline configs/base.yaml parallel.expert=2
    python -m benchmarks.timeline configs/base.yaml --layers 8 --trace traces

A student of a few layers (the profiler of torch 2.11 ends with a segmentation fault on graphs of ten thousand kernels)
takes two steps as `vpmoe-train kd` does; then its forward and its backward graph are replayed under the profiler, all
ranks at once. Microseconds a layer, of rank 0: span, busy (kernels and copies, those between ranks left out), exposed
(between ranks alone), idle (nothing), and the kernels by class. --trace: both passes for a viewer.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.kernel_classes import by_class, profile_of
from benchmarks.student_step import take_steps
from common.config import load_config
from trainer.config import KDConfig

BETWEEN_RANKS = re.compile(r"barrier_kernel|Memcpy PtoP|nccl")
Event = tuple[str, float, float]  # name, begin, end; microseconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--trace", type=Path, help="folder for the passes as Chrome traces")
    arguments = parser.parse_intermixed_args()
    overrides = (*arguments.overrides, f"student.layers={arguments.layers}", "cuda_graph=true")
    config = load_config(KDConfig, arguments.config, overrides)
    figures, rank = measure(config, arguments.trace)
    if rank == 0:
        print(json.dumps(figures, indent=2), flush=True)


def measure(config: KDConfig, trace: Path | None) -> tuple[dict[str, Any], int]:
    """The figures of each pass, and this process's rank."""
    from trainer.kd import KDRun
    from trainer.megatron.topology import distributed

    with distributed(
        config.device, config.parallel, config.seed, deterministic=config.deterministic
    ) as topology:
        run = KDRun(config, topology)
        take_steps(run, 2, config.batch.micro_batch_size * topology.dp_size)
        figures, graphs = {}, run.trainer.graphs
        # A backward pass uses up what the forward pass before it has left: never two of them in a row.
        for graph in graphs:
            graph.replay()
        for name, graph in zip(("forward", "backward"), graphs, strict=True):
            topology.barrier()
            path = None if trace is None or topology.rank else trace / f"{name}.json"
            figures[name] = shares(_events(graph.replay, path), config.student.layers)
        return figures, topology.rank


def shares(events: Iterable[Event], layers: int) -> dict[str, Any]:
    """Microseconds a layer; see the top of this file."""
    events = list(events)
    every = _union(events)
    busy = _union([event for event in events if not BETWEEN_RANKS.search(event[0])])
    span = max(end for *_, end in events) - min(begin for _, begin, _ in events)
    parts = {"span": span, "busy": busy, "exposed": every - busy, "idle": span - every}
    kernels: dict[str, dict[str, float]] = {}
    for name, begin, end in events:
        of = kernels.setdefault(name, {"ms": 0.0})
        of["ms"] += (end - begin) / 1e3
    classes = {name: 1e3 * ms for name, ms in by_class(kernels).items()}
    per_layer = {name: round(us / layers, 1) for name, us in parts.items()}
    return per_layer | {"classes": {name: round(us / layers, 1) for name, us in classes.items()}}


def _union(events: list[Event]) -> float:
    """Microseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for _, begin, end in sorted(events, key=lambda event: event[1]):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _events(work: Callable[[], Any], path: Path | None) -> list[Event]:
    """What runs on the device in `work`."""
    import torch

    profile = profile_of(work)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]


if __name__ == "__main__":
    main()
