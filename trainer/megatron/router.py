"""The router: Megatron's TopKRouter (DeepSeek-V3 settings), its statistics made exact for packed rows.

Upstream facts handled (megatron/core/transformer/moe): with a padding mask and several rows, router.py:310 divides
by the mean row length of the micro-batch, so the balance loss would depend on the micro-batch size; router.py:509
combines a [tokens, experts] map with a [tokens] mask and fails; moe_utils.py:866 keeps the first layer count for
the life of the process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter


class StudentRouter(TopKRouter):
    """`aux_loss_sum`: balance losses of the rows routed since it was last read, coefficient included; see
    `take_aux_loss`.
    """

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)
        self.aux_loss_sum = torch.zeros((), device=torch.cuda.current_device())

    def take_aux_loss(self) -> torch.Tensor:
        """The sum over this rank's rows since the last call; starts again from zero."""
        taken, self.aux_loss_sum = self.aux_loss_sum, torch.zeros_like(self.aux_loss_sum)
        return taken

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the counts in fp32 too: Float16Module turns every buffer to bf16, which counts exactly only to 256."""
        super()._maintain_float32_expert_bias()
        self.local_tokens_per_expert = self.local_tokens_per_expert.float()

    def _apply_seq_aux_loss(
        self,
        probs: torch.Tensor,
        scores_for_aux_loss: torch.Tensor,
        routing_map: torch.Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> torch.Tensor:
        """Mean over rows of c * E / (k T^2) * sum_i count_i * sum_t score_ti, T the row's own tokens (no padding).

        Counts and T are summed over the tensor-parallel ranks, which hold slices of the rows; scores are this rank's.
        """
        scores_BE = scores_for_aux_loss.view(seq_length, bsz, -1).sum(dim=0)
        counts_BE = routing_map.view(seq_length, bsz, -1).sum(dim=0, dtype=scores_BE.dtype)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(counts_BE, group=self.tp_cp_group)
        tokens_B = (counts_BE.sum(dim=1) / self.topk).clamp(min=1)
        loss_B = (
            (counts_BE * scores_BE).sum(dim=1) * self.num_experts / (self.topk * tokens_B.square())
        )
        loss_B = loss_B * self.config.moe_aux_loss_coeff
        self.aux_loss_sum += loss_B.detach().sum()
        return MoEAuxLossAutoScaler.apply(probs, loss_B.mean())

    def _apply_expert_bias(
        self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> None:
        """Count the routed tokens, without padding, for the bias update after the step."""
        if torch.is_grad_enabled():
            counted = (
                routing_map if padding_mask is None else routing_map & ~padding_mask.unsqueeze(-1)
            )
            self.local_tokens_per_expert += counted.sum(dim=0)
