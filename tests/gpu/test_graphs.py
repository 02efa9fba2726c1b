"""The compiled layers and their recorded graphs on CUDA: the numbers of the modules, the same bits with and without
recording, and nothing compiled again once a run is under way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# One set of process groups a process: each case runs in its own.
_RUN = """
import json, sys
import torch
from tests.trainer.megatron.tiny import SEQ_LEN, STUDENT, micro_batches, tiny_config, tiny_rows
from trainer.megatron.topology import distributed

runtime = json.loads(sys.argv[1])
wide = {"layers": 8, "hidden": 128, "heads": 4, "head_dim": 32, "ffn": 128, "expert_width": 64, "shared_width": 64}
config = tiny_config(**runtime, device="cuda", deterministic=False, student=STUDENT | wide)
with distributed("cuda", config.parallel, seed=1) as topology:
    from torch._dynamo.utils import counters
    from trainer.megatron.step import Clock, Trainer

    trainer = Trainer(config, topology, SEQ_LEN)
    steps = [[b.to(topology.device) for b in micro_batches(tiny_rows(8, seed=n), 4)] for n in range(6)]
    losses, norms, graphs = [], [], []
    for batches in steps:
        clock = Clock(topology.device)
        clock.mark("data")
        values = trainer.step(batches, 3e-3, clock).values
        losses.append(values["loss/total"])
        norms.append(values["grad_norm"])
        graphs.append(counters["stats"]["unique_graphs"])
    weights = [float(p.detach().double().abs().sum()) for p in trainer.student.parameters()]
print(json.dumps({"losses": losses, "norms": norms, "graphs": graphs, "weights": weights}))
"""
_FAST = {"precision": "bf16", "core_attention": "triton", "expert_compute": "triton"}


def _run(**runtime: Any) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RUN, json.dumps(_FAST | runtime)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[str, Any]]:
    return {
        "modules": _run(transformer_impl="local"),
        "compiled": _run(transformer_impl="compiled"),
        "recorded": _run(transformer_impl="compiled", cuda_graph=True),
    }


def test_compiled_layers_train_as_the_modules_do(seen) -> None:
    """Roundings differ, and with them some choices of experts; test_fused_layer.py compares with fp64."""
    modules, compiled = seen["modules"], seen["compiled"]
    assert compiled["losses"][0] == pytest.approx(modules["losses"][0], rel=1e-2)
    assert compiled["norms"][0] == pytest.approx(modules["norms"][0], rel=5e-2)
    assert compiled["losses"] == pytest.approx(modules["losses"], rel=5e-2)


def test_recording_changes_no_bit(seen) -> None:
    for name in ("losses", "norms", "weights"):
        assert seen["recorded"][name] == seen["compiled"][name], name


@pytest.mark.parametrize("way", ["compiled", "recorded"])
def test_nothing_is_compiled_after_the_first_step(seen, way) -> None:
    graphs = seen[way]["graphs"]
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[0]] * 5
