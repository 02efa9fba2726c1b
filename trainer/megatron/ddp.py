"""Megatron's DDP as the trainer uses it: fp32 gradient buffers, summed once a step, behind its last backward pass.

Megatron divides gradients by the number of ranks in a pass of its own over the buffers before it sums them
(distributed/param_and_grad_buffer.py, start_grad_sync): 45 GB of the full student, 11 ms of a step. Here the loss is
divided instead, of which gradients are multiples; for a power of two no bit changes.

Summing the experts' gradients ten layers at a time beside the last backward pass took as long as behind it (2.99 s a
step, two H200, 256 rows): NCCL's programs hold multiprocessors, and products that count on all of them run twice.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from trainer.config import RunConfig
from trainer.megatron.expert_shards import ExpertShards
from trainer.megatron.student import Student


class StudentDDP(DistributedDataParallel):
    """With the student's `expert_shards`, gradients of experts are summed by them, for their owners alone."""

    def __init__(self, student: Student, module: torch.nn.Module) -> None:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
        )
        super().__init__(student.config, ddp, module)
        self._shards = student.expert_shards
        if self._shards is not None:
            self._shards.bind_gradients()
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        student.config.grad_scale_func = lambda loss: loss / ranks
        for group in self.bucket_groups + self.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1.0

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Called by Megatron behind the last backward pass of a step."""
        if self._shards is None:
            super().finish_grad_sync(force_all_reduce)
            return
        for group in self.bucket_groups:
            group.finish_grad_sync(force_all_reduce=force_all_reduce)
        self._shards.sum_gradients()


def with_ddp(student: Student, config: RunConfig) -> StudentDDP:
    """The student in Megatron's wrappers; it gets `expert_shards` where `parallel.distributed_optimizer` asks for them.

    Raises ConfigError when its ranks cannot share the experts out evenly.
    """
    if config.parallel.distributed_optimizer:
        group = parallel_state.get_expert_data_parallel_group()
        student.expert_shards = ExpertShards(student, group)
    module: Any = Float16Module(student.config, student) if config.precision == "bf16" else student
    return StudentDDP(student, module)
