"""The reverse KL over a head and one bucket, against torch's KL of coarsened distributions and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional

from trainer.losses.chunk import LOG_TAIL_FLOOR, HeadTargets, TokenTargets
from trainer.losses.coefficients import Coefficients
from trainer.losses.fused_linear import fused_linear_eval, fused_linear_loss

VOCAB, HIDDEN = 40, 6


def headed(teacher_NV: torch.Tensor, threshold: float, draws: int = 3) -> TokenTargets:
    """Positions 0, 1, ... whose ids of teacher probability >= threshold are the head; then entries that are draws."""
    num, vocab = teacher_NV.shape
    probs_NV, ids_NV = teacher_NV.exp().sort(dim=1, descending=True)
    num_head_N = (probs_NV >= threshold).sum(dim=1)
    width = min(int(num_head_N.max()) + draws, vocab)
    columns = torch.arange(width)
    is_head_NK = columns < num_head_N[:, None]
    is_draw_NK = ~is_head_NK & (columns < num_head_N[:, None] + draws)
    weights_NK = torch.where(is_head_NK, probs_NV[:, :width], threshold * is_draw_NK)
    tail_N = torch.where(torch.arange(vocab) >= num_head_N[:, None], probs_NV, 0).sum(dim=1)
    return TokenTargets(
        index_N=torch.arange(num),
        labels_N=torch.arange(num) % vocab,
        ids_NK=(ids_NV[:, :width] * (weights_NK > 0)).int(),
        weights_NK=weights_NK,
        heads=HeadTargets(num_head_N.int(), tail_N.log()),
    )


def random_case(
    threshold: float, num: int = 12, scale: float = 1.0, seed: int = 0, vocab: int = VOCAB
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, TokenTargets]:
    """hidden, weight, the teacher's logprobs [N, V] and its targets."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_TD = (scale * normal(num, HIDDEN)).requires_grad_()
    weight_VD = normal(vocab, HIDDEN).requires_grad_()
    teacher_NV = (2 * normal(num, vocab)).log_softmax(dim=1)
    return hidden_TD, weight_VD, teacher_NV, headed(teacher_NV, threshold)


def only_kl(coef_N: torch.Tensor) -> Coefficients:
    zero_N = torch.zeros_like(coef_N)
    return Coefficients(zero_N, zero_N, kl_N=coef_N)


def coarse(logp_V: torch.Tensor, head: torch.Tensor) -> Categorical:
    """The distribution over the ids of `head` and one bucket of all others."""
    others = torch.ones(len(logp_V), dtype=torch.bool)
    others[head] = False
    rest = logp_V[others].logsumexp(0, keepdim=True) if others.any() else logp_V[:0]
    return Categorical(logits=torch.cat([logp_V[head], rest]))


def brute_force(
    logits_NV: torch.Tensor, teacher_NV: torch.Tensor, threshold: float
) -> torch.Tensor:
    kls = []
    for logits_V, teacher_V in zip(logits_NV, teacher_NV, strict=True):
        head = (teacher_V.exp() >= threshold).nonzero()[:, 0]
        student = coarse(logits_V.log_softmax(0), head)
        kls.append(kl_divergence(student, coarse(teacher_V, head)))
    return torch.stack(kls)


@pytest.mark.parametrize("threshold", [0.3, 0.1, 0.02, 0.004])
@pytest.mark.parametrize("chunk_tokens", [1, 5, 100])
def test_value_and_gradients_are_those_of_the_coarsened_distributions(
    threshold: float, chunk_tokens: int
) -> None:
    hidden, weight, teacher_NV, targets = random_case(threshold)
    coef_N = torch.rand(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss, losses = fused_linear_loss(
        hidden, weight, targets, only_kl(coef_N), chunk_tokens=chunk_tokens
    )
    kl_N = brute_force(hidden @ weight.T, teacher_NV, threshold)
    torch.testing.assert_close(losses.kl_N, kl_N.detach(), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(loss, (coef_N * kl_N).sum(), rtol=1e-10, atol=1e-13)
    wanted = torch.autograd.grad((coef_N * kl_N).sum(), (hidden, weight))
    got = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, _, targets = random_case(0.1, num=5, vocab=11)
    coefficients = only_kl(torch.linspace(0.2, 1, 5))

    def loss(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return fused_linear_loss(hidden_TD, weight_VD, targets, coefficients, chunk_tokens=2)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


@settings(max_examples=50, deadline=None)
@given(
    threshold=st.sampled_from([0.4, 0.1, 0.03, 0.01, 0.0]),
    scale=st.floats(0.01, 5),
    seed=st.integers(0, 999),
)
def test_it_is_at_most_the_true_kl_and_equal_where_the_head_holds_all(
    threshold: float, scale: float, seed: int
) -> None:
    hidden, weight, teacher_NV, targets = random_case(threshold, 6, scale, seed)
    losses, _ = fused_linear_eval(hidden, weight, targets, chunk_tokens=4)
    student_NV = (hidden @ weight.T).log_softmax(dim=1)
    true_N = functional.kl_div(teacher_NV, student_NV, log_target=True, reduction="none").sum(1)
    assert (losses.kl_N <= true_N + 1e-12).all()
    assert (losses.kl_N >= -1e-6).all()  # e^-16, by the floor under the bucket
    if threshold == 0:
        torch.testing.assert_close(losses.kl_N, true_N.detach(), rtol=1e-10, atol=1e-12)


def test_an_empty_head_says_nothing() -> None:
    hidden, weight, _, targets = random_case(2.0)
    assert targets.heads is not None and not targets.heads.num_head_N.any()
    for log_tail in (0.0, -0.1, -torch.inf):  # of a position without a head it is not read
        heads = HeadTargets(targets.heads.num_head_N, torch.full((12,), log_tail))
        case = TokenTargets(
            targets.index_N, targets.labels_N, targets.ids_NK, targets.weights_NK, heads
        )
        loss, losses = fused_linear_loss(
            hidden, weight, case, only_kl(torch.ones(12)), chunk_tokens=5
        )
        assert not losses.kl_N.any() and loss.item() == 0
        assert not any(each.any() for each in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("log_tail", [-torch.inf, -40.0, LOG_TAIL_FLOOR])
def test_a_teacher_without_a_tail_is_taken_at_the_floor(log_tail: float) -> None:
    """Two ids with all the mass: p of the bucket is e^-16 whatever smaller value was stored."""
    logits_V = torch.tensor([0.3, -0.2, 0.1, -1.0], dtype=torch.float64).requires_grad_()
    targets = TokenTargets(
        index_N=torch.arange(1),
        labels_N=torch.zeros(1, dtype=torch.int64),
        ids_NK=torch.tensor([[2, 0]]),
        weights_NK=torch.tensor([[0.75, 0.25]], dtype=torch.float64),
        heads=HeadTargets(torch.tensor([2]), torch.tensor([log_tail])),
    )
    loss, losses = fused_linear_loss(
        logits_V[None],
        torch.eye(4, dtype=torch.float64),
        targets,
        only_kl(torch.ones(1)),
        chunk_tokens=1,
    )
    q_V = logits_V.softmax(0)
    q_3 = torch.stack([q_V[2], q_V[0], q_V[1] + q_V[3]])
    p_3 = torch.tensor([0.75, 0.25, np.exp(-16.0)], dtype=torch.float64)
    kl = (q_3 * (q_3 / p_3).log()).sum()
    torch.testing.assert_close(losses.kl_N[0], kl.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits_V),
        torch.autograd.grad(kl, logits_V),
        rtol=1e-10,
        atol=1e-14,
    )


@pytest.mark.parametrize("gap", [5.0, 18.0, 30.0, 60.0, 120.0])
def test_a_bucket_of_tiny_student_mass_keeps_its_digits_in_float32(gap: float) -> None:
    """The student is sure of two ids, the teacher gives the others a tenth: 1 - head would be rounding alone."""
    num = 5
    logits_NV = torch.randn(num, VOCAB, generator=torch.Generator().manual_seed(4))
    logits_NV[:, :2] += gap
    teacher_NV = torch.full((num, VOCAB), 0.1 / (VOCAB - 2), dtype=torch.float64).log()
    teacher_NV[:, 0], teacher_NV[:, 1] = np.log(0.6), np.log(0.3)
    wide_NV = logits_NV.double().requires_grad_()
    exact_N = brute_force(wide_NV, teacher_NV, 0.05)
    (wanted_NV,) = torch.autograd.grad(exact_N.sum(), wide_NV)
    logits_NV.requires_grad_()
    loss, losses = fused_linear_loss(
        logits_NV,
        torch.eye(VOCAB),
        headed(teacher_NV, 0.05),
        only_kl(torch.ones(num)),
        chunk_tokens=3,
    )
    (gradient_NV,) = torch.autograd.grad(loss, logits_NV)
    torch.testing.assert_close(losses.kl_N.double(), exact_N.detach(), rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(gradient_NV.double(), wanted_NV, rtol=2e-4, atol=2e-7)
    assert torch.isfinite(gradient_NV).all()
    tail_NV = gradient_NV[:, 2:].double()
    if gap < 80:  # below, the student's own probabilities are 0 in float32
        torch.testing.assert_close(tail_NV, wanted_NV[:, 2:], rtol=2e-5, atol=0)


def test_positions_of_other_losses_are_untouched_beside_it() -> None:
    """CE and KD of anchors in one chunk with the KL: the sum of three runs with one kind each."""
    hidden, weight, _, targets = random_case(0.05)
    kind = torch.arange(12) % 3
    parts = [torch.linspace(0.5, 1, 12) * (kind == number) for number in range(3)]
    nothing = torch.zeros(12)
    mixes = [
        Coefficients(*parts),
        Coefficients(parts[0], nothing),
        Coefficients(nothing, parts[1]),
        only_kl(parts[2]),
    ]
    whole, *single = (
        torch.autograd.grad(
            fused_linear_loss(hidden, weight, targets, of, chunk_tokens=5)[0], (hidden, weight)
        )
        for of in mixes
    )
    for total, *each in zip(whole, *single, strict=True):
        torch.testing.assert_close(total, sum(each), rtol=1e-11, atol=1e-13)
    _, with_heads = fused_linear_loss(hidden, weight, targets, mixes[0], chunk_tokens=5)
    bare = TokenTargets(targets.index_N, targets.labels_N, targets.ids_NK, targets.weights_NK)
    _, without = fused_linear_loss(hidden, weight, bare, mixes[1], chunk_tokens=5)
    assert without.kl_N is None
    torch.testing.assert_close(with_heads[:2], without[:2], rtol=1e-13, atol=1e-13)


def test_a_student_equal_to_its_teacher_has_no_divergence() -> None:
    hidden, weight, _, _ = random_case(0.05)
    teacher_NV = (hidden @ weight.T).log_softmax(dim=1).detach()
    targets = headed(teacher_NV, 0.05)
    loss, losses = fused_linear_loss(
        hidden, weight, targets, only_kl(torch.ones(12)), chunk_tokens=5
    )
    assert losses.kl_N is not None and losses.kl_N.abs().max() < 1e-14
    for each in torch.autograd.grad(loss, (hidden, weight)):
        assert each.abs().max() < 1e-13
