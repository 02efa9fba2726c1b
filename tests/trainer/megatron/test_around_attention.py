"""Gradients of what surrounds attention, written out, against autograd of the plain functions in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.norm_kernel_errors import WEIGHTS
from trainer.megatron import around_attention
from trainer.megatron.around_attention import after, after_attention, before, before_attention

T, D, A, W, EPS = 7, 12, 10, 5, 1e-5


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch) -> None:
    monkeypatch.setattr(around_attention, "compiled", lambda function: function)


def _draw(make: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_()


def _weights(make: torch.Generator) -> tuple[torch.Tensor, ...]:
    shapes = ((D, A), (D,), (D,), (W, D), (W,), (D, W), (D,))
    return tuple(_draw(make, *shape) for shape in shapes)


def _compare(got: tuple, want: tuple, leaves: list[torch.Tensor], grads: tuple) -> None:
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    of_got, of_want = (torch.autograd.grad(outs, leaves, grads) for outs in (got, want))
    for one, other in zip(of_got, of_want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("widths", [(9,), (4, 3, 2)])
@pytest.mark.parametrize("biased", [False, True])
def test_before_attention_with_two_readers_of_hidden(widths, biased) -> None:
    make = torch.Generator().manual_seed(len(widths))
    hidden, norm = _draw(make, T, D), _draw(make, D)
    maps = tuple(_draw(make, width, D) for width in widths)
    bias = _draw(make, sum(widths)) if biased else None
    got = before(hidden, norm, bias, maps, EPS)
    want = (before_attention(hidden, norm, bias, maps, EPS), hidden)
    grads = (_draw(make, T, sum(widths)).detach(), _draw(make, T, D).detach())
    _compare(got, want, [hidden, norm, *maps, *([bias] if biased else [])], grads)


def test_after_attention_with_two_readers_of_x() -> None:
    make = torch.Generator().manual_seed(3)
    hidden, out, weights = _draw(make, T, D), _draw(make, T, A), _weights(make)
    got = after(hidden, out, weights, EPS)
    residual, shared, x, _ = after_attention(hidden, out, weights, EPS)
    grads = tuple(_draw(make, T, D).detach() for _ in range(4))
    _compare(got, (residual, shared, x, x), [hidden, out, *weights], grads)


def test_a_layer_without_experts_reads_no_x() -> None:
    make = torch.Generator().manual_seed(4)
    hidden, out, weights = _draw(make, T, D), _draw(make, T, A), _weights(make)
    grad = _draw(make, T, D).detach()
    got, want = (of(hidden, out, weights, EPS) for of in (after, after_attention))
    leaves = [hidden, out, *weights]
    of_got, of_want = (torch.autograd.grad(o[0] + o[1], leaves, grad) for o in (got, want))
    for one, other in zip(of_got, of_want, strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_in_bf16_are_rounded_once_where_they_leave() -> None:
    """Sums over tokens and of readers are made in fp32: as near to fp64 as bf16 products allow."""
    make = torch.Generator().manual_seed(5)
    wide = [_draw(make, 300, D), _draw(make, 300, A), *_weights(make)]
    grads = [torch.randn(300, D, generator=make).bfloat16() for _ in range(4)]
    narrow = [t.detach().bfloat16().requires_grad_() for t in wide]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    of = {}
    for name, leaves in (("narrow", narrow), ("exact", exact)):
        outs = after(leaves[0], leaves[1], tuple(leaves[2:]), EPS)
        cast = tuple(g.to(o.dtype) for g, o in zip(grads, outs, strict=True))
        of[name] = torch.autograd.grad(outs, leaves, cast)
    for name, one, other in zip(
        ("hidden", "out", *WEIGHTS), of["narrow"], of["exact"], strict=True
    ):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 1.5e-2 * other.norm(), name
