"""NorMuon on CUDA, its products in bf16, against float64 on the CPU; repeats, and the stated bound on temporaries.

Matrices with a side of 128 go through the Triton kernels (`on_gram`), which are held to float64 on equal bf16 U.
"""

from __future__ import annotations

import pytest
import torch

from trainer.normuon import (
    CHUNK_WEIGHTS,
    POLAR_EXPRESS,
    SAFETY,
    TINY,
    NorMuon,
    Piece,
    on_gram,
    polar_express,
)

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


EXPERTS = [(6, 128, 1024), (6, 1024, 128), (3, 128, 128), (3, 256, 128)]


def _gradients(shape: tuple[int, int, int], kind: str) -> torch.Tensor:
    """[b, m, n] of norm 1e-3; three decades: singular values from 1 to 1 / 630 of the largest."""
    b, m, n = shape
    k, generator = min(m, n), torch.Generator("cuda").manual_seed(7)

    def draw(*of: int) -> torch.Tensor:
        return torch.randn(of, generator=generator, device="cuda")

    grad = draw(*shape)
    if kind == "three decades":
        left, right = (torch.linalg.qr(draw(b, side, k))[0] for side in (m, n))
        grad = (left * torch.logspace(0, -2.8, k, device="cuda")) @ right.mT
    if kind == "low rank":
        grad = grad[:, :, :8] @ draw(b, 8, n)
    norm = {"zero": 0.0, "tiny": 1e-12}.get(kind, 1e-3)
    return (grad * (norm / grad.norm(dim=(1, 2), keepdim=True))).contiguous()


@pytest.mark.parametrize("shape", EXPERTS)
@pytest.mark.parametrize("kind", ["random", "three decades", "low rank", "zero", "tiny"])
def test_the_kernels_turn_u_as_float64_does(shape, kind) -> None:
    """Measured in fp32 on a CPU: 5e-6 random, 4e-4 over three decades, 8e-4 at rank 8."""
    from trainer.kernels import normuon as kernels

    count, m, n = shape
    grad = _gradients(shape, kind)
    scratch = kernels.Scratch.of(count, m, n, grad.device)
    kernels.gram(grad, grad.clone(), scratch, 0.95, None)
    kernels.polar(scratch, POLAR_EXPRESS, SAFETY, TINY)
    assert torch.equal(scratch.u_Bmn, grad.bfloat16())
    u, Q_Bkk = scratch.u_Bmn.double(), scratch.q_B2kk.double().sum(dim=1)
    X_Bmn = Q_Bkk @ u if m <= n else u @ Q_Bkk
    exact_Bmn = polar_express(u, torch.float64)
    assert torch.isfinite(X_Bmn).all()
    # Singular values of a random square matrix go down to a thousandth of its norm, as those of three decades do.
    even = kind == "random" and m != n
    assert (X_Bmn - exact_Bmn).norm() <= (1e-4 if even else 2e-3) * exact_Bmn.norm()
    if even:
        values = torch.linalg.svdvals(X_Bmn.cpu())
        assert values.min() > 0.855 and values.max() < 1.145


def _stepped(
    shape: tuple[int, int, int], chunk_weights: int = CHUNK_WEIGHTS, **attributes: object
) -> tuple[torch.nn.Parameter, NorMuon]:
    """Three steps on one stack, which the kernels take; its weights and optimizer."""
    generator = torch.Generator("cuda").manual_seed(8)

    def draw(scale: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda") * scale

    parameter = torch.nn.Parameter(draw(0.02))
    optimizer = NorMuon(
        [parameter], polar_dtype=torch.bfloat16, chunk_weights=chunk_weights, **SETTINGS
    )
    vars(optimizer).update(attributes)
    for _ in range(3):
        parameter.grad = draw(1e-3)
        optimizer.step()
    state = optimizer.state[parameter]
    weight, rows = parameter.detach(), state["row_second_moment"]
    assert on_gram(Piece(weight, parameter.grad, state["momentum"], rows), torch.bfloat16)
    return parameter, optimizer


@pytest.mark.parametrize("shape", EXPERTS)
def test_chunks_change_no_bit_of_the_kernels(shape) -> None:
    _, m, n = shape
    whole, parted = _stepped(shape)[0], _stepped(shape, chunk_weights=2 * m * n)[0]
    assert torch.equal(whole.detach(), parted.detach())


@pytest.mark.parametrize("shape", EXPERTS)
def test_a_scale_on_gradients_is_clipping_and_copies_are_the_weights(shape) -> None:
    """Halves are exact, so a scale of 0.5 leaves the momentum half of that without, bit by bit."""
    plain, plain_optimizer = _stepped(shape)
    copy = torch.zeros(shape, device="cuda", dtype=torch.bfloat16)
    scaled, scaled_optimizer = _stepped(shape, grad_scale=0.5)
    momenta = [
        optimizer.state[of]["momentum"]
        for of, optimizer in ((plain, plain_optimizer), (scaled, scaled_optimizer))
    ]
    assert torch.equal(momenta[0] * 0.5, momenta[1])
    scaled_optimizer.copies = {scaled: copy}
    scaled_optimizer.step()
    assert torch.equal(copy, scaled.detach().bfloat16())


def test_a_step_can_be_captured() -> None:
    """In a CUDA graph: nothing waits for the host and shapes are fixed."""
    parameter, optimizer = _stepped((4, 128, 1024))
    twin, twin_optimizer = _stepped((4, 128, 1024))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    graph.replay()
    twin_optimizer.step()
    assert torch.equal(parameter.detach(), twin.detach())
