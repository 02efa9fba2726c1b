"""The kernels between products in the backward pass on CUDA at full width, and a layer's second half around them."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.norm_kernel_errors import (
    layer_errors,
    layer_gradients,
    norm_errors,
    relu_errors,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = (2050, 1024, 512, 256, 128)


@pytest.mark.parametrize(
    ("topk", "readers", "ranks"), [(4, 2, 1), (0, 1, 1), (0, 3, 1), (4, 2, 2), (4, 2, 4)]
)
def test_norm_and_sums_equal_fp64(topk, readers, ranks) -> None:
    for name, error in norm_errors("cuda", 5003, 1024, topk, readers, ranks).items():
        assert error < (2e-6 if name.endswith("sum") else 5e-3), name  # else rounded to bf16, once


def test_relu_squared_equals_fp64() -> None:
    for name, error in relu_errors("cuda", 5003, 512).items():
        assert error < (2e-6 if name.endswith("sum") else 5e-3), name


@pytest.mark.parametrize("left", [True, False])
def test_a_layer_between_ranks_has_the_gradients_of_one(left) -> None:
    errors = layer_errors("cuda", SIZES, left=left, ranks=2)
    assert all(error < 1e-2 for error in errors.values()), errors


def test_a_layer_has_the_gradients_that_autograd_adds_up() -> None:
    errors = layer_errors("cuda", SIZES)
    assert all(error < 1e-2 for error in errors.values()), errors


def test_a_hundred_runs_have_the_same_bits() -> None:
    first = layer_gradients("cuda", SIZES, left=True)
    for _ in range(100):
        again = layer_gradients("cuda", SIZES, left=True)
        assert all(torch.equal(first[name], again[name]) for name in first)
