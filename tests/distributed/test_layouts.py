"""A checkpoint read on another layout and written again is bit by bit the same checkpoint."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.gloo import run_gloo
from tests.distributed.stored import assert_same_tensors
from tests.trainer.megatron.tiny import SEQ_LEN, micro_batches, step, tiny_config, tiny_rows

LAYOUTS = {
    "one": {},
    "tensor": {"tensor": 2, "expert": 2, "sequence_parallel": True},
    "expert": {"expert": 2},
    "data": {},
    "shards": {"distributed_optimizer": True},
}


def _passed_on(rank: int, folder: str, layouts: list[str]) -> None:
    """Through the layouts in order, all of this many processes: load the checkpoint before, train on the first only."""
    from trainer.checkpoints import Progress, read_progress
    from trainer.megatron.checkpoint import load_checkpoint
    from trainer.megatron.checkpoint_write import CheckpointWriter
    from trainer.megatron.step import Trainer
    from trainer.megatron.topology import distributed

    for name in layouts:
        config = tiny_config(parallel=LAYOUTS[name], optimizer={"lr": 1e-2})
        with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
            trainer, done = Trainer(config, topology, SEQ_LEN), 0
            if read_progress(Path(folder)) is None:
                step(trainer, micro_batches(tiny_rows(4), 2), 1e-2)
            else:
                done = load_checkpoint(Path(folder), trainer).step
            progress = Progress(step=done + 1, stream={}, provenance={})
            CheckpointWriter(Path(folder), trainer, keep=9, asynchronous=True).save(
                progress, wait=True
            )


def test_states_pass_through_every_layout_unchanged(tmp_path) -> None:
    run_gloo(_passed_on, 1, str(tmp_path), ["one"])
    run_gloo(_passed_on, 2, str(tmp_path), ["tensor", "shards", "expert", "data", "tensor"])
    run_gloo(_passed_on, 1, str(tmp_path), ["one", "shards"])
    for number in range(2, 9):
        assert_same_tensors(tmp_path / "step-00000001", tmp_path / f"step-{number:08d}")
