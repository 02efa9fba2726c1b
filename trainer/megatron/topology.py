"""Process groups: one `Topology` value from torchrun's environment, or from a single process started plainly."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from common.errors import ConfigError, EngineError
from trainer.config import ParallelConfig, RunConfig

Device = Literal["cpu", "cuda"]
Value = TypeVar("Value")
_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks, sizes and groups of this process, passed as a value to whatever communicates.

    Experts are spread over all ranks whatever their TP rank: EP groups cut the world anew. at_end: what is to be let go
    before the groups are taken down, after an error too.
    """

    device: torch.device
    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    ep_rank: int
    ep_size: int
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    at_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """`values` summed over the data-parallel ranks, in place."""
        dist.all_reduce(values, group=self.dp_group)
        return values

    def layout(self) -> dict[str, int]:
        """Sizes by kind of parallelism."""
        return {"dp": self.dp_size, "tp": self.tp_size, "ep": self.ep_size}

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier()

    def from_first(self, value: Value) -> Value:
        """The value of rank 0 on every rank; it can be pickled. Every rank calls it."""
        if self.world_size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0, device=self.device)
        return values[0]


def check_layout(parallel: ParallelConfig) -> None:
    """Refuse what Megatron-Core 0.16.1 computes wrongly or this trainer does not carry. Raises ConfigError."""
    refused = [
        (
            parallel.pipeline > 1,
            "parallel.pipeline > 1 (no stage passes on the values that student.value_residual takes from layer 1)",
            "spread with parallel.expert and data parallelism",
        ),
        (
            parallel.context > 1,
            "parallel.context > 1 (a row's documents are masked on one device)",
            "rows of documents fit one device; set parallel.context=1",
        ),
        (
            parallel.tensor > 1 and parallel.expert == 1,
            "parallel.tensor > 1 with parallel.expert = 1 (0.16.1 never sums expert gradients over TP there)",
            "set parallel.tensor=1, or parallel.expert to a multiple of it",
        ),
        (
            parallel.tensor > 1 and not parallel.sequence_parallel,
            "parallel.tensor > 1 without parallel.sequence_parallel",
            "set parallel.sequence_parallel=true",
        ),
        (
            parallel.sequence_parallel and parallel.tensor == 1,
            "parallel.sequence_parallel with parallel.tensor = 1",
            "set parallel.sequence_parallel=false",
        ),
    ]
    _refuse(refused)


def check_run(config: RunConfig) -> None:
    """`check_layout`, and the parts of this run that do not work in its layout. Raises ConfigError, before any process
    group starts.
    """
    parallel, student, optimizer = config.parallel, config.student, config.optimizer
    check_layout(parallel)
    tensor = f"parallel.tensor={parallel.tensor}"
    refused = [
        (
            student.kv_groups % parallel.tensor != 0,
            f"{tensor} with student.kv_groups={student.kv_groups} (attention and TPA split whole groups)",
            "set parallel.tensor to a divisor of it; parallel.expert has no such limit",
        ),
        (
            student.experts % parallel.expert != 0,
            f"parallel.expert={parallel.expert} with student.experts={student.experts}",
            "set parallel.expert to a divisor of it",
        ),
        (
            optimizer.normuon is not None and parallel.tensor > 1,
            f"optimizer.normuon with {tensor} (each rank would orthogonalise its own part of a matrix)",
            "set parallel.tensor=1 and spread with parallel.expert, or optimizer.normuon=null",
        ),
        (
            config.transformer_impl == "compiled" and parallel.tensor > 1,
            f"transformer_impl: compiled with {tensor} (its layers hold whole weights)",
            "set transformer_impl=local",
        ),
    ]
    _refuse(refused)


def _refuse(refused: list[tuple[bool, str, str]]) -> None:
    for unsupported, what, remedy in refused:
        if unsupported:
            raise ConfigError(f"{what} is not supported", remedy=remedy)


@contextlib.contextmanager
def distributed(
    device: Device, parallel: ParallelConfig, seed: int, *, deterministic: bool = False
) -> Iterator[Topology]:
    """Start the process groups and seed every generator; taken down on a clean exit of the block.

    A process group that the caller has started is joined and left standing. After an error nothing is waited for: the
    other ranks may be gone. deterministic: PyTorch refuses kernels that do not repeat bit by bit.
    """
    check_layout(parallel)
    if device == "cpu":
        from trainer.megatron import cpu

        cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    torch.use_deterministic_algorithms(deterministic)
    # Filling memory that nothing reads would take a sixth of a step on CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False
    joined = dist.is_initialized()
    if not joined:
        _start_process_group(device, deterministic)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size % parallel.tensor or world_size % parallel.expert:
        raise ConfigError(
            "the number of processes",
            got=world_size,
            expected=f"a multiple of parallel.tensor={parallel.tensor} and parallel.expert={parallel.expert}",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=False,
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    topology = _topology(device, rank, world_size)
    try:
        yield topology
        dist.barrier()
    finally:
        topology.at_end.close()
    parallel_state.destroy_model_parallel()
    if not joined:
        dist.destroy_process_group()


def _start_process_group(device: Device, deterministic: bool) -> None:
    if device == "cuda":
        if not torch.cuda.is_available():
            raise EngineError(
                "device: cuda, but no CUDA device is visible",
                remedy="set device=cpu for the CPU path",
            )
        if deterministic:
            os.environ.setdefault(
                "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
            )  # cuBLAS repeats only with its own workspaces
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # The default stream cannot be recorded into a CUDA graph, nor what waits for it (trainer/megatron/graphs.py).
        torch.cuda.set_stream(torch.cuda.Stream())
    backend = "nccl" if device == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(
            backend, store=dist.HashStore(), rank=0, world_size=1, timeout=_TIMEOUT
        )


def _topology(device: Device, rank: int, world_size: int) -> Topology:
    from megatron.core import parallel_state as state

    return Topology(
        device=torch.device("cpu")
        if device == "cpu"
        else torch.device("cuda", torch.cuda.current_device()),
        rank=rank,
        world_size=world_size,
        dp_rank=state.get_data_parallel_rank(),
        dp_size=state.get_data_parallel_world_size(),
        tp_rank=state.get_tensor_model_parallel_rank(),
        tp_size=state.get_tensor_model_parallel_world_size(),
        ep_rank=state.get_expert_model_parallel_rank(),
        ep_size=state.get_expert_model_parallel_world_size(),
        dp_group=state.get_data_parallel_group(),
        tp_group=state.get_tensor_model_parallel_group(),
    )
