"""The word embedding of a training step, whose gradient goes straight into Megatron's fp32 sums.

Shapes: B rows, S positions, T = S B tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding


class SummedEmbedding:
    """Stands in for `forward` of an embedding that is not tensor-parallel, on CUDA.

    Without gradients, or where no DDP has made sums, the embedding runs as it is.
    """

    def __init__(self, words: VocabParallelEmbedding) -> None:
        self._weight = words.weight
        self._plain: Callable[[torch.Tensor], torch.Tensor] = words.forward
        words.forward = self

    def __call__(self, ids_BS: torch.Tensor) -> torch.Tensor:
        sums_VD = getattr(self._weight, "main_grad", None)
        if sums_VD is None or not torch.is_grad_enabled():
            return self._plain(ids_BS)
        return _Embed.apply(ids_BS, self._weight, sums_VD)


class _Embed(torch.autograd.Function):
    """[B, S, D], in memory as [S, B, D], which is what Megatron makes of it next."""

    @staticmethod
    def forward(
        ctx: Any, ids_BS: torch.Tensor, weight_VD: torch.Tensor, sums_VD: torch.Tensor
    ) -> torch.Tensor:
        ids_SB = ids_BS.t().contiguous()
        ctx.save_for_backward(ids_SB)
        ctx.sums_VD = sums_VD
        return torch.nn.functional.embedding(ids_SB, weight_VD).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_BSD: torch.Tensor) -> tuple[None, None, None]:
        from trainer.kernels.embedding import add_rows

        (ids_SB,) = ctx.saved_tensors
        grad_TD = grad_BSD.transpose(0, 1).contiguous().flatten(0, 1)
        add_rows(ctx.sums_VD, grad_TD, ids_SB.flatten())
        return None, None, None
