"""The whole student on CUDA against the formulas in fp64, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
_COMPARE = """
import json
import numpy as np
from tests.trainer.megatron.test_reference import against_reference
from tests.trainer.megatron.tiny import STUDENT
from trainer.config import ParallelConfig
from trainer.megatron.topology import distributed

with distributed("cuda", ParallelConfig(), seed=1):
    seen = against_reference(STUDENT, "cuda")
pairs = seen["gradients"] | {"hidden": seen["hidden"]}
norm = np.linalg.norm
print(json.dumps({name: float(norm(got - want) / norm(want)) for name, (got, want) in pairs.items()}))
"""


def test_outputs_and_gradients_equal_the_reference() -> None:
    """fp64 but for the angles and lam, which are fp32: the angles' frequencies sum fp32 terms over all positions."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _COMPARE],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, error in json.loads(done.stdout.splitlines()[-1]).items():
        assert error < (1e-4 if name.endswith("log_frequency") else 1e-5), (name, error)
