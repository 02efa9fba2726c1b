"""Time of attention over packed rows, our Triton kernels beside FlexAttention as trainer/megatron/attention.py runs it.

    python -m benchmarks.attention                        checks, ours at 8 and 16 rows, FlexAttention at 8, launches
    python -m benchmarks.attention --no-launches          without the launches
    python -m benchmarks.attention --flex-rows 8 16       FlexAttention at 16 rows too: two more compilations

Rows of 2048 positions, 8 heads, 2 key-value groups of 128, bf16; documents of about 850 positions (lognormal, sigma
0.5). `window`: 128 positions; `global`: whole documents with ALiBi. First the errors against fp64 on fresh random
inputs, over their bound (at most 1 is right). Times: median of 10 replays of a CUDA graph, so without the host, with
256 MB written before each, so that the L2 cache is cold; backward_us is both less forward. `floor_us`: the products of
the pairs that are seen (2 forward, 5 backward) at 700 TFLOP/s or the bytes of inputs and results at 4.3 TB/s, whichever
is larger. Launches: each kernel alone at a few settings (queries, keys, warps, stages, split, turned), 8 rows; none is
begun after --seconds. Writes benchmarks/results/attention.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import BANDWIDTH, FLOPS, attempt, graph_us
from benchmarks.report import header
from common.files import write_json

RESULTS = Path(__file__).parent / "results"
S, H, G, C = 2048, 8, 2, 128
WAYS: dict[str, dict[str, Any]] = {
    "window": {"window": 128, "alibi": False},
    "global": {"window": None, "alibi": True},
}
LAUNCHES: dict[str, dict[str, list[tuple[Any, ...]]]] = {
    "window": {
        "forward": [
            (64, 64, 4, 2),
            (64, 64, 4, 1),
            (64, 32, 4, 2),
            (64, 32, 4, 3),
            (128, 32, 8, 2),
        ],
        "queries": [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)],
        "keys": [
            *((64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2), (64, 64, 4, 1), (64, 64, 8, 2)),
            (64, 128, 8, 2),
        ],
    },
    "global": {
        "forward": [
            *((64, 64, 4, 2, True), (64, 64, 4, 2), (64, 64, 4, 3, True), (64, 32, 4, 3, True)),
            (128, 64, 8, 3, True),
        ],
        "queries": [
            *((64, 64, 4, 2), (64, 64, 4, 2, True), (64, 32, 4, 2), (64, 32, 4, 3)),
            (128, 64, 8, 2, True),
        ],
        "keys": [
            *((64, 64, 4, 2), (64, 64, 4, 2, True), (64, 32, 4, 2), (32, 64, 4, 2)),
            *((32, 64, 4, 3), (64, 128, 8, 2)),
        ],
    },
}


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--no-launches", action="store_true")
    parser.add_argument("--flex-rows", type=int, nargs="*", default=[8])
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "attention.json")
    arguments = parser.parse_args()
    until = time.monotonic() + arguments.seconds
    report = header(("torch", "triton"), device="cuda") | {
        "what": (__doc__ or "").splitlines()[0],
        "errors_over_bounds": {way: check(way) for way in WAYS},
        "rows": {
            str(rows): {way: compare(way, rows, rows in arguments.flex_rows) for way in WAYS}
            for rows in (8, 16)
        },
        "launches_us": {} if arguments.no_launches else {way: launches(way, until) for way in WAYS},
    }
    write_json(arguments.out, report)


def draw_documents(rows: int) -> torch.Tensor:
    """document_BS int32: documents of about 850 positions back to back, the last one cut."""
    make = torch.Generator().manual_seed(rows)
    lengths_BD = 750 * torch.exp(0.5 * torch.randn(rows, 64, generator=make))
    ends_BD = lengths_BD.clamp(min=16).round().long().cumsum(1)
    place_BS = torch.arange(S).expand(rows, -1).contiguous()
    return torch.searchsorted(ends_BD, place_BS, right=True).int().cuda()


def check(way: str) -> Any:
    """Errors over their bound on other inputs each time, S no multiple of a block."""
    from tests.trainer.attention_errors import documents, errors, inputs

    def measure() -> dict[str, float]:
        of = inputs("cuda", 1531, 2, (H, G), C, seed=time.time_ns() % 2**31)
        document_BS = documents("cuda", [[700, 1, 600], [1531, 0, 0]], 1531)
        return {n: round(e, 3) for n, e in errors(of, document_BS, **WAYS[way]).items()}

    return attempt(f"errors of {way}", measure)


def compare(way: str, rows: int, flex: bool) -> dict[str, Any]:
    """Microseconds of both, forward and backward, and the gap between their outputs."""
    from tests.trainer.attention_errors import inputs
    from trainer.kernels.attention import attention
    from trainer.megatron.attention import visible_range

    *leaves, grad = inputs("cuda", S, rows, (H, G), C)
    leaves = [t.detach().requires_grad_() for t in leaves]
    document_BS, of = draw_documents(rows), WAYS[way]
    ranges = visible_range(document_BS, of["window"])
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: attention(*leaves, *ranges, **of, scale=C**-0.5)
    }
    if flex:
        ways["flex"] = flexible(leaves, document_BS, **of)
    figures: dict[str, Any] = {"floor_us": floor(ranges[0], rows)}
    for name, run in ways.items():
        figures[name] = attempt(f"{rows} rows, {way}, {name}", lambda r=run: both(r, leaves, grad))
    if flex:
        figures["gap"] = attempt(
            "   gap of outputs", lambda: gap(*(run() for run in ways.values()))
        )
    return figures


def flexible(
    leaves: list[torch.Tensor], document_BS: torch.Tensor, *, window: int | None, alibi: bool
) -> Callable[[], torch.Tensor]:
    """FlexAttention with its layout changes, [S, B, H, C] to [S, B, H, C]; the sink as out * sigmoid(lse - sink)."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    from trainer.megatron.attention import alibi as biased
    from trainer.megatron.attention import visible

    shape, score = (len(document_BS), None, S, S), biased(H, 0) if alibi else None
    mask = create_block_mask(visible(document_BS, window), *shape, device=document_BS.device)
    compiled = torch.compile(flex_attention)
    how: dict[str, Any] = {"score_mod": score, "block_mask": mask, "scale": C**-0.5}

    def run() -> torch.Tensor:
        heads_first = (t.permute(1, 2, 0, 3) for t in leaves[:3])
        out, aux = compiled(*heads_first, **how, enable_gqa=True, return_aux=AuxRequest(lse=True))
        gate = torch.sigmoid(aux.lse - leaves[3].float()[None, :, None])
        return (out * gate[..., None]).to(out.dtype).permute(2, 0, 1, 3)

    return run


def both(
    run: Callable[[], torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor
) -> dict[str, float]:
    """forward_us and backward_us."""
    forward = graph_us(run)
    whole = graph_us(lambda: torch.autograd.grad(run().contiguous(), leaves, grad))
    return {"forward_us": forward, "backward_us": round(whole - forward, 1)}


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative distance in norm."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def floor(low_BS: torch.Tensor, rows: int) -> dict[str, float]:
    """Least microseconds forward and backward by the pairs seen and by the bytes."""
    pairs = float((torch.arange(S, device=low_BS.device) - low_BS + 1).sum()) * H
    moved = 2 * S * rows * C * (2 * H + 2 * G)
    product = 2 * pairs * C / FLOPS
    return {
        "forward": round(1e6 * max(2 * product, moved / BANDWIDTH), 1),
        "backward": round(1e6 * max(5 * product, 2 * moved / BANDWIDTH), 1),
    }


def launches(way: str, until: float) -> dict[str, dict[str, Any]]:
    """Microseconds of each kernel at each of its settings, none begun after `until`."""
    from tests.trainer.attention_errors import inputs
    from trainer.kernels import attention as kernels
    from trainer.kernels import attention_backward as backward
    from trainer.megatron.attention import visible_range

    *qkv, sink, grad = inputs("cuda", S, 8, (H, G), C)
    how: dict[str, Any] = {"alibi": WAYS[way]["alibi"], "scale": C**-0.5}
    low, high = visible_range(draw_documents(8), WAYS[way]["window"])
    out, lse = kernels.attend(*qkv, sink, low, window=WAYS[way]["window"], **how)
    delta = torch.zeros_like(lse)
    run: dict[str, Callable[[kernels.Launch], Any]] = {
        "forward": lambda launch: kernels.attend(
            *qkv, sink, low, window=None, **how, launch=launch
        ),
        "queries": lambda launch: backward.query_gradients(
            grad, *qkv, sink, low, out, lse, **how, launch=launch
        ),
        "keys": lambda launch: backward.key_gradients(
            grad, *qkv, high, lse, delta, **how, launch=launch
        ),
    }
    figures: dict[str, dict[str, Any]] = {}
    for name, settings in LAUNCHES[way].items():
        figures[name] = {}
        for setting in settings:
            of = kernels.Launch(*setting)
            measure = lambda of=of, name=name: graph_us(lambda: run[name](of))  # noqa: E731
            late = time.monotonic() > until
            figures[name][str(setting)] = (
                "no time left" if late else attempt(f"{way} {name} {setting}", measure)
            )
    return figures


if __name__ == "__main__":
    main()
