"""The expert layer's Triton kernels at tiny sizes under Triton's interpreter, against plain fp64.

    TRITON_INTERPRET=1 python -m pytest tests/trainer/test_moe_kernels.py

Triton 3.6's interpreter multiplies the bits of bf16 numbers as if they were whole numbers, and cuts fp32 off to bf16
where GPUs round to the nearest; `interpreter` mends both.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.trainer.moe_kernel_errors import (
    dispatch_errors,
    expert_errors,
    expert_inputs,
    expert_results,
    outer_errors,
    routing_errors,
    sum_errors,
)

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)

SIZES = (8, 64, 16)  # experts, hidden, width
CHOICES = {  # experts a token, groups, groups kept
    "one": (1, 4, 1),
    "two of one group": (2, 4, 1),
    "three": (3, 4, 3),
    "four": (4, 4, 2),
    "four without groups": (4, 1, 1),
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch) -> None:
    import numpy as np
    from triton.runtime import interpreter as of

    plain, convert = of.InterpreterBuilder.create_dot, of._convert_float

    def wide(handle):
        if handle.dtype.scalar != of.tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return of.TensorHandle(bits.view(np.float32), of.tl.float32)

    def create_dot(self, a, b, d, *rest):
        return plain(self, wide(a), wide(b), d, *rest)

    def rounded(data, source, target, mode):
        if (source, target) != (of.tl.float32, of.tl.bfloat16):
            return convert(data, source, target, mode)
        bits = data.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    monkeypatch.setattr(of.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(of, "_convert_float", rounded)


def _experts(tokens: int, topk: int, num_experts: int = 8) -> torch.Tensor:
    """Drawn experts without a repetition in a token; the last expert gets none."""
    make = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, num_experts - 1, generator=make).argsort(dim=1)[:, :topk]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_routing_equals_plain_fp64(name, padded) -> None:
    topk, groups, group_topk = CHOICES[name]
    choice = {"topk": topk, "groups": groups, "group_topk": group_topk, "rows": 2, "scaling": 2.5}
    for error, value in routing_errors("cpu", 42, 16, 64, choice, padded).items():
        assert value <= 1, error


def test_ties_go_to_the_lower_id() -> None:
    from trainer.kernels.routing import route

    choice = {"topk": 4, "groups": 4, "group_topk": 2, "rows": 1, "scaling": 1.0}
    got = route(torch.zeros(3, 16), torch.zeros(16), None, **choice)
    assert got.experts_TK.tolist() == [[0, 1, 2, 3]] * 3
    assert got.counts_E.tolist() == got.best_counts_BE[0].tolist() == [3.0] * 4 + [0.0] * 12


def test_scores_that_are_no_numbers_give_experts_that_exist() -> None:
    from trainer.kernels.routing import route

    choice = {"topk": 4, "groups": 4, "group_topk": 2, "rows": 1, "scaling": 1.0}
    got = route(torch.full((3, 16), torch.nan), torch.zeros(16), None, **choice)
    assert ((got.experts_TK >= 0) & (got.experts_TK < 16)).all()


def test_routing_refuses_sizes_that_do_not_fit() -> None:
    from common.errors import ConfigError
    from trainer.kernels.routing import route

    choice = {"topk": 2, "groups": 1, "group_topk": 1, "rows": 1, "scaling": 1.0}
    for shape, change in (((3, 12), {}), ((3, 16), {"groups": 3}), ((3, 16), {"rows": 2})):
        with pytest.raises(ConfigError):
            route(torch.zeros(shape), torch.zeros(shape[1]), None, **choice | change)


@pytest.mark.parametrize(
    "experts_TK", [_experts(700, 4), _experts(300, 1), _experts(5, 2), torch.full((70, 2), 3)]
)
def test_slots_and_tiles_equal_a_stable_sort(experts_TK) -> None:
    assert not any(dispatch_errors("cpu", experts_TK, 8).values())


@pytest.mark.parametrize("first", [0, 2, 5])
def test_slots_of_experts_elsewhere_stand_last(first) -> None:
    assert not any(dispatch_errors("cpu", _experts(300, 4), 3, first).values())


def test_no_slots() -> None:
    from trainer.kernels.dispatch import sort_slots

    slots = sort_slots(torch.empty(0, 4, dtype=torch.int32), 8)
    assert slots.order_N.shape == (0,) and slots.place_TK.shape == (0, 4)
    assert slots.rows_E.tolist() == slots.ends_E.tolist() == [0] * 8
    assert slots.longest_E.tolist() == list(range(8))


@pytest.mark.parametrize(("tokens", "topk", "base"), [(150, 4, True), (90, 1, False), (3, 2, True)])
def test_experts_equal_plain_fp64(tokens, topk, base) -> None:
    errors = expert_errors("cpu", _experts(tokens, topk), SIZES, base=base)
    assert len(errors) == 7 + base
    for name, error in errors.items():
        assert error <= 1, name


@pytest.mark.parametrize("first", [0, 2, 5])
def test_some_of_the_experts_equal_plain_fp64(first) -> None:
    """The last of those from 5 on gets no rows; gates of experts elsewhere get zeros."""
    experts_TK = _experts(150, 4)
    for name, error in expert_errors("cpu", experts_TK, (3, 64, 16), first=first).items():
        assert error <= 1, name
    leaves = expert_inputs("cpu", experts_TK, (3, 64, 16))
    got = expert_results(leaves, experts_TK, 3, first)
    elsewhere = (experts_TK < first) | (experts_TK >= first + 3)
    assert bool((got["gates"][elsewhere] == 0).all()) and bool((got["gates"] != 0).any())


def test_a_second_base_is_added_before_rounding() -> None:
    from trainer.kernels.dispatch import sort_slots, sum_slots

    make = torch.Generator().manual_seed(3)
    y_ND, *bases = (torch.randn(n, 64, generator=make).bfloat16() for n in (40, 20, 20))
    slots = sort_slots(_experts(20, 2).int(), 8)
    for count in range(3):
        want = y_ND.float()[slots.place_TK].sum(dim=1) + sum(b.float() for b in bases[:count])
        got = sum_slots(y_ND, slots.place_TK, bases[:count])
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_of_other_ranks_are_added_to_the_slots_here_before_rounding(ranks) -> None:
    from trainer.kernels.dispatch import sort_slots, sum_slots

    make, experts_TK = torch.Generator().manual_seed(3), _experts(20, 2).int()
    y_ND, more_YD, base = (
        torch.randn(n, 64, generator=make).bfloat16() for n in (40, 20 * ranks, 20)
    )
    slots = sort_slots(experts_TK, 2, 3)
    y_ND[int(slots.held_1) :] = torch.nan  # never read
    places = torch.randperm(20 * ranks, generator=make).int().view(20, ranks)
    got = sum_slots(y_ND, slots.place_TK, [base], held_1=slots.held_1, more=(more_YD, places))
    there = (experts_TK >= 3) & (experts_TK < 5)
    own = torch.where(there.unsqueeze(2), y_ND.float()[slots.place_TK], 0).sum(dim=1)
    want = own + more_YD.float()[places].sum(dim=1) + base.float()
    torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=0)


def test_gradients_are_added_to_sums_unrounded() -> None:
    """Those of the weights, which then have none of their own."""
    for name, error in sum_errors("cpu", _experts(150, 4), SIZES).items():
        assert error <= 1, name


def test_no_rows_give_gradients_of_zero() -> None:
    experts_TK = torch.empty(0, 1, dtype=torch.int32)
    got = expert_results(expert_inputs("cpu", experts_TK, SIZES, base=False), experts_TK, SIZES[0])
    assert got["out"].shape == (0, 64)
    assert all(float(got[name].abs().max()) == 0 for name in ("fc1", "bias1", "fc2", "bias2"))


def test_experts_refuse_other_dtypes() -> None:
    from common.errors import ConfigError

    leaves = expert_inputs("cpu", _experts(3, 2), SIZES)
    with pytest.raises(ConfigError):
        expert_results([leaves[0].float(), *leaves[1:]], _experts(3, 2), SIZES[0])


@pytest.mark.parametrize("piece", [32, 100, 4096])
@pytest.mark.parametrize(
    "experts_TK", [torch.full((70, 2), 3), _experts(150, 2).clamp(max=2), _experts(60, 1)]
)
def test_busy_experts_are_summed_in_pieces(experts_TK, piece) -> None:
    for name, error in outer_errors("cpu", experts_TK, SIZES, piece).items():
        assert error < 1, name
