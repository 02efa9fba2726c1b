"""NorMuon on CUDA, its products in bf16, against float64 on the CPU; repeats, and the stated bound on temporaries."""

from __future__ import annotations

import pytest
import torch

from trainer.normuon import CHUNK_WEIGHTS, NorMuon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = [(1024, 1024), (32, 1024), (256, 1024), (1024, 512), (8, 128, 1024), (8, 1024, 128)]
SETTINGS = {"lr": 0.02, "weight_decay": 0.1}


def _train(device: str, dtype: torch.dtype, polar_dtype: torch.dtype) -> list[torch.Tensor]:
    """How far each weight moved, three steps."""
    generator = torch.Generator().manual_seed(3)

    def draw(scale: float) -> list[torch.Tensor]:
        return [(torch.randn(s, generator=generator) * scale).to(device, dtype) for s in SHAPES]

    start = draw(0.02)
    parameters = [torch.nn.Parameter(weight.clone()) for weight in start]
    optimizer = NorMuon(parameters, polar_dtype=polar_dtype, **SETTINGS)
    for _ in range(3):
        for parameter, grad in zip(parameters, draw(1e-3), strict=True):
            parameter.grad = grad
        optimizer.step()
    pairs = zip(parameters, start, strict=True)
    return [(parameter.detach() - weight).double().cpu() for parameter, weight in pairs]


def test_bf16_products_move_the_weights_as_exact_ones() -> None:
    """Random gradients have singular values near each other, so rounding turns the factor by a few per cent."""
    exact = _train("cpu", torch.float64, torch.float64)
    rounded = _train("cuda", torch.float32, torch.bfloat16)
    for shape, one, other in zip(SHAPES, exact, rounded, strict=True):
        assert (one - other).norm() < 0.12 * one.norm(), shape


def test_the_same_step_repeats_bit_by_bit() -> None:
    runs = [_train("cuda", torch.float32, torch.bfloat16) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [(512, 128, 1024), (40, 1024, 1024)])
def test_temporaries_stay_within_their_bound(shape) -> None:
    parameter = torch.nn.Parameter(torch.zeros(shape, device="cuda"))
    parameter.grad = torch.ones_like(parameter)
    optimizer = NorMuon([parameter], polar_dtype=torch.bfloat16, **SETTINGS)
    optimizer.step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < 12 * CHUNK_WEIGHTS + 2**20
