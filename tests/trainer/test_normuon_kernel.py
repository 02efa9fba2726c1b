"""The Triton kernels of NorMuon in Triton's interpreter, at tiny sizes, against the torch path in float64.

TRITON_INTERPRET=1 python -m pytest tests/trainer/test_normuon_kernel.py        where Triton is installed
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from trainer.normuon import POLAR_EXPRESS, SAFETY, TINY, Piece, polar_express, update_pieces

pytest.importorskip("triton", reason="needs Triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 from the start", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

from trainer.kernels import normuon as kernels

POLAR = (POLAR_EXPRESS, SAFETY, TINY)
SETTINGS = {"lr": 0.02, "momentum": 0.9, "beta2": 0.8, "eps": 1e-10, "weight_decay": 0.1}
LAUNCH = kernels.Launch(gram=(16, 4, 1), rows=(16, 4, 1), apply=(8, 2, 4, 1))
SHAPES = [(3, 16, 48), (3, 48, 16), (2, 16, 16)]


@pytest.fixture(autouse=True)
def _bf16_as_on_a_gpu(monkeypatch) -> None:
    """The interpreter of Triton 3.6 keeps bf16 as uint16: it multiplies these (create_dot) and cuts bits off fp32
    instead of rounding (cast_impl).
    """
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def as_fp32(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, as_fp32(a), as_fp32(b), *rest)

    def cast_impl(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, tl.bfloat16)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)


def _pieces(shape: tuple[int, int, int], seed: int = 5) -> list[Piece]:
    """A piece with a copy and one without."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*of: int) -> torch.Tensor:
        return torch.randn(of, generator=generator)

    return [
        Piece(draw(*shape), draw(*shape), draw(*shape), draw(*shape[:2]).square() / 16, copy)
        for copy in (torch.empty(shape, dtype=torch.bfloat16), None)
    ]


def _double(piece: Piece) -> Piece:
    return Piece(
        *(getattr(piece, name).double() for name in ("weight", "grad", "momentum", "rows"))
    )


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_a_step_is_the_torch_path_but_for_bf16(shape, scale) -> None:
    pieces, before = _pieces(shape), _pieces(shape)
    exact = [_double(piece) for piece in pieces]
    grad_scale = None if scale is None else torch.tensor(scale)
    kernels.update_pieces(pieces, *POLAR, grad_scale=grad_scale, launch=LAUNCH, **SETTINGS)
    update_pieces(exact, dtype=torch.float64, grad_scale=grad_scale, **SETTINGS)
    for got, expected, start in zip(pieces, exact, before, strict=True):
        assert _relative(got.momentum, expected.momentum) < 1e-6
        assert _relative(got.rows, expected.rows) < 2e-2
        moved = got.weight.double() - start.weight, expected.weight - start.weight
        assert _relative(*moved) < 2e-2
        assert torch.equal(got.grad, start.grad)
        if got.copy is not None:
            assert torch.equal(got.copy, got.weight.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "three decades", "low rank", "zero", "tiny"])
def test_q_turns_u_as_polar_express_in_float64(shape, kind) -> None:
    """On equal bf16 U. A matrix of norm 1e-12 stays near zero: the norm is taken 1e-6 too large."""
    generator = torch.Generator().manual_seed(6)
    count, m, n = shape
    U_Bmn = torch.randn(shape, generator=generator)
    if kind == "three decades":
        left, _, right = torch.linalg.svd(U_Bmn, full_matrices=False)
        U_Bmn = (left * torch.logspace(0, -2.8, min(m, n))) @ right
    if kind == "low rank":
        U_Bmn = U_Bmn[:, :, :3] @ torch.randn(count, 3, n, generator=generator)
    U_Bmn = U_Bmn * {"zero": 0.0, "tiny": 1e-12}.get(kind, 1e-4)
    scratch = kernels.Scratch.of(count, m, n, torch.device("cpu"))
    kernels.gram(U_Bmn, U_Bmn.clone(), scratch, 0.9, None, LAUNCH)
    kernels.polar(scratch, *POLAR, LAUNCH)
    assert torch.equal(scratch.u_Bmn, U_Bmn.bfloat16())
    Q_Bkk = scratch.q_B2kk.double().sum(dim=1)
    u_Bmn = scratch.u_Bmn.double()
    X_Bmn = Q_Bkk @ u_Bmn if m <= n else u_Bmn @ Q_Bkk
    exact_Bmn = polar_express(u_Bmn, torch.float64)
    assert torch.isfinite(X_Bmn).all()
    assert (X_Bmn - exact_Bmn).norm() <= 2e-3 * exact_Bmn.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gradient_a_matrix_only_decays(shape) -> None:
    piece = _pieces(shape)[0]
    zeros = torch.zeros(shape)
    piece = replace(piece, grad=zeros, momentum=zeros.clone(), rows=zeros[..., 0].clone())
    start = piece.weight.clone()
    kernels.update_pieces([piece], *POLAR, launch=LAUNCH, **SETTINGS)
    torch.testing.assert_close(piece.weight, start * (1 - 0.02 * 0.1), rtol=1e-6, atol=0)


def test_a_part_of_a_stack_moves_as_within_it() -> None:
    whole, parts = _pieces((3, 16, 48))[0], _pieces((3, 16, 48))[0]
    kernels.update_pieces([whole], *POLAR, launch=LAUNCH, **SETTINGS)
    for part in (slice(0, 1), slice(1, 3)):
        of = Piece(*(tensor[part] for tensor in vars(parts).values()))
        kernels.update_pieces([of], *POLAR, launch=LAUNCH, **SETTINGS)
    assert torch.equal(whole.weight, parts.weight)
