"""Errors of the kernels between products in the backward pass (norm, relu^2), for a CPU and a GPU test."""

from __future__ import annotations

from typing import Any

import torch

from tests.trainer.made_up_rank import Alone
from tests.trainer.moe_kernel_errors import gap

EPS = 1e-5
WEIGHTS = ("proj", "proj_bias", "norm", "fc1", "fc1_bias", "fc2", "fc2_bias")
MOE = ("router", "router_bias", "w1", "b1", "w2", "b2")


def norm_errors(
    device: str, tokens: int, hidden: int, topk: int, readers: int, ranks: int = 1
) -> dict[str, float]:
    """Of `norm_gradients` against fp64 on the same bf16 inputs; topk 0: no rows of slots. ranks: half of the slots are
    of other ranks, which give a row a token.
    """
    from trainer.kernels.norm import Slotted, norm_gradients
    from trainer.megatron import around_attention

    make = torch.Generator(device).manual_seed(tokens + hidden)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, device=device).bfloat16()

    h, weight, other = draw(tokens, hidden), draw(hidden), draw(tokens, hidden)
    grads = [draw(tokens, hidden) for _ in range(readers)]
    order = torch.randperm(tokens * topk, generator=make, device=device).int()
    slotted = [Slotted(draw(tokens * topk, hidden), order.view(tokens, topk))] if topk else []
    if ranks > 1:
        held = torch.tensor([tokens * topk // 2], dtype=torch.int32, device=device)
        rows = draw(tokens * (ranks - 1), hidden)
        place = torch.arange(len(rows), dtype=torch.int32, device=device).view(tokens, ranks - 1)
        slotted = [slotted[0]._replace(held_1=held), Slotted(rows, place)]
        slotted[0].rows_ND[int(held) :] = torch.nan  # never read
    got, x, sums = norm_gradients(h, weight, grads, other, EPS, slotted, normed=True)
    wide = [
        Slotted(of.rows_ND.double().cpu(), *(t if t is None else t.cpu() for t in of[1:]))
        for of in slotted
    ]
    of = around_attention.norm_gradients(
        *(h.double().cpu(), weight.double().cpu(), [g.double().cpu() for g in grads]),
        *(other.double().cpu(), EPS, wide),
        normed=True,
    )
    want = {"hidden": of.hidden_TD, "x": of.normed_TD, "weight sum": of.weight_D}
    want |= {"hidden sum": of.hidden_sum_D, "other sum": of.other_sum_D}
    return {
        name: gap(one.cpu(), want[name]) for name, one in zip(want, (got, x, *sums), strict=True)
    }


def relu_errors(device: str, tokens: int, width: int) -> dict[str, float]:
    """Of `relu_squared_gradients` against autograd in fp64 on the same bf16 inputs."""
    from trainer.kernels.relu_squared import relu_squared_gradients

    make = torch.Generator(device).manual_seed(tokens + width)
    grad, inner = (
        torch.randn(tokens, width, generator=make, device=device).bfloat16() for _ in range(2)
    )
    wide = inner.double().requires_grad_()
    squared = torch.relu(wide).square()
    (want,) = torch.autograd.grad(squared, wide, grad.double())
    got = relu_squared_gradients(grad, inner)
    wants = {"gradient": want, "value": squared, "gradient sum": want.sum(dim=0)}
    return {name: gap(one, wants[name]) for name, one in zip(wants, got, strict=True)}


def layer_gradients(
    device: str, sizes: tuple[int, ...], *, left: bool, ranks: int = 1
) -> dict[str, torch.Tensor]:
    """The output and all gradients of `after`, router and experts; left: the experts leave theirs by slots. ranks: 2
    with one that brings nothing.
    """
    from trainer.kernels.dispatch import sort_slots
    from trainer.kernels.experts import fused_experts
    from trainer.kernels.norm import Unsummed
    from trainer.kernels.routing import routed
    from trainer.megatron.around_attention import after, shared_expert
    from trainer.megatron.crossing import Crossing, GatheredRows

    T, D, W, E, F = sizes
    make = torch.Generator(device).manual_seed(T)
    shapes: dict[str, tuple[int, ...]] = {"hidden": (T, D), "out": (T, D)}
    shapes |= zip(WEIGHTS, ((D, D), (D,), (D,), (W, D), (W,), (D, W), (D,)), strict=True)
    shapes |= zip(MOE, ((E, D), (E,), (E, F, D), (E, F), (E, D, F), (E, D)), strict=True)
    leaves = {
        name: torch.randn(*shape, generator=make, device=device)
        .mul_(shape[-1] ** -0.5 if len(shape) > 1 and name not in ("hidden", "out") else 1.0)
        .bfloat16()
        .requires_grad_()
        for name, shape in shapes.items()
    }
    kept = GatheredRows() if left else None
    crossing = Crossing(Alone(own=True), kept) if ranks > 1 else None
    unsummed = crossing or Unsummed() if left else None
    inputs, weights = (leaves["hidden"], leaves["out"]), [leaves[n] for n in WEIGHTS]
    residual, x, router_x, shared_x = after(*inputs, tuple(weights[:3]), weights[-1], EPS, unsummed)
    shared, residual = shared_expert(shared_x, residual, tuple(weights[3:]))
    choice: dict[str, Any] = {"rows": 2, "topk": 4, "groups": 4, "group_topk": 2, "scaling": 2.5}
    balance = torch.zeros(E, device=device)
    got = routed(router_x, leaves["router"], leaves["router_bias"], balance, None, **choice)
    experts, bases = [leaves[n] for n in MOE[2:]], [shared, residual]
    if crossing is None:
        slots = sort_slots(got.experts_TK, E)
        total = fused_experts(x, got.gates_TK, slots, bases, *experts, unsummed=unsummed)
    else:
        gathered = crossing.gather(x)
        crossing.send_choices(got.gates_TK, got.experts_TK)
        gates_XK, experts_XK = crossing.gathered_choices(got.gates_TK, got.experts_TK)
        inputs = (gathered(), gates_XK, sort_slots(experts_XK, E, 0), [])
        sums = fused_experts(*inputs, *experts, unsummed=unsummed, send=crossing.send)
        total = crossing.give_back(sums, lambda: bases)
        assert crossing.exchange.in_place == [left, True], "x, where `after` writes it, and choices"
    grad = torch.randn(T, D, generator=make, device=device).bfloat16()
    shares_grad = torch.randn(got.shares_BE.shape, generator=make, device=device)
    grads = torch.autograd.grad((total, got.shares_BE), list(leaves.values()), (grad, shares_grad))
    return {"total": total} | dict(zip(leaves, grads, strict=True))


def layer_errors(
    device: str, sizes: tuple[int, ...], *, left: bool = True, ranks: int = 1
) -> dict[str, float]:
    """Of every gradient, against experts that are all here and return it."""
    got = layer_gradients(device, sizes, left=left, ranks=ranks)
    want = layer_gradients(device, sizes, left=False)
    return {name: gap(got[name], want[name]) for name in want}
