"""The objective on text: which coefficient each target position has. Pure.

With s over the spans (reasoning, final), N_s the target positions of span s in the whole GLOBAL batch, a = kd_weight
and c_t the confidence weight (1 without confidence weighting):

    L = sum over s of  w_s / N_s * sum over t in s of  c_t * ( (1 - a_t) * CE_t + a_t * KD_t )

    a_t = a at positions that the teacher scored, 0 elsewhere.

So where every position is scored this is  sum over s of  w_s * ((1 - a) * mean CE + a * mean KD).
Decisions, each of which keeps a position's weight independent of what else is in the batch:

- A document without targets trains with CE alone, at full weight (not 1 - a), and both kinds share the one mean over
  N_s: a token of vanilla data weighs as much as a scored one, and the share of scored positions in the batch is the
  only thing that sets their balance. With a = 1 vanilla documents still train.
- A span without positions in the global batch contributes 0 (its mean is no number); its count of 0 is logged.
- Confidence weights scale the whole loss of a scored position and are not renormalised: the mean still divides by
  N_s, so a batch that the teacher finds unlikely pulls less. Unscored positions have weight 1.

N_s must be known before the first forward pass of a step; it depends on data alone. Then the losses and gradients of
micro-batches simply add up, for any split of the global batch.
"""

from __future__ import annotations

import torch
from pydantic import Field, field_validator, model_validator

from common.config import Config
from common.errors import ConfigError
from datastore.types import SPAN_FINAL, SPAN_REASONING
from trainer.batch import Batch
from trainer.losses.coefficients import Coefficients


class SpanWeights(Config):
    """w_s of each span."""

    reasoning: float = Field(default=1.0, ge=0)
    final: float = Field(default=1.0, ge=0)


class ConfidenceConfig(Config):
    """c_t = clip(exp((logp_teacher(y_t) - m) / tau), w_min, w_max), logprobs in nats."""

    m: float
    tau: float = Field(gt=0)
    w_min: float = Field(ge=0)
    w_max: float = Field(gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> ConfidenceConfig:
        if self.w_min > self.w_max:
            raise ConfigError("loss.confidence", got=f"w_min {self.w_min} > w_max {self.w_max}")
        return self


class LossConfig(Config):
    """kd_weight: a in [0, 1]; 0 is plain CE (warm start). chunk_tokens: positions whose logits live at a time.

    temperature: targets are stored at temperature 1 and used so.
    """

    kd_weight: float = Field(ge=0, le=1)
    span_weights: SpanWeights = SpanWeights()
    confidence: ConfidenceConfig | None = None
    temperature: float = 1.0
    chunk_tokens: int = Field(default=1024, ge=1)

    @field_validator("temperature")
    @classmethod
    def _as_stored(cls, temperature: float) -> float:
        if temperature != 1.0:
            raise ConfigError(
                "loss.temperature",
                got=temperature,
                expected="1.0, the temperature at which targets are stored",
                remedy="leave the key out",
            )
        return temperature


def span_counts(batch: Batch) -> torch.Tensor:
    """Target positions of (reasoning, final): int64 [2].

    Add over the micro-batches of a rank, all-reduce over data parallel ranks: that is `global_counts` below.
    """
    spans_BT = batch.label_spans_BT
    return torch.stack([(spans_BT == span).sum() for span in (SPAN_REASONING, SPAN_FINAL)])


def confidence_weights(batch: Batch, config: LossConfig) -> torch.Tensor:
    """c_t of the target positions: float64 [N]; 1 where a position is not scored or nothing is configured."""
    logprob_N = batch.teacher_logprob_BT.flatten()[batch.target_index_N].double()
    if config.confidence is None:
        return torch.ones_like(logprob_N)
    of = config.confidence
    weights_N = torch.exp((logprob_N - of.m) / of.tau).clamp(of.w_min, of.w_max)
    return torch.where(batch.has_target_BT.flatten()[batch.target_index_N], weights_N, 1.0)


def span_coefficients(
    batch: Batch, global_counts: torch.Tensor, weights: SpanWeights
) -> torch.Tensor:
    """w_s / N_s of the target positions, s the span of each: float64 [N].

    global_counts: int64 [2], `span_counts` of the whole global batch. A schedule that averages over M micro-batches
    and D data parallel ranks needs the loss of each micro-batch times M * D to yield this sum.
    """
    spans_N = batch.label_spans_BT.flatten()[batch.target_index_N].long()
    counts = global_counts.clamp(min=1).double()
    per_position = torch.stack([weights.reasoning / counts[0], weights.final / counts[1]])
    return per_position[spans_N - SPAN_REASONING]


def token_coefficients(
    batch: Batch, global_counts: torch.Tensor, config: LossConfig
) -> Coefficients:
    """L's coefficients of CE and KD at the target positions, float32. global_counts: see `span_coefficients`."""
    has_target_N = batch.has_target_BT.flatten()[batch.target_index_N].double()
    coef_N = span_coefficients(batch, global_counts, config.span_weights)
    coef_N = coef_N * confidence_weights(batch, config)
    kd_share_N = config.kd_weight * has_target_N
    return Coefficients((coef_N * (1 - kd_share_N)).float(), (coef_N * kd_share_N).float())
