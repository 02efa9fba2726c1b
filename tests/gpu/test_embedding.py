"""The embedding's gradient on CUDA at full size: sums of fp64, the same bits every time."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
V, T, D = 201088, 32768, 1024


def test_rows_are_added_where_they_belong() -> None:
    """Ids as in text: a few many times (one 3000 times), most never."""
    from trainer.kernels.embedding import add_rows

    make = torch.Generator("cuda").manual_seed(0)
    ids_T = (torch.rand(T, device="cuda", generator=make) ** 8 * V).long()
    ids_T[torch.randperm(T, device="cuda", generator=make)[:3000]] = 7
    grad_TD = torch.randn(T, D, device="cuda", generator=make).bfloat16()
    start_VD = torch.randn(V, D, device="cuda", generator=make)
    runs = []
    for _ in range(3):
        sums_VD = start_VD.clone()
        add_rows(sums_VD, grad_TD, ids_T)
        runs.append(sums_VD)
    want = start_VD.double().index_add(0, ids_T, grad_TD.double())
    assert float((runs[0] - want).norm()) < 1e-6 * float(want.norm())
    assert all(torch.equal(run, runs[0]) for run in runs)
    untouched = torch.ones(V, dtype=torch.bool, device="cuda")
    untouched[ids_T] = False
    assert torch.equal(runs[0][untouched], start_VD[untouched])
