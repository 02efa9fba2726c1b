"""Time of the kernel of queries, keys and values, forward and backward, beside the plain functions compiled.

    python -m benchmarks.qkv            checks against fp64, settings at 16384 tokens, defaults, compiled
    python -m benchmarks.qkv --brief    checks and defaults alone

Rows of 2048 tokens, two kinds of layers: local (TPA, rotated) and global (fused), v_1 mixed in. Median of 20 runs
between events, with 256 MB written before each, so that the L2 cache is cold; `floor_us`: bytes at 4.3 TB/s. `compiled`
is the whole of forward and backward by autograd, as is `ours`: both replayed from a CUDA graph, so without the host.
Writes benchmarks/results/qkv.json.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import BANDWIDTH, attempt, graph_us, median_us
from benchmarks.report import header
from common.files import write_json

RESULTS = Path(__file__).parent / "results"
ROW, REPEATS = 2048, 20
KINDS = {"local": True, "global": False}
# Tokens and warps of a program, most registers of a thread.
FORWARD = [(16, 4, None), (16, 8, None), (8, 4, None), (32, 8, None), (32, 16, 64)]
BACKWARD = [(16, 8, 128), (16, 8, None), (8, 4, 128), (8, 4, None), (16, 4, None), (32, 16, 128)]


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--brief", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "qkv.json")
    arguments = parser.parse_args()
    report = header(("torch", "triton"), device="cuda") | {
        "what": (__doc__ or "").splitlines()[0],
        "errors_over_bounds": {kind: check(kind) for kind in KINDS},
        "figures": {
            f"{kind} at {tokens}": figures(
                kind,
                tokens,
                settings=tokens == 16384 and not arguments.brief,
                compiled=not arguments.brief,
            )
            for kind in KINDS
            for tokens in (16384, 32768)
        },
    }
    write_json(arguments.out, report)


def check(kind: str) -> Any:
    """Errors over their bounds (at most 1 is right) on fresh random inputs."""
    from tests.trainer.qkv_kernel_errors import errors, sizes

    of, local = sizes(KINDS[kind], 8), KINDS[kind]

    def measure() -> dict[str, float]:
        seed, positions = random.randrange(2**31), random.randrange(150, 250)
        got = errors("cuda", positions, of, turned=local, mixes=True, seed=seed)
        return {name: round(error, 3) for name, error in got.items()}

    return attempt(f"errors over bounds, {kind}", measure)


def figures(kind: str, tokens: int, *, settings: bool, compiled: bool) -> dict[str, Any]:
    """Floors and microseconds of one kind of layer."""
    from tests.trainer.qkv_kernel_errors import inputs, sizes
    from trainer.kernels.qkv import FORWARD as forward_default
    from trainer.kernels.qkv_backward import BACKWARD as backward_default

    print(f"-- {kind} at {tokens}", flush=True)
    local, of = KINDS[kind], sizes(KINDS[kind], tokens // ROW)
    leaves = inputs("cuda", ROW, of, turned=local, mixes=True)
    width, heads, value = leaves["mixed"].shape[1], 1536, 256
    moved = {"forward": width + heads + value, "backward": 2 * width + heads + 2 * value}
    result: dict[str, Any] = {
        f"{name}_floor_us": round(2e6 * tokens * columns / BANDWIDTH, 1)
        for name, columns in moved.items()
    }
    print(result, flush=True)
    lists = {"forward": [tuple(forward_default)], "backward": [tuple(backward_default)]}
    if settings:
        lists = {"forward": FORWARD, "backward": BACKWARD}
    runs = launches(leaves, of)
    for name, configs in lists.items():
        result[f"{name}_us"] = {
            str(config): attempt(
                f"{name} {config}", lambda n=name, c=config: median_us(lambda: runs[n](c), REPEATS)
            )
            for config in configs
        }
    result["ours_us"] = attempt("ours, both ways", lambda: both_us(leaves, of, None))
    if compiled:
        result["compiled_us"] = attempt("compiled, both ways", lambda: _compiled_us(leaves, of))
    return result


def launches(leaves: dict, of: dict) -> dict[str, Callable[[tuple], Any]]:
    """Forward and backward kernel (its small sum too) as functions of their setting."""
    from tests.trainer.qkv_kernel_errors import NAMES
    from trainer.kernels import qkv_backward
    from trainer.kernels.qkv import forward
    from trainer.kernels.qkv_heads import Program, QKVShape

    shape, given = QKVShape(**of), [leaves[name] for name in NAMES]
    grads = [torch.randn_like(t) for t in forward(*given, shape=shape)]
    return {
        "forward": lambda c: forward(*given, shape=shape, config=Program(*c)),
        "backward": lambda c: qkv_backward.gradients(
            *grads, *given, shape=shape, config=Program(*c)
        ),
    }


def _compiled_us(leaves: dict, of: dict) -> float:
    from tests.trainer.qkv_kernel_errors import plain

    def rounded(given: dict) -> tuple[torch.Tensor, ...]:
        return tuple(t.bfloat16() for t in plain(given, of))

    return both_us(leaves, of, torch.compile(rounded, fullgraph=True, dynamic=False))


def both_us(leaves: dict, of: dict, run: Callable | None) -> float:
    """Forward and backward through autograd, from a CUDA graph. run: of the leaves by name; None: the kernel."""
    from tests.trainer.qkv_kernel_errors import NAMES
    from trainer.kernels.qkv import qkv

    given = {n: None if t is None else t.detach().requires_grad_() for n, t in leaves.items()}
    run = run or (lambda leaves: qkv(*(leaves[n] for n in NAMES), **of))
    used = [t for t in given.values() if t is not None]
    grads = [torch.randn_like(t) for t in run(given)]

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(run(given), used, grads)

    return graph_us(both, REPEATS)


if __name__ == "__main__":
    main()
