"""The router: DeepSeek-V3's (arXiv 2412.19437) by indices, its statistics exact for packed rows.

z = W x + b in fp32, s = sigmoid(z). Experts are chosen by s + e (e the balancing bias, no gradient): the groups with
the largest sums of their best k / g biased scores, g groups kept, then the best k inside them. Gates are the unbiased
s of the chosen, divided by their sum + 1e-20, times the scaling. With one expert a token the gate is s times the
scaling (as in Megatron): divided by itself it would teach the router nothing.

Parameters, buffers and the bias update stay Megatron's (TopKRouter, finalize_model_grads); its routing is not used
(megatron/core/transformer/moe): dense [tokens, experts] maps of probabilities and choices; with a padding mask and
several rows, router.py:310 divides by the mean row length of the micro-batch, so the balance loss would depend on the
micro-batch size; router.py:509 combines a [tokens, experts] map with a [tokens] mask and fails; moe_utils.py:866
keeps the first layer count for the life of the process; the gating product is an fp32 one without tensor cores.

Shapes: T = S * B tokens in the order of hidden states, E experts, K of them a token, G groups of M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from trainer.megatron.compiled import compiled
from trainer.megatron.experts import Compute

# Is told gates and experts before the statistics are made of them.
Chosen = Callable[[torch.Tensor, torch.Tensor], None]


class Routing(NamedTuple):
    """Of T tokens: gates_TK (with gradients) and experts_TK; counts_E, how many counted tokens each expert has;
    best_counts_BE and shares_BE (with gradients), what the balance loss of each of the B rows is made of.
    """

    gates_TK: torch.Tensor
    experts_TK: torch.Tensor
    counts_E: torch.Tensor
    best_counts_BE: torch.Tensor
    shares_BE: torch.Tensor


class StudentRouter(TopKRouter):
    """`aux_loss_sum`: balance losses of the rows routed since it was last read, coefficient included; see
    `take_aux_loss`. `local_tokens_per_expert` [E] fp32: routed tokens of this step, without padding.

    Both are changed in place, so that a recorded CUDA graph goes on counting. compute: `triton` routes by the kernel of
    trainer/kernels/routing.py, `loop` by plain torch, which is its reference.
    """

    def __init__(self, *arguments: object, compute: Compute, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        self.compute = compute
        self.aux_loss_sum = torch.zeros((), device=torch.cuda.current_device())

    def take_aux_loss(self) -> torch.Tensor:
        """The sum over this rank's rows since the last call; starts again from zero."""
        taken = self.aux_loss_sum.clone()
        self.aux_loss_sum.zero_()
        return taken

    def forward(
        self,
        hidden_SBD: torch.Tensor,
        padding_SB: torch.Tensor | None = None,
        chosen: Chosen | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates [T, K] (fp32, or fp64 of fp64 states) and experts [T, K]; padding is routed like any token."""
        self._maintain_float32_expert_bias()
        if self.compute == "triton":
            return self._counted(self._by_kernel(hidden_SBD, padding_SB), chosen)
        logits_SBE = _RouterProduct.apply(hidden_SBD, self.weight, self.bias)
        return self.routing(logits_SBE, padding_SB, chosen)

    def routing(
        self,
        logits_SBE: torch.Tensor,
        padding_SB: torch.Tensor | None = None,
        chosen: Chosen | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and experts of the logits; under gradients the tokens are counted and the balance loss attached."""
        counted_T = None if padding_SB is None else ~padding_SB.flatten()
        routing = route(
            logits_SBE.flatten(0, 1), self.expert_bias, counted_T, **self._rules(logits_SBE)
        )
        return self._counted(routing, chosen)

    def _by_kernel(self, hidden_SBD: torch.Tensor, padding_SB: torch.Tensor | None) -> Routing:
        from trainer.kernels.routing import routed

        counted_T = None if padding_SB is None else ~padding_SB.flatten()
        weights = (self.weight, self.bias, self.expert_bias)
        return routed(hidden_SBD.flatten(0, 1), *weights, counted_T, **self._rules(hidden_SBD))

    def _rules(self, rows_SBX: torch.Tensor) -> dict[str, Any]:
        config = self.config
        return {
            "rows": rows_SBX.shape[1],
            "topk": self.topk,
            "groups": config.moe_router_num_groups,
            "group_topk": config.moe_router_group_topk,
            "scaling": config.moe_router_topk_scaling_factor,
        }

    def _counted(
        self, routing: Routing, chosen: Chosen | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gates_TK = routing.gates_TK
        if chosen is not None:
            chosen(gates_TK, routing.experts_TK)
        if torch.is_grad_enabled():
            # Neither evaluation nor the first pass of recomputation counts.
            self.local_tokens_per_expert += routing.counts_E
            if self.training:
                gates_TK = MoEAuxLossAutoScaler.apply(gates_TK, self._aux_loss(routing))
        return gates_TK, routing.experts_TK

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the counts in fp32 too: Float16Module turns every buffer to bf16, which counts exactly only to 256."""
        super()._maintain_float32_expert_bias()
        self.local_tokens_per_expert = self.local_tokens_per_expert.float()

    def _aux_loss(self, routing: Routing) -> torch.Tensor:
        """Mean over rows of c * E / (k T^2) * sum_i count_i * sum_t p_ti, p = s / sum(s), T the row's own tokens (no
        padding); count_i by the best k of s, neither groups nor bias.

        Counts and T are summed over the tensor-parallel ranks, which hold slices of the rows; scores are this rank's.
        """
        counts_BE = routing.best_counts_BE
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts_BE, group=self.tp_cp_group)
        factor = self.num_experts * self.config.moe_aux_loss_coeff / self.topk
        # Compiled: it is 20 kernels on a few thousand numbers otherwise.
        loss = compiled(balance_loss) if self.compute == "triton" else balance_loss
        mean, total = loss(counts_BE, routing.shares_BE, self.topk, factor)
        self.aux_loss_sum += total.detach()
        return mean


def balance_loss(
    counts_BE: torch.Tensor, shares_BE: torch.Tensor, topk: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sum over rows of factor / T^2 * sum_i counts_i shares_i, T the row's tokens; see `_aux_loss`."""
    tokens_B = (counts_BE.sum(dim=1) / topk).clamp(min=1)
    loss_B = (counts_BE * shares_BE).sum(dim=1) * factor / tokens_B.square()
    return loss_B.mean(), loss_B.sum()


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
) -> Routing:
    """The routing of logits that hold the linear bias. Token t is of row t % rows; counted_T: bool, None for all."""
    E, scores_TE = logits_TE.shape[1], torch.sigmoid(logits_TE)
    with torch.no_grad():
        experts_TK = choose_experts(scores_TE + expert_bias_E, topk, groups, group_topk)
        best_TK = scores_TE.topk(topk, dim=1).indices
        row_T = torch.arange(len(scores_TE), device=scores_TE.device) % rows
        best_counts_BE = _counts(best_TK + E * row_T.unsqueeze(1), rows * E, counted_T)
    gates_TK = scores_TE.gather(1, experts_TK)
    if topk > 1:
        gates_TK = gates_TK / (gates_TK.sum(dim=1, keepdim=True) + 1e-20)
    weight_T = 1 / (scores_TE.sum(dim=1) + 1e-20)
    if counted_T is not None:
        weight_T = weight_T * counted_T
    shares_BE = torch.einsum("sbe,sb->be", scores_TE.view(-1, rows, E), weight_T.view(-1, rows))
    return Routing(
        gates_TK * scaling,
        experts_TK,
        _counts(experts_TK, E, counted_T),
        best_counts_BE.view(rows, E),
        shares_BE,
    )


def choose_experts(
    biased_TE: torch.Tensor, topk: int, groups: int, group_topk: int
) -> torch.Tensor:
    """The best `topk` experts [T, K] int64 inside each token's best `group_topk` groups, best first.

    A group's score is the sum of its best topk / group_topk biased scores.
    """
    of_group_TGM = biased_TE.unflatten(1, (groups, -1))
    size, best = of_group_TGM.shape[2], topk // group_topk
    score_TG = (
        of_group_TGM.amax(dim=2) if best == 1 else of_group_TGM.topk(best, dim=2).values.sum(dim=2)
    )
    kept_Tg = score_TG.topk(group_topk, dim=1).indices
    inside = of_group_TGM.gather(1, kept_Tg.unsqueeze(2).expand(-1, -1, size)).flatten(1)
    place_TK = inside.topk(topk, dim=1).indices
    return kept_Tg.gather(1, place_TK // size) * size + place_TK % size


def _counts(keys_TK: torch.Tensor, size: int, weight_T: torch.Tensor | None) -> torch.Tensor:
    """How often each key below `size` occurs, fp32: sums of ones, exact to 2^24 in any order."""
    counts = torch.zeros(size, device=keys_TK.device)
    ones_TK = torch.ones_like(keys_TK, dtype=counts.dtype)
    if weight_T is not None:
        ones_TK = ones_TK * weight_T.unsqueeze(1).to(counts.dtype)
    return counts.scatter_add_(0, keys_TK.flatten(), ones_TK.flatten())


class _RouterProduct(torch.autograd.Function):
    """z = x W' + b of bf16 (or fp32, fp64) x and W, at fp32 accuracy (or fp64).

    Products of two bf16 numbers are exact in fp32, so tensor cores with an fp32 output lose nothing but the order of
    the sums. The fp32 gradient dz enters as two bf16 parts of 8 bits each, dz = high + low + r with |r| <= 2^-17 |dz|:
    one product of twice the length for dx, one of twice the rows for dW.
    """

    @staticmethod
    def forward(
        ctx: Any, x_SBD: torch.Tensor, weight_ED: torch.Tensor, bias_E: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x_SBD, weight_ED)
        z_TE = _mm(x_SBD.flatten(0, -2), weight_ED.t())
        return (z_TE + bias_E.to(z_TE.dtype)).unflatten(0, x_SBD.shape[:-1])

    @staticmethod
    def backward(
        ctx: Any, grad_SBE: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_SBD, weight_ED = ctx.saved_tensors
        x_TD, grad_TE = x_SBD.flatten(0, -2), grad_SBE.flatten(0, -2)
        if x_TD.dtype == torch.bfloat16:
            high_TE = grad_TE.to(torch.bfloat16)
            parts = torch.cat([high_TE, (grad_TE - high_TE).to(torch.bfloat16)], dim=1)
            x_grad = _mm(parts, torch.cat([weight_ED, weight_ED]))
            weight_grad = _mm(parts.t(), x_TD).unflatten(0, (2, -1)).sum(dim=0)
        else:
            x_grad, weight_grad = grad_TE @ weight_ED, grad_TE.t() @ x_TD
        return x_grad.to(x_SBD.dtype).view_as(x_SBD), weight_grad, grad_TE.sum(dim=0)


def _mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with an fp32 result (fp64 of fp64); bf16 on CUDA by tensor cores."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) @ b.to(wide)
