"""What is logged: KL against an independent computation, control apart, sums that add."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.tokenizer import CHANNEL, END, PAD, START, VOCAB_SIZE
from datastore.target import target_positions
from tests.trainer.packed import pack, score
from trainer.batch import make_batch
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
    metrics = loss_metrics(loss_sums(batch, ce_N, kd_N, ones_N, zeros_N))
    assert metrics["loss/positions/control"] == 3
    assert metrics["loss/positions/reasoning"] == 4
    assert metrics["loss/positions/final"] == 1
    for name in ("reasoning", "final", "control"):
        assert metrics[f"loss/kl/{name}"] == pytest.approx(0, abs=1e-6)
        assert metrics[f"loss/entropy/{name}"] == pytest.approx(entropy)
        assert metrics[f"loss/teacher_nll/{name}"] == pytest.approx(-np.log(0.75), rel=1e-6)
    lower = loss_metrics(loss_sums(batch, ce_N, kd_N + 0.5, ones_N, zeros_N))
    assert lower["loss/kl/final"] == pytest.approx(0.5, rel=1e-6)
    assert lower["loss/total"] == pytest.approx(5 * -np.log(0.75), rel=1e-6)
