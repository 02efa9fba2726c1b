"""Weights that several ranks hold must be the same on all of them: training would not bring them together again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from common.errors import VpmoeError
from trainer.megatron.student import Student

_NAMED_AT_MOST = 5


class ReplicaError(VpmoeError):
    """Data-parallel ranks hold different weights. Every rank raises it."""

    collective = True


def require_equal_replicas(student: Student) -> None:
    """Compare every parameter over the ranks that hold it too, bit by bit. Every rank calls it.

    Parameters of experts are replicated over the expert-data-parallel ranks, all others over the data-parallel ones.
    Raises ReplicaError naming the parameters that rank 0's group does not agree on, else those of any other.
    """
    experts: dict[str, torch.nn.Parameter] = {}
    others: dict[str, torch.nn.Parameter] = {}
    for name, parameter in student.named_parameters():
        (others if getattr(parameter, "allreduce", True) else experts)[name] = parameter
    differing = [
        *_differing(others, parallel_state.get_data_parallel_group()),
        *_differing(experts, parallel_state.get_expert_data_parallel_group()),
    ]
    every: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, differing)
    names = next((found for found in every if found), [])
    if names:
        raise ReplicaError(
            f"{len(names)} parameters are not the same on all data-parallel ranks: "
            + ", ".join(names[:_NAMED_AT_MOST]),
            remedy="the ranks run other code, versions or configs, or one machine is faulty: compare their run.json",
        )


def _differing(parameters: dict[str, torch.nn.Parameter], group: dist.ProcessGroup) -> list[str]:
    if not parameters:
        return []
    least = torch.stack([bit_sum(parameter) for parameter in parameters.values()])
    most = least.clone()
    dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return [
        name for name, same in zip(parameters, (least == most).tolist(), strict=True) if not same
    ]


def bit_sum(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The sum of a parameter's bit patterns as integers: exact in any order of summation."""
    kind = torch.int16 if parameter.element_size() == 2 else torch.int32
    return parameter.detach().view(kind).sum(dtype=torch.int64)
