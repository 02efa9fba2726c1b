"""Layouts: a checkpoint read on another and written again is bit by bit the same; what ends before the groups do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

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


def _let_go(_rank: int, error: bool) -> list[bool]:
    """Whether the groups still stood when something was let go at the end."""
    from megatron.core import parallel_state

    from trainer.config import ParallelConfig
    from trainer.megatron.topology import distributed

    stood: list[bool] = []
    with contextlib.suppress(ArithmeticError), distributed("cpu", ParallelConfig(), 1) as topology:
        topology.at_end.callback(
            lambda: stood.append(parallel_state.model_parallel_is_initialized())
        )
        if error:
            raise ArithmeticError
    return stood


@pytest.mark.parametrize("error", [False, True])
def test_what_holds_collectives_is_let_go_before_the_groups_are_taken_down(error) -> None:
    assert run_gloo(_let_go, 1, error) == [[True]]
