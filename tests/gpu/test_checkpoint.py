"""Checkpoints from CUDA: pinned staging and writing threads beside steps, weights read back into the masters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.stored import assert_same_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
_SAVES = """
import sys
from pathlib import Path
import torch
from tests.trainer.megatron.tiny import SEQ_LEN, STUDENT, micro_batches, tiny_config, tiny_rows
from trainer.checkpoints import Progress
from trainer.megatron.topology import distributed

folder = Path(sys.argv[1])
wide = {"hidden": 128, "heads": 4, "head_dim": 32, "ffn": 128, "expert_width": 64, "shared_width": 64}
config = tiny_config(device="cuda", deterministic=False, precision="bf16", student=STUDENT | wide)
with distributed("cuda", config.parallel, seed=1) as topology:
    from trainer.megatron.checkpoint import load_checkpoint
    from trainer.megatron.checkpoint_write import CheckpointWriter
    from trainer.megatron.step import Clock, Trainer
    from trainer.megatron.weights import load_weights

    def train(steps):
        for _ in range(steps):
            clock = Clock(topology.device)
            clock.mark("data")
            trainer.step([batch.to(topology.device) for batch in micro_batches(tiny_rows(4), 4)], 3e-3, clock)

    def masters():
        return {n: getattr(p, "main_param", p).detach().clone() for n, p in trainer.student.named_parameters()}

    trainer = Trainer(config, topology, SEQ_LEN)
    together = CheckpointWriter(folder / "sync", trainer, keep=1, asynchronous=False)
    aside = CheckpointWriter(folder / "async", trainer, keep=1, asynchronous=True)
    train(1)
    aside.reserve()
    for done in (2, 3):
        train(1)
        together.save(Progress(step=done, stream={}, provenance={}))
        saved = masters()
        aside.save(Progress(step=done, stream={}, provenance={}))
        train(2)
        assert aside.finish().step == done
    for load in (
        lambda: load_weights(folder / "async", trainer.student),
        lambda: load_checkpoint(folder / "async", trainer),
    ):
        train(1)
        load()
        assert all(torch.equal(value, saved[name]) for name, value in masters().items())
    train(1)
"""


def test_an_asynchronous_save_holds_the_state_of_its_step(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SAVES, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    step = "step-00000003"
    assert_same_tensors(tmp_path / "sync" / step, tmp_path / "async" / step)
