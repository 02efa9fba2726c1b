"""What surrounds attention in a layer, as plain functions and as two autograd functions of compiled ones.

`before_attention` is a norm and a projection, `after_attention` the output projection, the residual, a norm and the
expert that every token visits (or the dense MLP). `before` and `after` compute the same on CUDA, one compilation for
all layers of a kind, with gradients written out (`before_gradients`, `after_gradients`). Why written out: autograd adds
up the gradients of a tensor with two readers by a kernel of its own, three times the tensor's bytes (46 us each for the
hidden states and for what the router and the experts read, of 32,768 tokens on an H200). So such a tensor is given out
once for each reader, and the sum is made inside the kernel of the norm's gradient, in fp32. Likewise residual and
shared expert leave apart: the kernel that sums over experts adds both.

Kept for the backward pass: the layer's input, attention's output, the residual, its norm (which the experts keep too)
and the inner states before their activation.

Shapes: T tokens, D hidden, X columns of the projection, A attention's output, W width of the MLP.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from trainer.megatron.compiled import compiled

_linear = torch.nn.functional.linear
Grads = tuple[torch.Tensor, ...]


def before_attention(
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    bias_X: torch.Tensor | None,
    maps: tuple[torch.Tensor, ...],
    eps: float,
) -> torch.Tensor:
    """The projection of the norm, [T, X]: TPA's six factors side by side, or queries, keys and values.

    maps: [x, D] each, X their sum. Any leading axes. Norms are computed in fp32 (fp64 of fp64) and rounded once to the
    dtype of hidden.
    """
    return _linear(rms_norm(hidden_TD, norm_D, eps).to(hidden_TD.dtype), _joined(maps), bias_X)


def after_attention(
    hidden_TD: torch.Tensor, out_TA: torch.Tensor, weights: tuple[torch.Tensor, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, shared, x, inner): the layer's output is the sum of the first two and of what the routed experts make
    of x; inner [T, W] is the states before relu^2.

    weights: proj [D, A], proj_bias, norm, fc1 [W, D], fc1_bias, fc2 [D, W], fc2_bias. Any leading axes.
    """
    proj, proj_bias, norm, fc1, fc1_bias, fc2, fc2_bias = weights
    residual_TD = hidden_TD + _linear(out_TA, proj, proj_bias)
    x_TD = rms_norm(residual_TD, norm, eps).to(hidden_TD.dtype)
    inner_TW = _linear(x_TD, fc1, fc1_bias)
    shared_TD = _linear(torch.relu(inner_TW).square(), fc2, fc2_bias)
    return residual_TD, shared_TD, x_TD, inner_TW


def before_gradients(
    mixed_grad_TX: torch.Tensor,
    residual_grad_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    maps: tuple[torch.Tensor, ...],
    eps: float,
    *,
    biased: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Of hidden, norm, bias (None if there is none) and maps; residual_grad: of the other reader of hidden, added."""
    normed_grad_TD = mixed_grad_TX @ _joined(maps)
    normed_TD = rms_norm(hidden_TD, norm_D, eps).to(hidden_TD.dtype)
    hidden_grad, norm_grad = _norm_gradients(hidden_TD, norm_D, [normed_grad_TD], eps)
    joined = mixed_grad_TX.t() @ normed_TD
    return (
        (hidden_grad + residual_grad_TD).to(hidden_TD.dtype),
        norm_grad,
        _sum(mixed_grad_TX) if biased else None,
        *joined.split([len(of) for of in maps]),
    )


def after_gradients(
    residual_grad_TD: torch.Tensor,
    shared_grad_TD: torch.Tensor,
    x_grads: tuple[torch.Tensor, ...],
    kept: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    eps: float,
) -> Grads:
    """Of hidden, out and the seven weights. x_grads: of each reader of x. kept: out, x, residual, inner."""
    out_TA, x_TD, residual_TD, inner_TW = kept
    proj, _, norm, fc1, _, fc2, _ = weights
    positive_TW = torch.relu(inner_TW)
    inner_grad_TW = (shared_grad_TD @ fc2) * positive_TW * 2
    grads = [*x_grads, inner_grad_TW @ fc1]
    residual_grad, norm_grad = _norm_gradients(residual_TD, norm, grads, eps)
    residual_grad = (residual_grad + residual_grad_TD).to(residual_TD.dtype)
    return (
        residual_grad,
        residual_grad @ proj,
        residual_grad.t() @ out_TA,
        _sum(residual_grad),
        norm_grad,
        inner_grad_TW.t() @ x_TD,
        _sum(inner_grad_TW),
        shared_grad_TD.t() @ positive_TW.square(),
        _sum(shared_grad_TD),
    )


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 or wider, not rounded back (arXiv 1910.07467)."""
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(x.dtype)


def _norm_gradients(
    x_TD: torch.Tensor, weight_D: torch.Tensor, grads: list[torch.Tensor], eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x, in fp32 or wider, and of the weight, in its dtype; grads: of the norm's readers."""
    x = _wide(x_TD)
    grad = functools.reduce(torch.add, map(_wide, grads))
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    normal, turned = x * scale, grad * weight_D.to(x.dtype)
    x_grad = (turned - normal * (turned * normal).mean(dim=-1, keepdim=True)) * scale
    return x_grad, (grad * normal).sum(dim=0).to(weight_D.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(grad_TX: torch.Tensor) -> torch.Tensor:
    return _wide(grad_TX).sum(dim=0).to(grad_TX.dtype)


def _joined(maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(maps)


def before(
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    bias_X: torch.Tensor | None,
    maps: tuple[torch.Tensor, ...],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`before_attention` compiled, and hidden for its other reader, the residual; tokens in one axis."""
    return _Before.apply(hidden_TD, norm_D, bias_X, eps, *maps)


def after(
    hidden_TD: torch.Tensor, out_TA: torch.Tensor, weights: tuple[torch.Tensor, ...], eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, shared, x, x once more): `after_attention` compiled, x for two readers; tokens in one axis."""
    return _After.apply(hidden_TD, out_TA, eps, *weights)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        norm_D: torch.Tensor,
        bias_X: torch.Tensor | None,
        eps: float,
        *maps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(hidden_TD, norm_D, *maps)
        ctx.eps, ctx.biased = eps, bias_X is not None
        mixed_TX = compiled(before_attention)(hidden_TD, norm_D, bias_X, maps, eps)
        return mixed_TX, hidden_TD.detach()

    @staticmethod
    def backward(
        ctx: Any, mixed_grad_TX: torch.Tensor, residual_grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, norm_D, *maps = ctx.saved_tensors
        hidden_grad, norm_grad, bias_grad, *map_grads = compiled(before_gradients)(
            *(mixed_grad_TX, residual_grad_TD, hidden_TD, norm_D, tuple(maps), ctx.eps),
            biased=ctx.biased,
        )
        return hidden_grad, norm_grad, bias_grad, None, *map_grads


class _After(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: torch.Tensor, out_TA: torch.Tensor, eps: float, *weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        residual_TD, shared_TD, x_TD, inner_TW = compiled(after_attention)(
            hidden_TD, out_TA, weights, eps
        )
        ctx.save_for_backward(out_TA, x_TD, residual_TD, inner_TW, *weights)
        ctx.eps = eps
        return residual_TD, shared_TD, x_TD, x_TD.detach()

    @staticmethod
    def backward(
        ctx: Any,
        residual_grad_TD: torch.Tensor,
        shared_grad_TD: torch.Tensor,
        *x_grads: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        kept, weights = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        hidden_grad, out_grad, *grads = compiled(after_gradients)(
            residual_grad_TD, shared_grad_TD, x_grads, kept, weights, ctx.eps
        )
        return hidden_grad, out_grad, None, *grads
