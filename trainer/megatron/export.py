"""The weights of a checkpoint by name, whatever layout and device trained them: read on a CPU, in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from trainer.config import ModelRuntime, ParallelConfig
from trainer.megatron.student import Student, build_student
from trainer.megatron.topology import distributed
from trainer.megatron.weights import load_weights
from trainer.student_config import StudentConfig


@contextlib.contextmanager
def stored_weights(
    checkpoints: Path, student: StudentConfig, *, step: int, precision: Literal["fp32", "bf16"]
) -> Iterator[dict[str, torch.Tensor]]:
    """Parameters and balancing biases of the checkpoint of `step`; in fp32 the masters of a bf16 run."""
    runtime = ModelRuntime.on_cpu(precision)
    with distributed("cpu", ParallelConfig(), seed=0):
        model = build_student(student, runtime, ParallelConfig(), seq_len=1)
        load_weights(checkpoints, model, step=step)
        yield weights_by_name(model)


def weights_by_name(model: Student) -> dict[str, torch.Tensor]:
    """Every stored tensor of the student, no copies."""
    return {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
