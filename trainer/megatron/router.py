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

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class StudentRouter(TopKRouter):
    """`aux_loss_sum`: balance losses of the rows routed since it was last read, coefficient included; see
    `take_aux_loss`. `local_tokens_per_expert` [E] fp32: routed tokens of this step, without padding.
    """

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        self.aux_loss_sum = torch.zeros((), device=torch.cuda.current_device())

    def take_aux_loss(self) -> torch.Tensor:
        """The sum over this rank's rows since the last call; starts again from zero."""
        taken, self.aux_loss_sum = self.aux_loss_sum, torch.zeros_like(self.aux_loss_sum)
        return taken

    def forward(
        self, hidden_SBD: torch.Tensor, padding_SB: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates [T, K] (fp32, or fp64 of fp64 states) and experts [T, K] int64; padding is routed like any token."""
        self._maintain_float32_expert_bias()
        logits_SBE = _RouterProduct.apply(hidden_SBD, self.weight, self.bias)
        return self.routing(logits_SBE, padding_SB)

    def routing(
        self, logits_SBE: torch.Tensor, padding_SB: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and experts of the logits; under gradients the tokens are counted and the balance loss attached."""
        batch, config = logits_SBE.shape[1], self.config
        scores_TE = torch.sigmoid(logits_SBE.flatten(0, 1))
        with torch.no_grad():
            experts_TK = choose_experts(
                scores_TE + self.expert_bias,
                self.topk,
                config.moe_router_num_groups,
                config.moe_router_group_topk,
            )
        gates_TK = scores_TE.gather(1, experts_TK)
        if self.topk > 1:
            gates_TK = gates_TK / (gates_TK.sum(dim=1, keepdim=True) + 1e-20)
        gates_TK = gates_TK * config.moe_router_topk_scaling_factor
        if torch.is_grad_enabled():
            # Neither evaluation nor the first pass of recomputation counts.
            counted_T = None if padding_SB is None else (~padding_SB).flatten().to(scores_TE.dtype)
            self.local_tokens_per_expert += _counts(experts_TK, self.num_experts, counted_T)
            if self.training:
                gates_TK = self._with_aux_loss(gates_TK, scores_TE, batch, counted_T)
        return gates_TK, experts_TK

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the counts in fp32 too: Float16Module turns every buffer to bf16, which counts exactly only to 256."""
        super()._maintain_float32_expert_bias()
        self.local_tokens_per_expert = self.local_tokens_per_expert.float()

    def _with_aux_loss(
        self,
        gates_TK: torch.Tensor,
        scores_TE: torch.Tensor,
        batch: int,
        counted_T: torch.Tensor | None,
    ) -> torch.Tensor:
        """Mean over rows of c * E / (k T^2) * sum_i count_i * sum_t p_ti, p = s / sum(s), T the row's own tokens (no
        padding); count_i by the best k of s, neither groups nor bias.

        Counts and T are summed over the tensor-parallel ranks, which hold slices of the rows; scores are this rank's.
        """
        tokens, E = scores_TE.shape
        best_TK = scores_TE.detach().topk(self.topk, dim=1).indices
        row_T = torch.arange(tokens, device=scores_TE.device) % batch
        counts_BE = _counts(best_TK + E * row_T.unsqueeze(1), batch * E, counted_T).view(batch, E)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts_BE, group=self.tp_cp_group)
        weight_T = 1 / (scores_TE.sum(dim=1) + 1e-20)
        if counted_T is not None:
            weight_T = weight_T * counted_T
        shares_BE = torch.einsum(
            "sbe,sb->be", scores_TE.view(-1, batch, E), weight_T.view(-1, batch)
        )
        tokens_B = (counts_BE.sum(dim=1) / self.topk).clamp(min=1)
        loss_B = (counts_BE * shares_BE).sum(dim=1) * E / (self.topk * tokens_B.square())
        loss_B = loss_B * self.config.moe_aux_loss_coeff
        self.aux_loss_sum += loss_B.detach().sum()
        return MoEAuxLossAutoScaler.apply(gates_TK, loss_B.mean())


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
