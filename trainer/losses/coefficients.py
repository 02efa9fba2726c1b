"""What each position's losses are multiplied with; that of a sampled token depends on the student's logprob. Pure.

The policy gradient on a sampled token y, with the student's logp and the teacher's logp_T of it, its logp_sampled under
the weights that sampled it, and w = w_s / N_s (trainer/losses/spans.py):

    a = stop_grad(logp_T - logp)                            advantage, clipped to +- advantage_clip
    r = stop_grad(clip(exp(logp - logp_sampled), low, high))    importance ratio
    loss = - w r a logp = (w r a) CE                        gradient (w r a) (q - onehot(y))

So it is the cross entropy with a coefficient of either sign, known as soon as the cross entropy is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Losses(NamedTuple):
    """CE, KD and KL of each position, [N] each, in nats.

    kl_N: 0 where the teacher's head is empty; None where heads were not asked for.
    """

    ce_N: torch.Tensor
    kd_N: torch.Tensor
    kl_N: torch.Tensor | None


@dataclass(frozen=True)
class SampledTokens:
    """The sampled tokens among N positions.

    sampled_N: bool. coef_N: w where the token's loss is the policy gradient, 0 elsewhere. teacher_logprob_N,
    sampling_logprob_N: natural log, any finite value where nothing was sampled. ratio_low, ratio_high,
    advantage_clip: limits, see above; None for no limit on the advantage.
    """

    sampled_N: torch.Tensor
    coef_N: torch.Tensor
    teacher_logprob_N: torch.Tensor
    sampling_logprob_N: torch.Tensor
    ratio_low: float
    ratio_high: float
    advantage_clip: float | None

    def __getitem__(self, rows: slice) -> SampledTokens:
        return SampledTokens(
            self.sampled_N[rows],
            self.coef_N[rows],
            self.teacher_logprob_N[rows],
            self.sampling_logprob_N[rows],
            self.ratio_low,
            self.ratio_high,
            self.advantage_clip,
        )

    def raw_ratio(self, ce_N: torch.Tensor) -> torch.Tensor:
        """exp(logp - logp_sampled), from the student's cross entropy of the tokens."""
        return torch.exp(-ce_N - self.sampling_logprob_N.to(ce_N.dtype))

    def raw_advantage(self, ce_N: torch.Tensor) -> torch.Tensor:
        """logp_T - logp."""
        return self.teacher_logprob_N.to(ce_N.dtype) + ce_N

    def ratio(self, ce_N: torch.Tensor) -> torch.Tensor:
        """r."""
        return self.raw_ratio(ce_N).clamp(self.ratio_low, self.ratio_high)

    def advantage(self, ce_N: torch.Tensor) -> torch.Tensor:
        """a."""
        limit, advantage_N = self.advantage_clip, self.raw_advantage(ce_N)
        return advantage_N if limit is None else advantage_N.clamp(-limit, limit)

    def ce_coef(self, ce_N: torch.Tensor) -> torch.Tensor:
        """w r a, in the dtype of ce_N; it has no gradient."""
        ce_N = ce_N.detach()
        return self.coef_N.to(ce_N.dtype) * self.ratio(ce_N) * self.advantage(ce_N)


@dataclass(frozen=True)
class Coefficients:
    """Of N positions: loss = ce_N * CE + kd_N * KD + kl_N * KL, and the policy gradient of `sampled`.

    A position's ce_N and kd_N have one sign. Where kl_N is not 0, all others are; None stands for 0.
    """

    ce_N: torch.Tensor
    kd_N: torch.Tensor
    kl_N: torch.Tensor | None = None
    sampled: SampledTokens | None = None

    def __getitem__(self, rows: slice) -> Coefficients:
        return Coefficients(
            self.ce_N[rows],
            self.kd_N[rows],
            None if self.kl_N is None else self.kl_N[rows],
            None if self.sampled is None else self.sampled[rows],
        )

    def settled(self, ce_N: torch.Tensor) -> Coefficients:
        """The same in the dtype of ce_N, the cross entropies, with the policy gradient as part of the CE."""
        ce_coef_N = self.ce_N.to(ce_N.dtype)
        return Coefficients(
            ce_coef_N if self.sampled is None else ce_coef_N + self.sampled.ce_coef(ce_N),
            self.kd_N.to(ce_N.dtype),
            None if self.kl_N is None else self.kl_N.to(ce_N.dtype),
        )

    def weights(self) -> torch.Tensor:
        """The share of L that each position has whatever its loss is: float64, >= 0, without ratio and advantage."""
        weights_N = self.ce_N.double() + self.kd_N
        for more_N in (self.kl_N, None if self.sampled is None else self.sampled.coef_N):
            weights_N = weights_N if more_N is None else weights_N + more_N
        return weights_N

    def loss(self, losses: Losses) -> torch.Tensor:
        """Each position's part of L, float64."""
        of = self.settled(losses.ce_N)
        loss_N = of.ce_N.double() * losses.ce_N + of.kd_N.double() * losses.kd_N
        if of.kl_N is None or losses.kl_N is None:
            return loss_N
        return loss_N + of.kl_N.double() * losses.kl_N
