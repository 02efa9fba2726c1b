"""The policy gradient on sampled tokens is the gradient of the reverse KL: by enumeration, by sampling, by autograd.

With an identity lm_head the hidden states are the logits, so the gradient of hidden is dL/dz.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from trainer.losses.chunk import TokenTargets
from trainer.losses.coefficients import Coefficients, SampledTokens
from trainer.losses.fused_linear import fused_linear_eval, fused_linear_loss

VOCAB = 23


def labelled(labels_N: torch.Tensor) -> TokenTargets:
    """Positions 0, 1, ... with these labels and no teacher entries."""
    nothing_N0 = torch.zeros(len(labels_N), 0)
    return TokenTargets(torch.arange(len(labels_N)), labels_N, nothing_N0.int(), nothing_N0)


def unlimited(
    coef_N: torch.Tensor, teacher_N: torch.Tensor, sampling_N: torch.Tensor
) -> SampledTokens:
    return SampledTokens(
        sampled_N=torch.ones(len(coef_N), dtype=torch.bool),
        coef_N=coef_N,
        teacher_logprob_N=teacher_N,
        sampling_logprob_N=sampling_N,
        ratio_low=0.0,
        ratio_high=math.inf,
        advantage_clip=None,
    )


def gradients_of_tokens(
    logits_V: torch.Tensor,
    labels_N: torch.Tensor,
    coef_N: torch.Tensor,
    teacher_V: torch.Tensor,
    sampling_V: torch.Tensor,
) -> torch.Tensor:
    """dL/dz of each token, all of them in the state `logits_V`: [N, V]."""
    logits_NV = logits_V.detach().repeat(len(labels_N), 1).requires_grad_()
    sampled = unlimited(coef_N, teacher_V[labels_N], sampling_V[labels_N])
    zero_N = torch.zeros(len(labels_N))
    loss, _ = fused_linear_loss(
        logits_NV,
        torch.eye(len(logits_V), dtype=torch.float64),
        labelled(labels_N),
        Coefficients(zero_N, zero_N, sampled=sampled),
        chunk_tokens=4096,
    )
    return torch.autograd.grad(loss, logits_NV)[0]


def random_state(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's logits, the teacher's logprobs, and those of the student at another version: [V] each."""
    generator = torch.Generator().manual_seed(seed)
    draws = 1.5 * torch.randn(3, VOCAB, generator=generator, dtype=torch.float64)
    return draws[0], draws[1].log_softmax(0), (draws[0] + 0.5 * draws[2]).log_softmax(0)


def reverse_kl_gradient(logits_V: torch.Tensor, teacher_V: torch.Tensor) -> torch.Tensor:
    logits_V = logits_V.clone().requires_grad_()
    kl = functional.kl_div(teacher_V, logits_V.log_softmax(0), log_target=True, reduction="sum")
    return torch.autograd.grad(kl, logits_V)[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_mean_over_every_token_is_the_exact_gradient(seed: int) -> None:
    """Each token once, weighted with its probability under the weights that sample."""
    logits_V, teacher_V, _ = random_state(seed)
    student_V = logits_V.log_softmax(0)
    each_VV = gradients_of_tokens(
        logits_V, torch.arange(VOCAB), student_V.exp(), teacher_V, student_V
    )
    exact_V = reverse_kl_gradient(logits_V, teacher_V)
    torch.testing.assert_close(each_VV.sum(dim=0), exact_V, rtol=1e-10, atol=1e-13)
    assert exact_V.abs().max() > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_stale_samples_have_the_exact_gradient_by_their_ratio(seed: int) -> None:
    """Tokens of older weights, not clipped: the mean over them is still the gradient under the weights of now."""
    logits_V, teacher_V, older_V = random_state(seed)
    each_VV = gradients_of_tokens(logits_V, torch.arange(VOCAB), older_V.exp(), teacher_V, older_V)
    exact_V = reverse_kl_gradient(logits_V, teacher_V)
    torch.testing.assert_close(each_VV.sum(dim=0), exact_V, rtol=1e-10, atol=1e-13)
    uncorrected_VV = gradients_of_tokens(
        logits_V, torch.arange(VOCAB), older_V.exp(), teacher_V, logits_V.log_softmax(0)
    )
    assert (uncorrected_VV.sum(dim=0) - exact_V).abs().max() > 1e-3


@pytest.mark.parametrize("stale", [False, True])
def test_the_mean_over_samples_lies_within_five_standard_errors(stale: bool) -> None:
    """The standard error of each coordinate comes from the exact variance, by enumeration of the tokens.

    With n = 20,000 draws the mean is normal to good approximation: each of the 23 coordinates passes 5 standard errors
    with a probability of 6e-7. The seed is fixed.
    """
    logits_V, teacher_V, older_V = random_state(7)
    behaviour_V = older_V if stale else logits_V.log_softmax(0)
    num_draws = 20_000
    one_each = torch.arange(VOCAB)
    values_VV = gradients_of_tokens(
        logits_V, one_each, torch.ones(VOCAB, dtype=torch.float64), teacher_V, behaviour_V
    )
    exact_V = reverse_kl_gradient(logits_V, teacher_V)
    variance_V = (behaviour_V.exp()[:, None] * (values_VV - exact_V).square()).sum(dim=0)
    generator = torch.Generator().manual_seed(11)
    drawn_N = torch.multinomial(behaviour_V.exp(), num_draws, replacement=True, generator=generator)
    mean_V = gradients_of_tokens(
        logits_V,
        drawn_N,
        torch.full((num_draws,), 1 / num_draws, dtype=torch.float64),
        teacher_V,
        behaviour_V,
    ).sum(dim=0)
    errors_V = (mean_V - exact_V).abs() / (variance_V / num_draws).sqrt()
    assert errors_V.max() < 5
    assert errors_V.max() > 0.1  # draws, not the enumeration


def mixed_case(
    dtype: torch.dtype = torch.float64, advantage_clip: float | None = 1.5
) -> tuple[torch.Tensor, torch.Tensor, TokenTargets, Coefficients]:
    """Thirty positions, sampled ones and anchors with CE and KD in turn, of advantages of both signs."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num, entries = 30, 4
    hidden_TD, weight_VD = normal(40, 6).to(dtype), normal(VOCAB, 6).to(dtype)
    targets = TokenTargets(
        index_N=torch.arange(5, 5 + num),
        labels_N=torch.randint(0, VOCAB, (num,), generator=generator),
        ids_NK=torch.stack([torch.randperm(VOCAB, generator=generator)[:entries]] * num).int(),
        weights_NK=torch.rand(num, entries, generator=generator) / entries,
    )
    logits_NV = hidden_TD[targets.index_N].double() @ weight_VD.double().T
    logp_N = logits_NV.log_softmax(dim=1).gather(1, targets.labels_N[:, None])[:, 0]
    sampled_N = torch.arange(num) % 3 > 0
    coef_N = torch.rand(num, generator=generator)
    coefficients = Coefficients(
        ce_N=coef_N * ~sampled_N,
        kd_N=torch.rand(num, generator=generator) * ~sampled_N,
        sampled=SampledTokens(
            sampled_N=sampled_N,
            coef_N=coef_N * sampled_N,
            teacher_logprob_N=(logp_N + 2 * normal(num)).clamp(max=0).float(),
            sampling_logprob_N=(logp_N + normal(num)).clamp(max=0).float(),
            ratio_low=0.5,
            ratio_high=2.0,
            advantage_clip=advantage_clip,
        ),
    )
    return hidden_TD.requires_grad_(), weight_VD.requires_grad_(), targets, coefficients


def plain_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets: TokenTargets, of: Coefficients
) -> torch.Tensor:
    """The whole objective by autograd over full logits."""
    assert of.sampled is not None
    sampled = of.sampled
    logp_NV = (hidden_TD[targets.index_N] @ weight_VD.T).log_softmax(dim=1)
    ce_N = functional.nll_loss(logp_NV, targets.labels_N, reduction="none")
    # Differs from lse - sum T z by lse (1 - sum T).
    logits_NV = hidden_TD[targets.index_N] @ weight_VD.T
    kd_N = logits_NV.logsumexp(1) - (
        logits_NV.gather(1, targets.ids_NK.long()) * targets.weights_NK
    ).sum(dim=1)
    with torch.no_grad():
        advantage_N = sampled.teacher_logprob_N + ce_N
        if sampled.advantage_clip is not None:
            advantage_N = torch.clip(advantage_N, -sampled.advantage_clip, sampled.advantage_clip)
        ratio_N = (-ce_N).exp() / sampled.sampling_logprob_N.double().exp()
        ratio_N = torch.clip(ratio_N, sampled.ratio_low, sampled.ratio_high)
    policy_N = sampled.coef_N * ratio_N * advantage_N * ce_N
    return (of.ce_N * ce_N + of.kd_N * kd_N + policy_N).sum()


@pytest.mark.parametrize("advantage_clip", [None, 1.5])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 30, 1000])
def test_sampled_tokens_beside_anchors_equal_autograd(
    chunk_tokens: int, advantage_clip: float | None
) -> None:
    case = mixed_case(advantage_clip=advantage_clip)
    loss, losses = fused_linear_loss(*case, chunk_tokens=chunk_tokens)
    plain = plain_loss(*case)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, case[:2]),
        torch.autograd.grad(plain, case[:2]),
        rtol=1e-9,
        atol=1e-12,
    )
    sampled = case[3].sampled
    assert sampled is not None
    on = sampled.sampled_N
    advantages = sampled.advantage(losses.ce_N)[on]
    assert (advantages < 0).any() and (advantages > 0).any()
    ratios = sampled.ratio(losses.ce_N)[on]
    assert {0.5, 2.0} < {*ratios.tolist()}
    if advantage_clip is not None:
        assert (advantages.abs() == advantage_clip).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)])
def test_narrow_numbers_are_close_to_float64(dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets, of = mixed_case(dtype)
    loss, _ = fused_linear_loss(hidden, weight, targets, of, chunk_tokens=8)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    exact = torch.autograd.grad(plain_loss(*wide, targets, of), wide)
    for gradient, wanted in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert gradient.dtype == dtype
        assert ((gradient.double() - wanted).norm() / wanted.norm()).item() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_student_equal_to_its_teacher_has_no_gradient_at_all(dtype: torch.dtype) -> None:
    hidden, weight, targets, of = mixed_case(dtype)
    assert of.sampled is not None
    losses, _ = fused_linear_eval(hidden, weight, targets, chunk_tokens=8)
    equal = replace(of, sampled=replace(of.sampled, teacher_logprob_N=-losses.ce_N))
    loss, _ = fused_linear_loss(hidden, weight, targets, equal, chunk_tokens=8)
    (gradient_TD,) = torch.autograd.grad(loss, hidden)
    on = of.sampled.sampled_N
    assert not gradient_TD[targets.index_N[on]].any()
    assert gradient_TD[targets.index_N[~on]].any(dim=1).all()
    alone = replace(equal, ce_N=torch.zeros(30), kd_N=torch.zeros(30))
    loss, _ = fused_linear_loss(hidden, weight, targets, alone, chunk_tokens=8)
    assert loss.item() == 0
    assert not any(each.any() for each in torch.autograd.grad(loss, (hidden, weight)))
