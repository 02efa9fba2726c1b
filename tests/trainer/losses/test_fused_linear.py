"""The fused lm_head and loss against torch's own log_softmax, kl_div and autograd in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch.nn import functional

from trainer.losses.chunk import TokenTargets
from trainer.losses.coefficients import Coefficients
from trainer.losses.fused_linear import fused_linear_eval, fused_linear_loss


@dataclass(frozen=True)
class Case:
    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    targets: TokenTargets
    ce_coef_N: torch.Tensor
    kd_coef_N: torch.Tensor

    def loss(self, chunk_tokens: int = 1000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        loss, losses = fused_linear_loss(
            self.hidden_TD,
            self.weight_VD,
            self.targets,
            Coefficients(self.ce_coef_N, self.kd_coef_N),
            chunk_tokens=chunk_tokens,
        )
        assert losses.kl_N is None
        return loss, losses.ce_N, losses.kd_N

    def gradients(self, chunk_tokens: int = 1000) -> tuple[torch.Tensor, ...]:
        loss, _, _ = self.loss(chunk_tokens)
        return torch.autograd.grad(loss, (self.hidden_TD, self.weight_VD))


def make_case(
    num_tokens: int, hidden: int, vocab: int, entries: int, dtype: torch.dtype, scale: float = 1.0
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(torch.float32)

    index_N = torch.randperm(num_tokens, generator=generator)[: 2 * num_tokens // 3].sort().values
    num = len(index_N)
    ids_NK = torch.stack([torch.randperm(vocab, generator=generator)[:entries] for _ in range(num)])
    return Case(
        hidden_TD=(scale * normal(num_tokens, hidden)).to(dtype).requires_grad_(),
        weight_VD=normal(vocab, hidden).to(dtype).requires_grad_(),
        targets=TokenTargets(
            index_N=index_N,
            labels_N=torch.randint(0, vocab, (num,), generator=generator),
            ids_NK=ids_NK.int(),
            weights_NK=uniform(num, entries) / max(entries, 1),
        ),
        ce_coef_N=uniform(num),
        kd_coef_N=uniform(num),
    )


def reference(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss, CE and KD of the full logits in float64."""
    targets = case.targets
    logits_NV = case.hidden_TD.double()[targets.index_N] @ case.weight_VD.double().T
    ce_N = functional.cross_entropy(logits_NV, targets.labels_N, reduction="none")
    picked_NK = logits_NV.gather(1, targets.ids_NK.long())
    kd_N = logits_NV.logsumexp(dim=1) - (targets.weights_NK.double() * picked_NK).sum(dim=1)
    return (case.ce_coef_N.double() * ce_N + case.kd_coef_N.double() * kd_N).sum(), ce_N, kd_N


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact.double()).norm() / exact.double().norm()).item()


def test_every_id_stored_is_the_dense_kl() -> None:
    case = make_case(12, 5, 29, 29, torch.float64)
    index_N = case.targets.index_N
    teacher_NV = torch.randn(len(index_N), 29, dtype=torch.float64).log_softmax(dim=1)
    targets = replace(
        case.targets,
        ids_NK=torch.arange(29).expand(len(index_N), -1),
        weights_NK=teacher_NV.exp(),
    )
    case = replace(case, targets=targets, ce_coef_N=torch.zeros(len(index_N)))
    student_NV = (case.hidden_TD[index_N] @ case.weight_VD.T).log_softmax(dim=1)
    kl_N = functional.kl_div(student_NV, teacher_NV, log_target=True, reduction="none").sum(dim=1)
    entropy_N = torch.distributions.Categorical(logits=teacher_NV).entropy()
    torch.testing.assert_close(case.loss()[2], (kl_N + entropy_N).detach(), rtol=1e-12, atol=0)
    dense = torch.autograd.grad((case.kd_coef_N * kl_N).sum(), (case.hidden_TD, case.weight_VD))
    torch.testing.assert_close(case.gradients(), dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("entries", [0, 1, 4, 11])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_gradcheck(entries: int, chunk_tokens: int) -> None:
    case = make_case(7, 3, 11, entries, torch.float64)

    def loss(hidden_TD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
        return replace(case, hidden_TD=hidden_TD, weight_VD=weight_VD).loss(chunk_tokens)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden_TD, case.weight_VD))


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"),
    [
        (torch.float32, 1.0, 1e-6),
        (torch.float32, 30.0, 2e-5),  # logits of 300: their own rounding, 300 * 2^-24, is the error
        (torch.bfloat16, 1.0, 4e-3),
    ],
)
def test_value_and_gradients_of_the_full_logits(
    dtype: torch.dtype, scale: float, tolerance: float
) -> None:
    case = make_case(60, 16, 1000, 20, dtype, scale)
    loss, ce_N, kd_N = case.loss(chunk_tokens=16)
    exact_loss, exact_ce_N, exact_kd_N = reference(case)
    assert loss.dtype == ce_N.dtype == kd_N.dtype == torch.float32
    # bf16 operands are widened: only the gradients, returned in bf16, are coarser.
    assert relative_error(loss, exact_loss) < 1e-6
    torch.testing.assert_close(ce_N.double(), exact_ce_N, rtol=2e-6, atol=5e-6 * scale)
    torch.testing.assert_close(kd_N.double(), exact_kd_N, rtol=2e-6, atol=5e-6 * scale)
    exact = torch.autograd.grad(exact_loss, (case.hidden_TD, case.weight_VD))
    for gradient, wanted in zip(case.gradients(chunk_tokens=16), exact, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, wanted) < tolerance


@pytest.mark.parametrize("chunk_tokens", [1, 7, 39, 40, 41])
def test_the_chunk_size_changes_nothing(chunk_tokens: int) -> None:
    case = make_case(60, 16, 1000, 20, torch.float32)
    assert relative_error(case.loss(chunk_tokens)[0], case.loss(10_000)[0]) < 1e-6
    for one, other in zip(case.gradients(chunk_tokens), case.gradients(10_000), strict=True):
        assert relative_error(one, other) < 1e-6


def test_rows_not_named_have_no_gradient() -> None:
    case = make_case(30, 4, 50, 3, torch.float64)
    gradient_TD, _ = case.gradients()
    named_T = torch.zeros(30, dtype=torch.bool)
    named_T[case.targets.index_N] = True
    assert not gradient_TD[~named_T].any()
    assert gradient_TD[named_T].any(dim=1).all()


def test_the_incoming_gradient_scales_both_and_may_come_twice() -> None:
    case = make_case(30, 4, 50, 3, torch.float64)
    once = case.gradients()
    loss, _, _ = case.loss()
    inputs = (case.hidden_TD, case.weight_VD)
    for factor in (-2.5, 3.0):
        scaled = torch.autograd.grad(factor * loss, inputs, retain_graph=True)
        torch.testing.assert_close(scaled, tuple(factor * each for each in once))


@pytest.mark.parametrize("frozen", ["hidden_TD", "weight_VD"])
def test_a_frozen_input_gets_no_gradient(frozen: str) -> None:
    case = make_case(30, 4, 50, 3, torch.float64)
    wanted = dict(zip(("hidden_TD", "weight_VD"), case.gradients(), strict=True))
    free = ({*wanted} - {frozen}).pop()
    half = replace(case, **{frozen: getattr(case, frozen).detach()})
    half.loss()[0].backward()
    torch.testing.assert_close(getattr(half, free).grad, wanted[free])
    assert getattr(half, frozen).grad is None


def test_positions_of_coefficient_zero_are_computed_but_do_not_train() -> None:
    case = make_case(30, 4, 50, 3, torch.float64)
    off = torch.arange(len(case.ce_coef_N)) % 2 == 0
    half = replace(
        case,
        ce_coef_N=case.ce_coef_N.masked_fill(off, 0),
        kd_coef_N=case.kd_coef_N.masked_fill(off, 0),
    )
    torch.testing.assert_close(half.loss()[1:], case.loss()[1:])
    gradient_TD, _ = half.gradients()
    assert not gradient_TD[case.targets.index_N[off]].any()
    torch.testing.assert_close(
        gradient_TD[case.targets.index_N[~off]], case.gradients()[0][case.targets.index_N[~off]]
    )


def test_no_positions_give_zero() -> None:
    case = make_case(3, 4, 50, 3, torch.float32)
    empty = replace(
        case, targets=case.targets[:0], ce_coef_N=torch.zeros(0), kd_coef_N=torch.zeros(0)
    )
    assert empty.loss()[0].item() == 0
    assert all(not gradient.any() for gradient in empty.gradients())


def test_evaluation_equals_training_and_ranks_by_logit() -> None:
    case = make_case(60, 16, 1000, 20, torch.float32)
    _, ce_N, kd_N = case.loss(chunk_tokens=7)
    losses, top_N = fused_linear_eval(case.hidden_TD, case.weight_VD, case.targets, chunk_tokens=16)
    torch.testing.assert_close(losses[:2], (ce_N, kd_N))
    logits_NV = case.hidden_TD.double()[case.targets.index_N] @ case.weight_VD.double().T
    assert torch.equal(top_N, logits_NV.argmax(dim=1))
    assert not any(each.requires_grad for each in losses[:2])
