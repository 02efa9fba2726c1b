"""The student on CUDA: a few steps of every implementation."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# One model depth and one set of process groups a process: each case runs in its own.
_STEPS = """
import json, sys
import torch
from tests.trainer.megatron.tiny import SEQ_LEN, STUDENT, micro_batches, tiny_config, tiny_rows
from trainer.megatron.topology import distributed

runtime = json.loads(sys.argv[1])
wide = {"hidden": 128, "heads": 4, "head_dim": 32, "ffn": 128, "expert_width": 64, "shared_width": 64}
config = tiny_config(**runtime, device="cuda", deterministic=False, student=STUDENT | wide)
with distributed("cuda", config.parallel, seed=1) as topology:
    from trainer.megatron.step import Clock, Trainer

    trainer = Trainer(config, topology, SEQ_LEN)
    batches = [batch.to(topology.device) for batch in micro_batches(tiny_rows(8), 4)]
    losses = []
    for _ in range(12):
        clock = Clock(topology.device)
        clock.mark("data")
        losses.append(trainer.step(batches, 3e-3, clock).values["loss/total"])
print(json.dumps(losses))
"""
RUNTIMES = {
    "plain": {"precision": "fp32", "core_attention": "dense", "expert_compute": "loop"},
    "local": {"precision": "bf16", "core_attention": "triton", "expert_compute": "triton"},
    "recompute": {
        "precision": "bf16",
        "core_attention": "triton",
        "expert_compute": "triton",
        "recompute": True,
    },
    "transformer_engine": {
        "precision": "bf16",
        "core_attention": "triton",
        "expert_compute": "triton",
        "transformer_impl": "transformer_engine",
    },
}


@pytest.mark.parametrize("name", RUNTIMES)
def test_steps_lower_the_loss(name) -> None:
    if name == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _STEPS, json.dumps(RUNTIMES[name])],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert losses[-1] < 0.9 * losses[0]
