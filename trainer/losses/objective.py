"""The loss of one micro-batch, and its evaluation: hidden states and lm_head in, loss and sums for the log out."""

from __future__ import annotations

import torch

from trainer.batch import Batch
from trainer.losses.fused_linear import (
    WHOLE_VOCAB,
    TokenTargets,
    VocabShard,
    fused_linear_eval,
    fused_linear_loss,
)
from trainer.losses.report import loss_sums
from trainer.losses.spans import LossConfig, token_coefficients


def batch_loss(
    hidden_BTD: torch.Tensor,
    weight_WD: torch.Tensor,
    batch: Batch,
    global_counts: torch.Tensor,
    config: LossConfig,
    shard: VocabShard = WHOLE_VOCAB,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This micro-batch's part of L (scalar with gradients), and its sums for `loss_metrics` (float64 [C, M]).

    hidden_BTD: final hidden states, after the last norm. weight_WD: lm_head. global_counts: `span_counts` of the
    whole global batch. The parts of all micro-batches and data parallel ranks add up to L, and so do the sums.
    """
    ce_coef_N, kd_coef_N = token_coefficients(batch, global_counts, config)
    loss, ce_N, kd_N = fused_linear_loss(
        hidden_BTD.flatten(0, 1),
        weight_WD,
        batch_targets(batch),
        ce_coef_N,
        kd_coef_N,
        shard=shard,
        chunk_tokens=config.chunk_tokens,
    )
    return loss, loss_sums(batch, ce_N, kd_N, ce_coef_N, kd_coef_N)


def evaluate_batch(
    hidden_BTD: torch.Tensor,
    weight_WD: torch.Tensor,
    batch: Batch,
    global_counts: torch.Tensor,
    config: LossConfig,
    shard: VocabShard = WHOLE_VOCAB,
) -> torch.Tensor:
    """The sums of this micro-batch for `loss_metrics`, with top-1 agreement, without gradients."""
    ce_coef_N, kd_coef_N = token_coefficients(batch, global_counts, config)
    ce_N, kd_N, top_N = fused_linear_eval(
        hidden_BTD.flatten(0, 1),
        weight_WD,
        batch_targets(batch),
        shard=shard,
        chunk_tokens=config.chunk_tokens,
    )
    return loss_sums(batch, ce_N, kd_N, ce_coef_N, kd_coef_N, top_N)


def batch_targets(batch: Batch) -> TokenTargets:
    """The target positions of a batch; its rows lie one after another."""
    index_N = batch.target_index_N
    return TokenTargets(
        index_N=index_N,
        labels_N=batch.labels_BT.flatten()[index_N],
        ids_NK=batch.target_ids_BTK.flatten(0, 1)[index_N],
        weights_NK=batch.target_weights_BTK.flatten(0, 1)[index_N],
    )
