"""The loss of one micro-batch, and its evaluation: hidden states and lm_head in, loss and sums for the log out.

The type of the config names the objective: LossConfig that on text (spans.py), PolicyLossConfig that of on-policy
distillation (policy.py).
"""

from __future__ import annotations

import torch

from trainer.batch import Batch
from trainer.losses.chunk import WHOLE_VOCAB, HeadTargets, TokenTargets, VocabShard
from trainer.losses.coefficients import Coefficients
from trainer.losses.fused_linear import fused_linear_eval, fused_linear_loss
from trainer.losses.policy import PolicyLossConfig, policy_coefficients
from trainer.losses.report import loss_sums
from trainer.losses.spans import LossConfig, token_coefficients


def batch_loss(
    hidden_BTD: torch.Tensor,
    weight_WD: torch.Tensor,
    batch: Batch,
    global_counts: torch.Tensor,
    config: LossConfig | PolicyLossConfig,
    shard: VocabShard = WHOLE_VOCAB,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This micro-batch's part of L (scalar with gradients), and its sums for `loss_metrics` (float64 [C, M]).

    hidden_BTD: final hidden states, after the last norm. weight_WD: lm_head. global_counts: `span_counts` of the
    whole global batch. The parts of all micro-batches and data parallel ranks add up to L, and so do the sums.
    """
    coefficients = _coefficients(batch, global_counts, config)
    loss, losses = fused_linear_loss(
        hidden_BTD.flatten(0, 1),
        weight_WD,
        batch_targets(batch, with_heads=coefficients.kl_N is not None),
        coefficients,
        shard=shard,
        chunk_tokens=config.chunk_tokens,
    )
    return loss, loss_sums(batch, losses, coefficients)


def evaluate_batch(
    hidden_BTD: torch.Tensor,
    weight_WD: torch.Tensor,
    batch: Batch,
    global_counts: torch.Tensor,
    config: LossConfig | PolicyLossConfig,
    shard: VocabShard = WHOLE_VOCAB,
) -> torch.Tensor:
    """The sums of this micro-batch for `loss_metrics`, with top-1 agreement, without gradients.

    On-policy the KL over the teacher's head is among them where there are targets, whatever the objective.
    """
    losses, top_N = fused_linear_eval(
        hidden_BTD.flatten(0, 1),
        weight_WD,
        batch_targets(batch, with_heads=isinstance(config, PolicyLossConfig)),
        shard=shard,
        chunk_tokens=config.chunk_tokens,
    )
    return loss_sums(batch, losses, _coefficients(batch, global_counts, config), top_N)


def _coefficients(
    batch: Batch, global_counts: torch.Tensor, config: LossConfig | PolicyLossConfig
) -> Coefficients:
    if isinstance(config, PolicyLossConfig):
        return policy_coefficients(batch, global_counts, config)
    return token_coefficients(batch, global_counts, config)


def batch_targets(batch: Batch, *, with_heads: bool = False) -> TokenTargets:
    """The target positions of a batch; its rows lie one after another."""
    index_N = batch.target_index_N
    heads = None
    if with_heads:
        heads = HeadTargets(
            num_head_N=batch.target_num_head_BT.flatten()[index_N],
            log_tail_N=batch.target_log_tail_BT.flatten()[index_N],
        )
    return TokenTargets(
        index_N=index_N,
        labels_N=batch.labels_BT.flatten()[index_N],
        ids_NK=batch.target_ids_BTK.flatten(0, 1)[index_N],
        weights_NK=batch.target_weights_BTK.flatten(0, 1)[index_N],
        heads=heads,
    )
