"""Checkpoints of a run in Megatron's torch_dist format: written atomically, read on any layout.

Weights and optimizer state are stored by global shape, so another number of data-parallel ranks reads them. Random
states belong to ranks and are taken over on the same layout only; no training step draws a number (dropout is 0).
"""

from __future__ import annotations

import queue
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import ResumeError
from common.files import TMP_PREFIX
from trainer.checkpoints import (
    Progress,
    commit,
    find_checkpoint,
    read_checkpoint,
    unfinished_folder,
)
from trainer.megatron.step import Trainer
from trainer.megatron.topology import Topology


def save_checkpoint(folder: Path, trainer: Trainer, progress: Progress, keep: int) -> None:
    """Write step-N, move `latest` to it, drop all but the newest `keep`. Every rank calls it.

    A kill at any moment leaves `latest` on a complete checkpoint.
    """
    topology = trainer.topology
    unfinished = unfinished_folder(folder, progress.step)
    if topology.rank == 0:
        unfinished.mkdir(parents=True)
    topology.barrier()
    _write_in_this_process()
    try:
        dist_checkpointing.save(
            _state(trainer, loading=False, with_random=True),
            str(unfinished),
            sharded_strategy=("torch_dist", 1),
        )
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _unwritten(unfinished, error) from error
    topology.barrier()
    if topology.rank == 0:
        commit(folder, progress, topology.layout(), keep)
    topology.barrier()


def load_checkpoint(folder: Path, trainer: Trainer) -> Progress:
    """Fill the trainer from the newest checkpoint and say where it stands. Every rank calls it."""
    path = find_checkpoint(folder)
    progress, layout = read_checkpoint(path)
    same_layout = layout == trainer.topology.layout()
    loaded = dist_checkpointing.load(
        _state(trainer, loading=True, with_random=same_layout),
        str(path),
        strict="raise_all" if same_layout else "raise_unexpected",
    )
    trainer.student.load_state_dict(loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _set_random_state(loaded["random"])
    return progress


def _unwritten(unfinished: Path, error: BaseException) -> ResumeError:
    """A full disk reaches us as a writer's RuntimeError ("unexpected pos"), so the free space is told with it."""
    free_bytes = shutil.disk_usage(unfinished).free
    shutil.rmtree(unfinished, ignore_errors=True)
    cause = str(error).strip().splitlines()[-1]
    return ResumeError(
        f"checkpoint {unfinished.name.removeprefix(TMP_PREFIX)} could not be written to {unfinished.parent}: {cause}",
        got=f"{free_bytes / 2**30:.1f} GiB free at that moment",
        remedy="make room or lower checkpoint.keep, then run the same command: it goes on from the newest checkpoint",
    )


def _write_in_this_process() -> None:
    """Give Megatron's writer a queue of this process.

    It would spawn a manager process for it (dist_checkpointing/strategies/filesystem_async.py:55): seconds at the first
    save, and an orphan after every kill. A synchronous save puts and gets in one process.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _state(trainer: Trainer, *, loading: bool, with_random: bool) -> dict[str, Any]:
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = trainer.student.sharded_state_dict(metadata=metadata)
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer} | (
        {"random": _random_object(trainer.topology)} if with_random else {}
    )


def _random_object(topology: Topology) -> ShardedObject:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape, offset = (topology.tp_size, topology.dp_size), (topology.tp_rank, topology.dp_rank)
    return ShardedObject("random", state, shape, offset, replica_id=0)


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])
