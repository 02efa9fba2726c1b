"""The softmax of a chunk of positions over a vocabulary that may be sharded: its losses and dL/dz, in one buffer.

Legend: N positions, C positions of a chunk, K stored teacher entries, W rows of the vocabulary on this rank.

With logits z, q = softmax(z), label y and sparse target T (its weights need not sum to 1):

    CE = lse - z_y                     dCE/dz = q - onehot(y)
    KD = lse - sum_i T_i z_i           dKD/dz = q - T
    KL = sum_c q_c f_c                 dKL/dz_j = q_j (f_c(j) - KL)         f_c = log q_c - log p_c

KL is the reverse KL of two coarsened distributions: c runs over the ids of the teacher's head and one bucket of all
others. By the data processing inequality it is at most the KL over the vocabulary, and equal where the teacher's and
the student's distributions within the bucket have one shape.

Every dL/dz has one form, scale * (e + a few entries), e = exp(z - max): the whole row takes one factor, and only the
label and the K stored entries differ from it. For the KL the factor is that of the bucket, scale = c g_tail / sum(e)
with g = f - KL, and a head id holds e_i g_i / g_tail in the place of e_i.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from trainer.losses.coefficients import Coefficients

# Least log mass of the teacher's bucket: e^-16 is the step of float32 at 1, below which "1 - head" is rounding alone. A
# larger p in the bucket lowers the KL, so it remains a lower bound.
LOG_TAIL_FLOOR = -16.0
NO_ID = torch.iinfo(torch.int64).max


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
class HeadTargets:
    """The teacher's distributions of the N positions, coarsened to their heads and one bucket each.

    num_head_N: integer, the first that many stored entries are the head with their probabilities; 0: nothing is known
    of the position, its KL is 0. log_tail_N: log mass of the bucket, <= 0, -inf where the head holds all; values below
    LOG_TAIL_FLOOR count as that.
    """

    num_head_N: torch.Tensor
    log_tail_N: torch.Tensor

    def __getitem__(self, rows: slice) -> HeadTargets:
        return HeadTargets(self.num_head_N[rows], self.log_tail_N[rows])


@dataclass(frozen=True)
class TokenTargets:
    """What the N computed positions are to predict.

    index_N: int64, distinct rows of the hidden states. labels_N: integer ids in the whole vocabulary.
    ids_NK: integer, weights_NK: >= 0, the sparse teacher target; weight 0 in unused entries. K may be 0.
    heads: which of the entries are exact, for the KL; None where it is not wanted.
    """

    index_N: torch.Tensor
    labels_N: torch.Tensor
    ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    heads: HeadTargets | None = None

    def __getitem__(self, rows: slice) -> TokenTargets:
        return TokenTargets(
            self.index_N[rows],
            self.labels_N[rows],
            self.ids_NK[rows],
            self.weights_NK[rows],
            None if self.heads is None else self.heads[rows],
        )


@dataclass(frozen=True)
class HeadChunk:
    """The heads of a chunk's positions on this rank: exp_CK = e of head ids, 0 in other entries.

    known_C: bool, a position with a head. excess_CK, tail_excess_C: f of the head ids and of the bucket. kl_C: KL.
    """

    known_C: torch.Tensor
    exp_CK: torch.Tensor
    excess_CK: torch.Tensor
    tail_excess_C: torch.Tensor
    kl_C: torch.Tensor

    def residual(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dKL/dz = factor q_j in the bucket, and factor / sum(e) times the entries at the head: (factor_C, entries_CK).

        A factor that is 0 to rounding is replaced by the rounding, so that the division is safe.
        """
        tail_C = self.tail_excess_C - self.kl_C
        step = torch.finfo(tail_C.dtype).eps
        factor_C = torch.where(tail_C.abs() < step, step, tail_C)
        return factor_C, self.exp_CK * (self.excess_CK - self.kl_C[:, None]) / factor_C[:, None]


@dataclass(frozen=True)
class SoftmaxChunk:
    """exp_CW = exp(z - max), its sums over the vocabulary, and the losses of a chunk's positions.

    heads: None where the targets have none. With them exp_CW holds 0 at the ids of the heads.
    """

    exp_CW: torch.Tensor
    sum_C: torch.Tensor
    ce_C: torch.Tensor
    kd_C: torch.Tensor
    label_rows_C1: torch.Tensor
    label_here_C1: torch.Tensor
    entry_rows_CK: torch.Tensor
    entry_weights_CK: torch.Tensor
    heads: HeadChunk | None

    def subtract_targets(self, of: Coefficients) -> torch.Tensor:
        """Turn exp_CW in place into dL/dz up to a factor a row, and return that factor [C]. of: settled."""
        coef_C = of.ce_N + of.kd_N
        kd_share_C = torch.where(coef_C != 0, of.kd_N / coef_C, 0)
        label_C1 = ((kd_share_C - 1) * self.sum_C)[:, None] * self.label_here_C1
        entries_CK = (-kd_share_C * self.sum_C)[:, None] * self.entry_weights_CK
        if self.heads is not None:
            entries_CK += self.heads.exp_CK  # what was taken out of exp_CW
            if of.kl_N is not None:
                by_kl_C1 = (self.heads.known_C & (of.kl_N != 0))[:, None]
                factor_C, head_CK = self.heads.residual()
                label_C1 = torch.where(by_kl_C1, 0, label_C1)
                entries_CK = torch.where(by_kl_C1, head_CK, entries_CK)
                coef_C = torch.where(by_kl_C1[:, 0], of.kl_N * factor_C, coef_C)
        self.exp_CW.scatter_add_(1, self.label_rows_C1, label_C1)
        self.exp_CW.scatter_add_(1, self.entry_rows_CK, entries_CK)
        return coef_C / self.sum_C


def softmax_chunk(
    logits_CW: torch.Tensor, targets: TokenTargets, shard: VocabShard
) -> SoftmaxChunk:
    """Losses of a chunk; the buffer of the logits becomes exp(z - max) in place."""
    dtype, num_rows = logits_CW.dtype, logits_CW.shape[1]
    label_rows_C1, label_here_C1 = shard.localise(targets.labels_N[:, None], num_rows)
    entry_rows_CK, entry_here_CK = shard.localise(targets.ids_NK, num_rows)
    label_here_C1 = label_here_C1.to(dtype)
    entry_weights_CK = (targets.weights_NK * entry_here_CK).to(dtype)
    label_C = (logits_CW.gather(1, label_rows_C1) * label_here_C1)[:, 0]
    entry_logits_CK = logits_CW.gather(1, entry_rows_CK)
    entries_C = (entry_logits_CK * entry_weights_CK).sum(dim=1)
    max_C = shard.all_reduce(logits_CW.amax(dim=1), dist.ReduceOp.MAX)
    exp_CW = logits_CW.sub_(max_C[:, None]).exp_()
    taken = None
    if targets.heads is not None:
        above_max_CK = entry_logits_CK - max_C[:, None]
        taken = _take_heads(exp_CW, entry_rows_CK, above_max_CK, entry_weights_CK, targets.heads)
    # One reduction for all: a collective of a few kB costs its latency.
    sums_C = [exp_CW.sum(dim=1), label_C, entries_C, *(() if taken is None else taken.sums())]
    sum_C, label_C, entries_C, *head_C = shard.all_reduce(torch.stack(sums_C))
    heads = None
    if targets.heads is not None and taken is not None:
        heads = taken.with_sums(targets.heads, sum_C, *head_C)
        sum_C = sum_C + head_C[0]
    lse_C = max_C + sum_C.log()
    return SoftmaxChunk(
        exp_CW=exp_CW,
        sum_C=sum_C,
        ce_C=lse_C - label_C,
        kd_C=lse_C - entries_C,
        label_rows_C1=label_rows_C1,
        label_here_C1=label_here_C1,
        entry_rows_CK=entry_rows_CK,
        entry_weights_CK=entry_weights_CK,
        heads=heads,
    )


@dataclass(frozen=True)
class TakenHeads:
    """e of this rank's head ids, moved out of the buffer, and z - max - log p of each; 0 in other entries."""

    exp_CK: torch.Tensor
    excess_CK: torch.Tensor

    def sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the ranks add up: sum of e, and of e (z - max - log p)."""
        return self.exp_CK.sum(dim=1), (self.exp_CK * self.excess_CK).sum(dim=1)

    def with_sums(
        self,
        heads: HeadTargets,
        tail_sum_C: torch.Tensor,
        head_sum_C: torch.Tensor,
        head_dot_C: torch.Tensor,
    ) -> HeadChunk:
        """The chunk's KL, from the sums over all ranks of e in the bucket and of `sums`."""
        sum_C = tail_sum_C + head_sum_C
        log_sum_C, known_C = sum_C.log(), heads.num_head_N > 0
        log_tail_C = heads.log_tail_N.to(sum_C.dtype).clamp(min=LOG_TAIL_FLOOR)
        log_p_C = torch.where(known_C, log_tail_C, 0)
        # A bucket of student mass 0 adds q log q = 0 to the KL and has no gradient.
        tail_excess_C = torch.where(tail_sum_C > 0, tail_sum_C.log() - log_sum_C - log_p_C, 0)
        kl_C = head_dot_C - head_sum_C * log_sum_C + tail_sum_C * tail_excess_C
        return HeadChunk(
            known_C=known_C,
            exp_CK=self.exp_CK,
            excess_CK=self.excess_CK - log_sum_C[:, None],
            tail_excess_C=tail_excess_C,
            kl_C=kl_C / sum_C,
        )


def head_entries(entry_weights_CK: torch.Tensor, heads: HeadTargets) -> torch.Tensor:
    """Which entries are head ids of this rank, bool [C, K]. entry_weights_CK: 0 where the id lives elsewhere."""
    columns_K = torch.arange(entry_weights_CK.shape[1], device=entry_weights_CK.device)
    return (columns_K < heads.num_head_N[:, None]) & (entry_weights_CK > 0)


def _take_heads(
    exp_CW: torch.Tensor,
    entry_rows_CK: torch.Tensor,
    above_max_CK: torch.Tensor,
    entry_weights_CK: torch.Tensor,
    heads: HeadTargets,
) -> TakenHeads:
    """Move e of the head ids out of exp_CW: what remains sums to the bucket without the cancellation of 1 - head."""
    is_head_CK = head_entries(entry_weights_CK, heads)
    exp_CK = torch.where(is_head_CK, exp_CW.gather(1, entry_rows_CK), 0)
    exp_CW.scatter_add_(1, entry_rows_CK, -exp_CK)
    excess_CK = torch.where(is_head_CK, above_max_CK - entry_weights_CK.log(), 0)
    return TakenHeads(exp_CK, excess_CK)


def top_ids(logits_CW: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Global id of the largest logit of each row; the lowest such id between ranks."""
    best = logits_CW.max(dim=1)
    max_C = shard.all_reduce(best.values.clone(), dist.ReduceOp.MAX)
    ids_C = torch.where(best.values == max_C, best.indices + shard.start, NO_ID)
    return shard.all_reduce(ids_C, dist.ReduceOp.MIN)
