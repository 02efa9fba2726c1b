"""The kernels of the loss at the lm_head one by one, on CUDA: shapes of tiles, checked and timed, and the other parts.

    python benchmarks/loss.py --device cuda --variants        about 40 s, most of it compilation

Every variant is first compared with float64 on fresh values; one that fails or is wrong says so and the next goes on.
`of_mm` is the time over that of torch.mm of the same product with bf16 logits. Nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from common.tokenizer import VOCAB_SIZE
from trainer.kernels.lm_head import BlockStats, Tiles, exp_buffer, exp_products
from trainer.kernels.lm_head_slots import scaled_bf16, settle_slots, slot_logits

VARIANTS = [
    Tiles(),
    Tiles(stages=3),
    Tiles(stages=3, programs=132),
    Tiles(programs=132),
    Tiles(rows=256, ids=128),
    Tiles(rows=256, ids=128, stages=3, programs=132),
    Tiles(ids=128, warps=4, stages=3),
    Tiles(ids=128, warps=4, stages=2),
    Tiles(ids=128, warps=4, stages=3, programs=264),
    Tiles(ids=128, warps=8, stages=3),
    Tiles(stages=3, tma=False),
]
SLOTS = 21


def milliseconds(step: Callable[[], object], repeats: int = 7) -> float:
    """The least of the repeats, by events on the device, after two that warm up."""
    times = []
    for _ in range(repeats + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return min(times[2:])


def errors(tiles: Tiles, weight_WD: torch.Tensor, rows: int = 300) -> tuple[float, float, float]:
    """Largest relative error of e (bf16 rounding: 0.004) and of a row's sum, and of its largest exponent."""
    hidden_CD = torch.randn(rows, weight_WD.shape[1], device="cuda").bfloat16()
    offset_C = torch.randn(rows, device="cuda")
    exp_CW = exp_buffer(rows, len(weight_WD), weight_WD.device).fill_(-1)
    stats = BlockStats.empty(hidden_CD, len(weight_WD), tiles, top=False)
    exp_products(hidden_CD, weight_WD, offset_C, stats, tiles, exp_CW=exp_CW)
    exponent_CW = hidden_CD.double() @ weight_WD.double().T / math.log(2)
    exponent_CW -= offset_C[:, None]
    top_C = exponent_CW.amax(dim=1)
    exact_CW = exponent_CW.exp2_()
    sums_C = exact_CW.sum(dim=1)
    return (
        (exp_CW / exact_CW - 1).abs().max().item(),
        (stats.sums_NC.double().sum(dim=0) / sums_C - 1).abs().max().item(),
        (stats.tops_NC.amax(dim=0) - top_C).abs().max().item(),
    )


def time_variants(chunk: int, hidden: int, entries: int = SLOTS - 1) -> None:
    """Print the tables at `chunk` positions and the whole vocabulary."""
    torch.manual_seed(0)
    hidden_CD = torch.randn(chunk, hidden, device="cuda").bfloat16()
    weight_WD = (torch.randn(VOCAB_SIZE, hidden, device="cuda") * 2 / hidden**0.5).bfloat16()
    exp_CW = exp_buffer(chunk, VOCAB_SIZE, hidden_CD.device)
    flops = 2 * chunk * hidden * VOCAB_SIZE
    floor = milliseconds(lambda: torch.mm(hidden_CD, weight_WD.T, out=exp_CW))
    print(f"chunk {chunk}: torch.mm {floor:.3f} ms, {flops / floor / 1e9:.0f} TFLOP/s", flush=True)
    offset_C = torch.zeros(chunk, device="cuda")
    for tiles in VARIANTS:
        try:
            wrong = errors(tiles, weight_WD)
            stats = BlockStats.empty(hidden_CD, VOCAB_SIZE, tiles, top=False)
            ms = milliseconds(
                lambda tiles=tiles, stats=stats: exp_products(
                    hidden_CD, weight_WD, offset_C, stats, tiles, exp_CW=exp_CW
                )
            )
        except Exception as error:  # a variant that does not fit must not end the others
            print(f"{tiles}: {type(error).__name__} {str(error)[:300]}", flush=True)
            continue
        right = wrong[0] < 0.004 and wrong[1] < 1e-5 and wrong[2] < 1e-4
        print(
            f"{tiles}: {ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s, of_mm {ms / floor:.3f}, "
            f"{'right' if right else 'WRONG'} {wrong[0]:.1e} {wrong[1]:.1e} {wrong[2]:.1e}",
            flush=True,
        )
    _time_parts(hidden_CD, weight_WD, exp_CW, offset_C, 1 + entries)


def _time_parts(
    hidden_CD: torch.Tensor,
    weight_WD: torch.Tensor,
    exp_CW: torch.Tensor,
    offset_C: torch.Tensor,
    slots: int,
) -> None:
    """Everything else that a chunk costs, and the scaling of the weight's gradient, once a step."""
    chunk, tiles = len(hidden_CD), Tiles()
    rows_CJ = torch.randint(VOCAB_SIZE, (chunk, slots), device="cuda")
    values_CJ = torch.zeros(chunk, slots, device="cuda")
    dropped_CJ = torch.zeros_like(values_CJ, dtype=torch.int8)
    grad_CD = torch.empty_like(hidden_CD, dtype=torch.float32)
    grad_WD = torch.zeros_like(weight_WD, dtype=torch.float32)
    again_C = torch.zeros(chunk, dtype=torch.bool, device="cuda")
    one_again_C = again_C.clone()
    one_again_C[0] = True
    stats = BlockStats.empty(hidden_CD, VOCAB_SIZE, tiles, top=False)
    with_top = BlockStats.empty(hidden_CD, VOCAB_SIZE, tiles, top=True)
    run = (hidden_CD, weight_WD, offset_C)
    exp_CW.zero_()
    factor = torch.ones((), device="cuda")
    wide: dict = {"out_dtype": torch.float32}
    parts: dict[str, Callable[[], object]] = {
        "slot_logits": lambda: slot_logits(hidden_CD, weight_WD, rows_CJ),
        "statistics": lambda: (stats.tops_NC.amax(0), stats.sums_NC.sum(0, dtype=torch.float64)),
        "again, no row": lambda: exp_products(*run, stats, tiles, exp_CW=exp_CW, again_C=again_C),
        "again, one row": lambda: exp_products(
            *run, stats, tiles, exp_CW=exp_CW, again_C=one_again_C
        ),
        "evaluation": lambda: exp_products(*run, with_top, tiles),
        "settle_slots": lambda: settle_slots(exp_CW, rows_CJ, values_CJ, values_CJ, dropped_CJ),
        "dH": lambda: torch.mm(exp_CW, weight_WD, **wide, out=grad_CD),
        "dW, first": lambda: torch.mm(exp_CW.t(), hidden_CD, **wide, out=grad_WD),
        "dW, more": lambda: torch.addmm(grad_WD, exp_CW.t(), hidden_CD, **wide, out=grad_WD),
        "scaled_bf16": lambda: scaled_bf16(grad_WD, factor),
    }
    for name, step in parts.items():
        try:
            print(f"{name:16} {milliseconds(step):.3f} ms", flush=True)
        except Exception as error:
            print(f"{name:16} {type(error).__name__} {str(error)[:300]}", flush=True)
