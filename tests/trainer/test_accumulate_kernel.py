"""The kernel that adds up gradients, under Triton's interpreter: the bits of one addition after the other.

TRITON_INTERPRET=1 python -m pytest tests/trainer/test_accumulate_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

from common.errors import ConfigError

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


def _pairs(seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    make = torch.Generator().manual_seed(seed)
    shapes = [(8192,), (3, 8192), (5, 1000), (7,), (1,), (130, 127)]
    sums = [torch.randn(shape, generator=make) for shape in shapes]
    grads = [torch.randn(shape, generator=make).bfloat16() for shape in shapes]
    grads[3] = grads[3].float()
    return sums, grads


@pytest.mark.parametrize("shift", [0, 1])
def test_sums_have_the_bits_of_plain_additions(shift) -> None:
    """Also where tensors do not begin at a multiple of 16 bytes."""
    from trainer.kernels.accumulate import Accumulation

    sums, grads = _pairs(seed=1)
    flat = torch.zeros(sum(t.numel() for t in sums) + shift)
    views = flat[shift:].split([t.numel() for t in sums])
    placed = [view.view(t.shape).copy_(t) for view, t in zip(views, sums, strict=True)]
    accumulation = Accumulation(placed, grads)
    for _ in range(3):
        accumulation.add()
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad)
        for grad in grads:
            grad.mul_(0.5)  # read anew each time
    assert all(torch.equal(a, b) for a, b in zip(placed, sums, strict=True))


def test_nothing_to_add_is_fine() -> None:
    from trainer.kernels.accumulate import Accumulation

    Accumulation([], []).add()


@pytest.mark.parametrize(
    ("total", "grad"),
    [
        (torch.zeros(4).bfloat16(), torch.zeros(4).bfloat16()),
        (torch.zeros(4), torch.zeros(4).half()),
        (torch.zeros(4), torch.zeros(5).bfloat16()),
        (torch.zeros(4, 4), torch.zeros(4, 4).bfloat16().t()),
    ],
)
def test_other_pairs_are_refused(total, grad) -> None:
    from trainer.kernels.accumulate import Accumulation

    with pytest.raises(ConfigError, match="cannot take this pair"):
        Accumulation([total], [grad])
