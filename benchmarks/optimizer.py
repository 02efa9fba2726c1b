"""One optimizer step on every parameter of a student: NorMuon batched, NorMuon matrix by matrix, fused AdamW.

    python -m benchmarks.optimizer configs/base.yaml                                  the full student, 84 GB
    python -m benchmarks.optimizer configs/base.yaml --device cpu student.layers=4 student.experts=8 student.hidden=64

Random gradients in fp32, weights in fp32 with a bf16 copy, as in training; gradient norm and clipping are not in it.
`normuon` is one step on all matrices, which writes their bf16 copies too and takes gradients times a clipping factor,
at each --chunk-weights; `experts` is that of the stacks alone, `dense` of the other matrices; `adamw_rest` is the step
of all else and `adamw_all` AdamW on the matrices, both with the refresh of copies as a pass of its own. `loop`, on CUDA
only when --ways names it (minutes), is the mathematics of normuon one matrix at a time on at most --loop-matrices of
every shape, scaled up to all of them. `floor` counts bytes at --bandwidth and products at --flops.
Writes benchmarks/results/optimizer.json; `ms` is the least of the repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import header
from common.config import load_config
from common.files import write_json
from trainer.config import KDConfig
from trainer.normuon import CHUNK_WEIGHTS, POLAR_EXPRESS, NorMuon
from trainer.student_config import StudentConfig

RESULT = Path(__file__).parent / "results" / "optimizer.json"
SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}
NORMUON_BYTES = 4 + 8 + 8 + 2  # gradient; momentum and weight, read and written; bf16 copy
ADAMW_BYTES = 4 + 16 + 8 + 2
WAYS = ["loop", "adamw_rest", "experts", "dense", "normuon", "adamw_all"]
Shape = tuple[int, ...]
Way = dict[str, float]


def matrix_shapes(student: StudentConfig) -> Counter[Shape]:
    """Shapes [m, n] and [E, m, n] of everything that NorMuon updates, with how often each is there."""
    D, F, S = student.hidden, student.expert_width, student.shared_width
    heads, groups = student.heads * student.head_dim, student.kv_groups * student.head_dim
    global_layers, local_layers = student.global_layers, student.local_layers
    experts = student.layers - student.dense_layers
    shapes: Counter[Shape] = Counter()
    shapes[D, heads] += student.layers
    shapes[heads + 2 * groups, D] += global_layers if student.tpa else student.layers
    if student.tpa:
        for count, rank in (
            (student.heads, student.tpa.q_rank),
            *[(student.kv_groups, student.tpa.kv_rank)] * 2,
        ):
            shapes[count * rank, D] += local_layers
            shapes[rank * student.head_dim, D] += local_layers
    for count, width in ((student.dense_layers, student.ffn), (experts, S)):
        shapes[width, D] += count
        shapes[D, width] += count
    shapes[student.experts, D] += experts
    shapes[student.experts, F, D] += experts
    shapes[student.experts, D, F] += experts
    return shapes


def rest_shapes(student: StudentConfig) -> Counter[Shape]:
    """Embedding and lm_head; the vectors, a thousandth of the rest, are left out."""
    return Counter({(student.vocab_size, student.hidden): 2})


class Weights:
    """fp32 weights with random gradients, and their bf16 copies."""

    def __init__(self, shapes: Counter[Shape], device: str) -> None:
        self.masters = [
            torch.nn.Parameter(torch.full(shape, 0.02, device=device))
            for shape in shapes.elements()
        ]
        for master in self.masters:
            master.grad = torch.randn_like(master).mul_(1e-3)
        self.copies = [torch.empty_like(m, dtype=torch.bfloat16) for m in self.masters]
        self.count = sum(master.numel() for master in self.masters)

    def stepper(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """A step with the refresh of the copies: NorMuon's own, or as Megatron's wrapper does it."""
        if isinstance(optimizer, NorMuon):
            optimizer.copies = dict(zip(self.masters, self.copies, strict=True))
            optimizer.grad_scale = 0.5
            return optimizer.step

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            for master, copy in zip(self.masters, self.copies, strict=True):
                copy.copy_(master)

        return step


def measure(step: Callable[[], None], device: str, repeats: int) -> Way:
    """Milliseconds, least and median, and on CUDA the peak GiB above what stays. The first step makes the states."""
    step()
    seconds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    way = {"ms": 1e3 * min(seconds), "median_ms": 1e3 * statistics.median(seconds)}
    if device == "cuda":
        way["temporaries_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {name: round(value, 3) for name, value in way.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def normuon(weights: Weights, device: str, chunk_weights: int) -> NorMuon:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return NorMuon(weights.masters, polar_dtype=dtype, chunk_weights=chunk_weights, **SETTINGS)


def adamw(weights: Weights, device: str) -> torch.optim.AdamW:
    return torch.optim.AdamW(weights.masters, fused=device == "cuda", **SETTINGS)


def loop(shapes: Counter[Shape], device: str, most: int, repeats: int) -> dict[str, Any]:
    """One matrix at a time on a part of each shape; `ms` is scaled up by their number."""
    total, by_shape, measured = 0.0, {}, 0
    for (*stack, m, n), count in sorted(shapes.items()):
        every = count * (stack[0] if stack else 1)
        part = min(most, every)
        weights = Weights(Counter({(m, n): part}), device)
        way = measure(weights.stepper(normuon(weights, device, 1)), device, repeats)
        by_shape[f"{m}x{n}"] = by_shape.get(f"{m}x{n}", 0.0) + way["ms"] * every / part
        total, measured = total + way["ms"] * every / part, measured + part
    return {
        "ms": round(total, 3),
        "measured_matrices": measured,
        "of_matrices": _matrices(shapes),
        "by_shape_ms": {name: round(ms, 3) for name, ms in by_shape.items()},
    }


def _matrices(shapes: Counter[Shape]) -> int:
    return sum(count * (shape[0] if len(shape) == 3 else 1) for shape, count in shapes.items())


def floor(shapes: Counter[Shape], bandwidth: float, flops: float) -> dict[str, float]:
    """Bytes and products of the matrices' step, and the time of each alone."""
    weights = products = 0
    for shape, count in shapes.items():
        *stack, m, n = shape
        number, k, long = count * (stack[0] if stack else 1), min(m, n), max(m, n)
        weights += number * m * n
        products += number * len(POLAR_EXPRESS) * (4 * k * k * long + 2 * k**3)
    return {
        "weights": weights,
        "gb": weights * NORMUON_BYTES / 1e9,
        "tflop": products / 1e12,
        "ms_bytes": round(1e3 * weights * NORMUON_BYTES / bandwidth, 3),
        "ms_adamw_bytes": round(1e3 * weights * ADAMW_BYTES / bandwidth, 3),
        "ms_products": round(1e3 * products / flops, 3),
    }


def kernels(step: Callable[[], None], most: int = 20) -> dict[str, dict[str, float]]:
    """Milliseconds and calls of the longest kernels of a step."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return {
        event.key[:110]: {"ms": event.self_device_time_total / 1e3, "calls": event.count}
        for event in events[:most]
    }


def run(student: StudentConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every way in turn; states of one are freed before the next."""
    shapes, device, repeats = matrix_shapes(student), arguments.device, arguments.repeats
    figures: dict[str, Any] = {"floor": floor(shapes, arguments.bandwidth, arguments.flops)}
    if "loop" in arguments.ways:
        figures["loop"] = loop(shapes, device, arguments.loop_matrices, repeats)
    if "adamw_rest" in arguments.ways:
        rest = Weights(rest_shapes(student), device)
        figures["adamw_rest"] = measure(rest.stepper(adamw(rest, device)), device, repeats)
        del rest
    for way, stacked in (("experts", True), ("dense", False)):
        if way in arguments.ways:
            part = Counter({s: n for s, n in shapes.items() if (len(s) == 3) == stacked})
            figures |= _normuon_figures(way, Weights(part, device), arguments)
    if not {"normuon", "adamw_all"} & set(arguments.ways):
        return figures
    weights = Weights(shapes, device)
    if "normuon" in arguments.ways:
        figures |= _normuon_figures("normuon", weights, arguments)
    if "adamw_all" in arguments.ways:
        figures["adamw_all"] = measure(weights.stepper(adamw(weights, device)), device, repeats)
    return figures


def _normuon_figures(way: str, weights: Weights, arguments: argparse.Namespace) -> dict[str, Any]:
    """At each size of chunks."""
    figures = {}
    for chunk in arguments.chunk_weights:
        step = weights.stepper(normuon(weights, arguments.device, chunk))
        name = f"{way} chunk {chunk}"
        figures[name] = measure(step, arguments.device, arguments.repeats)
        if arguments.device == "cuda":
            figures[name]["kernels"] = kernels(step)
        del step
    return figures


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, help="default: all, on CUDA all but loop"
    )
    parser.add_argument("--chunk-weights", type=int, nargs="+", default=[CHUNK_WEIGHTS])
    parser.add_argument("--loop-matrices", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s (H200: 4.8e12)")
    parser.add_argument("--flops", type=float, default=989.4e12, help="FLOP/s (H200, bf16)")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_intermixed_args()
    arguments.ways = arguments.ways or (WAYS[1:] if arguments.device == "cuda" else WAYS)
    student = load_config(KDConfig, arguments.config, tuple(arguments.overrides)).student
    report = header(("torch",), device=arguments.device) | {
        "what": (__doc__ or "").splitlines()[0],
        "threads": torch.get_num_threads(),
    }
    report |= run(student, arguments)
    for key, value in report.items():
        print(f"{key}: {value}")
    write_json(arguments.out, report)


if __name__ == "__main__":
    main()
