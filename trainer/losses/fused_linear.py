"""lm_head, cross entropy and sparse distillation loss in one function; [tokens, vocabulary] is never kept.

Legend: T tokens, N computed positions, C positions of a chunk, D hidden size, K stored teacher entries,
V vocabulary, W rows of the vocabulary on this rank (W = V without tensor parallelism).

The losses of a position, CE, KD and KL, are those of trainer/losses/chunk.py on its logits z = W h. KD's gradient is
that of the cross entropy of the teacher's distribution P in expectation, as E[T] = P. The policy gradient on a sampled
token is CE with a coefficient that depends on its value (trainer/losses/coefficients.py).

The gradients of hidden and weight are made in the forward pass, while the chunk's logits are there, and scaled by
the incoming gradient in the backward pass (the idea of Liger Kernel's fused linear cross entropy, arXiv 2410.10989).
The chunk's buffer holds z, then e = exp(z - max), then dL/dz up to a factor a row; that factor is applied to
the small operands of the products instead of the buffer.

One rule names the form: bf16 on CUDA takes the kernels (trainer/losses/exp_chunk.py), which write e in bf16 and never
z; all else takes torch's operations (trainer/losses/chunk.py), the reference.

Numbers: logits, losses and the weight's gradient are float32 (float64 for float64 inputs). bf16 operands stay bf16
in the three products on CUDA, which accumulate and return float32; elsewhere they are widened first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from trainer.losses.chunk import (
    WHOLE_VOCAB,
    SoftmaxChunk,
    TokenTargets,
    VocabShard,
    softmax_chunk,
    top_ids,
)
from trainer.losses.coefficients import Coefficients, Losses

if TYPE_CHECKING:
    from trainer.losses.exp_chunk import ExpChunk


def fused_linear_loss(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets: TokenTargets,
    coefficients: Coefficients,
    *,
    shard: VocabShard = WHOLE_VOCAB,
    chunk_tokens: int,
) -> tuple[torch.Tensor, Losses]:
    """loss = sum over the N positions of their coefficients times CE, KD and KL; also the three of each, detached.

    hidden_TD, weight_WD: one dtype, float32, bfloat16 or float64; gradients flow to both. Rows of hidden that
    targets.index_N does not name have no loss and no gradient. coefficients.kl_N needs targets.heads. chunk_tokens:
    positions whose logits live at a time. Returns (loss [], losses) in float32 (float64 for float64 inputs); nats.

    With a shard group every rank passes the same hidden and targets and its own rows of the weight; all get the same
    loss, and the whole gradient of hidden, already summed over the group: where sequence parallelism gathers
    hidden, its backward must split that gradient, not sum it again.
    """
    assert coefficients.kl_N is None or targets.heads is not None
    loss, *losses = _FusedLinearLoss.apply(
        hidden_TD,
        weight_WD,
        targets,
        coefficients,
        shard,
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    return loss, Losses(*losses)


@torch.no_grad()
def fused_linear_eval(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets: TokenTargets,
    *,
    shard: VocabShard = WHOLE_VOCAB,
    chunk_tokens: int,
) -> tuple[Losses, torch.Tensor]:
    """The losses and the most probable id (int64 [N]) of each position, without gradients."""
    hidden_ND, head_WD, dtype = _operands(hidden_TD.index_select(0, targets.index_N), weight_WD)
    losses = _empty_losses(hidden_ND, dtype, targets)
    top_N = torch.empty_like(targets.index_N)
    for rows, chunk, top_C in _chunks(
        hidden_ND, head_WD, dtype, targets, shard, chunk_tokens, keep=False, top=True
    ):
        _store(losses, rows, chunk)
        if top_C is not None:
            top_N[rows] = top_C
    return losses, top_N


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_WD: torch.Tensor,
        targets: TokenTargets,
        coefficients: Coefficients,
        shard: VocabShard,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, head_WD, dtype = _operands(hidden_TD.index_select(0, targets.index_N), weight_WD)
        # ctx.needs_input_grad does not know of torch.no_grad().
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:2]]
        gradients = _Gradients.empty(hidden_ND, head_WD, dtype, *needs)
        losses = _empty_losses(hidden_ND, dtype, targets)
        for rows, chunk, _ in _chunks(
            hidden_ND, head_WD, dtype, targets, shard, chunk_tokens, keep=any(needs)
        ):
            _store(losses, rows, chunk)
            if chunk.exp_CW is not None and any(needs):
                scale_C = chunk.subtract_targets(coefficients[rows].settled(chunk.ce_C))
                gradients.add(rows, chunk.exp_CW, scale_C, hidden_ND, head_WD)
        if gradients.hidden_ND is not None:
            shard.all_reduce(gradients.hidden_ND)
        ctx.save_for_backward(targets.index_N, gradients.hidden_ND, gradients.weight_WD)
        ctx.num_tokens, ctx.dtype = len(hidden_TD), hidden_TD.dtype
        ctx.mark_non_differentiable(*(loss_N for loss_N in losses if loss_N is not None))
        return coefficients.loss(losses).sum().to(dtype), *losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        index_N, grad_hidden_ND, grad_weight_WD = ctx.saved_tensors
        grad_hidden_TD = grad_weight = None
        if grad_hidden_ND is not None:
            scaled_ND = (grad_hidden_ND * grad_loss).to(ctx.dtype)
            grad_hidden_TD = scaled_ND.new_zeros((ctx.num_tokens, scaled_ND.shape[1]))
            grad_hidden_TD.index_copy_(0, index_N, scaled_ND)
        if grad_weight_WD is not None:
            grad_weight = _scaled(grad_weight_WD, grad_loss, ctx.dtype)
        return grad_hidden_TD, grad_weight, *(None,) * 5


@dataclass(frozen=True)
class _Gradients:
    """Sums of the gradients over the chunks so far, in the dtype of the logits; None where not needed.

    The first chunk writes the weight's, 0.8 GB at full size, without reading it; without chunks it is 0.
    """

    hidden_ND: torch.Tensor | None
    weight_WD: torch.Tensor | None

    @classmethod
    def empty(
        cls,
        hidden_ND: torch.Tensor,
        head_WD: torch.Tensor,
        dtype: torch.dtype,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> _Gradients:
        new_weight = torch.empty_like if len(hidden_ND) else torch.zeros_like
        return cls(
            hidden_ND=torch.empty_like(hidden_ND, dtype=dtype) if needs_hidden else None,
            weight_WD=new_weight(head_WD, dtype=dtype) if needs_weight else None,
        )

    def add(
        self,
        rows: slice,
        residual_CW: torch.Tensor,
        scale_C: torch.Tensor,
        hidden_ND: torch.Tensor,
        head_WD: torch.Tensor,
    ) -> None:
        """Add the products with dL/dz = scale * residual of the chunk `rows`."""
        residual_CW, scale_C1 = residual_CW.to(head_WD.dtype), scale_C[:, None]
        if self.hidden_ND is not None:
            _mm(residual_CW, head_WD, out=self.hidden_ND[rows])
            self.hidden_ND[rows] *= scale_C1
        if self.weight_WD is not None:
            scaled_CD = (hidden_ND[rows] * scale_C1).to(head_WD.dtype)
            if rows.start == 0:
                _mm(residual_CW.t(), scaled_CD, out=self.weight_WD)
            else:
                _addmm(self.weight_WD, residual_CW.t(), scaled_CD)


def _empty_losses(hidden_ND: torch.Tensor, dtype: torch.dtype, targets: TokenTargets) -> Losses:
    ce_N, kd_N, kl_N = (hidden_ND.new_empty(len(hidden_ND), dtype=dtype) for _ in range(3))
    return Losses(ce_N, kd_N, None if targets.heads is None else kl_N)


def _store(losses: Losses, rows: slice, chunk: SoftmaxChunk | ExpChunk) -> None:
    losses.ce_N[rows], losses.kd_N[rows] = chunk.ce_C, chunk.kd_C
    if losses.kl_N is not None and chunk.heads is not None:
        losses.kl_N[rows] = chunk.heads.kl_C


def _by_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """The rule: bf16 on CUDA."""
    return device.type == "cuda" and dtype == torch.bfloat16


def _operands(
    hidden_ND: torch.Tensor, weight_WD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """The operands of the products, and the dtype of the logits."""
    assert hidden_ND.dtype == weight_WD.dtype, (hidden_ND.dtype, weight_WD.dtype)
    dtype = torch.float64 if weight_WD.dtype == torch.float64 else torch.float32
    if weight_WD.is_cuda or _by_kernels(weight_WD.device, weight_WD.dtype):
        return hidden_ND, weight_WD, dtype
    return hidden_ND.to(dtype), weight_WD.to(dtype), dtype


def _chunks(
    hidden_ND: torch.Tensor,
    head_WD: torch.Tensor,
    dtype: torch.dtype,
    targets: TokenTargets,
    shard: VocabShard,
    chunk_tokens: int,
    *,
    keep: bool,
    top: bool = False,
) -> Iterator[tuple[slice, SoftmaxChunk | ExpChunk, torch.Tensor | None]]:
    """Rows of a chunk, its softmax and, with `top`, its most probable ids, all in one buffer.

    keep: the exponentials are wanted.
    """
    if _by_kernels(head_WD.device, head_WD.dtype):
        from trainer.losses.exp_chunk import exp_chunks  # needs Triton

        for rows, chunk in exp_chunks(
            hidden_ND, head_WD, targets, shard, chunk_tokens, keep=keep, top=top
        ):
            yield rows, chunk, chunk.top_C
        return
    for rows, logits_CW in _logits_chunks(hidden_ND, head_WD, dtype, chunk_tokens):
        top_C = top_ids(logits_CW, shard) if top else None
        yield rows, softmax_chunk(logits_CW, targets[rows], shard), top_C


def _logits_chunks(
    hidden_ND: torch.Tensor, head_WD: torch.Tensor, dtype: torch.dtype, chunk_tokens: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of a chunk and their logits [C, W], all in one buffer that the next chunk overwrites."""
    num_tokens = len(hidden_ND)
    buffer_CW = hidden_ND.new_empty((min(chunk_tokens, num_tokens), len(head_WD)), dtype=dtype)
    for start in range(0, num_tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_tokens))
        logits_CW = buffer_CW[: rows.stop - rows.start]
        _mm(hidden_ND[rows], head_WD.t(), out=logits_CW)
        yield rows, logits_CW


def _scaled(values: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values * factor in `dtype`; by the kernels in one pass, without a product in float32 beside them."""
    if _by_kernels(values.device, dtype):
        from trainer.kernels.lm_head_slots import scaled_bf16  # needs Triton

        return scaled_bf16(values, factor)
    return (values * factor).to(dtype)


def _mm(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> None:
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def _addmm(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
