"""What Megatron-Core 0.16.1 needs to run on CPU with gloo. Active only when a config says `device: cpu`.

Megatron-Core takes CUDA for granted in a few places. Each patch below names them (paths under megatron/core/);
with them its DDP, optimisers, clipping and checkpoints run on CPU unmodified. Nothing here changes a number:
every patch answers "which device" or "which generator".
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from common.errors import EngineError


@functools.cache
def install() -> None:
    """Apply every patch, once a process. Raises EngineError when a CUDA device was already in use."""
    if torch.cuda.is_initialized():
        raise EngineError(
            "device: cpu was asked for in a process that already uses CUDA",
            remedy="start a process of its own for the CPU run",
        )
    _no_compiler()
    _cuda_answers_cpu()
    _tensors_answer_cuda()
    _modules_allocate_on_cpu()


def _no_compiler() -> None:
    """jit.py: jit_fuser is torch.compile, which would need a C++ compiler and seconds a function."""
    torch.compiler.set_stance("force_eager")


def _cuda_answers_cpu() -> None:
    """The device, its synchronisation and its random generator are the CPU's.

    current_device: distributed/param_and_grad_buffer.py:800,806; transformer/moe/router.py:90,92,169,178;
    tensor_parallel/layers.py:552; tensor_parallel/mappings.py:141,181; utils.py:631;
    models/common/embeddings/rotary_pos_embedding.py:162; dist_checkpointing/strategies/state_dict_saver.py:252.
    synchronize: dist_checkpointing/strategies/filesystem_async.py:230.
    generator: tensor_parallel/random.py:235-280 and 422 (the tracker's fork and the seeding).
    """
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = get_state
    torch.cuda.set_rng_state = set_state  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _tensors_answer_cuda() -> None:
    """Type names are compared with "torch.cuda.*": optimizer/clip_grads.py:167, optimizer/optimizer.py:671,690."""
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        answer = plain_type(self, *arguments, **keywords)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_  # type: ignore[method-assign]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _modules_allocate_on_cpu() -> None:
    """Five modules allocate with device="cuda" spelled out.

    pipeline_parallel/schedules.py:596; optimizer/optimizer.py:481,485,907; optimizer/clip_grads.py:103,174,207;
    utils.py:1207; transformer/utils.py:35,40.
    """
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.optimizer as optimizer
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.transformer.utils as transformer_utils
    import megatron.core.utils as utils

    for module in (schedules, optimizer, clip_grads, utils, transformer_utils):
        module.torch = _TorchOnCpu("torch")


class _TorchOnCpu(ModuleType):
    """The torch module, with device="cuda" read as "cpu" by its factories."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        return _on_cpu(value) if name in ("tensor", "zeros", "ones", "empty") else value


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def create(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if keywords.get("device") == "cuda":
            keywords["device"] = "cpu"
        return factory(*arguments, **keywords)

    return create
