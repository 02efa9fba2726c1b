"""FLOPs a token: against products counted one by one, positions counted one by one, and the peak's table."""

from __future__ import annotations

import pytest

from common.config import CONFIG_ROOT, load_config
from tests.trainer.megatron.tiny import STUDENT
from trainer.flops import flops_per_token, forward_flops, mfu, peak_bf16_flops
from trainer.student_config import StudentConfig

TINY = StudentConfig.model_validate(STUDENT)


def test_every_product_of_the_tiny_student() -> None:
    """Layers 1-3 are local with factors, 4 is global; 1 is dense; two of eight experts."""
    matrices = [
        *[(32, 4 * 3), (32, 2 * 2), (32, 2 * 2), (32, 3 * 8), (32, 2 * 8), (32, 2 * 8)] * 3,
        (32, (4 + 2 + 2) * 8),
        *[(4 * 8, 32)] * 4,
        *[(32, 48), (48, 32)],
        *[(32, 8), (32, 24), (24, 32), *[(32, 16), (16, 32)] * 2] * 3,
    ]
    factors = [*[(3, 8)] * 4, *[(2, 8)] * 4] * 3
    parts = forward_flops(TINY, 48)
    assert parts["matrices"] == 2 * sum(m * n for m, n in matrices)
    assert parts["tpa"] == 2 * sum(m * n for m, n in factors)
    assert parts["lm_head"] == 2 * 32 * 300


@pytest.mark.parametrize("seq_len", [3, 48])
def test_attention_counts_the_positions_that_queries_see(seq_len) -> None:
    local = sum(min(t, TINY.window) for t in range(1, seq_len + 1)) / seq_len
    whole = sum(range(1, seq_len + 1)) / seq_len
    seen = 3 * local + whole
    assert forward_flops(TINY, seq_len)["attention"] == pytest.approx(2 * 2 * 4 * 8 * seen)


def test_the_locked_student_costs_3_78_gflops_a_token() -> None:
    """2 x 367,362,048 weights of matrices and 205,914,112 of lm_head; scores and values are 9 %."""
    student = load_config(StudentConfig, CONFIG_ROOT / "student" / "vpmoe.yaml")
    parts = forward_flops(student, 2048)
    assert parts["matrices"] == 2 * 367_362_048
    assert flops_per_token(student, 2048) == pytest.approx(3.78472704e9)


def test_utilisation_is_the_share_of_a_known_peak() -> None:
    peak = peak_bf16_flops("NVIDIA H200")
    assert peak == peak_bf16_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert peak_bf16_flops("NVIDIA H100 PCIe") is peak_bf16_flops("NVIDIA H200 NVL") is None
    assert mfu(1e5, 3.78e9, peak) == pytest.approx(0.38205, rel=1e-4)
