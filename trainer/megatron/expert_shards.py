"""The routed experts' optimizer spread over their data-parallel ranks: each updates its own experts alone.

`parallel.distributed_optimizer`. A rank of the experts' data-parallel group (size R) owns E / R of every stack
[E, ..] that the R ranks hold alike. After the backward pass gradients are summed for their owner alone
(reduce-scatter, in place in Megatron's fp32 buffers), the owner's optimizer steps, and the new weights go to all
(all-gather, in place). An expert's matrices are never cut, so NorMuon computes what it computes without it; its states
and the fp32 weights of 88 % of the student take 1 / R of the memory, its time is 1 / R, and (4 + 2) (R - 1) / R bytes
a weight travel, where an all-reduce of gradients alone moves 8 (R - 1) / R.

The optimizer is given shards: parameters over the owner's part of the model's own storage, known by `shard_of`. In
checkpoints states have the global shape of the stack, so any layout reads them (`sharded_parts`).

Why not Megatron-Core 0.16.1's own: it cuts gradient buffers at any number, through matrices, and its states share one
step counter after a resume (docs/decisions/0007, 0027).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed import _coalescing_manager

from common.errors import ConfigError
from trainer.megatron.collectives import all_gather, reduce_scatter
from trainer.megatron.experts import RoutedExperts


class ExpertShards:
    """The shards of a student's routed experts on this rank, and what its ranks tell each other of them.

    group: the ranks that hold the same experts. To be built before Megatron's DDP, which then keeps the experts'
    gradients in buffers of their own. Raises ConfigError when the ranks cannot share the experts out evenly.
    """

    def __init__(self, student: torch.nn.Module, group: dist.ProcessGroup) -> None:
        experts = [module for module in student.modules() if isinstance(module, RoutedExperts)]
        self._group = group
        self._wholes = [parameter for module in experts for parameter in module.parameters()]
        for parameter in self._wholes:
            parameter.allreduce = False
            parameter.expert_shard = _shard(parameter, group)

    def bind_gradients(self) -> None:
        """Give the shards their part of the buffers; once, after DDP has made them."""
        for parameter in self._wholes:
            shard_of(parameter).main_grad = _own(parameter.main_grad, self._group)

    def sum_gradients(self) -> None:
        """Of each buffer this rank's own part is summed over the group, in place; the rest holds rubbish then."""
        pairs = ((shard_of(of).main_grad, of.main_grad) for of in self._wholes)
        self._begin(reduce_scatter, pairs)()

    def gather_weights(self) -> Callable[[], None]:
        """Send the model's weights from their owners to all, in place, behind what the current stream has queued; what
        is returned makes the stream wait for them.
        """
        pairs = ((of.detach(), shard_of(of).detach()) for of in self._wholes)
        return self._begin(all_gather, pairs)

    def _begin(
        self, collective: Callable[..., Any], pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> Callable[[], None]:
        """One launch for all pairs of output and input: alone, biases would take as long as weights."""
        if self._group.size() == 1:
            return lambda: None
        with _coalescing_manager(self._group, async_ops=True) as work:
            for out, value in pairs:
                collective(out, value, group=self._group)
        return work.wait


def shard_of(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """What the optimizer updates of a parameter: its shard on this rank if it has one, else the parameter."""
    return getattr(parameter, "expert_shard", parameter)


def sharded_parts(tensors: dict[str, Any]) -> dict[str, Any]:
    """A model's sharded state dict as its optimizer has it: parameters with a shard are replaced by it."""
    return {name: _part(tensor) for name, tensor in tensors.items()}


def _part(tensor: Any) -> Any:
    if not isinstance(tensor, ShardedTensor):
        return tensor
    whole, shard, axis = tensor.data, shard_of(tensor.data), tensor.prepend_axis_num
    if shard is whole:
        return tensor
    offset, fragments = list(tensor.global_offset), list(tensor.axis_fragmentations)
    offset[axis] += (shard.storage_offset() - whole.storage_offset()) // whole.stride(0)
    fragments[axis] *= len(whole) // len(shard)
    return replace(
        tensor,
        data=shard,
        local_shape=tuple(shard.shape),
        global_offset=tuple(offset),
        axis_fragmentations=tuple(fragments),
        replica_id=(0, 0, 0),
    )


def _shard(parameter: torch.nn.Parameter, group: dist.ProcessGroup) -> torch.nn.Parameter:
    shard = torch.nn.Parameter(_own(parameter.detach(), group))
    shard.allreduce = False
    tensor_parallel.copy_tensor_model_parallel_attributes(shard, parameter)
    return shard


def _own(stack: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's part along the first axis, a view."""
    ranks = group.size()
    if len(stack) % ranks:
        raise ConfigError(
            f"parallel.distributed_optimizer with {ranks} data-parallel ranks of experts",
            got=f"{len(stack)} experts on each",
            expected=f"a multiple of {ranks}",
            remedy="change the number of GPUs or parallel.expert, or set parallel.distributed_optimizer=false",
        )
    return stack.chunk(ranks)[group.rank()]
