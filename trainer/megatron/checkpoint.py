"""The whole state of a trainer as a checkpoint holds it, and its way back, in Megatron's torch_dist format.

Weights and optimizer state are stored by global shape, so another number of data-parallel ranks reads them. Random
states belong to ranks and are taken over on the same layout only; no training step draws a number (dropout is 0).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from trainer.checkpoints import Progress, find_checkpoint, read_checkpoint
from trainer.megatron.expert_shards import sharded_parts
from trainer.megatron.step import Trainer
from trainer.megatron.topology import Topology


def saved_state(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint holds, as Megatron's sharded state dict: it refers to the tensors and copies none."""
    return _state(trainer, loading=False, with_random=True)


def main_tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors of a sharded state dict that this rank writes: of replicas, one rank writes."""
    return [
        tensor.data
        for tensor in nested_values(state)
        if isinstance(tensor, ShardedTensor) and is_main_replica(tensor.replica_id)
    ]


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


def _state(trainer: Trainer, *, loading: bool, with_random: bool) -> dict[str, Any]:
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = trainer.student.sharded_state_dict(metadata=metadata)
    optimizer = trainer.optimizer.sharded_state_dict(
        sharded_parts(model), is_loading=loading, metadata=metadata
    )
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
