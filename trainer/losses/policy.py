"""The objective of on-policy distillation on sampled tokens. Pure."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from common.config import Config
from trainer.losses.spans import SpanWeights


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
