"""The objective of design section 7: global span means, vanilla rows, confidence, any split of a global batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional

from common.config import parse_config
from common.errors import ConfigError
from datastore.target import reduce_logprobs
from datastore.types import DocTarget, PackedRow
from tests.trainer.packed import random_logprobs, random_row
from trainer.batch import Batch, make_batch
from trainer.losses.chunk import TokenTargets
from trainer.losses.coefficients import Coefficients
from trainer.losses.fused_linear import fused_linear_loss
from trainer.losses.objective import batch_loss, evaluate_batch
from trainer.losses.report import loss_metrics
from trainer.losses.spans import LossConfig, span_counts

VOCAB, HIDDEN, SEQ_LEN = 211, 8, 40
SHAPES = [[(3, 9, 5), (2, 6, 8)], [(4, 0, 20)], [(2, 11, 1), (6, 2, 2)], [(5, 12, 7)]]
Row = tuple[PackedRow, list[DocTarget]]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rng = np.random.default_rng(1)
    return [random_row(rng, SHAPES[b % 4], SEQ_LEN, VOCAB) for b in range(8)]


@pytest.fixture(scope="module")
def model() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    hidden_BTD = torch.randn(8, SEQ_LEN, HIDDEN, generator=generator)
    return hidden_BTD, torch.randn(VOCAB, HIDDEN, generator=generator)


def batch_of(rows: list[Row], vanilla: tuple[int, ...] = ()) -> Batch:
    """Rows numbered in `vanilla` come without their targets."""
    documents = [None if b in vanilla else documents for b, (_, documents) in enumerate(rows)]
    return make_batch([row for row, _ in rows], documents)


def position_losses(
    batch: Batch, hidden_BTD: torch.Tensor, weight_VD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """CE and KD of every position from full float64 logits: [B, T] each."""
    logits = hidden_BTD.double() @ weight_VD.double().T
    labels = batch.labels_BT.masked_fill(batch.label_spans_BT == 0, 0)
    ce = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    picked = logits.gather(2, batch.target_ids_BTK.long())
    kd = logits.logsumexp(dim=2) - (picked * batch.target_weights_BTK).sum(dim=2)
    return ce.view_as(kd), kd


def run(
    batch: Batch, model: tuple[torch.Tensor, torch.Tensor], config: LossConfig
) -> tuple[float, dict[str, float]]:
    loss, sums = batch_loss(*model, batch, span_counts(batch), config)
    return loss.item(), loss_metrics(sums)


@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
def test_a_scored_batch_has_the_mean_of_each_span(rows, model, kd_weight: float) -> None:
    batch = batch_of(rows)
    spans = {"reasoning": 0.7, "final": 2.0}
    config = LossConfig(kd_weight=kd_weight, span_weights=spans)
    ce, kd = position_losses(batch, *model)
    reasoning, final = batch.label_spans_BT == 1, batch.label_spans_BT == 2
    expected = 0.7 * ((1 - kd_weight) * ce[reasoning].mean() + kd_weight * kd[reasoning].mean())
    expected += 2.0 * ((1 - kd_weight) * ce[final].mean() + kd_weight * kd[final].mean())
    loss, metrics = run(batch, model, config)
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss/total"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss/ce/final"] == pytest.approx(ce[final].mean().item(), rel=1e-6)
    assert metrics["loss/kd/reasoning"] == pytest.approx(kd[reasoning].mean().item(), rel=1e-6)
    assert metrics["loss/weight/final"] == pytest.approx(2.0)


@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
def test_vanilla_rows_train_with_ce_alone_at_full_weight(rows, model, kd_weight: float) -> None:
    batch = batch_of(rows, vanilla=(0, 1, 5))
    ce, kd = position_losses(batch, *model)
    scored = torch.tensor([b not in (0, 1, 5) for b in range(8)])[:, None]
    mixed = torch.where(scored, (1 - kd_weight) * ce + kd_weight * kd, ce)
    expected = sum(mixed[batch.label_spans_BT == span].mean() for span in (1, 2))
    loss, metrics = run(batch, model, LossConfig(kd_weight=kd_weight))
    assert loss == pytest.approx(float(expected), rel=1e-6)
    final = (batch.label_spans_BT == 2) & scored
    assert metrics["loss/kd/final"] == pytest.approx(kd[final].mean().item(), rel=1e-6)


def some_documents(rows: list[Row]) -> list[list[DocTarget | None] | None]:
    """Row 1 has no targets at all, row 0 none of its first document, rows 2 and 4 none of their second."""
    targets: list[list[DocTarget | None] | None] = [list(documents) for _, documents in rows]
    targets[1] = None
    for row, document in ((0, 0), (2, 1), (4, 1)):
        targets[row][document] = None
    return targets


@pytest.mark.parametrize("kd_weight", [0.3, 1.0])
def test_documents_without_targets_train_with_ce_beside_scored_ones(rows, model, kd_weight) -> None:
    batch = make_batch([row for row, _ in rows], some_documents(rows))
    ce, kd = position_losses(batch, *model)
    scored = torch.ones(8, SEQ_LEN, dtype=torch.bool)
    scored[1] = False
    for row, document in ((0, 0), (2, 1), (4, 1)):
        scored[row][batch.doc_ids_BT[row] == document] = False
    mixed = torch.where(scored, (1 - kd_weight) * ce + kd_weight * kd, ce)
    spans = {"reasoning": batch.label_spans_BT == 1, "final": batch.label_spans_BT == 2}
    loss, metrics = run(batch, model, LossConfig(kd_weight=kd_weight))
    assert loss == pytest.approx(float(sum(mixed[at].mean() for at in spans.values())), rel=1e-6)
    for name, at in spans.items():
        both = at & scored
        assert 0 < both.sum() < at.sum()
        assert metrics[f"loss/positions/{name}"] == at.sum()
        assert metrics[f"loss/scored_share/{name}"] == pytest.approx(
            (both.sum() / at.sum()).item(), rel=1e-6
        )
        assert metrics[f"loss/kd/{name}"] == pytest.approx(kd[both].mean().item(), rel=1e-6)
        nll = -batch.teacher_logprob_BT[both].double().mean().item()
        assert metrics[f"loss/teacher_nll/{name}"] == pytest.approx(nll, rel=1e-6)
        assert metrics[f"loss/ce/{name}"] == pytest.approx(ce[at].mean().item(), rel=1e-6)


@pytest.mark.parametrize("split", [[8], [1] * 8, [3, 5], [2, 2, 4], [7, 1]])
def test_any_split_of_the_global_batch_is_the_same(rows, model, split: list[int]) -> None:
    """Micro-batches, accumulation and data parallel ranks are all splits: each part knows only global counts."""
    config = LossConfig(
        kd_weight=0.6,
        span_weights={"reasoning": 0.5, "final": 1.5},
        confidence={"m": -3.0, "tau": 2.0, "w_min": 0.2, "w_max": 1.5},
        chunk_tokens=13,
    )
    documents = some_documents(rows)
    packed = [row for row, _ in rows]

    def total(sizes: list[int]) -> tuple[torch.Tensor, ...]:
        hidden_BTD, weight_VD = (each.clone().requires_grad_() for each in model)
        cuts = np.cumsum([0, *sizes])
        parts = [slice(int(a), int(b)) for a, b in itertools.pairwise(cuts)]
        batches = [make_batch(packed[part], documents[part]) for part in parts]
        counts = sum(span_counts(batch) for batch in batches)
        losses, sums = zip(
            *(
                batch_loss(hidden_BTD[part], weight_VD, batch, counts, config)
                for part, batch in zip(parts, batches, strict=True)
            ),
            strict=True,
        )
        for loss in losses:
            loss.backward()
        return sum(losses).detach(), sum(sums), hidden_BTD.grad, weight_VD.grad

    for part, whole in zip(total(split), total([8]), strict=True):
        assert ((part - whole).norm() / whole.norm()).item() < 1e-6


def test_the_gradient_over_draws_is_the_dense_gradient() -> None:
    """The mean of q - T over the offset u of the draws is q - P. With an identity lm_head hidden is the logits."""
    rng, threshold, num_draws = np.random.default_rng(3), 1 / 8, 4000
    logprobs_V = random_logprobs(rng, 1, 60)[0]
    uniforms = (np.arange(num_draws) + 0.5) / num_draws
    target = reduce_logprobs(
        np.tile(logprobs_V, (num_draws, 1)),
        np.zeros(num_draws, dtype=np.int64),
        np.arange(num_draws),
        uniforms,
        threshold,
    )
    entries = np.diff(target.offsets_P1)
    ids, weights = np.zeros((2, num_draws, entries.max()))
    inside = np.arange(entries.max()) < entries[:, None]
    ids[inside], weights[inside] = target.ids_E, target.weights_E
    logits_V = torch.from_numpy(rng.standard_normal(60)).requires_grad_()
    loss, _ = fused_linear_loss(
        logits_V.expand(num_draws, 60),
        torch.eye(60, dtype=torch.float64),
        TokenTargets(
            index_N=torch.arange(num_draws),
            labels_N=torch.zeros(num_draws, dtype=torch.int64),
            ids_NK=torch.from_numpy(ids).int(),
            weights_NK=torch.from_numpy(weights),
        ),
        Coefficients(torch.zeros(num_draws), torch.full((num_draws,), 1 / num_draws)),
        chunk_tokens=512,
    )
    (gradient_V,) = torch.autograd.grad(loss, logits_V)
    dense_V = logits_V.detach().softmax(dim=0) - torch.from_numpy(np.exp(logprobs_V))
    assert 0.1 < (target.weights_E == np.float32(threshold)).mean() < 0.9
    # An id is drawn for u in at most two intervals: the grid misses each by one step at either end.
    assert (gradient_V - dense_V).abs().max().item() < 4 * threshold / num_draws + 1e-6


def test_a_span_without_positions_contributes_nothing_and_is_counted(rows, model) -> None:
    hidden_BTD, weight_VD = model
    only_final = batch_of(rows[1:2])
    loss, metrics = run(only_final, (hidden_BTD[1:2], weight_VD), LossConfig(kd_weight=0.0))
    ce, _ = position_losses(only_final, hidden_BTD[1:2], weight_VD)
    assert loss == pytest.approx(ce[only_final.label_spans_BT == 2].mean().item(), rel=1e-6)
    assert metrics["loss/positions/reasoning"] == 0
    assert metrics["loss/weight/reasoning"] == 0
    assert "loss/ce/reasoning" not in metrics


def test_confidence_scales_scored_positions_within_its_bounds(rows, model) -> None:
    batch = batch_of(rows, vanilla=(4,))
    confidence = {"m": -4.0, "tau": 1.5, "w_min": 0.25, "w_max": 2.0}
    config = LossConfig(kd_weight=0.5, confidence=confidence)
    weights = np.clip(np.exp((batch.teacher_logprob_BT.double().numpy() + 4.0) / 1.5), 0.25, 2.0)
    assert {0.25, 2.0} < {*weights[batch.has_target_BT.numpy()].tolist()}
    weights = np.where(batch.has_target_BT.numpy(), weights, 1.0)
    ce, kd = position_losses(batch, *model)
    mixed = torch.where(batch.has_target_BT, 0.5 * ce + 0.5 * kd, ce) * torch.from_numpy(weights)
    expected = sum(mixed[batch.label_spans_BT == span].mean() for span in (1, 2))
    loss, metrics = run(batch, model, config)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    mean_weight = weights[batch.label_spans_BT.numpy() == 1].mean()
    assert metrics["loss/weight/reasoning"] == pytest.approx(mean_weight, rel=1e-6)


def test_evaluation_reports_what_training_reports_and_agreement(rows, model) -> None:
    batch, config = batch_of(rows, vanilla=(3,)), LossConfig(kd_weight=0.5)
    _, trained = run(batch, model, config)
    counts = span_counts(batch)
    evaluated = loss_metrics(evaluate_batch(*model, batch, counts, config), prefix="loss")
    assert {name: evaluated[name] for name in trained} == pytest.approx(trained)
    top = (model[0].double() @ model[1].double().T).argmax(dim=2)
    final = batch.label_spans_BT == 2
    headed = final & (batch.teacher_top_BT >= 0)
    hits, agreed = top == batch.labels_BT, top == batch.teacher_top_BT
    assert evaluated["loss/label_top1/final"] == pytest.approx(hits[final].double().mean().item())
    assert evaluated["loss/teacher_top1/final"] == pytest.approx(
        agreed[headed].double().mean().item()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": 2.0},
        {"temperature": 0.999},
        {"kd_weight": 1.1},
        {"kd_weight": -0.1},
        {"confidence": {"m": 0, "tau": 0, "w_min": 0, "w_max": 1}},
        {"confidence": {"m": 0, "tau": 1, "w_min": 2, "w_max": 1}},
        {"span_weights": {"reasoning": -1}},
        {"chunk_tokens": 0},
        {"kd_wieght": 1},
    ],
)
def test_wrong_configs_are_refused(wrong: dict) -> None:
    parse_config(LossConfig, {"kd_weight": 0.5, "temperature": 1.0}, "test")
    with pytest.raises(ConfigError):
        parse_config(LossConfig, {"kd_weight": 0.5} | wrong, "test")
