"""Errors of the expert layer's Triton kernels against plain fp64, for a CPU test, a GPU test and the benchmark.

Errors are norms of differences over norms, except of whole numbers, where they count what differs.
"""

from __future__ import annotations

from typing import Any

import torch

# Bounds: of fp32 from given logits, of fp32 behind a product of tensor cores, of what passes through bf16 a few times.
FP32, PRODUCT, BF16 = 1e-6, 1e-5, 6e-3


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over the norm of `want` (over 1 where that is zero)."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm()) / (float(want.norm()) or 1.0)


def plain_routing(
    logits_TE: torch.Tensor, bias_E: torch.Tensor, choice: dict[str, Any]
) -> torch.Tensor:
    """Experts [T, K] by stable sorts: ties go to the lower id."""
    topk, groups, kept = choice["topk"], choice["groups"], choice["group_topk"]
    biased_TE = torch.sigmoid(logits_TE) + bias_E
    by_group = biased_TE.unflatten(1, (groups, -1))
    score_TG = by_group.sort(dim=2, descending=True).values[:, :, : topk // kept].sum(dim=2)
    order_TG = score_TG.argsort(dim=1, descending=True, stable=True)[:, :kept]
    allowed_TG = torch.zeros_like(score_TG, dtype=torch.bool).scatter_(1, order_TG, True)
    biased_TE = by_group.masked_fill(~allowed_TG.unsqueeze(2), -torch.inf).flatten(1)
    return biased_TE.argsort(dim=1, descending=True, stable=True)[:, :topk]


def plain_statistics(
    logits_TE: torch.Tensor,
    experts_TK: torch.Tensor,
    counted_T: torch.Tensor | None,
    choice: dict[str, Any],
) -> dict[str, torch.Tensor]:
    """gates, counts, best_counts and shares of given experts, differentiable in the logits."""
    rows, topk, T = choice["rows"], choice["topk"], len(logits_TE)
    s = torch.sigmoid(logits_TE)
    weight_T = torch.ones_like(s[:, 0]) if counted_T is None else counted_T.to(s.dtype)
    gates = s.gather(1, experts_TK.long())
    if topk > 1:
        gates = gates / gates.sum(dim=1, keepdim=True)
    row_T = torch.arange(T, device=s.device) % rows
    by_row = torch.nn.functional.one_hot(row_T, rows).to(s.dtype) * weight_T.unsqueeze(1)
    chosen = torch.zeros_like(s).scatter_(1, experts_TK.long(), 1.0)
    best = s.argsort(dim=1, descending=True, stable=True)[:, :topk]
    return {
        "gates": gates * choice["scaling"],
        "counts": (chosen * weight_T.unsqueeze(1)).sum(dim=0),
        "best_counts": by_row.t() @ torch.zeros_like(s).scatter_(1, best, 1.0),
        "shares": by_row.t() @ (s / s.sum(dim=1, keepdim=True)),
    }


def _router_leaves(
    tokens: int, experts: int, hidden: int, make: torch.Generator
) -> list[torch.Tensor]:
    """x, W and b in bf16; logits of about unit size."""
    sizes = [((tokens, hidden), 1.0), ((experts, hidden), hidden**-0.5), ((experts,), 0.1)]
    drawn = [torch.randn(shape, device=make.device, generator=make) * size for shape, size in sizes]
    return [t.bfloat16().requires_grad_() for t in drawn]


def routing_errors(
    device: str, tokens: int, experts: int, hidden: int, choice: dict[str, Any], padded: bool
) -> dict[str, float]:
    """Of `routed` (bf16 x, W, b) and of `route` on its logits; at most 1: each is over its bound.

    `chosen`: share of tokens whose experts differ, which near ties may do, over 2e-3.
    """
    from trainer.kernels.routing import route, routed

    make = torch.Generator(device).manual_seed(tokens + experts)
    x, weight, bias = _router_leaves(tokens, experts, hidden, make)
    balance = 0.1 * torch.randn(experts, device=device, generator=make)
    counted = torch.rand(tokens, device=device, generator=make) > 0.3 if padded else None
    got = routed(x, weight, bias, balance, counted, **choice)
    wides = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    logits = wides[0] @ wides[1].t() + wides[2]
    narrow = logits.detach().float().requires_grad_()
    again = route(narrow, balance, counted, **choice)
    want = plain_statistics(logits, got.experts_TK, counted, choice)
    exact = plain_statistics(narrow.detach().double(), again.experts_TK, counted, choice)
    plain = plain_routing(narrow.detach(), balance, choice)
    weigh = [torch.randn(t.shape, device=device, generator=make) for t in got]
    sums = [
        (g * weigh[0]).sum() + (s * weigh[4]).sum()
        for g, s in (
            (got.gates_TK, got.shares_BE),
            (want["gates"], want["shares"]),
            (again.gates_TK, again.shares_BE),
        )
    ]
    grads = torch.autograd.grad(sums[0], [x, weight, bias])
    want_grads = torch.autograd.grad(sums[1], [logits, *wides])
    (narrow_grad,) = torch.autograd.grad(sums[2], narrow)
    same = (again.experts_TK == got.experts_TK).all(dim=1)
    errors = {
        "chosen": float((again.experts_TK != plain).any(dim=1).double().mean()) / 2e-3,
        "chosen of the product": float((~same).double().mean()) / 2e-3,
        "gates": gap(got.gates_TK, want["gates"]) / PRODUCT,
        "shares": gap(got.shares_BE, want["shares"]) / PRODUCT,
        "gates of logits": gap(again.gates_TK, exact["gates"]) / FP32,
        "shares of logits": gap(again.shares_BE, exact["shares"]) / FP32,
        "counts": float((got.counts_E - want["counts"]).abs().max()) / 0.5,
        # Near ties may fall the other way: two counts of one token differ.
        "best_counts": float((got.best_counts_BE - want["best_counts"]).abs().sum())
        / max(1.0, 4e-3 * tokens),
        "logits' gradient": gap(narrow_grad[same], want_grads[0][same]) / 1e-5,
    }
    names = ("x", "weight", "bias")
    pairs = zip(names, grads, want_grads[1:], strict=True)
    # Half a unit of bf16 is 2^-9; uniform rounding leaves 1.1e-3 of the norm.
    return errors | {name: gap(one, other) / 3e-3 for name, one, other in pairs}


def dispatch_errors(
    device: str, experts_TK: torch.Tensor, num_experts: int, first: int | None = None
) -> dict[str, float]:
    """How many entries of order, place, rows, ends, longest, held, and of the tiles of 64 rows, are wrong."""
    from trainer.kernels.dispatch import sort_slots, tiles

    experts_TK = experts_TK.to(device, torch.int32)
    slots, keys = sort_slots(experts_TK, num_experts, first), experts_TK.flatten().long()
    if first is not None:
        keys = keys - first
        keys[(keys < 0) | (keys >= num_experts)] = num_experts
    order = keys.argsort(stable=True)
    rows = keys.bincount(minlength=num_experts)[:num_experts]
    held = len(keys) if slots.held_1 is None else int(slots.held_1)
    wrong = {
        "order": slots.order_N != order,
        "place": slots.place_TK.flatten()[order] != torch.arange(len(keys), device=device),
        "rows": slots.rows_E != rows,
        "ends": slots.ends_E != rows.cumsum(0),
        "longest": slots.longest_E != rows.argsort(descending=True, stable=True),
        "held": (rows.sum() != held).unsqueeze(0),
    }
    tile_expert, tile_start = tiles(slots.rows_E, 64, len(keys))
    begin = (rows.cumsum(0) - rows).tolist()
    want = [(e, begin[e] + i) for e, n in enumerate(rows.tolist()) for i in range(0, n, 64)]
    got = list(zip(tile_expert.tolist(), tile_start.tolist(), strict=True))
    padding = [(-1, 0)] * (len(keys) // 64 + num_experts - len(want))
    return {name: float(w.sum()) for name, w in wrong.items()} | {"tiles": got != want + padding}


def plain_experts(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    base_TD: torch.Tensor | None,
    *weights: torch.Tensor,
    first: int = 0,
) -> torch.Tensor:
    """base + sum_k gate (W2 relu(W1 x + b1)^2 + b2), expert by expert from `first` on."""
    out = torch.zeros_like(x_TD) if base_TD is None else base_TD
    for expert, (w1, b1, w2, b2) in enumerate(zip(*weights, strict=True)):
        token, slot = torch.nonzero(experts_TK == first + expert, as_tuple=True)
        inner = (x_TD[token] @ w1.t() + b1).relu().square()
        out = out.index_add(0, token, gates_TK[token, slot].unsqueeze(1) * (inner @ w2.t() + b2))
    return out


def expert_inputs(
    device: str, experts_TK: torch.Tensor, sizes: tuple[int, int, int], *, base: bool = True
) -> list[torch.Tensor | None]:
    """x, gates, base, fc1, bias1, fc2, bias2 as leaves; sizes: experts, hidden, width."""
    (E, D, F), (T, K) = sizes, experts_TK.shape
    make = torch.Generator(device).manual_seed(T + E)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=make)  # noqa: E731
    tensors = [draw(T, D), torch.rand(T, K, device=device, generator=make) + 0.1, draw(T, D)]
    tensors += [draw(E, F, D) * D**-0.5, 0.3 * draw(E, F), draw(E, D, F) * F**-0.5, draw(E, D)]
    leaves: list[Any] = [(t if i == 1 else t.bfloat16()) for i, t in enumerate(tensors)]
    leaves = [t.requires_grad_() for t in leaves]
    return leaves if base else [*leaves[:2], None, *leaves[3:]]


NAMES = ("out", "x", "gates", "base", "fc1", "bias1", "fc2", "bias2")


def expert_results(
    leaves: list[Any], experts_TK: torch.Tensor, num_experts: int, first: int | None = None
) -> dict[str, torch.Tensor]:
    """Output and gradients of `fused_experts` for a drawn gradient of the output; first: as of `sort_slots`."""
    from trainer.kernels.dispatch import sort_slots
    from trainer.kernels.experts import fused_experts

    x, gates, base, *weights = leaves
    slots = sort_slots(experts_TK.to(x.device, torch.int32), num_experts, first)
    out = fused_experts(x, gates, slots, [] if base is None else [base], *weights)
    return _named(leaves, out)


def _named(leaves: list[Any], out: torch.Tensor) -> dict[str, torch.Tensor]:
    make = torch.Generator(out.device).manual_seed(5)
    weigh = torch.randn(out.shape, device=out.device, generator=make).bfloat16().to(out.dtype)
    grads = iter(torch.autograd.grad(out, [t for t in leaves if t is not None], weigh))
    values = [out.detach(), *(None if t is None else next(grads) for t in leaves)]
    return {name: v for name, v in zip(NAMES, values, strict=True) if v is not None}


def expert_errors(
    device: str,
    experts_TK: torch.Tensor,
    sizes: tuple[int, int, int],
    *,
    base: bool = True,
    first: int | None = None,
) -> dict[str, float]:
    """Of the output and every gradient, over BF16; infinite where an expert without rows has a gradient.

    first: the sizes' experts are those from there on, of more.
    """
    leaves = expert_inputs(device, experts_TK, sizes, base=base)
    wides = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    experts_TK = experts_TK.to(device)
    begin, end = first or 0, (first or 0) + sizes[0]
    want = _named(wides, plain_experts(*wides[:2], experts_TK, *wides[2:], first=begin))
    got = expert_results(leaves, experts_TK, sizes[0], first)
    idle = experts_TK.flatten().long().bincount(minlength=end)[begin:end] == 0
    errors = {name: gap(got[name], want[name]) / BF16 for name in want}
    for name in ("fc1", "bias1", "fc2", "bias2"):
        if bool((got[name][idle] != 0).any()) or got[name].dtype != torch.bfloat16:
            errors[name] = float("inf")
    return errors


def sum_errors(
    device: str, experts_TK: torch.Tensor, sizes: tuple[int, int, int]
) -> dict[str, float]:
    """Of what two backward passes add to fp32 sums, against the gradients that are given back, over bounds of these."""
    from trainer.kernels.dispatch import sort_slots
    from trainer.kernels.experts import fused_experts

    leaves = expert_inputs(device, experts_TK, sizes, base=False)
    x, gates, _, *weights = leaves
    want = expert_results(leaves, experts_TK, sizes[0])
    sums = [torch.randn(w.shape, device=device) for w in weights]
    before = [total.clone() for total in sums]
    slots = sort_slots(experts_TK.to(device, torch.int32), sizes[0])
    for _ in range(2):
        out = fused_experts(x, gates, slots, [], *weights, sums)
        make = torch.Generator(device).manual_seed(5)
        weigh = torch.randn(out.shape, device=device, generator=make).bfloat16()
        grads = torch.autograd.grad(out, [x, gates, *weights], weigh, allow_unused=True)
        assert all(grad is None for grad in grads[2:])
    added = [(after - old) / 2 for after, old in zip(sums, before, strict=True)]
    # The gradients given back are rounded to bf16, half a unit at most: 2^-9.
    names = zip(NAMES[4:], added, strict=True)
    return {name: gap(total, want[name]) / 2**-9 for name, total in names} | {
        "x": gap(grads[0], want["x"]) / 1e-7,
        "gates": gap(grads[1], want["gates"]) / 1e-7,
    }


def outer_errors(
    device: str, experts_TK: torch.Tensor, sizes: tuple[int, int, int], piece: int
) -> dict[str, float]:
    """Of weight gradients added to fp32 sums and of written ones, from rows in pieces, over bounds of fp32 and bf16."""
    from trainer.kernels.dispatch import sort_slots
    from trainer.kernels.experts_outer import outer, pieces

    (E, D, F), (T, K) = sizes, experts_TK.shape
    make = torch.Generator(device).manual_seed(T)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=make)  # noqa: E731
    slots = sort_slots(experts_TK.to(device, torch.int32), E)
    cut = pieces(slots, piece)
    narrow, wide, side = draw(T * K, F).bfloat16(), draw(T, D).bfloat16(), draw(T * K, 16)
    side[:, 2:] = 1.0
    side = side.bfloat16()
    of = torch.arange(E, device=device).repeat_interleave(slots.rows_E)
    hot_NE = torch.nn.functional.one_hot(of, E).double()
    rows = wide.double()[slots.order_N.long() // K]
    by_gate = rows * side[:, :2].double().sum(dim=1, keepdim=True)
    wants = {
        False: (torch.einsum("ne,nf,nd->efd", hot_NE, narrow.double(), rows), narrow.double()),
        True: (torch.einsum("ne,nd,nf->edf", hot_NE, rows, narrow.double()), by_gate),
    }
    errors = {}
    for gated, (weight, of_bias) in wants.items():
        bias = hot_NE.t() @ of_bias
        for add, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            sums = [draw(*want.shape).to(dtype) for want in (weight, bias)]
            before = [(total if add else torch.zeros_like(total)).double() for total in sums]
            outer(narrow, wide, side, slots, *sums, gated=gated, add=add, cut=cut)
            # Tensor cores add in fp32 and drop bits: half a unit for each product of 16 rows.
            bound = FP32 + piece / 16 * 2**-24 if add else BF16
            for name, total, old, want in zip("wb", sums, before, (weight, bias), strict=True):
                errors[f"{name}, gated {gated}, add {add}"] = gap(total, old + want) / bound
    return errors
