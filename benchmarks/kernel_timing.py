"""How the kernels' benchmarks take times on a CUDA device, and its ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

BANDWIDTH, FLOPS = 4.3e12, 700e12  # of an H200: bytes a second of a copy, bf16 products


def attempt(what: str, measure: Callable[[], Any]) -> Any:
    """What `measure` gives, printed; the exception as text where it fails, and on to the next."""
    try:
        result = measure()
    except Exception as error:
        result = f"{type(error).__name__}: {str(error)[:300]}"
    print(f"{what}: {result}", flush=True)
    return result


def median_us(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median microseconds between events, the cache overwritten before each run."""
    cold = torch.empty(2**26, device="cuda")
    run()
    times = []
    for _ in range(repeats):
        cold.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return round(statistics.median(times), 1)


def graph_us(run: Callable[[], Any], repeats: int = 10) -> float:
    """`median_us` of a replay of `run` from a CUDA graph: without the host."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    figure = median_us(graph.replay, repeats)
    del kept
    return figure


def graph_ms(run: Callable[[], Any], repeats: int = 10) -> float:
    """`graph_us` in milliseconds."""
    return round(graph_us(run, repeats) / 1e3, 3)
