"""The router's choice, gates and statistics in one Triton kernel each way, and its product on tensor cores.

z = W x + b in fp32, s = sigmoid(z). Experts are chosen by s + e (e the balancing bias, no gradient): a group's score is
the sum of its best k / g biased scores, the best g groups are kept, then the best k inside them, best first, ties to
the lower id (arXiv 2412.19437). Gates are the s of the chosen, divided by their sum + 1e-20 (not with k = 1), times the
scaling. Of the counted tokens: how many chose each expert, how often it is among the best k of s by row, and the sums
of s / (sum_e s + 1e-20) by row. A program takes tokens of one row and writes its own sums, which torch adds in a fixed
order: no atomics, the same bits in every run, nothing waits for the device.

Shapes: T tokens, token t of row t % B, E experts, K of them a token, D hidden size, P programs of a row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from common.errors import ConfigError
from trainer.kernels.routing_kernels import choose_kernel, gradient_kernel


class RouteConfig(NamedTuple):
    """Tokens at a time, how often, and warps of a program; the most registers of a thread (None: no limit)."""

    tokens: int
    steps: int
    warps: int
    registers: int | None = None


FORWARD = RouteConfig(tokens=2, steps=8, warps=1)
BACKWARD = RouteConfig(tokens=4, steps=4, warps=1, registers=128)


class Choice(NamedTuple):
    """How experts are chosen; see the top of this file."""

    rows: int
    topk: int
    groups: int
    group_topk: int
    scaling: float


class Routed(NamedTuple):
    """gates_TK fp32 and shares_BE fp32, with gradients to the logits; experts_TK int32; counts_E and best_counts_BE
    fp32 (whole numbers, exact to 2^24): of the choice, and of the best k of s. Statistics are of counted tokens.
    """

    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    counts_E: torch.Tensor
    best_counts_BE: torch.Tensor
    shares_BE: torch.Tensor


def route(
    logits_TE: torch.Tensor,
    expert_bias_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    *,
    rows: int,
    topk: int,
    groups: int,
    group_topk: int,
    scaling: float,
) -> Routed:
    """Experts, gates and statistics of logits_TE (fp32, the linear bias inside). expert_bias_E fp32, counted_T bool.

    ConfigError: E or groups no power of two, or numbers that do not fit each other.
    """
    choice = Choice(rows, topk, groups, group_topk, float(scaling))
    _check(choice, *logits_TE.shape)
    return Routed(*_Route.apply(logits_TE, expert_bias_E, counted_T, choice))


def routed(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    bias_E: torch.Tensor,
    expert_bias_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    *,
    rows: int,
    topk: int,
    groups: int,
    group_topk: int,
    scaling: float,
) -> Routed:
    """`route` of z = W x + b, with gradients of x, W and b, all bf16, at fp32 accuracy.

    Products of two bf16 numbers are exact in fp32. The gradient of z enters the products as two bf16 parts of 8 bits
    each, dz = high + low + r with |r| <= 2^-17 |dz|: one product of twice the length for dx, of twice the rows for dW.
    """
    choice = Choice(rows, topk, groups, group_topk, float(scaling))
    _check(choice, x_TD.shape[0], weight_ED.shape[0])
    return Routed(*_RoutedProduct.apply(x_TD, weight_ED, bias_E, expert_bias_E, counted_T, choice))


def _check(choice: Choice, tokens: int, num_experts: int) -> None:
    rows, topk, groups, group_topk, _ = choice
    powers = all(n > 0 and n & (n - 1) == 0 for n in (num_experts, groups))
    fits = powers and groups <= num_experts and 1 <= group_topk <= groups
    fits = fits and group_topk <= topk <= group_topk * (num_experts // groups)
    fits = fits and rows > 0 and tokens % rows == 0
    if not fits:
        raise ConfigError(
            "The routing kernel cannot take these sizes",
            got=f"{num_experts} experts, {tokens} tokens, {choice}",
            expected="experts and groups powers of two, groups kept <= experts a token <= experts in them, "
            "whole rows of tokens",
            remedy="route by another way",
        )


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_TE: torch.Tensor,
        expert_bias_E: torch.Tensor,
        counted_T: torch.Tensor | None,
        choice: Choice,
    ) -> tuple[torch.Tensor, ...]:
        logits_TE, ctx.choice = logits_TE.contiguous(), choice
        out = choose(logits_TE, None, expert_bias_E, counted_T, choice)
        ctx.save_for_backward(logits_TE, out[1], counted_T)
        ctx.mark_non_differentiable(*out[1:4])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(
        ctx: Any, gates_grad: Any, _e: None, _c: None, _b: None, shares_grad: Any
    ) -> tuple[torch.Tensor | None, ...]:
        logits_TE, experts_TK, counted_T = ctx.saved_tensors
        grads = (gates_grad, shares_grad)
        logits_grad, _ = logits_gradient(
            logits_TE, None, experts_TK, counted_T, *grads, ctx.choice, parts=False
        )
        return logits_grad, None, None, None


class _RoutedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_ED: torch.Tensor,
        bias_E: torch.Tensor,
        expert_bias_E: torch.Tensor,
        counted_T: torch.Tensor | None,
        choice: Choice,
    ) -> tuple[torch.Tensor, ...]:
        z_TE, bias_E, ctx.choice = wide_product(x_TD, weight_ED.t()), bias_E.contiguous(), choice
        out = choose(z_TE, bias_E, expert_bias_E, counted_T, choice)
        ctx.save_for_backward(x_TD, weight_ED, bias_E, z_TE, out[1], counted_T)
        ctx.mark_non_differentiable(*out[1:4])
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(
        ctx: Any, gates_grad: Any, _e: None, _c: None, _b: None, shares_grad: Any
    ) -> tuple[torch.Tensor | None, ...]:
        x_TD, weight_ED, bias_E, z_TE, experts_TK, counted_T = ctx.saved_tensors
        grads = (gates_grad, shares_grad)
        parts, bias_grad = logits_gradient(
            z_TE, bias_E, experts_TK, counted_T, *grads, ctx.choice, parts=True
        )
        x_grad = parts @ torch.cat([weight_ED, weight_ED])
        weight_grad = wide_product(parts.t(), x_TD).unflatten(0, (2, -1)).sum(dim=0)
        return x_grad, weight_grad.to(weight_ED.dtype), bias_grad.to(bias_E.dtype), None, None, None


def wide_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b of bf16 with an fp32 result: by tensor cores on CUDA, where other devices have no such product."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def choose(
    z_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    expert_bias_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    choice: Choice,
    config: RouteConfig = FORWARD,
) -> tuple[torch.Tensor, ...]:
    """The fields of Routed for logits z + bias; z fp32, contiguous. No gradient of its own."""
    (tokens, E), (rows, topk, groups, group_topk, scaling) = z_TE.shape, choice
    gates_TK = z_TE.new_empty(tokens, topk)
    experts_TK = z_TE.new_empty(tokens, topk, dtype=torch.int32)
    programs = triton.cdiv(tokens // rows, config.tokens * config.steps)
    sums_3BPE = z_TE.new_empty(3, rows, programs, E)
    if programs:
        choose_kernel[(programs, rows)](
            *(z_TE, *_or(z_TE, bias_E, counted_T), expert_bias_E.contiguous()),
            *(gates_TK, experts_TK, sums_3BPE, tokens // rows, rows, scaling),
            *(bias_E is not None, counted_T is not None),
            *(E, topk, triton.next_power_of_2(topk), groups, group_topk, *config[:2]),
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    counts_BE, best_counts_BE, shares_BE = sums_3BPE.sum(dim=2).unbind()
    return gates_TK, experts_TK, counts_BE.sum(dim=0), best_counts_BE, shares_BE


def _or(stand_in: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Arguments for the kernel, which reads none that is absent; bools as bytes."""
    given = [stand_in if t is None else t.contiguous() for t in tensors]
    return [t.view(torch.uint8) if t.dtype == torch.bool else t for t in given]


def logits_gradient(
    z_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    experts_TK: torch.Tensor,
    counted_T: torch.Tensor | None,
    gates_grad_TK: torch.Tensor | None,
    shares_grad_BE: torch.Tensor | None,
    choice: Choice,
    *,
    parts: bool,
    config: RouteConfig = BACKWARD,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of the logits, fp32 [T, E] or, with `parts`, bf16 [T, 2E] (its rounding, and the rest); and its sum
    over tokens, fp32 [E]. Gradients of gates and shares are fp32, None: zeros.
    """
    (tokens, E), rows = z_TE.shape, choice.rows
    if gates_grad_TK is None:
        gates_grad_TK = z_TE.new_zeros(experts_TK.shape)
    if shares_grad_BE is None:
        shares_grad_BE = z_TE.new_zeros(rows, E)
    grad = z_TE.new_empty(tokens, 2 * E, dtype=torch.bfloat16) if parts else torch.empty_like(z_TE)
    programs = triton.cdiv(tokens // rows, config.tokens * config.steps)
    sums_PE = z_TE.new_empty(programs * rows, E)
    if programs:
        gradient_kernel[(programs, rows)](
            *(z_TE, *_or(z_TE, bias_E, counted_T), experts_TK),
            *(gates_grad_TK.contiguous(), shares_grad_BE.contiguous(), grad, sums_PE),
            *(tokens // rows, rows, choice.scaling, bias_E is not None, counted_T is not None),
            *(parts, E, choice.topk, triton.next_power_of_2(choice.topk), *config[:2]),
            num_warps=config.warps,
            maxnreg=config.registers,
        )
    return grad, sums_PE.sum(dim=0)
