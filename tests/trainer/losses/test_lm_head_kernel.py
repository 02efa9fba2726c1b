"""The kernels of the loss at the lm_head in Triton's interpreter, on CPU: the whole function against the torch form.

    TRITON_INTERPRET=1 python -m pytest tests/trainer/losses/test_lm_head_kernel.py

tests/gpu/test_loss.py holds the same on CUDA, at full tiles.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.gloo import run_gloo
from tests.trainer.losses.lm_head_cases import (
    GRADIENT_TOLERANCE,
    Case,
    check,
    check_rows_of_likely_labels,
    error_of,
    far_above,
    likely_labels,
    make_case,
    with_heads,
    with_kd,
)
from trainer.losses import fused_linear
from trainer.losses.chunk import VocabShard
from trainer.losses.coefficients import Coefficients, Losses
from trainer.losses.fused_linear import fused_linear_eval

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from trainer.kernels import lm_head, lm_head_slots
from trainer.losses import exp_chunk


def dot_of_bf16(_: object, left: Any, right: Any, total: Any, *__: object) -> TensorHandle:
    """The interpreter keeps bf16 as its bits, and Triton 3.6 multiplies those as integers."""
    left, right = ((each.data.astype(np.uint32) << 16).view(np.float32) for each in (left, right))
    return TensorHandle(np.matmul(left, right) + total.data, total.dtype.scalar)


def mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    out.copy_(left.float() @ right.float())


def addmm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    total += left.float() @ right.float()


def take_kernels(patch: pytest.MonkeyPatch, *, tma: bool = True, programs: int = 0) -> None:
    """bf16 on CPU takes the kernels, with tiles that the small sizes below do not fill."""
    tiles = lm_head.Tiles(rows=16, ids=32, depth=16, tma=tma, programs=programs)
    patch.setattr(InterpreterBuilder, "create_dot", dot_of_bf16)
    patch.setattr(exp_chunk, "TILES", tiles)
    patch.setattr(fused_linear, "_by_kernels", lambda _, dtype: dtype == torch.bfloat16)
    patch.setattr(fused_linear, "_mm", mm)
    patch.setattr(fused_linear, "_addmm", addmm)


@pytest.fixture(params=["tma", "pointers", "loop"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = 3 if request.param == "loop" else 0
    take_kernels(monkeypatch, tma=request.param != "pointers", programs=programs)


@pytest.mark.parametrize("entries", [0, 1, 6])
@pytest.mark.usefixtures("kernels")
def test_ce_and_kd(entries: int) -> None:
    check(make_case(entries))
    check(with_kd(make_case(entries, hidden=20)))  # rows of 40 bytes: by pointers


@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.usefixtures("kernels")
def test_heads(kl: bool) -> None:
    check(with_heads(make_case(6), kl=kl))


@pytest.mark.usefixtures("kernels")
def test_rows_far_above_their_label_are_computed_again() -> None:
    case = far_above(make_case(1))
    logits_NV = case.logits()
    above_N = logits_NV.amax(dim=1) - logits_NV.gather(1, case.targets.labels_N[:, None])[:, 0]
    assert (above_N > 90).any() and (above_N < 20).any()
    check(case)


@pytest.mark.usefixtures("kernels")
def test_a_likely_label_keeps_its_gradient() -> None:
    case = likely_labels(make_case(0, scale=0.5))
    check(case)
    check_rows_of_likely_labels(case)


@pytest.mark.usefixtures("kernels")
def test_evaluation() -> None:
    case = with_heads(make_case(6), kl=True)
    losses, top_N = fused_linear_eval(case.hidden_TD, case.weight_VD, case.targets, chunk_tokens=20)
    torch.testing.assert_close(losses, case.run(torch.bfloat16, 20)[1])
    assert torch.equal(top_N, case.logits().argmax(dim=1))


@pytest.mark.usefixtures("kernels")
def test_no_positions_give_zero() -> None:
    case = make_case(3)
    none = Coefficients(torch.zeros(0), torch.zeros(0))
    case = replace(case, targets=case.targets[:0], coefficients=none)
    loss, _, gradients = case.run(torch.bfloat16, 20)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def sharded_cases() -> list[Case]:
    return [far_above(make_case(1)), with_heads(make_case(6), kl=True)]


def _sharded(rank: int, cut: int) -> list[tuple[torch.Tensor, Losses, list, torch.Tensor]]:
    results = []
    with pytest.MonkeyPatch.context() as patch:
        take_kernels(patch)
        for case in sharded_cases():
            shard = VocabShard(start=cut * rank, group=dist.group.WORLD)
            ids = slice(cut, None) if rank else slice(0, cut)
            part = replace(case, weight_VD=case.weight_VD[ids])
            _, top_N = fused_linear_eval(
                part.hidden_TD, part.weight_VD, part.targets, shard=shard, chunk_tokens=20
            )
            loss, losses, gradients = part.run(torch.bfloat16, 20, shard)
            results.append((loss, losses, gradients, top_N))
    return results


@pytest.mark.parametrize("cut", [96, 8])
def test_a_sharded_vocabulary(cut: int) -> None:
    for case, *ranks in zip(sharded_cases(), *run_gloo(_sharded, 2, cut), strict=True):
        exact_loss, exact, (hidden_TD, weight_VD) = case.run(torch.float64, 20)
        for loss, losses, gradients, top_N in ranks:
            torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=1e-5)
            for value, wanted in zip(losses, exact, strict=True):
                if value is not None:
                    torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=1e-5)
            assert error_of(gradients[0], hidden_TD) < GRADIENT_TOLERANCE
            assert torch.equal(top_N, case.logits().argmax(dim=1))
        parts_VD = torch.cat([gradients[1] for _, _, gradients, _ in ranks])
        assert error_of(parts_VD, weight_VD) < GRADIENT_TOLERANCE


def test_slots_of_one_row_are_summed_and_rounded_once() -> None:
    exp_CW = lm_head.exp_buffer(1, 40, torch.device("cpu")).fill_(7)
    rows_CJ = torch.tensor([[3, 5, 3, -1, 39]])
    settled = torch.tensor([[100.0, 1.0, 100.0, 9.0, 4.0]])
    add_CJ = torch.tensor([[-100.25, 0.5, 0.125, 9.0, 2.0]])
    dropped_CJ = torch.tensor([[0, 0, 0, 0, 1]], dtype=torch.int8)
    lm_head_slots.settle_slots(exp_CW, rows_CJ, settled, add_CJ, dropped_CJ)
    wanted = torch.full((40,), 7.0)
    wanted[[3, 5, 39]] = torch.tensor([-0.125, 1.5, 2.0])
    assert torch.equal(exp_CW[0].float(), wanted)
