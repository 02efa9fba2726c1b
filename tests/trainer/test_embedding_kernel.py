"""The embedding's gradient, under Triton's interpreter: the sums of plain additions, in order.

TRITON_INTERPRET=1 python -m pytest tests/trainer/test_embedding_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.parametrize(
    "ids",
    [
        [3],
        [0, 0, 0],
        [5, 1, 5, 6, 1, 1, 0],
        [2] * 70 + [6] * 33 + [2] * 20,
        [*range(7)] * 9,
    ],
)
def test_every_row_is_added_where_it_belongs(ids) -> None:
    from trainer.kernels.embedding import add_rows

    make = torch.Generator().manual_seed(len(ids))
    ids_T = torch.tensor(ids)
    grad_TD = torch.randn(len(ids), 48, generator=make).bfloat16()
    sums_VD = torch.randn(7, 48, generator=make)
    want = sums_VD.double().index_add(0, ids_T, grad_TD.double())
    untouched = torch.ones(7, dtype=torch.bool)
    untouched[ids_T] = False
    before = sums_VD.clone()
    add_rows(sums_VD, grad_TD, ids_T)
    torch.testing.assert_close(sums_VD.double(), want, rtol=1e-6, atol=1e-5)
    assert torch.equal(sums_VD[untouched], before[untouched])


def test_the_function_of_training_gives_megatrons_order_in_memory(monkeypatch) -> None:
    """[B, S, D] out, no copy when it becomes [S, B, D], no gradient of the weight, and the sums of autograd."""
    from trainer.megatron.embedding import _Embed

    make = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 16, generator=make).requires_grad_()
    ids_BS = torch.randint(0, 11, (3, 20), generator=make)
    grad = torch.randn(3, 20, 16, generator=make)
    sums = torch.zeros(11, 16)
    out = _Embed.apply(ids_BS, weight, sums)
    assert out.transpose(0, 1).is_contiguous()
    plain = torch.nn.functional.embedding(ids_BS, weight)
    assert torch.equal(out, plain)
    out.backward(grad)
    assert weight.grad is None
    (want,) = torch.autograd.grad(plain, weight, grad)
    torch.testing.assert_close(sums, want, rtol=1e-5, atol=1e-5)
