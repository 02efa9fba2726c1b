"""The student on CUDA: grouped experts against the plain loop, and a few steps of every implementation."""

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
    "local": {"precision": "bf16", "core_attention": "flex", "expert_compute": "grouped_mm"},
    "recompute": {
        "precision": "bf16",
        "core_attention": "flex",
        "expert_compute": "grouped_mm",
        "recompute": True,
    },
    "transformer_engine": {
        "precision": "bf16",
        "core_attention": "flex",
        "expert_compute": "grouped_mm",
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


def test_grouped_experts_equal_the_loop() -> None:
    """bf16 products of both forms, biases and empty experts included; the loop in fp32 is the reference."""
    from trainer.megatron.experts import _grouped, _loop

    E, D, F = 8, 128, 64
    rows_E = torch.tensor([70, 0, 33, 1, 128, 0, 7, 17])
    generator = torch.Generator().manual_seed(0)
    shapes = [(int(rows_E.sum()), D), (E, F, D), (E, F), (E, D, F), (E, D)]
    start = [torch.randn(s, generator=generator).to("cuda", torch.bfloat16) * 0.3 for s in shapes]
    weigh = torch.randn(shapes[0], generator=generator).cuda()
    results = []
    for compute, dtype in ((_grouped, torch.bfloat16), (_loop, torch.float32)):
        x, *parameters = (t.to(dtype).requires_grad_() for t in start)
        out = compute(x, rows_E, *parameters)
        grads = torch.autograd.grad((out.float() * weigh).sum(), [x, *parameters])
        results.append([t.float() for t in (out, *grads)])
    names = ["out", "x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]
    for name, got, expected in zip(names, *results, strict=True):
        assert (got - expected).norm() < 2e-2 * expected.norm(), name
        if name not in ("out", "x"):
            assert got[1].abs().max() == 0, f"{name} of an expert without rows"
