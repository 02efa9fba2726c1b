"""The kernels between products in the backward pass, under Triton's interpreter, on small sizes.

TRITON_INTERPRET=1 python -m pytest tests/trainer/test_norm_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.trainer.norm_kernel_errors import (
    layer_errors,
    layer_gradients,
    norm_errors,
    relu_errors,
)
from trainer.megatron import around_attention

pytest.importorskip("triton", reason="needs triton")
from tests.trainer.test_moe_kernels import interpreter  # noqa: F401

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
SIZES = (70, 64, 24, 8, 16)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch) -> None:
    monkeypatch.setattr(around_attention, "compiled", lambda function: function)


@pytest.mark.parametrize(
    ("tokens", "hidden", "topk", "readers", "ranks"),
    [(70, 48, 4, 2, 1), (1, 64, 0, 1, 1), (130, 1024, 1, 3, 1), (70, 64, 4, 2, 3)],
)
def test_norm_and_sums_equal_fp64(tokens, hidden, topk, readers, ranks) -> None:
    for name, error in norm_errors("cpu", tokens, hidden, topk, readers, ranks).items():
        assert error < (2e-6 if name.endswith("sum") else 5e-3), name  # else rounded to bf16, once


@pytest.mark.parametrize(("tokens", "width"), [(130, 24), (1, 512)])
def test_relu_squared_equals_fp64(tokens, width) -> None:
    for name, error in relu_errors("cpu", tokens, width).items():
        assert error < (2e-6 if name.endswith("sum") else 5e-3), name


def test_a_layer_has_the_gradients_that_autograd_adds_up() -> None:
    """But for the rounding of the experts' sum to bf16, which there is none of here."""
    errors = layer_errors("cpu", SIZES)
    assert all(error < 1e-2 for error in errors.values()), errors


@pytest.mark.parametrize("left", [True, False])
def test_a_layer_between_ranks_has_the_gradients_of_one(left) -> None:
    errors = layer_errors("cpu", SIZES, left=left, ranks=2)
    assert all(error < 1e-2 for error in errors.values()), errors


def test_what_is_left_is_taken_once() -> None:
    from trainer.kernels.norm import Slotted, Unsummed

    slotted = Slotted(torch.zeros(4, 8), torch.zeros(2, 2, dtype=torch.int32))
    unsummed = Unsummed(slotted)
    assert unsummed.take() == [slotted]
    with pytest.raises(AssertionError):
        unsummed.take()


def test_two_runs_have_the_same_bits() -> None:
    first, second = (layer_gradients("cpu", SIZES, left=True) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
