"""Megatron's DDP as the trainer uses it: fp32 gradient buffers, summed once a step.

Megatron divides gradients by the number of ranks in a pass of its own over the buffers before it sums them
(distributed/param_and_grad_buffer.py, start_grad_sync): 45 GB of the full student, 11 ms of a step. Here the loss is
divided instead, of which gradients are multiples; for a power of two no bit changes.

Experts that ranks share out (expert_shards.py) are summed for their owners alone, and beside the last backward pass of
a step where it says how far it is (graphs.py): the first layers' 0.3 GB are what is left to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module

from trainer.config import RunConfig
from trainer.megatron.expert_shards import ExpertShards
from trainer.megatron.graphs import Mark
from trainer.megatron.student import Student


class StudentDDP(DistributedDataParallel):
    """Sums gradients in the last backward pass of a step; none inside `unsummed`."""

    def __init__(self, student: Student, module: torch.nn.Module) -> None:
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=False, use_distributed_optimizer=False
        )
        super().__init__(student.config, ddp, module)
        self._shards, self._last, self._sums = student.expert_shards, True, True
        self._beside = torch.cuda.Stream() if next(student.parameters()).is_cuda else None
        # NCCL warns of two groups at a time on one device: a pass with exchanges of its own is summed after it.
        self._may_overlap = parallel_state.get_expert_model_parallel_world_size() == 1
        if self._shards is not None:
            self._shards.bind_gradients()
        ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
        student.config.grad_scale_func = lambda loss: loss / ranks
        student.config.no_sync_func = self.no_sync
        for group in self.bucket_groups + self.expert_parallel_bucket_groups:
            for bucket in group.buckets:
                bucket.gradient_scaling_factor = 1.0

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all backward passes of a step but the last."""
        self._last = False
        try:
            yield
        finally:
            self._last = True

    @contextmanager
    def unsummed(self) -> Iterator[None]:
        """Leave every rank its own gradients."""
        self._sums = False
        try:
            yield
        finally:
            self._sums = True

    def backward_queued(self, marks: Sequence[Mark]) -> None:
        """A backward pass of the layers is queued whole: sum what is complete at each mark beside what follows."""
        if self._shards is None or not (self._may_overlap and self._last and self._sums):
            return
        with torch.cuda.stream(self._beside):
            for mark in marks:
                mark.event.wait()
                self._shards.start_sums(mark.first)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Called by Megatron after the last backward pass of a step."""
        if not self._sums:
            return
        if self._shards is None:
            super().finish_grad_sync(force_all_reduce)
            return
        for group in self.bucket_groups:
            group.finish_grad_sync(force_all_reduce=force_all_reduce)
        self._shards.finish_sums()


def with_ddp(student: Student, config: RunConfig) -> StudentDDP:
    """The student in Megatron's wrappers; it gets `expert_shards` where `parallel.distributed_optimizer` asks for them.

    Raises ConfigError when its ranks cannot share the experts out evenly.
    """
    if config.parallel.distributed_optimizer:
        group = parallel_state.get_expert_data_parallel_group()
        student.expert_shards = ExpertShards(student.decoder.layers, group)
    module: Any = Float16Module(student.config, student) if config.precision == "bf16" else student
    return StudentDDP(student, module)
