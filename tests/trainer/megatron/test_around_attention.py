"""Gradients of what surrounds attention, written out, against autograd of the plain functions in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.norm_kernel_errors import WEIGHTS
from trainer.megatron import around_attention
from trainer.megatron.around_attention import (
    after,
    after_attention,
    before,
    before_attention,
    shared_expert,
    two_products,
)

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


def _written_out(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(residual + shared, x, x): of `after` and `shared_expert`."""
    hidden, out, *weights = leaves
    residual, x, router_x, shared_x = after(hidden, out, tuple(weights[:3]), weights[-1], EPS)
    shared, residual = shared_expert(shared_x, residual, tuple(weights[3:]))
    return residual + shared, x, router_x


def _plain(leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    hidden, out, *weights = leaves
    residual, x = after_attention(hidden, out, tuple(weights[:3]), EPS)
    return residual + two_products(x, tuple(weights[3:]))[0], x, x


def test_after_attention_with_three_readers_of_x() -> None:
    make = torch.Generator().manual_seed(3)
    leaves = [_draw(make, T, D), _draw(make, T, A), *_weights(make)]
    grads = tuple(_draw(make, T, D).detach() for _ in range(3))
    _compare(_written_out(leaves), _plain(leaves), leaves, grads)


def test_a_layer_without_experts_reads_x_once() -> None:
    make = torch.Generator().manual_seed(4)
    leaves = [_draw(make, T, D), _draw(make, T, A), *_weights(make)]
    grad = _draw(make, T, D).detach()
    _compare(_written_out(leaves)[:1], _plain(leaves)[:1], leaves, (grad,))


def test_residual_and_shared_expert_go_into_one_sum() -> None:
    """The gradient of the last bias is made from the residual's."""
    make = torch.Generator().manual_seed(6)
    leaves = [_draw(make, T, D), _draw(make, T, A), *_weights(make)]
    residual, *_, x = after(*leaves[:2], tuple(leaves[2:5]), leaves[-1], EPS)
    shared, residual = shared_expert(x, residual, tuple(leaves[5:]))
    with pytest.raises(AssertionError, match="one sum"):
        (2 * shared + residual).sum().backward()


class _Rooms:
    """In place of trainer/kernels/norm.py's Unsummed, which needs triton."""

    def __init__(self) -> None:
        self.x, self.gradient = torch.zeros(2, T, D, dtype=torch.float64).unbind(0)

    def room_for_x(self, like_TD: torch.Tensor) -> torch.Tensor:
        assert like_TD.shape == self.x.shape
        return self.x

    def room_for_gradient(self, like_TD: torch.Tensor) -> torch.Tensor:
        assert like_TD.shape == self.gradient.shape
        return self.gradient


def test_x_and_the_gradient_of_hidden_are_written_where_there_is_room() -> None:
    make, rooms = torch.Generator().manual_seed(7), _Rooms()
    leaves = [_draw(make, T, D), _draw(make, T, A), *_weights(make)]
    _, *readers = after(*leaves[:2], tuple(leaves[2:5]), leaves[-1], EPS, rooms)
    assert [x.data_ptr() for x in readers] == [rooms.x.data_ptr()] * 3
    torch.testing.assert_close(readers[0], _plain(leaves)[1])
    hidden, norm, map_XD = _draw(make, T, D), _draw(make, D), _draw(make, 9, D)
    mixed, _ = before(hidden, norm, None, (map_XD,), EPS, rooms)
    plain = before_attention(hidden, norm, None, (map_XD,), EPS)
    grad = _draw(make, T, 9).detach()
    got, want = (torch.autograd.grad(out, hidden, grad)[0] for out in (mixed, plain))
    assert got.data_ptr() == rooms.gradient.data_ptr()
    torch.testing.assert_close(got, want)


def test_gradients_in_bf16_are_rounded_once_where_they_leave() -> None:
    """Sums over tokens and of readers are made in fp32: as near to fp64 as bf16 products allow."""
    make = torch.Generator().manual_seed(5)
    wide = [_draw(make, 300, D), _draw(make, 300, A), *_weights(make)]
    grads = [torch.randn(300, D, generator=make).bfloat16() for _ in range(3)]
    narrow = [t.detach().bfloat16().requires_grad_() for t in wide]
    exact = [t.detach().double().requires_grad_() for t in narrow]
    of = {}
    for name, leaves in (("narrow", narrow), ("exact", exact)):
        outs = _written_out(leaves)
        cast = tuple(g.to(o.dtype) for g, o in zip(grads, outs, strict=True))
        of[name] = torch.autograd.grad(outs, leaves, cast)
    for name, one, other in zip(
        ("hidden", "out", *WEIGHTS), of["narrow"], of["exact"], strict=True
    ):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() < 1.5e-2 * other.norm(), name
