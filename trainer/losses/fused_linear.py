"""lm_head, cross entropy and sparse distillation loss in one function; [tokens, vocabulary] is never kept.

Legend: T tokens, N computed positions, C positions of a chunk, D hidden size, K stored teacher entries,
V vocabulary, W rows of the vocabulary on this rank (W = V without tensor parallelism).

With logits z = W h, lse = log sum_v exp(z_v), label y and sparse target T (its weights need not sum to 1):

    CE = lse - z_y                     dCE/dz = q - onehot(y)        q = softmax(z)
    KD = lse - sum_i T_i z_i           dKD/dz = q - T

KD's gradient is that of the cross entropy of the teacher's distribution P in expectation, as E[T] = P.
The gradients of hidden and weight are made in the forward pass, while the chunk's logits are there, and scaled by
the incoming gradient in the backward pass (the idea of Liger Kernel's fused linear cross entropy, arXiv 2410.10989).
The chunk's buffer holds z, then e = exp(z - max), then e minus the targets; the rows' factor c / sum(e) is applied to
the small operands of the products instead of the buffer.

Numbers: logits, losses and the weight's gradient are float32 (float64 for float64 inputs). bf16 operands stay bf16
in the three products on CUDA, which accumulate and return float32; elsewhere they are widened first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

_NO_ID = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class VocabShard:
    """The rows of the lm_head on this rank: ids start .. start + W; group None means all of them."""

    start: int = 0
    group: dist.ProcessGroup | None = None

    def all_reduce(self, values: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        """`values` combined over the ranks of the vocabulary, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values

    def localise(self, ids: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Local rows of global ids (int64, 0 where the id lives elsewhere) and 1.0 / 0.0 for here / elsewhere."""
        local = ids.long() - self.start
        if self.group is None:
            return local, torch.ones_like(local, dtype=torch.float32)
        here = (local >= 0) & (local < num_rows)
        return torch.where(here, local, 0), here.float()


WHOLE_VOCAB = VocabShard()


@dataclass(frozen=True)
class TokenTargets:
    """What the N computed positions are to predict.

    index_N: int64, distinct rows of the hidden states. labels_N: integer ids in the whole vocabulary.
    ids_NK: integer, weights_NK: >= 0, the sparse teacher target; weight 0 in unused entries. K may be 0.
    """

    index_N: torch.Tensor
    labels_N: torch.Tensor
    ids_NK: torch.Tensor
    weights_NK: torch.Tensor

    def __getitem__(self, rows: slice) -> TokenTargets:
        return TokenTargets(
            self.index_N[rows], self.labels_N[rows], self.ids_NK[rows], self.weights_NK[rows]
        )


def fused_linear_loss(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets: TokenTargets,
    ce_coef_N: torch.Tensor,
    kd_coef_N: torch.Tensor,
    *,
    shard: VocabShard = WHOLE_VOCAB,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """loss = sum over the N positions of ce_coef * CE + kd_coef * KD; also CE and KD of each, detached.

    hidden_TD, weight_WD: one dtype, float32, bfloat16 or float64; gradients flow to both. Rows of hidden that
    targets.index_N does not name have no loss and no gradient. ce_coef_N, kd_coef_N: >= 0. chunk_tokens: positions
    whose logits live at a time. Returns (loss [], ce_N, kd_N) in float32 (float64 for float64 inputs); nats.

    With a shard group every rank passes the same hidden and targets and its own rows of the weight; all get the same
    loss, and the whole gradient of hidden, already summed over the group: where sequence parallelism gathers
    hidden, its backward must split that gradient, not sum it again.
    """
    return _FusedLinearLoss.apply(
        hidden_TD,
        weight_WD,
        targets,
        ce_coef_N,
        kd_coef_N,
        shard,
        chunk_tokens,
        torch.is_grad_enabled(),
    )


@torch.no_grad()
def fused_linear_eval(
    hidden_TD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets: TokenTargets,
    *,
    shard: VocabShard = WHOLE_VOCAB,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CE, KD and the most probable id (int64) of each position, without gradients: [N] each."""
    hidden_ND, head_WD, dtype = _operands(hidden_TD.index_select(0, targets.index_N), weight_WD)
    ce_N, kd_N = hidden_ND.new_empty((2, len(hidden_ND)), dtype=dtype)
    top_N = torch.empty_like(targets.index_N)
    for rows, logits_CW in _logits_chunks(hidden_ND, head_WD, dtype, chunk_tokens):
        top_N[rows] = _top_ids(logits_CW, shard)
        chunk = _softmax_chunk(logits_CW, targets[rows], shard)
        ce_N[rows], kd_N[rows] = chunk.ce_C, chunk.kd_C
    return ce_N, kd_N, top_N


class _FusedLinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: torch.Tensor,
        weight_WD: torch.Tensor,
        targets: TokenTargets,
        ce_coef_N: torch.Tensor,
        kd_coef_N: torch.Tensor,
        shard: VocabShard,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_ND, head_WD, dtype = _operands(hidden_TD.index_select(0, targets.index_N), weight_WD)
        ce_coef_N, kd_coef_N = ce_coef_N.to(dtype), kd_coef_N.to(dtype)
        # ctx.needs_input_grad does not know of torch.no_grad().
        needs = [grad_enabled and need for need in ctx.needs_input_grad[:2]]
        gradients = _Gradients.zeros(hidden_ND, head_WD, dtype, *needs)
        ce_N, kd_N = hidden_ND.new_empty((2, len(hidden_ND)), dtype=dtype)
        for rows, logits_CW in _logits_chunks(hidden_ND, head_WD, dtype, chunk_tokens):
            chunk = _softmax_chunk(logits_CW, targets[rows], shard)
            ce_N[rows], kd_N[rows] = chunk.ce_C, chunk.kd_C
            if any(needs):
                scale_C = chunk.subtract_targets(ce_coef_N[rows], kd_coef_N[rows])
                gradients.add(rows, chunk.exp_CW, scale_C, hidden_ND, head_WD)
        if gradients.hidden_ND is not None:
            shard.all_reduce(gradients.hidden_ND)
        ctx.save_for_backward(targets.index_N, gradients.hidden_ND, gradients.weight_WD)
        ctx.num_tokens, ctx.dtype = len(hidden_TD), hidden_TD.dtype
        ctx.mark_non_differentiable(ce_N, kd_N)
        loss = (ce_coef_N.double() * ce_N + kd_coef_N.double() * kd_N).sum().to(dtype)
        return loss, ce_N, kd_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        index_N, grad_hidden_ND, grad_weight_WD = ctx.saved_tensors
        grad_hidden_TD = grad_weight = None
        if grad_hidden_ND is not None:
            scaled_ND = (grad_hidden_ND * grad_loss).to(ctx.dtype)
            grad_hidden_TD = scaled_ND.new_zeros((ctx.num_tokens, scaled_ND.shape[1]))
            grad_hidden_TD.index_copy_(0, index_N, scaled_ND)
        if grad_weight_WD is not None:
            grad_weight = (grad_weight_WD * grad_loss).to(ctx.dtype)
        return grad_hidden_TD, grad_weight, *(None,) * 6


@dataclass(frozen=True)
class _Gradients:
    """Sums of the gradients over the chunks so far, in the dtype of the logits; None where not needed."""

    hidden_ND: torch.Tensor | None
    weight_WD: torch.Tensor | None

    @classmethod
    def zeros(
        cls,
        hidden_ND: torch.Tensor,
        head_WD: torch.Tensor,
        dtype: torch.dtype,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> _Gradients:
        return cls(
            hidden_ND=torch.empty_like(hidden_ND, dtype=dtype) if needs_hidden else None,
            weight_WD=torch.zeros_like(head_WD, dtype=dtype) if needs_weight else None,
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
            _addmm(self.weight_WD, residual_CW.t(), scaled_CD)


@dataclass(frozen=True)
class _SoftmaxChunk:
    """exp_CW = exp(z - max), its sums over the vocabulary, and the losses of a chunk's positions."""

    exp_CW: torch.Tensor
    sum_C: torch.Tensor
    ce_C: torch.Tensor
    kd_C: torch.Tensor
    label_rows_C1: torch.Tensor
    label_here_C1: torch.Tensor
    entry_rows_CK: torch.Tensor
    entry_weights_CK: torch.Tensor

    def subtract_targets(self, ce_coef_C: torch.Tensor, kd_coef_C: torch.Tensor) -> torch.Tensor:
        """Turn exp_CW in place into dL/dz up to a factor a row, and return that factor [C]."""
        coef_C = ce_coef_C + kd_coef_C
        kd_share_C = torch.where(coef_C > 0, kd_coef_C / coef_C, 0)
        label_C1 = ((kd_share_C - 1) * self.sum_C)[:, None] * self.label_here_C1
        entries_CK = (-kd_share_C * self.sum_C)[:, None] * self.entry_weights_CK
        self.exp_CW.scatter_add_(1, self.label_rows_C1, label_C1)
        self.exp_CW.scatter_add_(1, self.entry_rows_CK, entries_CK)
        return coef_C / self.sum_C


def _softmax_chunk(
    logits_CW: torch.Tensor, targets: TokenTargets, shard: VocabShard
) -> _SoftmaxChunk:
    """Losses of a chunk; the buffer of the logits becomes exp(z - max) in place."""
    dtype, num_rows = logits_CW.dtype, logits_CW.shape[1]
    label_rows_C1, label_here_C1 = shard.localise(targets.labels_N[:, None], num_rows)
    entry_rows_CK, entry_here_CK = shard.localise(targets.ids_NK, num_rows)
    label_here_C1 = label_here_C1.to(dtype)
    entry_weights_CK = (targets.weights_NK * entry_here_CK).to(dtype)
    label_C = (logits_CW.gather(1, label_rows_C1) * label_here_C1)[:, 0]
    entries_C = (logits_CW.gather(1, entry_rows_CK) * entry_weights_CK).sum(dim=1)
    max_C = shard.all_reduce(logits_CW.amax(dim=1), dist.ReduceOp.MAX)
    exp_CW = logits_CW.sub_(max_C[:, None]).exp_()
    # One reduction for all three: a collective of a few kB costs its latency.
    sums_3C = shard.all_reduce(torch.stack([exp_CW.sum(dim=1), label_C, entries_C]))
    sum_C, label_C, entries_C = sums_3C
    lse_C = max_C + sum_C.log()
    return _SoftmaxChunk(
        exp_CW=exp_CW,
        sum_C=sum_C,
        ce_C=lse_C - label_C,
        kd_C=lse_C - entries_C,
        label_rows_C1=label_rows_C1,
        label_here_C1=label_here_C1,
        entry_rows_CK=entry_rows_CK,
        entry_weights_CK=entry_weights_CK,
    )


def _top_ids(logits_CW: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Global id of the largest logit of each row; the lowest such id between ranks."""
    best = logits_CW.max(dim=1)
    max_C = shard.all_reduce(best.values.clone(), dist.ReduceOp.MAX)
    ids_C = torch.where(best.values == max_C, best.indices + shard.start, _NO_ID)
    return shard.all_reduce(ids_C, dist.ReduceOp.MIN)


def _operands(
    hidden_ND: torch.Tensor, weight_WD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    """The operands of the products, and the dtype of the logits."""
    assert hidden_ND.dtype == weight_WD.dtype, (hidden_ND.dtype, weight_WD.dtype)
    dtype = torch.float64 if weight_WD.dtype == torch.float64 else torch.float32
    if weight_WD.is_cuda:
        return hidden_ND, weight_WD, dtype
    return hidden_ND.to(dtype), weight_WD.to(dtype), dtype


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
