"""The kernel of queries, keys and values at tiny sizes under Triton's interpreter, against the plain functions in fp64.

TRITON_INTERPRET=1 python -m pytest tests/trainer/test_qkv_kernel.py
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.trainer.qkv_kernel_errors import BF16, NAMES, errors, inputs, results, sizes

pytest.importorskip("triton", reason="needs triton")
from tests.trainer.test_moe_kernels import interpreter  # noqa: F401

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)


@pytest.mark.parametrize("mixes", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("tpa", [True, False])
def test_equals_plain_fp64(tpa, turned, mixes) -> None:
    # 7 positions of 3 rows: neither tokens nor rows fill a tile.
    got = errors("cpu", 7, sizes(tpa, 3, head_dim=16), turned=turned, mixes=mixes)
    assert len(got) == 3 + 3 + tpa + turned + 2 * mixes
    for name, error in got.items():
        assert error <= 1, name
    # fp32 throughout, of inputs without an error.
    assert got.get("grad rotation", 0.0) * BF16 < 1e-6


@pytest.mark.parametrize(("rows", "positions"), [(1, 37), (16, 2), (20, 2), (8, 5)])
def test_every_number_of_rows(rows, positions) -> None:
    of = sizes(True, rows, head_dim=16, heads=4, groups=1)
    for name, error in errors("cpu", positions, of, turned=True, mixes=True).items():
        assert error <= 1, name


def test_the_full_head() -> None:
    for name, error in errors("cpu", 3, sizes(True, 2), turned=True, mixes=True).items():
        assert error <= 1, name


def test_many_programs_are_added_up() -> None:
    """More programs than one of the first round of sums takes (256 of 2 tokens)."""
    of = sizes(True, 16, head_dim=16, heads=2, groups=1)
    for name, error in errors("cpu", 33, of, turned=True, mixes=True).items():
        assert error <= 1, name


def test_value_is_rounded_before_it_is_mixed() -> None:
    of = sizes(False, 2, head_dim=16)
    leaves = inputs("cpu", 3, of, turned=False, mixes=True) | {"logit": torch.tensor([30.0])}
    want = leaves["mixed"].unflatten(1, (2, 6, 16))[:, :, 5]
    assert torch.equal(results(leaves, of)["value"], want)


@pytest.mark.parametrize(
    "change",
    [
        {"mixed": torch.zeros(6, 192)},
        {"mixed": torch.zeros(6, 191).bfloat16()},
        {"bias": torch.zeros(192)},
        {"logit": None},
        {"first_value": None},
        {"rotation": torch.zeros(2, 6, 8)},
    ],
)
def test_refuses_what_does_not_fit(change) -> None:
    from common.errors import ConfigError
    from trainer.kernels.qkv import qkv

    of = sizes(False, 2, head_dim=16)
    leaves = inputs("cpu", 3, of, turned=True, mixes=True) | change
    with pytest.raises(ConfigError):
        qkv(*(leaves[n] for n in NAMES), **of)
