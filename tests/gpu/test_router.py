"""The router's product on tensor cores keeps fp32 accuracy."""

from __future__ import annotations

import pytest
import torch

from tests.trainer.megatron.expert_errors import product_errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_product_keeps_fp32_accuracy() -> None:
    for name, error in product_errors("cuda").items():
        assert error <= 1, name
