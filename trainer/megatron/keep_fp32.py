"""Parameters that stay fp32 in a bf16 model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Transform = Callable[[torch.Tensor], torch.Tensor]


class KeepsFP32(torch.nn.Module):
    """Own parameters and buffers follow `.to(device)` and ignore casts; those of submodules follow both.

    Megatron's Float16Module calls `.bfloat16()` on the whole model (transformer/module.py:440).
    """

    def _apply(self, fn: Transform, recurse: bool = True) -> Any:
        if recurse:
            for child in self.children():
                child._apply(fn)
        return super()._apply(_only_moved_by(fn), recurse=False)


def _only_moved_by(fn: Transform) -> Transform:
    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device)).device)

    return move
