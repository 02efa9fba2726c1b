"""Weights alone, from a checkpoint of any layout and precision into a student of any layout and precision.

A run in bf16 keeps fp32 masters of its weights in the optimizer. They are read wherever fp32 is asked for: into the
masters of a bf16 run, or into the parameters of an fp32 student. A bf16 parameter is its master, rounded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from trainer.checkpoints import Progress, find_checkpoint, read_checkpoint
from trainer.init_from import Shape, WeightPlan, plan_weights
from trainer.megatron.expert_shards import sharded_parts
from trainer.megatron.student import Student

_OPTIMIZER = "optimizer."
_MASTER = "optimizer.state.fp32_param."  # megatron/core/optimizer/optimizer.py:825


def load_weights(checkpoints: Path, student: Student, *, step: int | None = None) -> Progress:
    """Fill a student, with or without an optimizer, from the newest checkpoint or that of `step`; every rank calls it.

    Parameters and the routers' balancing biases are copied in place; masters of a bf16 run's optimizer are set too.
    Raises ResumeError without such a checkpoint, ConfigError when its weights are not exactly the student's.
    """
    path = find_checkpoint(checkpoints, step)
    plan = plan_weights(stored_shapes(path), student_shapes(student))
    read_weights(path, student, plan.taken)
    return read_checkpoint(path)[0]


def take_weights(
    path: Path, student: Student, *, new: Iterable[str] = (), drop: Iterable[str] = ()
) -> WeightPlan:
    """As `load_weights`, from one checkpoint's folder, but for what the patterns name. Says what was done."""
    plan = plan_weights(stored_shapes(path), student_shapes(student), new=new, drop=drop)
    read_weights(path, student, plan.taken)
    return plan


def stored_shapes(path: Path) -> dict[str, Shape]:
    """Global shapes of the weights and buffers in a checkpoint, by name."""
    return {
        name: tuple(tensor.global_shape)
        for name, tensor in dist_checkpointing.load_tensors_metadata(str(path)).items()
        if not name.startswith(_OPTIMIZER)
    }


def student_shapes(student: Student) -> dict[str, Shape]:
    """Global shapes of the student's weights and buffers, by their names in a checkpoint."""
    return {name: tuple(tensor.global_shape) for name, tensor in _tensors(student).items()}


@torch.no_grad()
def read_weights(path: Path, student: Student, names: Iterable[str]) -> None:
    """Copy these weights from the checkpoint. Every rank calls it with the same names."""
    stored, chosen = dist_checkpointing.load_tensors_metadata(str(path)).keys(), set(names)
    of_student = {name: tensor for name, tensor in _tensors(student).items() if name in chosen}
    tensors = sharded_parts(of_student)
    wanted = {}
    for name, tensor in tensors.items():
        target = getattr(tensor.data, "main_param", tensor.data)
        exact = target.dtype == torch.float32 and _MASTER + name in stored
        wanted[name] = replace(
            tensor, key=_MASTER + name if exact else name, data=target, dtype=target.dtype
        )
    loaded = dist_checkpointing.load(wanted, str(path))
    for name, tensor in tensors.items():
        for target in (getattr(tensor.data, "main_param", tensor.data), tensor.data):
            target.copy_(loaded[name])
    if student.expert_shards is not None:
        arrived = student.expert_shards.gather_weights()
        arrived()


def _tensors(student: Student) -> dict[str, ShardedTensor]:
    """The student's shards by name in a checkpoint; extra states of TransformerEngine are no weights."""
    metadata = {
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = student.sharded_state_dict(metadata=metadata)
    return {
        tensor.key: tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)
    }
