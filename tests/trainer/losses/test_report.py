"""What is logged: KL against an independent computation, control apart, sums that add."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.tokenizer import CHANNEL, END, PAD, START, VOCAB_SIZE
from datastore.target import target_positions
from tests.trainer.packed import pack, score
from trainer.batch import make_batch
from trainer.losses.coefficients import Coefficients, Losses
from trainer.losses.report import loss_metrics, loss_sums


def test_kl_of_a_student_equal_to_the_teacher_is_zero_and_control_is_apart() -> None:
    """A teacher that is sure of two ids stores both exactly, so its cross entropy is known on paper."""
    tokens = np.array([7, START, CHANNEL, 11, END, 12, PAD], dtype=np.int32)
    spans = np.array([0, 1, 1, 1, 1, 2, 0], dtype=np.uint8)
    num_positions = len(target_positions(tokens, spans))
    logprobs_PV = np.full((num_positions, VOCAB_SIZE), -np.inf)
    logprobs_PV[np.arange(num_positions), tokens[1:6]] = np.log(0.75)
    logprobs_PV[:, 5] = np.log(0.25)
    batch = make_batch([pack([(tokens, spans)], 9)], [[score((tokens, spans), logprobs_PV)]])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    ce_N = torch.full((5,), -np.log(0.75))
    kd_N = torch.full((5,), entropy)
    ones_N, zeros_N = torch.ones(5), torch.zeros(5)
    metrics = loss_metrics(
        loss_sums(batch, Losses(ce_N, kd_N, None), Coefficients(ones_N, zeros_N))
    )
    assert metrics["loss/positions/control"] == 3
    assert metrics["loss/positions/reasoning"] == 4
    assert metrics["loss/positions/final"] == 1
    for name in ("reasoning", "final", "control"):
        assert metrics[f"loss/kl/{name}"] == pytest.approx(0, abs=1e-6)
        assert metrics[f"loss/entropy/{name}"] == pytest.approx(entropy)
        assert metrics[f"loss/teacher_nll/{name}"] == pytest.approx(-np.log(0.75), rel=1e-6)
    lower = loss_metrics(
        loss_sums(batch, Losses(ce_N, kd_N + 0.5, None), Coefficients(ones_N, zeros_N))
    )
    assert lower["loss/kl/final"] == pytest.approx(0.5, rel=1e-6)
    assert lower["loss/total"] == pytest.approx(5 * -np.log(0.75), rel=1e-6)


def test_the_reported_kl_subtracts_the_entropy_of_scored_documents_alone() -> None:
    """Two documents of known entropies; the one without targets adds no entropy, and its KD value is not counted."""
    tokens = np.array([7, START, 11, END, 12, 13, PAD], dtype=np.int32)
    spans = np.array([0, 1, 1, 1, 2, 2, 0], dtype=np.uint8)
    targets, entropies = [], []
    for likely in (0.75, 0.5):
        logprobs_PV = np.full((5, VOCAB_SIZE), -np.inf)
        logprobs_PV[np.arange(5), tokens[1:6]] = np.log(likely)
        logprobs_PV[:, 5] = np.log(1 - likely)
        targets.append(score((tokens, spans), logprobs_PV))
        entropies.append(-likely * np.log(likely) - (1 - likely) * np.log(1 - likely))
    row = pack([(tokens, spans), (tokens, spans)], 16)
    for scored in (0, 1):
        documents = [target if n == scored else None for n, target in enumerate(targets)]
        batch = make_batch([row], [documents])
        of_scored = batch.has_target_BT.flatten()[batch.target_index_N]
        assert of_scored.tolist() == [scored == 0] * 5 + [scored == 1] * 5
        kd_N = torch.where(of_scored, entropies[scored] + 0.25, 1e6)
        ones_N, zeros_N = torch.ones(10), torch.zeros(10)
        metrics = loss_metrics(
            loss_sums(batch, Losses(ones_N, kd_N, None), Coefficients(ones_N, zeros_N))
        )
        assert metrics["loss/scored_share/total"] == 0.5
        for name, count in (("reasoning", 6), ("final", 4), ("control", 4)):
            assert metrics[f"loss/positions/{name}"] == count
            assert metrics[f"loss/scored_share/{name}"] == 0.5
            assert metrics[f"loss/entropy/{name}"] == pytest.approx(entropies[scored])
            assert metrics[f"loss/kl/{name}"] == pytest.approx(0.25, rel=1e-6)
    nothing = loss_metrics(
        loss_sums(make_batch([row]), Losses(ones_N, kd_N, None), Coefficients(ones_N, zeros_N))
    )
    assert nothing["loss/scored_share/total"] == 0
    assert "loss/kl/final" not in nothing
