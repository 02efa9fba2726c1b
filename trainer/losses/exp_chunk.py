"""The softmax of a chunk of positions in bf16 on CUDA: what chunk.py computes, by kernels that never write the logits.

Legend: N positions, C positions of a chunk, K stored teacher entries, J = 1 + K slots (label, then entries), D hidden
size, W rows of the vocabulary on this rank.

The kernels (trainer/kernels) write e = exp(z - c) with an offset c of the row that must be known before its logits are:
here the largest logit of the label and the entries, which is at most the row's maximum. bf16 and float32 have one
exponent range, so e may exceed 1 by far; a row whose maximum is more than 2^MOST_ABOVE over c is computed a
second time with c = maximum, decided on the device. Logits of the slots are products of their own, in float32, and
the losses and the gradient at the slots come from those.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.kernels.lm_head import (
    TILES,
    BlockStats,
    exp_buffer,
    exp_products,
    fits_tma,
)
from trainer.kernels.lm_head_slots import mark_ids, settle_slots, slot_logits
from trainer.losses.chunk import (
    NO_ID,
    HeadChunk,
    TakenHeads,
    TokenTargets,
    VocabShard,
    head_entries,
)
from trainer.losses.coefficients import Coefficients

# Exponents of e in base 2. At 64 a row's sum is below 2e5 * 2^64 = 4e24, and a coefficient of 1e-10 over it 3e-35: all
# normal float32 and bf16, which end at 1e-38.
MOST_ABOVE = 64.0
_LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class ExpChunk:
    """exp_CW = exp(z - c) in bf16, its sums over the vocabulary, and the losses of a chunk's positions.

    exp_CW: None where no gradient is wanted; 0 at the ids of heads. exp_CJ: e of each slot in float32, 0 on another
    rank. top_C: most probable id, where asked for.
    """

    exp_CW: torch.Tensor | None
    exp_CJ: torch.Tensor
    slots: _Slots
    sum_C: torch.Tensor
    ce_C: torch.Tensor
    kd_C: torch.Tensor
    heads: HeadChunk | None
    top_C: torch.Tensor | None

    def subtract_targets(self, of: Coefficients) -> torch.Tensor:
        """Turn exp_CW in place into dL/dz up to a factor a row, and return that factor [C]. of: settled."""
        assert self.exp_CW is not None
        coef_C = of.ce_N + of.kd_N
        kd_share_C = torch.where(coef_C != 0, of.kd_N / coef_C, 0)
        label_C1 = ((kd_share_C - 1) * self.sum_C)[:, None]
        entries_CK = (-kd_share_C * self.sum_C)[:, None] * self.slots.weights_CK
        dropped_CJ = torch.zeros_like(self.exp_CJ, dtype=torch.int8)
        is_head_CK = self.slots.is_head_CK
        if self.heads is not None and is_head_CK is not None and of.kl_N is not None:
            by_kl_C1 = (self.heads.known_C & (of.kl_N != 0))[:, None]
            factor_C, head_CK = self.heads.residual()
            label_C1 = torch.where(by_kl_C1, 0, label_C1)
            entries_CK = torch.where(by_kl_C1, head_CK, entries_CK)
            coef_C = torch.where(by_kl_C1[:, 0], of.kl_N * factor_C, coef_C)
            dropped_CJ[:, 1:] = by_kl_C1 & is_head_CK
        add_CJ = torch.cat([label_C1, entries_CK], dim=1)
        settle_slots(self.exp_CW, self.slots.rows_CJ, self.exp_CJ, add_CJ, dropped_CJ)
        return coef_C / self.sum_C


def exp_chunks(
    hidden_ND: torch.Tensor,
    weight_WD: torch.Tensor,
    targets: TokenTargets,
    shard: VocabShard,
    chunk_tokens: int,
    *,
    keep: bool,
    top: bool,
) -> Iterator[tuple[slice, ExpChunk]]:
    """Rows of a chunk and its softmax, all in one buffer that the next chunk overwrites.

    hidden_ND, weight_WD: bf16. keep: with e, for the gradients. top: with the most probable ids.
    """
    num_positions, weight_WD = len(hidden_ND), weight_WD.contiguous()
    shape = min(chunk_tokens, num_positions), len(weight_WD)
    buffer_CW = exp_buffer(*shape, hidden_ND.device) if keep else None
    for start in range(0, num_positions, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_positions))
        exp_CW = None if buffer_CW is None else buffer_CW[: rows.stop - rows.start]
        yield rows, _exp_chunk(hidden_ND[rows], weight_WD, targets[rows], shard, exp_CW, top=top)


def _exp_chunk(
    hidden_CD: torch.Tensor,
    weight_WD: torch.Tensor,
    targets: TokenTargets,
    shard: VocabShard,
    exp_CW: torch.Tensor | None,
    *,
    top: bool,
) -> ExpChunk:
    slots = _Slots.of(hidden_CD, weight_WD, targets, shard)
    offset_C, stats = _exponentials(hidden_CD, weight_WD, slots, shard, exp_CW, top=top)
    # -inf for an id on another rank.
    above_CJ = slots.logits_CJ * _LOG2_E - offset_C[:, None]
    exp_CJ = torch.exp2(above_CJ)
    taken = slots.take_heads(exp_CJ, above_CJ)
    # Sums of 256 in float32, the 786 of them in float64: the error does not grow with the vocabulary.
    sum_C = stats.sums_NC.sum(dim=0, dtype=torch.float64).float()
    sums_C = [sum_C, *slots.label_and_entries(), *(() if taken is None else taken.sums())]
    sum_C, label_C, entries_C, *head_C = shard.all_reduce(torch.stack(sums_C))
    heads = None
    if targets.heads is not None and taken is not None:
        heads = taken.with_sums(targets.heads, sum_C, *head_C)
        sum_C = sum_C + head_C[0]
    lse_C = (offset_C + sum_C.log2()) / _LOG2_E
    return ExpChunk(
        exp_CW=exp_CW,
        exp_CJ=exp_CJ,
        slots=slots,
        sum_C=sum_C,
        ce_C=lse_C - label_C,
        kd_C=lse_C - entries_C,
        heads=heads,
        top_C=_top_ids(stats, shard) if top else None,
    )


@dataclass(frozen=True)
class _Slots:
    """rows_CJ: local row of each slot, -1 on another rank. logits_CJ: float32, -inf there. weights_CK: 0 there.

    is_head_CK: bool, None where the targets have no heads.
    """

    rows_CJ: torch.Tensor
    logits_CJ: torch.Tensor
    weights_CK: torch.Tensor
    is_head_CK: torch.Tensor | None

    @classmethod
    def of(
        cls,
        hidden_CD: torch.Tensor,
        weight_WD: torch.Tensor,
        targets: TokenTargets,
        shard: VocabShard,
    ) -> _Slots:
        ids_CJ = torch.cat([targets.labels_N[:, None].long(), targets.ids_NK.long()], dim=1)
        rows_CJ, here_CJ = shard.localise(ids_CJ, len(weight_WD))
        rows_CJ = torch.where(here_CJ > 0, rows_CJ, -1)
        weights_CK = torch.where(rows_CJ[:, 1:] >= 0, targets.weights_NK.float(), 0)
        return cls(
            rows_CJ=rows_CJ,
            logits_CJ=slot_logits(hidden_CD, weight_WD, rows_CJ),
            weights_CK=weights_CK,
            is_head_CK=None if targets.heads is None else head_entries(weights_CK, targets.heads),
        )

    def marks(self, num_rows: int) -> torch.Tensor | None:
        """Of the head ids, for the kernel."""
        if self.is_head_CK is None or self.is_head_CK.shape[1] == 0:
            return None
        return mark_ids(torch.where(self.is_head_CK, self.rows_CJ[:, 1:], -1), num_rows)

    def label_and_entries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """z_y and sum T z of this rank, [C] each."""
        logits_CJ = torch.where(self.rows_CJ >= 0, self.logits_CJ, 0)
        return logits_CJ[:, 0], (logits_CJ[:, 1:] * self.weights_CK).sum(dim=1)

    def take_heads(self, exp_CJ: torch.Tensor, above_CJ: torch.Tensor) -> TakenHeads | None:
        """exp_CJ, above_CJ: e of the slots and its exponent, base 2."""
        if self.is_head_CK is None:
            return None
        excess_CK = above_CJ[:, 1:] / _LOG2_E - self.weights_CK.log()
        return TakenHeads(
            torch.where(self.is_head_CK, exp_CJ[:, 1:], 0),
            torch.where(self.is_head_CK, excess_CK, 0),
        )


def _exponentials(
    hidden_CD: torch.Tensor,
    weight_WD: torch.Tensor,
    slots: _Slots,
    shard: VocabShard,
    exp_CW: torch.Tensor | None,
    *,
    top: bool,
) -> tuple[torch.Tensor, BlockStats]:
    """The offsets that hold in the end, base 2, and the statistics at them; e into exp_CW."""
    # Loads by pointers where the addresses do not suit the tensor memory accelerator; the products are the same.
    tiles = TILES if fits_tma(hidden_CD, weight_WD) else TILES.by_pointers()
    stats = BlockStats.empty(hidden_CD, len(weight_WD), tiles, top=top)
    marks_CM = slots.marks(len(weight_WD))

    def run(offset_C: torch.Tensor, again_C: torch.Tensor | None) -> None:
        exp_products(
            *(hidden_CD, weight_WD, offset_C, stats, tiles),
            exp_CW=exp_CW,
            marks_CM=marks_CM,
            again_C=again_C,
        )

    first_C = shard.all_reduce(slots.logits_CJ.amax(dim=1) * _LOG2_E, dist.ReduceOp.MAX)
    run(first_C, None)
    top_C = shard.all_reduce(stats.tops_NC.amax(dim=0), dist.ReduceOp.MAX)
    again_C = top_C > MOST_ABOVE
    offset_C = torch.where(again_C, first_C + top_C, first_C)
    run(offset_C, again_C)
    return offset_C, stats


def _top_ids(stats: BlockStats, shard: VocabShard) -> torch.Tensor:
    """Global id of the largest logit of each row; the lowest such id between ranks."""
    assert stats.top_ids_NC is not None
    best = stats.tops_NC.max(dim=0)
    local_C = stats.top_ids_NC.gather(0, best.indices[None])[0].long()
    top_C = shard.all_reduce(best.values.clone(), dist.ReduceOp.MAX)
    ids_C = torch.where(best.values == top_C, local_C + shard.start, NO_ID)
    return shard.all_reduce(ids_C, dist.ReduceOp.MIN)
