"""The objective of on-policy distillation: which loss each target position has, and at which coefficient. Pure.

With s over the spans (reasoning, final) and N_s the target positions of span s in the whole GLOBAL batch, sampled or
not:

    L = sum over s of  w_s / N_s * sum over t in s of  ( S_t at sampled tokens, CE_t at the others )

S_t is the policy gradient (coefficients.py), the KL over the teacher's head (chunk.py), or the KD loss, as `objective`
says. Tokens that were not sampled are those of the anchor. Both kinds share the one mean, so the anchor's part of L is
its part of the span's tokens, as with rows without targets in offline KD (spans.py).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, PositiveFloat

from common.config import Config
from common.errors import AlignmentError
from trainer.batch import Batch
from trainer.losses.coefficients import Coefficients, SampledTokens
from trainer.losses.spans import SpanWeights, span_coefficients


class RatioConfig(Config):
    """Limits of the importance ratio exp(logp_now - logp_sampled) of a token whose sample is older than the weights."""

    low: float = Field(default=0.5, ge=0, le=1)
    high: float = Field(default=2.0, ge=1)


class PolicyLossConfig(Config):
    """objective: on sampled tokens; rows of the anchor train with cross entropy whatever it is.

    policy_gradient: reverse KL from the two log-probabilities of each sampled token. reverse_kl: of the student's whole
    distribution at each visited position, over the teacher's head and one bucket for its tail. forward_kl: the loss of
    offline KD at each visited position. advantage_clip: largest |log p_T - log p_S| that counts, null for none.
    chunk_tokens: positions whose logits live at a time.
    """

    objective: Literal["policy_gradient", "reverse_kl", "forward_kl"] = "policy_gradient"
    span_weights: SpanWeights = SpanWeights()
    ratio: RatioConfig = RatioConfig()
    advantage_clip: PositiveFloat | None = None
    chunk_tokens: int = Field(default=1024, ge=1)


def policy_coefficients(
    batch: Batch, global_counts: torch.Tensor, config: PolicyLossConfig
) -> Coefficients:
    """L's coefficients at the target positions, float32. global_counts: see `span_coefficients`."""
    index_N = batch.target_index_N
    sampled_N = batch.sampled_BT.flatten()[index_N]
    coef_N = span_coefficients(batch, global_counts, config.span_weights).float()
    zero_N = torch.zeros_like(coef_N)
    of_sampled_N = torch.where(sampled_N, coef_N, zero_N)

    def for_objective(name: str) -> torch.Tensor:
        return of_sampled_N if config.objective == name else zero_N

    return Coefficients(
        ce_N=torch.where(sampled_N, zero_N, coef_N),
        kd_N=for_objective("forward_kl"),
        kl_N=for_objective("reverse_kl") if config.objective == "reverse_kl" else None,
        sampled=SampledTokens(
            sampled_N=sampled_N,
            coef_N=for_objective("policy_gradient"),
            teacher_logprob_N=batch.teacher_logprob_BT.flatten()[index_N],
            sampling_logprob_N=batch.sampling_logprob_BT.flatten()[index_N],
            ratio_low=config.ratio.low,
            ratio_high=config.ratio.high,
            advantage_clip=config.advantage_clip,
        ),
    )


def num_without_targets(batch: Batch) -> torch.Tensor:
    """Sampled tokens of the batch for which the teacher's distribution is not there: int64 []."""
    return (batch.sampled_BT & ~batch.has_target_BT).sum()


def require_targets(num_missing: int, config: PolicyLossConfig) -> None:
    """AlignmentError where the objective needs targets and `num_without_targets` of the whole step is not 0."""
    if num_missing and config.objective != "policy_gradient":
        raise AlignmentError(
            f"loss.objective={config.objective} at sampled tokens without targets",
            got=f"{num_missing} such tokens in the step",
            expected="the teacher's sparse target at each, not its logprob of the token alone",
            remedy="score the rollouts with targets, or set loss.objective=policy_gradient",
        )
