"""The student built without memory, so that the full one can be counted anywhere."""

from __future__ import annotations

import torch

from trainer.config import ModelRuntime, ParallelConfig
from trainer.megatron.topology import distributed
from trainer.parameters import component_of
from trainer.student_config import StudentConfig


def built_shapes(student: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by its name, from the modules of the trainer on PyTorch's meta device.

    Starts process groups of one process; so it wants a process that trains nothing. Megatron allocates where
    `torch.cuda.current_device` says, which answers "meta" meanwhile.
    """
    runtime = ModelRuntime.on_cpu("bf16")
    with distributed("cpu", ParallelConfig(), seed=0):
        from trainer.megatron.student import build_student

        answer, torch.cuda.current_device = torch.cuda.current_device, lambda: "meta"  # type: ignore[assignment, return-value]
        try:
            with torch.device("meta"):
                model = build_student(
                    student, runtime, ParallelConfig(), seq_len=1, initialise=False
                )
        finally:
            torch.cuda.current_device = answer
        return {name: tuple(p.shape) for name, p in model.named_parameters()}


def built_counts(student: StudentConfig) -> dict[str, int]:
    """Parameters of the built student by component (trainer/parameters.py)."""
    counts: dict[str, int] = {}
    for name, shape in built_shapes(student).items():
        component = component_of(name, student)
        counts[component] = counts.get(component, 0) + torch.Size(shape).numel()
    return counts
