"""What surrounds attention in a layer, as plain functions and as three autograd functions.

`before_attention` is a norm and a projection, `after_attention` the output projection, the residual and a norm,
`two_products` the expert that every token visits (or the dense MLP). `before`, `after` and `shared_expert` compute the
same on CUDA: forward by torch.compile, one compilation for all layers of a kind, backward written out
(`before_gradients`, `after_gradients`, `shared_gradients`). Why written out: autograd adds up the gradients of a tensor
with two readers by a kernel of its own, three times the tensor's bytes, and the compiler reads a norm's inputs twice,
for its gradient and for its weight's (81 and 48 us at 32,768 tokens on an H200). So such a tensor is given out once for
each reader, and one kernel (trainer/kernels/norm.py) adds up what its readers have, the routed experts' rows too, and
makes all sums over tokens on the way. Likewise residual and shared expert leave apart: the kernel that sums over
experts adds both.

The shared expert stands apart from `after` so that it can run, both ways, while rows are between ranks (crossing.py).

Kept for the backward pass: the layer's input, attention's output, the residual, its norm (which the experts keep too)
and the inner states before their activation.

Shapes: T tokens, D hidden, X columns of the projection, A attention's output, W width of the MLP.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trainer.megatron.compiled import compiled

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Slotted, Unsummed

_linear = torch.nn.functional.linear
Grads = tuple[torch.Tensor, ...]


class OfNorm(NamedTuple):
    """What `norm_gradients` gives: gradients of h and of the weight, x where it was asked for, and the sums over tokens
    of the gradient of h and of `other`, [D]; all in the dtype of what they are the gradients of.
    """

    hidden_TD: torch.Tensor
    weight_D: torch.Tensor
    normed_TD: torch.Tensor | None
    hidden_sum_D: torch.Tensor
    other_sum_D: torch.Tensor


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, x): the layer's output is residual and what routed and shared experts make of x, its norm.

    weights: proj [D, A], proj_bias, norm. Any leading axes.
    """
    proj, proj_bias, norm = weights
    residual_TD = hidden_TD + _linear(out_TA, proj, proj_bias)
    return residual_TD, rms_norm(residual_TD, norm, eps).to(hidden_TD.dtype)


def two_products(
    x_TD: torch.Tensor, weights: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(W2 relu(W1 x + b1)^2 + b2, W1 x + b1). weights: fc1 [W, D], fc1_bias, fc2 [D, W], fc2_bias. Any leading axes."""
    fc1, fc1_bias, fc2, fc2_bias = weights
    inner_TW = _linear(x_TD, fc1, fc1_bias)
    return _linear(torch.relu(inner_TW).square(), fc2, fc2_bias), inner_TW


def before_gradients(
    mixed_grad_TX: torch.Tensor,
    residual_grad_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    maps: tuple[torch.Tensor, ...],
    eps: float,
    *,
    biased: bool,
    out_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Of hidden, norm, bias (None if there is none) and maps; residual_grad: of the other reader of hidden, added. out:
    takes that of hidden.
    """
    grads = [mixed_grad_TX @ _joined(maps)]
    inputs = (hidden_TD, norm_D, grads, residual_grad_TD, eps)
    of = norm_gradients(*inputs, normed=True, out_TD=out_TD)
    joined = mixed_grad_TX.t() @ of.normed_TD
    bias_grad = _sum(mixed_grad_TX) if biased else None
    return of.hidden_TD, of.weight_D, bias_grad, *joined.split([len(of) for of in maps])


def after_gradients(
    residual_grad_TD: torch.Tensor,
    x_grads: list[torch.Tensor],
    slotted: Sequence[Slotted],
    kept: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    eps: float,
) -> Grads:
    """Of hidden, out, proj, proj_bias, norm, and the sum of residual_grad over tokens. x_grads: of readers of x, one to
    three; slotted: of one more, by slots (trainer/kernels/norm.py). kept: out and residual; weights: proj and norm.
    """
    (out_TA, residual_TD), (proj, norm) = kept, weights
    of = norm_gradients(residual_TD, norm, x_grads, residual_grad_TD, eps, slotted)
    return (
        of.hidden_TD,
        of.hidden_TD @ proj,
        of.hidden_TD.t() @ out_TA,
        of.hidden_sum_D,
        of.weight_D,
        of.other_sum_D,
    )


def shared_gradients(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, inner_TW: torch.Tensor, fc1: Any, fc2: Any
) -> Grads:
    """Of `two_products`' x, fc1, fc1_bias and fc2."""
    inner_grad_TW, squared_TW, fc1_bias_grad = relu_squared_gradients(grad_TD @ fc2, inner_TW)
    return (
        inner_grad_TW @ fc1,
        inner_grad_TW.t() @ x_TD,
        fc1_bias_grad,
        grad_TD.t() @ squared_TW,
    )


def norm_gradients(
    h_TD: torch.Tensor,
    weight_D: torch.Tensor,
    grads: list[torch.Tensor],
    other_TD: torch.Tensor,
    eps: float,
    slotted: Sequence[Slotted] = (),
    *,
    normed: bool = False,
    out_TD: torch.Tensor | None = None,
) -> OfNorm:
    """Of x = `rms_norm` of h, from what its readers have, grads and slotted; other is added to that of h, which is
    written to out, if given. One kernel on CUDA, plain elsewhere; each result is rounded once.
    """
    if h_TD.is_cuda:
        from trainer.kernels import norm

        grads, other_TD = [grad.contiguous() for grad in grads], other_TD.contiguous()
        hidden_grad, x, sums_3D = norm.norm_gradients(
            *(h_TD, weight_D, grads, other_TD, eps, slotted), normed=normed, out_TD=out_TD
        )
        weight_grad, hidden_sum, other_sum = sums_3D.to(weight_D.dtype)
        return OfNorm(hidden_grad, weight_grad, x, hidden_sum, other_sum)
    for rows_ND, place_TK, held_1 in slotted:
        there_TK = place_TK >= 0 if held_1 is None else place_TK < held_1
        rows_TKD = torch.where(there_TK.unsqueeze(2), rows_ND[place_TK.long()], 0)
        grads = [*grads, *rows_TKD.unbind(1)]
    h, weight = _wide(h_TD), _wide(weight_D)
    grad = functools.reduce(torch.add, map(_wide, grads))
    scale = torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps)
    normal, turned = h * scale, grad * weight
    by_norm = (turned - normal * (turned * normal).mean(dim=-1, keepdim=True)) * scale
    total, dtype = by_norm + other_TD, weight_D.dtype
    out_TD = torch.empty_like(h_TD) if out_TD is None else out_TD
    return OfNorm(
        out_TD.copy_(total),
        (grad * normal).sum(dim=0).to(dtype),
        (normal * weight).to(h_TD.dtype) if normed else None,
        total.sum(dim=0).to(dtype),
        _sum(other_TD).to(dtype),
    )


def relu_squared_gradients(grad_TW: torch.Tensor, inner_TW: torch.Tensor) -> Grads:
    """(gradient of inner, relu(inner)^2, sum of the gradient over tokens [W]), in inner's dtype; grad: of the second.
    One kernel on CUDA, plain elsewhere.
    """
    if inner_TW.is_cuda:
        from trainer.kernels import relu_squared

        grad, squared, total = relu_squared.relu_squared_gradients(grad_TW, inner_TW)
        return grad, squared, total.to(inner_TW.dtype)
    positive = torch.relu(_wide(inner_TW))
    grad = _wide(grad_TW) * positive * 2
    return tuple(t.to(inner_TW.dtype) for t in (grad, positive.square(), grad.sum(dim=0)))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 or wider, not rounded back (arXiv 1910.07467)."""
    x = _wide(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight.to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(grad_TX: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(grad_TX.dtype, torch.float32)
    return grad_TX.sum(dim=0, dtype=wide).to(grad_TX.dtype)


def _joined(maps: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return maps[0] if len(maps) == 1 else torch.cat(maps)


def before(
    hidden_TD: torch.Tensor,
    norm_D: torch.Tensor,
    bias_X: torch.Tensor | None,
    maps: tuple[torch.Tensor, ...],
    eps: float,
    unsummed: Unsummed | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`before_attention` compiled, and hidden for its other reader, the residual; tokens in one axis.

    unsummed: has room for the gradient of hidden (trainer/kernels/norm.py).
    """
    return _Before.apply(hidden_TD, norm_D, bias_X, eps, unsummed, *maps)


def after(
    hidden_TD: torch.Tensor,
    out_TA: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    fc2_bias_D: torch.Tensor,
    eps: float,
    unsummed: Unsummed | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(residual, x, x, x): `after_attention` compiled, x for three readers; tokens in one axis.

    fc2_bias: of the shared expert. It is not used here, but its gradient is the sum over tokens of the residual's,
    which is made here on the way. unsummed: has room for x, and one reader of x leaves its gradient there
    (trainer/kernels/norm.py).
    """
    return _After.apply(hidden_TD, out_TA, fc2_bias_D, eps, unsummed, *weights)


def shared_expert(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weights: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(shared, residual): `two_products` compiled, tokens in one axis; both must go into one sum, by their readers.

    weights: as of `two_products`; fc2_bias gets its gradient from `after`.
    """
    *own, fc2_bias = weights
    return _Shared.apply(x_TD, residual_TD, fc2_bias.detach(), *own)


class _Before(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        norm_D: torch.Tensor,
        bias_X: torch.Tensor | None,
        eps: float,
        unsummed: Unsummed | None,
        *maps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(hidden_TD, norm_D, *maps)
        ctx.eps, ctx.biased, ctx.unsummed = eps, bias_X is not None, unsummed
        mixed_TX = compiled(before_attention)(hidden_TD, norm_D, bias_X, maps, eps)
        return mixed_TX, hidden_TD.detach()

    @staticmethod
    def backward(
        ctx: Any, mixed_grad_TX: torch.Tensor, residual_grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_TD, norm_D, *maps = ctx.saved_tensors
        hidden_grad, norm_grad, bias_grad, *map_grads = before_gradients(
            *(mixed_grad_TX, residual_grad_TD, hidden_TD, norm_D, tuple(maps), ctx.eps),
            biased=ctx.biased,
            out_TD=None if ctx.unsummed is None else ctx.unsummed.room_for_gradient(hidden_TD),
        )
        return hidden_grad, norm_grad, bias_grad, None, None, *map_grads


def _after_attention_into(
    x_TD: torch.Tensor,
    hidden_TD: torch.Tensor,
    out_TA: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    eps: float,
) -> torch.Tensor:
    """The residual of `after_attention`; its x goes where the first argument lies, and compiled there alone."""
    residual_TD, normed_TD = after_attention(hidden_TD, out_TA, weights, eps)
    x_TD.copy_(normed_TD)
    return residual_TD


class _After(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        out_TA: torch.Tensor,
        _fc2_bias_D: torch.Tensor,
        eps: float,
        unsummed: Unsummed | None,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        room = torch.empty_like if unsummed is None else unsummed.room_for_x
        x_TD = room(hidden_TD)
        residual_TD = compiled(_after_attention_into)(x_TD, hidden_TD, out_TA, weights, eps)
        proj, _, norm = weights
        ctx.save_for_backward(out_TA, residual_TD, proj, norm)
        ctx.eps, ctx.unsummed = eps, unsummed
        # No zeros for readers that there are not, or that left theirs elsewhere.
        ctx.set_materialize_grads(False)
        return residual_TD, x_TD, x_TD.detach(), x_TD.detach()

    @staticmethod
    def backward(
        ctx: Any, residual_grad_TD: torch.Tensor, *x_grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        kept, weights = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        given = [grad for grad in x_grads if grad is not None]
        slotted = [] if ctx.unsummed is None else ctx.unsummed.take()
        hidden_grad, out_grad, *grads, fc2_bias_grad = after_gradients(
            residual_grad_TD, given, slotted, kept, weights, ctx.eps
        )
        return hidden_grad, out_grad, fc2_bias_grad, None, None, *grads


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        residual_TD: torch.Tensor,
        fc2_bias_D: torch.Tensor,
        fc1: torch.Tensor,
        fc1_bias: torch.Tensor,
        fc2: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (fc1, fc1_bias, fc2, fc2_bias_D)
        shared_TD, inner_TW = compiled(two_products)(x_TD, weights)
        ctx.save_for_backward(x_TD, inner_TW, fc1, fc2)
        return shared_TD, residual_TD.detach()

    @staticmethod
    def backward(
        ctx: Any, grad_TD: torch.Tensor, residual_grad_TD: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        one = grad_TD.data_ptr() == residual_grad_TD.data_ptr()
        assert one, "residual and shared expert go into one sum: their gradients are one tensor"
        x_grad, *grads = shared_gradients(grad_TD, *ctx.saved_tensors)
        return x_grad, residual_grad_TD, None, *grads
