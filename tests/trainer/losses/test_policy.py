"""The on-policy objective on batches: rollouts beside an anchor, one mean a span, any split, and what is logged."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from common.config import parse_config
from common.errors import AlignmentError, ConfigError
from common.tokenizer import CHANNEL, END, PAD, START
from datastore.rollout import ScoredTokens
from tests.trainer.losses.sampling import MixedRow, mixed_rows
from tests.trainer.packed import pack
from trainer.batch import Batch, make_batch
from trainer.losses.coefficients import Coefficients, Losses, SampledTokens
from trainer.losses.fused_linear import fused_linear_eval
from trainer.losses.objective import batch_loss, batch_targets, evaluate_batch
from trainer.losses.policy import PolicyLossConfig, num_without_targets, require_targets
from trainer.losses.report import loss_metrics, loss_sums
from trainer.losses.spans import LossConfig, span_counts

VOCAB, HIDDEN, SEQ_LEN, ROWS = 151, 8, 40, 7
OBJECTIVES = ("policy_gradient", "reverse_kl", "forward_kl")


@pytest.fixture(scope="module")
def rows() -> list[MixedRow]:
    return mixed_rows(ROWS, SEQ_LEN, VOCAB)


@pytest.fixture(scope="module")
def model() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_BTD = torch.randn(ROWS, SEQ_LEN, HIDDEN, generator=generator)
    return hidden_BTD, torch.randn(VOCAB, HIDDEN, generator=generator)


def batch_of(rows: list[MixedRow]) -> Batch:
    return make_batch(*zip(*rows, strict=True))


def config_of(objective: str, **changes: object) -> PolicyLossConfig:
    values = {
        "objective": objective,
        "span_weights": {"reasoning": 0.7, "final": 1.8},
        "ratio": {"low": 0.6, "high": 1.5},
        "advantage_clip": 2.0,
        "chunk_tokens": 13,
    }
    return PolicyLossConfig.model_validate(values | changes)


def plain_losses(
    batch: Batch, config: PolicyLossConfig, hidden_BTD: torch.Tensor, weight_VD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE, and the loss of sampled tokens by `objective`, of every position from full logits: [B, T] each."""
    logp = (hidden_BTD @ weight_VD.T).log_softmax(dim=2)
    labels = batch.labels_BT.masked_fill(batch.label_spans_BT == 0, 0)
    ce = -logp.gather(2, labels[..., None])[..., 0]
    if config.objective == "policy_gradient":
        surprise = batch.teacher_logprob_BT + ce.detach()
        ratio = (-ce.detach() - batch.sampling_logprob_BT).exp()
        weight = ratio.clip(config.ratio.low, config.ratio.high)
        return ce, weight * surprise.clip(-config.advantage_clip, config.advantage_clip) * ce
    dense = torch.zeros_like(logp).scatter_add_(
        2, batch.target_ids_BTK.long(), batch.target_weights_BTK.to(logp.dtype)
    )
    if config.objective == "forward_kl":
        logits = hidden_BTD @ weight_VD.T
        return ce, logits.logsumexp(dim=2) - (dense * logits).sum(dim=2)
    columns = torch.arange(batch.target_ids_BTK.shape[2])
    in_head = (columns < batch.target_num_head_BT[..., None]).to(logp.dtype)
    mask = torch.zeros_like(logp).scatter_add_(2, batch.target_ids_BTK.long(), in_head) > 0
    q_tail = (logp.exp() * ~mask).sum(dim=2)
    head = torch.where(mask, logp.exp() * (logp - dense.clamp(min=1e-9).log()), 0).sum(dim=2)
    kl = head + q_tail * (q_tail.log() - batch.target_log_tail_BT.clamp(min=-16))
    return ce, torch.where(mask.any(dim=2), kl, 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_both_kinds_of_rows_share_the_mean_of_each_span(rows, model, objective: str) -> None:
    batch, config = batch_of(rows), config_of(objective)
    inputs = [each.double().requires_grad_() for each in model]
    ce, of_sampled = plain_losses(batch, config, *inputs)
    mixed = torch.where(batch.sampled_BT, of_sampled, ce)
    reasoning, final = batch.label_spans_BT == 1, batch.label_spans_BT == 2
    expected = 0.7 * mixed[reasoning].mean() + 1.8 * mixed[final].mean()
    wide = [each.double().requires_grad_() for each in model]
    loss, sums = batch_loss(*wide, batch, span_counts(batch), config)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    gradients, wanted = torch.autograd.grad(loss, wide), torch.autograd.grad(expected, inputs)
    for gradient, exact in zip(gradients, wanted, strict=True):
        assert ((gradient - exact).norm() / exact.norm()).item() < 1e-6
    metrics = loss_metrics(sums)
    assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss/weight/reasoning"] == pytest.approx(0.7)
    assert metrics["loss/weight/total"] == pytest.approx(2.5)
    for name, at in (("reasoning", reasoning), ("final", final)):
        text = at & ~batch.sampled_BT
        assert 0 < text.sum() < at.sum()
        assert metrics[f"loss/ce/{name}"] == pytest.approx(ce[text].mean().item(), rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("split", [[1] * 7, [3, 4], [2, 5], [6, 1]])
def test_any_split_of_the_global_batch_is_the_same(rows, model, objective, split) -> None:
    """Parts with anchors alone, and with rollouts alone, are among them."""
    config = config_of(objective)

    def total(sizes: list[int]) -> tuple[torch.Tensor, ...]:
        hidden_BTD, weight_VD = (each.clone().requires_grad_() for each in model)
        cuts = np.cumsum([0, *sizes])
        parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(cuts)]
        batches = [batch_of(rows[part]) for part in parts]
        counts = sum(span_counts(batch) for batch in batches)
        results = [
            batch_loss(hidden_BTD[part], weight_VD, batch, counts, config)
            for part, batch in zip(parts, batches, strict=True)
        ]
        losses, sums = zip(*results, strict=True)
        sum(losses).backward()
        return sum(losses).detach(), sum(sums), hidden_BTD.grad, weight_VD.grad

    for part, whole in zip(total(split), total([ROWS]), strict=True):
        assert ((part - whole).norm() / whole.norm()).item() < 2e-6


def test_the_policy_gradient_needs_no_targets(rows, model) -> None:
    config = config_of("policy_gradient")
    batch, bare = batch_of(rows), batch_of([(row, None, sampled) for row, _, sampled in rows])
    assert bare.target_ids_BTK.shape[2] == 0 and bool(bare.sampled_BT.any())
    losses, gradients, metrics = [], [], []
    for each in (batch, bare):
        inputs = [tensor.clone().requires_grad_() for tensor in model]
        loss, sums = batch_loss(*inputs, each, span_counts(each), config)
        losses.append(loss)
        gradients.append(torch.autograd.grad(loss, inputs))
        metrics.append(loss_metrics(sums))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(*gradients)
    assert "loss/kl/final" in metrics[0] and "loss/kl/final" not in metrics[1]
    shared = {name: metrics[0][name] for name in metrics[1]} | {"loss/scored_share/total": 0}
    changed = {f"loss/scored_share/{name}" for name in ("reasoning", "final", "control")}
    assert {n: v for n, v in metrics[1].items() if n not in changed} == pytest.approx(
        {n: v for n, v in shared.items() if n not in changed}
    )


def test_a_student_equal_to_its_teacher_is_not_moved_by_its_samples(rows, model) -> None:
    batch, config = batch_of(rows), config_of("policy_gradient")
    own, _ = fused_linear_eval(
        model[0].flatten(0, 1), model[1], batch_targets(batch), chunk_tokens=config.chunk_tokens
    )
    own_BT = torch.zeros(batch.tokens_BT.numel()).index_copy_(0, batch.target_index_N, -own.ce_N)
    equal = dataclasses.replace(batch, teacher_logprob_BT=own_BT.view_as(batch.teacher_logprob_BT))
    hidden_BTD = model[0].clone().requires_grad_()
    loss, sums = batch_loss(hidden_BTD, model[1], equal, span_counts(batch), config)
    (gradient_BTD,) = torch.autograd.grad(loss, hidden_BTD)
    assert not gradient_BTD[batch.sampled_BT].any()
    assert gradient_BTD[(batch.label_spans_BT > 0) & ~batch.sampled_BT].any(dim=1).all()
    metrics = loss_metrics(sums)
    assert metrics["loss/reverse_kl/total"] == metrics["loss/advantage/final"] == 0


def hand_made() -> tuple[Batch, Losses, SampledTokens]:
    """Six sampled tokens, of them three control ids, then a document of the anchor with two targets."""
    tokens = np.array([7, START, CHANNEL, 11, END, 12, 13, PAD], dtype=np.int32)
    spans = np.array([0, 1, 1, 1, 1, 2, 2, 0], dtype=np.uint8)
    anchor = np.array([3, 4, 5, PAD], dtype=np.int32), np.array([0, 1, 2, 0], dtype=np.uint8)
    teacher_S = np.log([0.5, 0.5, 0.25, 0.5, 0.1, 0.2]).astype(np.float32)
    sampling_S = np.log([0.5, 0.25, 0.5, 0.5, 0.4, 0.1]).astype(np.float32)
    scored = ScoredTokens(sampling_logprob_S=sampling_S, teacher_logprob_S=teacher_S)
    batch = make_batch([pack([(tokens, spans), anchor], 14)], None, [[scored, None]])
    ce_N = -torch.tensor([0.5, 0.5, 0.5, 0.25, 0.8, 0.1, 0.3, 0.6]).log()
    index_N = batch.target_index_N
    sampled = SampledTokens(
        sampled_N=batch.sampled_BT.flatten()[index_N],
        coef_N=batch.sampled_BT.flatten()[index_N].float(),
        teacher_logprob_N=batch.teacher_logprob_BT.flatten()[index_N],
        sampling_logprob_N=batch.sampling_logprob_BT.flatten()[index_N],
        ratio_low=0.75,
        ratio_high=1.75,
        advantage_clip=1.0,
    )
    return batch, Losses(ce_N, torch.zeros(8), None), sampled


def test_the_log_of_known_tokens() -> None:
    batch, losses, sampled = hand_made()
    assert batch.sampled_BT[0].tolist() == [True] * 6 + [False] * 8
    text_N = (~sampled.sampled_N).float()
    of = Coefficients(text_N, torch.zeros(8), sampled=sampled)
    metrics = loss_metrics(loss_sums(batch, losses, of))
    log = np.log
    assert metrics["loss/sampled/reasoning"] == 4 and metrics["loss/positions/reasoning"] == 5
    assert metrics["loss/sampled/final"] == 2 and metrics["loss/sampled/control"] == 3
    expected = {
        "reverse_kl/reasoning": (log(0.5 / 0.25) + log(0.25 / 0.5)) / 4,
        "reverse_kl/final": (log(0.8 / 0.1) + log(0.1 / 0.2)) / 2,
        "reverse_kl/control": log(0.25 / 0.5) / 3,
        "reverse_kl/total": log(0.8 / 0.2 * 0.1 / 0.1) / 6,
        "student_logprob/final": (log(0.8) + log(0.1)) / 2,
        "teacher_logprob/final": (log(0.1) + log(0.2)) / 2,
        "advantage/reasoning": (log(0.25 / 0.5) + log(0.5 / 0.25)) / 4,
        "advantage/final": (-1 + log(2)) / 2,
        "advantage_clipped/reasoning": 0,
        "advantage_clipped/final": 0.5,
        "ratio/reasoning": (1 + 1.75 + 1 + 0.75) / 4,
        "ratio_clipped/reasoning": 0.5,
        "ratio/final": (1.75 + 1) / 2,
        "ratio_clipped/final": 0.5,
        "ce/reasoning": -log(0.3),
        "ce/final": -log(0.6),
        "weight/final": 3,
    }
    assert {name: metrics[f"loss/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert not any("kl/" in name and "reverse" not in name for name in metrics)
    assert "loss/ce/control" not in metrics and "loss/teacher_nll/final" not in metrics


def test_a_batch_without_samples_reports_what_it_did(rows, model) -> None:
    """No name of sampled tokens among those of offline KD, and none of its own missing."""
    text = make_batch([row for row, _, _ in rows], [documents for _, documents, _ in rows])
    _, sums = batch_loss(*model, text, span_counts(text), LossConfig(kd_weight=0.5))
    kinds = {name.split("/")[1] for name in loss_metrics(sums)}
    assert kinds == {
        *("positions", "weight", "ce", "scored_share", "kd", "kl", "entropy", "teacher_nll"),
        "total",
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_evaluation_reports_what_training_reports(rows, model, objective: str) -> None:
    batch, config = batch_of(rows), config_of(objective)
    counts = span_counts(batch)
    _, sums = batch_loss(*model, batch, counts, config)
    trained = loss_metrics(sums)
    evaluated = loss_metrics(evaluate_batch(*model, batch, counts, config))
    assert {name: evaluated[name] for name in trained} == pytest.approx(trained)
    _, kl = plain_losses(batch, config_of("reverse_kl"), *(each.double() for each in model))
    for name, span in (("reasoning", 1), ("final", 2)):
        at = batch.sampled_BT & (batch.label_spans_BT == span)
        assert evaluated[f"loss/coarse_kl/{name}"] == pytest.approx(kl[at].mean().item(), rel=1e-5)
        assert (f"loss/coarse_kl/{name}" in trained) == (objective == "reverse_kl")


@pytest.mark.parametrize("objective", ["reverse_kl", "forward_kl"])
def test_samples_without_the_targets_that_the_objective_needs_are_refused(rows, objective) -> None:
    config = config_of(objective)
    require_targets(int(num_without_targets(batch_of(rows))), config)
    part = [(row, None if n == 0 else documents, of) for n, (row, documents, of) in enumerate(rows)]
    missing = int(num_without_targets(batch_of(part)))
    assert missing == int(batch_of(rows[:1]).sampled_BT.sum()) > 0
    with pytest.raises(AlignmentError, match=objective):
        require_targets(missing, config)
    require_targets(missing, config_of("policy_gradient"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"objective": "ppo"},
        {"ratio": {"low": 1.5}},
        {"ratio": {"high": 0.5}},
        {"ratio": {"low": -0.1}},
        {"advantage_clip": 0},
        {"chunk_tokens": 0},
        {"span_weights": {"final": -1}},
        {"kd_weight": 1},
    ],
)
def test_wrong_configs_are_refused(wrong: dict) -> None:
    parse_config(PolicyLossConfig, {}, "test")
    with pytest.raises(ConfigError):
        parse_config(PolicyLossConfig, wrong, "test")
