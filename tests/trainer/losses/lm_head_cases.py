"""Inputs of the kernels of the loss at the lm_head, and checks of them against torch's form in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from trainer.losses.chunk import WHOLE_VOCAB, HeadTargets, TokenTargets, VocabShard
from trainer.losses.coefficients import Coefficients, Losses
from trainer.losses.fused_linear import fused_linear_loss

# Norm of a gradient's error over its own: residual, scaled hidden states and result are rounded to bf16 once each.
GRADIENT_TOLERANCE = 2 * 2.0**-8


@dataclass(frozen=True)
class Case:
    """bf16 hidden_TD and weight_VD; targets and coefficients of two thirds of the rows."""

    hidden_TD: torch.Tensor
    weight_VD: torch.Tensor
    targets: TokenTargets
    coefficients: Coefficients

    def run(
        self, dtype: torch.dtype, chunk_tokens: int, shard: VocabShard = WHOLE_VOCAB
    ) -> tuple[torch.Tensor, Losses, list[torch.Tensor]]:
        """Loss, losses and both gradients. bf16: by the kernels; float64: by torch, on the same values."""
        inputs = [
            each.detach().to(dtype).requires_grad_() for each in (self.hidden_TD, self.weight_VD)
        ]
        loss, losses = fused_linear_loss(
            *inputs, self.targets, self.coefficients, shard=shard, chunk_tokens=chunk_tokens
        )
        return loss.detach(), losses, list(torch.autograd.grad(loss, inputs))

    def logits(self) -> torch.Tensor:
        """float64 [N, V]."""
        return (self.hidden_TD.double() @ self.weight_VD.double().T)[self.targets.index_N]


def make_case(
    entries: int,
    *,
    tokens: int = 40,
    hidden: int = 24,
    vocab: int = 203,
    scale: float = 2.0,
    device: str = "cpu",
) -> Case:
    """CE with coefficients of both signs. Of several entries, some are the label or are not in use (id 0, weight 0)."""
    generator = torch.Generator().manual_seed(entries)
    num = max(2 * tokens // 3, 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    index_N = torch.randperm(tokens, generator=generator)[:num].sort().values
    labels_N = torch.randint(vocab, (num,), generator=generator)
    ids_NK = torch.stack([torch.randperm(vocab, generator=generator)[:entries] for _ in index_N])
    weights_NK = torch.rand(num, entries, generator=generator) / max(entries, 1)
    if entries > 2:
        labels_N[::2] = ids_NK[::2, 1]
        ids_NK[::3, 2:], weights_NK[::3, 2:] = 0, 0.0
    ce_N = torch.rand(num, generator=generator) - 0.3
    return Case(
        normal(tokens, hidden).bfloat16().to(device),
        (normal(vocab, hidden) * scale / hidden**0.5).bfloat16().to(device),
        TokenTargets(*(each.to(device) for each in (index_N, labels_N, ids_NK.int(), weights_NK))),
        Coefficients(ce_N.to(device), torch.zeros(num, device=device)),
    )


def with_kd(case: Case) -> Case:
    ce_N = case.coefficients.ce_N.abs()
    return replace(case, coefficients=Coefficients(ce_N, ce_N.flip(0)))


def with_heads(case: Case, *, kl: bool) -> Case:
    """0 to 3 of the entries are the head. kl: the loss of four positions of five is the KL."""
    number_N = torch.arange(len(case.targets.labels_N), device=case.hidden_TD.device)
    columns_K = torch.arange(case.targets.ids_NK.shape[1], device=case.hidden_TD.device)
    mass_N = (case.targets.weights_NK * (columns_K < (number_N % 4)[:, None])).sum(dim=1)
    heads = HeadTargets(number_N % 4, torch.log1p(-mass_N.clamp(max=0.999)))
    of = case.coefficients
    if kl:
        is_ce_N = number_N % 5 == 0
        kl_N = torch.where(is_ce_N, 0, of.ce_N.abs() + 0.1)
        of = Coefficients(of.ce_N * is_ce_N, torch.zeros_like(of.ce_N), kl_N)
    return replace(case, targets=replace(case.targets, heads=heads), coefficients=of)


def far_above(case: Case) -> Case:
    """Some rows have logits of +-200, and so a maximum more than 64 log(2) above the label; with one entry at most."""
    hidden_TD = case.hidden_TD.clone()
    hidden_TD[::7] *= 60.0
    return with_kd(replace(case, hidden_TD=hidden_TD))


def likely_labels(case: Case) -> Case:
    """Labels of probability up to 0.99999: there e - sum(e) is a small difference."""
    index_N = case.targets.index_N
    labels_N = torch.arange(len(index_N), device=index_N.device)
    weight_VD = case.weight_VD.clone()
    weight_VD[labels_N] = (case.hidden_TD[index_N] * 0.5).to(weight_VD.dtype)
    coefficients = Coefficients(torch.ones_like(case.coefficients.ce_N), case.coefficients.kd_N)
    targets = replace(case.targets, labels_N=labels_N)
    return replace(case, weight_VD=weight_VD, targets=targets, coefficients=coefficients)


def error_of(value: torch.Tensor, exact: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Norm of the error over the norm of the exact value, of all or along one dimension."""
    if dim is None:
        return (value.double() - exact).norm() / exact.norm()
    return (value.double() - exact).norm(dim=dim) / exact.norm(dim=dim)


def check(case: Case, chunk_tokens: int = 20, atol: float = 1e-5) -> None:
    """Losses to float32's accuracy (atol: nats, for large logits), gradients to bf16's, two runs to the bit."""
    loss, losses, gradients = case.run(torch.bfloat16, chunk_tokens)
    exact_loss, exact, exact_gradients = case.run(torch.float64, chunk_tokens)
    assert loss.dtype == torch.float32
    total = len(losses.ce_N) * atol
    torch.testing.assert_close(loss.double(), exact_loss, rtol=2e-6, atol=total)
    for value, wanted in zip(losses, exact, strict=True):
        assert (value is None) == (wanted is None)
        if value is not None:
            torch.testing.assert_close(value.double(), wanted, rtol=2e-6, atol=atol)
    for gradient, wanted in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert error_of(gradient, wanted) < GRADIENT_TOLERANCE
    again = case.run(torch.bfloat16, chunk_tokens)
    assert torch.equal(loss, again[0])
    assert all(torch.equal(*pair) for pair in zip(gradients, again[2], strict=True))


def check_rows_of_likely_labels(case: Case) -> None:
    """The gradient of each position by itself, where 1 - q > 1e-4; at 1e-6 float32's own sum has an error of 6 %."""
    _, losses, (exact_TD, _) = case.run(torch.float64, 20)
    _, _, (gradient_TD, _) = case.run(torch.bfloat16, 20)
    index_N = case.targets.index_N
    error_N = error_of(gradient_TD[index_N], exact_TD[index_N], dim=1)
    assert ((losses.ce_N > 1e-4) & (losses.ce_N < 2e-3)).any()
    assert error_N[losses.ce_N > 1e-4].max() < 0.02
