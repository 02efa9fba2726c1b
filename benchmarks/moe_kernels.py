"""Time of the expert layer's Triton kernels, each by itself at a few settings, and of the routed part of a layer.

    python -m benchmarks.moe_kernels            checks against fp64, settings at 32768 tokens, whole at three sizes
    python -m benchmarks.moe_kernels --whole    checks and the whole alone

Each kernel: median of 10 runs between events, with 256 MB written before each, so that the L2 cache is cold; `floor_us`
is the larger of its bytes at 4.3 TB/s and its products at 700 TFLOP/s. Bytes count every gathered row, though a token's
row is read K times and may come from the cache. Whole: router, sort and experts, forward and backward, replayed from a
CUDA graph, so without the host; tokens in rows of 2048. Writes benchmarks/results/moe_kernels_cuda.json.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import BANDWIDTH, FLOPS, attempt, graph_ms, median_us
from benchmarks.report import header
from common.files import write_json

RESULTS = Path(__file__).parent / "results"
E, K, D, F, ROW = 256, 4, 1024, 128, 2048
CHOICE: dict[str, Any] = {"topk": K, "groups": 8, "group_topk": 4, "scaling": 2.5}
_WIDE = [(128, 64, 1, 8, 3), (128, 64, 2, 8, 3), (128, 128, 2, 8, 3), (128, 64, 1, 8, 2)]
_WIDE += [(64, 128, 1, 4, 2), (64, 64, 1, 4, 3), (64, 64, 1, 4, 4)]
_OUTER = [(128, 64, 8, 3, 128), (128, 64, 8, 3), (128, 32, 8, 5, 128), (64, 64, 8, 3)]
_OUTER += [(64, 64, 4, 3), (256, 64, 8, 3)]
_ROUTE = [(4, 4, 1), (4, 2, 1), (2, 4, 1), (2, 8, 1), (16, 1, 4)]
_SUM = [(4, 8), (2, 4), (1, 4), (1, 2), (8, 8)]
SETTINGS: dict[str, list[tuple[int, ...]]] = {
    "choose": _ROUTE,
    "logits gradient": _ROUTE,
    "sort": [()],
    "up": [(128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 4), (256, 64, 8, 3)],
    "down": _WIDE,
    "sum": _SUM,
    "inner": [(64, 32, 4, 5, 168), (64, 32, 4, 4, 168), (64, 64, 4, 3, 168), (128, 64, 8, 3, 128)],
    "rows": _WIDE,
    "sum of gradients": _SUM,
    "outer 1": _OUTER,
    "outer 2": _OUTER,
}


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "moe_kernels_cuda.json")
    arguments = parser.parse_args()
    report = header(("torch", "triton"), device="cuda") | {
        "what": (__doc__ or "").splitlines()[0],
        "errors_over_bounds": check(),
        "kernels_at_32768": {} if arguments.whole else kernels(32768),
        "whole": {str(tokens): whole(tokens) for tokens in (8192, 16384, 32768)},
    }
    write_json(arguments.out, report)


def check() -> dict[str, Any]:
    """Errors over their bounds (at most 1 is right; of the dispatch, 0) on fresh random inputs."""
    from tests.trainer.moe_kernel_errors import dispatch_errors, expert_errors, routing_errors

    # The inputs' seeds are their sizes: other ones each time, and no multiple of a tile.
    torch.seed()
    tokens = 2 * random.randrange(1800, 2300)
    experts_TK = draw_experts(tokens)
    choice = CHOICE | {"rows": 2}
    return {
        name: attempt(name, measure)
        for name, measure in {
            "routing": lambda: _round(routing_errors("cuda", tokens, E, D, choice, True)),
            "dispatch": lambda: _round(dispatch_errors("cuda", experts_TK, E)),
            "experts": lambda: _round(expert_errors("cuda", experts_TK, (E, D, F))),
            "experts, K = 1": lambda: _round(
                expert_errors("cuda", experts_TK[:, :1], (E, D, F), base=False)
            ),
        }.items()
    }


def _round(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(float(value), 3) for name, value in figures.items()}


def draw_experts(tokens: int, spread: float = 1.0) -> torch.Tensor:
    """Experts [T, K] int32 on the device, unevenly liked: from none to several times the mean."""
    liked_E = spread * torch.randn(E, device="cuda")
    return (liked_E + torch.randn(tokens, E, device="cuda")).topk(K, dim=1).indices.int()


def costs(tokens: int) -> dict[str, tuple[float, float]]:
    """Bytes and floating-point operations of each kernel."""
    wide, narrow, weight = tokens * K * D * 2, tokens * K * F * 2, E * D * F * 2
    own, logits, flops = tokens * D * 2, tokens * E * 4, 2 * tokens * K * D * F
    return {
        "choose": (logits, 0),
        "logits gradient": (2 * logits, 0),
        "sort": (4 * tokens * K * 4, 0),
        "up": (wide + weight + narrow, flops),
        "down": (wide + weight + narrow, flops),
        "sum": (wide + 2 * own, 0),
        "inner": (wide + weight + 3 * narrow, flops),
        "rows": (wide + weight + narrow, flops),
        "sum of gradients": (wide + own, 0),
        "outer 1": (wide + 4 * weight + narrow, flops),
        "outer 2": (wide + 4 * weight + narrow, flops),
    }


def launches(tokens: int) -> dict[str, Callable[..., Any]]:
    """Each kernel as a function of its setting (a tuple; empty: none)."""
    from trainer.kernels import dispatch, experts, experts_backward, experts_outer, routing

    # One fixed draw, so that settings are measured on the same load; mildly uneven, as a balanced router leaves it.
    torch.manual_seed(0)
    experts_TK = draw_experts(tokens, spread=0.3)
    draw = lambda *shape: torch.randn(*shape, device="cuda").mul_(0.5).bfloat16()  # noqa: E731
    x, g, w1, b1 = draw(tokens, D), draw(tokens, D), draw(E, F, D), draw(E, F)
    w2, b2, y, z = draw(E, D, F), draw(E, D), draw(tokens * K, D), draw(tokens * K, F)
    gates, logits = torch.rand(tokens, K, device="cuda"), torch.randn(tokens, E, device="cuda")
    slots, side = dispatch.sort_slots(experts_TK, E), draw(tokens * K, experts_backward.SIDE)
    sums = [torch.zeros_like(w, dtype=torch.float32) for w in (w1, b1, w2, b2)]
    choice, balance = routing.Choice(rows=tokens // ROW, **CHOICE), torch.zeros(E, device="cuda")
    shares = torch.randn(tokens // ROW, E, device="cuda")
    of, back, of_weights = routing.RouteConfig, experts_backward, experts_outer
    added: dict[str, Any] = {"add": True, "cut": of_weights.pieces(slots)}
    route_grads = (experts_TK, None, gates, shares, choice)
    return {
        "choose": lambda *c: routing.choose(logits, b1[:2].view(-1), balance, None, choice, of(*c)),
        "logits gradient": lambda *c: routing.logits_gradient(
            logits, b1[:2].view(-1), *route_grads, parts=True, config=of(*c)
        ),
        "sort": lambda: dispatch.sort_slots(experts_TK, E),
        "up": lambda *c: experts.up(x, slots, w1, b1, experts.UpConfig(*c)),
        "down": lambda *c: experts.down(z, gates, slots, w2, b2, experts.DownConfig(*c)),
        "sum": lambda *c: dispatch.sum_slots(y, slots.place_TK, [x], dispatch.SumConfig(*c)),
        "inner": lambda *c: back.inner(g, gates, z, slots, w2, b2, back.InnerConfig(*c)),
        "rows": lambda *c: back.rows(z, slots, w1, back.RowsConfig(*c)),
        "sum of gradients": lambda *c: dispatch.sum_slots(
            y, slots.place_TK, [], dispatch.SumConfig(*c)
        ),
        "outer 1": lambda *c: of_weights.outer(
            *(z, x, side, slots, *sums[:2]), gated=False, config=of_weights.OuterConfig(*c), **added
        ),
        "outer 2": lambda *c: of_weights.outer(
            *(z, g, side, slots, *sums[2:]), gated=True, config=of_weights.OuterConfig(*c), **added
        ),
    }


def kernels(tokens: int) -> dict[str, Any]:
    """Microseconds of each kernel at each of its settings (the whole call: its tiles and sums too)."""
    run, figures = launches(tokens), {}
    for name, (moved, flops) in costs(tokens).items():
        floor = round(1e6 * max(moved / BANDWIDTH, flops / FLOPS), 1)
        print(f"-- {name}: {moved / 1e9:.3f} GB, {flops / 1e9:.1f} GFLOP, floor {floor} us")
        times = {
            setting: attempt(str(setting), lambda s=setting, n=name: median_us(lambda: run[n](*s)))
            for setting in SETTINGS[name]
        }
        right = {s: t for s, t in times.items() if isinstance(t, float)}
        best = min(right, key=right.get) if right else None
        print(f"   best {best}: {right.get(best)} us", flush=True)
        figures[name] = {"gb": moved / 1e9, "gflop": flops / 1e9, "floor_us": floor}
        figures[name] |= {"us": {str(s): t for s, t in times.items()}, "best": str(best)}
    return figures


def whole(tokens: int) -> Any:
    """Milliseconds of router, sort and experts, forward and forward with backward, from CUDA graphs."""
    return attempt(f"whole at {tokens}", lambda: _whole(tokens))


def _whole(tokens: int) -> dict[str, float]:
    from trainer.kernels.dispatch import sort_slots
    from trainer.kernels.experts import fused_experts
    from trainer.kernels.routing import routed

    torch.manual_seed(1)
    scale = {"x": 1.0, "base": 1.0, "router": D**-0.5, "w1": D**-0.5, "w2": F**-0.5}
    shape = {"x": (tokens, D), "base": (tokens, D), "router": (E, D), "router_bias": (E,)}
    shape |= {"w1": (E, F, D), "b1": (E, F), "w2": (E, D, F), "b2": (E, D)}
    leaf = {
        name: torch.randn(size, device="cuda").mul_(scale.get(name, 0.1)).bfloat16()
        for name, size in shape.items()
    }
    leaves = [t.requires_grad_() for t in leaf.values()]
    x, base, router, router_bias, *weights = leaves
    balance, grad = torch.zeros(E, device="cuda"), torch.randn_like(x).detach()
    shares_grad = torch.full((tokens // ROW, E), 1e-6, device="cuda")

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        got = routed(x, router, router_bias, balance, None, rows=tokens // ROW, **CHOICE)
        slots = sort_slots(got.experts_TK, E)
        return fused_experts(x, got.gates_TK, slots, [base], *weights), got.shares_BE

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, [grad, shares_grad])

    return {"forward_ms": graph_ms(forward), "forward_backward_ms": graph_ms(both)}


if __name__ == "__main__":
    main()
