"""Hidden states to sparse teacher targets, on the device that holds the lm_head, in bounded chunks of positions.

Legend: N positions, V ids of this rank's vocabulary shard, B blocks of W consecutive ids, K most head entries,
J most tail draws (K + 1), E most entries together (K + 1), R ranks.

A packed row is int32 [5 + E + K]: number of head entries, number of draws, then bit patterns of float32: realised
logprob, log tail mass, entropy; then the ids (head by falling probability, draws ascending) and the head logprobs.

With t the threshold: an id of probability >= t lies in a block of mass >= t, so the K heaviest blocks hold the whole
head. Draws are found in two levels: the block by its cumulative mass, then the id inside it. Under tensor
parallelism each rank works on its shard; scalars and packed entries are exchanged, never logits.
The reference is `target.reduce_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from datastore.types import SparseTarget

_SCALARS = 5
_BLOCK = 128


@dataclass(frozen=True, slots=True)
class VocabShard:
    """Which ids a rank holds: `first_id` onwards; `group` is the tensor-parallel group, None for one rank."""

    first_id: int = 0
    group: dist.ProcessGroup | None = None

    def gather(self, mine: torch.Tensor) -> torch.Tensor:
        """[R, *mine.shape]: the tensors of all ranks, in rank order."""
        if self.group is None:
            return mine[None]
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine.contiguous(), group=self.group)
        return torch.stack(parts)

    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)


def most_heads(threshold: float) -> int:
    """The most ids that can have probability >= threshold."""
    return int(1 / threshold + 1e-9)


def packed_width(threshold: float) -> int:
    """Columns of a packed row."""
    return _SCALARS + 2 * most_heads(threshold) + 1


def reduce_hidden(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    realised_N: torch.Tensor,
    uniforms_N: torch.Tensor,
    *,
    threshold: float,
    chunk: int,
    shard: VocabShard,
) -> torch.Tensor:
    """Packed rows int32 [N, packed_width] of N positions, at most `chunk` of them as logits at any time.

    hidden_ND, head_VD: the final hidden states and this rank's lm_head rows, of one dtype. Logits are fp32: bf16
    ones tie the top id in about 5 % of positions (measured). realised_N: int64 ids of the next tokens.
    uniforms_N: float64 in [0, 1), the systematic draw's offset of each position.
    """
    num_rows = hidden_ND.shape[0]
    packed_NC = torch.empty(
        (num_rows, packed_width(threshold)), dtype=torch.int32, device=hidden_ND.device
    )
    workspace = (min(chunk, num_rows), head_VD.shape[0])
    logits_NV = torch.empty(workspace, dtype=torch.float32, device=hidden_ND.device)
    probs_NV = torch.empty_like(logits_NV)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        size = rows.stop - rows.start
        _head_logits(hidden_ND[rows], head_VD, out_NV=logits_NV[:size])
        packed_NC[rows] = reduce_logits(
            logits_NV[:size],
            realised_N[rows],
            uniforms_N[rows],
            threshold=threshold,
            shard=shard,
            probs_NV=probs_NV[:size],
        )
    return packed_NC


def _head_logits(hidden_ND: torch.Tensor, head_VD: torch.Tensor, *, out_NV: torch.Tensor) -> None:
    if head_VD.dtype == torch.float32:
        torch.mm(hidden_ND, head_VD.t(), out=out_NV)
    else:  # CUDA only: bf16 inputs, fp32 accumulation and output, no fp32 copy of the weight
        torch.mm(hidden_ND, head_VD.t(), out_dtype=torch.float32, out=out_NV)


def reduce_logits(
    logits_NV: torch.Tensor,
    realised_N: torch.Tensor,
    uniforms_N: torch.Tensor,
    *,
    threshold: float,
    shard: VocabShard,
    probs_NV: torch.Tensor | None = None,
) -> torch.Tensor:
    """Packed rows int32 [N, packed_width] of fp32 logits [N, V] of this rank's shard; the same on every rank.

    logits_NV is used up. probs_NV: optional fp32 workspace [N, V].
    """
    probs_NV = torch.softmax(logits_NV, dim=-1, out=probs_NV)  # of the shard alone
    blocks_NBW = probs_NV.view(len(probs_NV), -1, _block_width(logits_NV.shape[1]))
    mass_NB = blocks_NBW.sum(-1)
    total_N = mass_NB.double().sum(-1)  # 1 but for fp32 rounding of softmax's own sum (1e-6)
    heavy_NK, candidates_NKW = _heavy_blocks(blocks_NBW, mass_NB, most_heads(threshold))
    head_p_NK, head_id_NK = _best_candidates(heavy_NK, candidates_NKW, most_heads(threshold))
    head_z_NK = logits_NV.gather(1, head_id_NK).double()
    realised_z_N = _owned_logit(logits_NV, realised_N - shard.first_id)
    expectation_N = logits_NV.mul_(probs_NV).sum(-1).double() / total_N
    shard_lse_N = head_z_NK[:, 0] - (head_p_NK[:, 0].double() / total_N).log()

    all_R3N = shard.gather(torch.stack([shard_lse_N, expectation_N, realised_z_N]))
    lse_N = all_R3N[:, 0].logsumexp(0)
    entropy_N = lse_N - (all_R3N[:, 1] * (all_R3N[:, 0] - lse_N).exp()).sum(0)
    realised_N = all_R3N[:, 2].sum(0) - lse_N
    share_N = (shard_lse_N - lse_N).exp() / total_N

    head_mass_NK = head_p_NK.double() * share_N[:, None]
    head_mass_NK = head_mass_NK.where(head_mass_NK >= threshold, 0.0)
    _drop_head(probs_NV, mass_NB, heavy_NK, candidates_NKW, head_id_NK, threshold, share_N)
    cumulative_NB = mass_NB.double().cumsum(-1)
    tail_RN = shard.gather(cumulative_NB[:, -1] * share_N)
    draws_NJ, num_draws_N = _systematic_draws(
        blocks_NBW, cumulative_NB, tail_RN, uniforms_N, share_N, threshold, shard
    )
    ids_NK, logprobs_NK, num_head_N = _merge_heads(
        head_mass_NK, head_z_NK - lse_N[:, None], head_id_NK + shard.first_id, shard
    )
    # The clamps only undo rounding past what a probability can be.
    scalars = (
        realised_N.clamp(max=0),
        tail_RN.sum(0).log().clamp(max=0),
        entropy_N.clamp(min=0),
    )
    return _pack(num_head_N, num_draws_N, scalars, ids_NK, draws_NJ, logprobs_NK)


def _block_width(vocab: int) -> int:
    """The largest power of two <= 128 that divides the shard: 201,088 = 1571 * 128, so 128 / TP."""
    return min(_BLOCK, vocab & -vocab)


def _heavy_blocks(
    blocks_NBW: torch.Tensor, mass_NB: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    heavy_NK = mass_NB.topk(min(most, mass_NB.shape[1]), sorted=False).indices
    width = blocks_NBW.shape[2]
    return heavy_NK, blocks_NBW.gather(1, heavy_NK[:, :, None].expand(-1, -1, width))


def _best_candidates(
    heavy_NK: torch.Tensor, candidates_NKW: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `most` likeliest ids of the heavy blocks by falling probability, equal ones by rising id."""
    width = candidates_NKW.shape[2]
    flat = candidates_NKW.flatten(1)
    p_NK, where_NK = flat.topk(min(most, flat.shape[1]), sorted=False)
    id_NK = heavy_NK.gather(1, where_NK // width) * width + where_NK % width
    return _ordered(p_NK, id_NK)[:2]


def _ordered(
    p_NK: torch.Tensor, id_NK: torch.Tensor, *others: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    by_id = id_NK.argsort(dim=-1)
    order = by_id.gather(1, p_NK.gather(1, by_id).argsort(dim=-1, descending=True, stable=True))
    return tuple(value.gather(1, order) for value in (p_NK, id_NK, *others))


def _owned_logit(logits_NV: torch.Tensor, local_id_N: torch.Tensor) -> torch.Tensor:
    last = logits_NV.shape[1] - 1
    owned_N = (local_id_N >= 0) & (local_id_N <= last)
    z_N = logits_NV.gather(1, local_id_N.clamp(0, last)[:, None])[:, 0].double()
    return z_N.where(owned_N, 0.0)


def _drop_head(
    probs_NV: torch.Tensor,
    mass_NB: torch.Tensor,
    heavy_NK: torch.Tensor,
    candidates_NKW: torch.Tensor,
    head_id_NK: torch.Tensor,
    threshold: float,
    share_N: torch.Tensor,
) -> None:
    """Zero the head in the probabilities and recompute the mass of its blocks, in place (no cancellation)."""
    is_head = candidates_NKW.double() * share_N[:, None, None] >= threshold
    mass_NB.scatter_(1, heavy_NK, candidates_NKW.masked_fill(is_head, 0.0).sum(-1))
    p_NK = probs_NV.gather(1, head_id_NK)
    is_head_NK = p_NK.double() * share_N[:, None] >= threshold
    probs_NV.scatter_(1, head_id_NK, p_NK.masked_fill(is_head_NK, 0.0))


def _systematic_draws(
    blocks_NBW: torch.Tensor,
    cumulative_NB: torch.Tensor,
    tail_RN: torch.Tensor,
    uniforms_N: torch.Tensor,
    share_N: torch.Tensor,
    threshold: float,
    shard: VocabShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids hit by the points (j + u) t over the tail's cumulative mass, [N, J], and how many points there are."""
    steps_J = torch.arange(most_heads(threshold) + 1, device=uniforms_N.device)
    points_NJ = (steps_J + uniforms_N[:, None]) * threshold
    ends_RN = tail_RN.cumsum(0)
    end_N = ends_RN[shard.rank()]
    start_N = end_N - tail_RN[shard.rank()] if shard.rank() == 0 else ends_RN[shard.rank() - 1]
    mine_NJ = (points_NJ >= start_N[:, None]) & (points_NJ < end_N[:, None])
    local_NJ = (points_NJ - start_N[:, None]) / share_N[:, None]

    block_NJ, base_NJ = _locate(cumulative_NB, local_NJ)
    width = blocks_NBW.shape[2]
    inside_NJW = blocks_NBW.gather(1, block_NJ[:, :, None].expand(-1, -1, width))
    inside_NJW = inside_NJW.double().cumsum(-1)
    within_NJ, _ = _locate(inside_NJW, (local_NJ - base_NJ)[:, :, None])
    ids_NJ = block_NJ * width + within_NJ[:, :, 0] + shard.first_id
    ids_NJ = shard.gather(ids_NJ.where(mine_NJ, 0)).sum(0)
    return ids_NJ, (points_NJ < ends_RN[-1][:, None]).sum(-1)


def _locate(cumulative: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the interval of `cumulative` [..., B] that holds each point [..., J], and where it starts.

    A point that rounding puts at or past the end falls in the last interval that has mass.
    """
    last = (cumulative < cumulative[..., -1:]).sum(-1, keepdim=True)
    index = torch.minimum(torch.searchsorted(cumulative, points, right=True), last)
    before = cumulative.gather(-1, (index - 1).clamp(min=0))
    return index, before.where(index > 0, 0.0)


def _merge_heads(
    mass_NK: torch.Tensor, logprob_NK: torch.Tensor, id_NK: torch.Tensor, shard: VocabShard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head over all ranks: ids, logprobs [N, K] by falling probability, and how many of them count."""
    if shard.group is not None:
        most = mass_NK.shape[1]
        all_R3NK = shard.gather(torch.stack([mass_NK, logprob_NK, id_NK.double()]))
        mass_NK, logprob_NK, id_NK = all_R3NK.permute(1, 2, 0, 3).flatten(2)
        mass_NK, id_NK, logprob_NK = _ordered(mass_NK, id_NK, logprob_NK)
        mass_NK, id_NK, logprob_NK = mass_NK[:, :most], id_NK[:, :most], logprob_NK[:, :most]
    return id_NK.long(), logprob_NK, (mass_NK > 0).sum(-1)


def _pack(
    num_head_N: torch.Tensor,
    num_draws_N: torch.Tensor,
    scalars: tuple[torch.Tensor, ...],
    head_ids_NK: torch.Tensor,
    draws_NJ: torch.Tensor,
    logprobs_NK: torch.Tensor,
) -> torch.Tensor:
    slots_E = torch.arange(draws_NJ.shape[1], device=draws_NJ.device)
    draw_slot_NE = slots_E - num_head_N[:, None]
    last_head = head_ids_NK.shape[1] - 1
    ids_NE = torch.where(
        draw_slot_NE < 0,
        head_ids_NK.gather(1, slots_E.clamp(max=last_head).expand(len(draws_NJ), -1)),
        draws_NJ.gather(1, draw_slot_NE.clamp(min=0)),
    )
    counts_N2 = torch.stack([num_head_N, num_draws_N], dim=1).int()
    floats_N3 = torch.stack(scalars, dim=1).float().view(torch.int32)
    logprob_bits = logprobs_NK.clamp(max=0).float().contiguous().view(torch.int32)
    return torch.cat([counts_N2, floats_N3, ids_NE.int(), logprob_bits], dim=1)


def unpack(packed_PC: np.ndarray, positions_P: np.ndarray, threshold: float) -> SparseTarget:
    """The sparse target that packed rows int32 [P, packed_width] hold, at `positions_P`."""
    most = most_heads(threshold)
    num_head_P, num_draws_P = packed_PC[:, 0], packed_PC[:, 1]
    floats_P3 = np.ascontiguousarray(packed_PC[:, 2:_SCALARS]).view(np.float32)
    slots_E = np.arange(most + 1)
    is_head_PE = slots_E < num_head_P[:, None]
    used_PE = slots_E < (num_head_P + num_draws_P)[:, None]
    weights_PE = np.full(is_head_PE.shape, threshold, dtype=np.float32)
    logprobs_PK = np.ascontiguousarray(packed_PC[:, _SCALARS + most + 1 :]).view(np.float32)
    heads_PK = is_head_PE[:, :most]
    weights_PE[:, :most][heads_PK] = np.exp(logprobs_PK[heads_PK].astype(np.float64))
    offsets_P1 = np.zeros(len(packed_PC) + 1, dtype=np.int64)
    np.cumsum(num_head_P + num_draws_P, out=offsets_P1[1:])
    return SparseTarget(
        threshold=threshold,
        positions_P=positions_P.astype(np.int32),
        num_head_P=num_head_P.astype(np.int32),
        offsets_P1=offsets_P1,
        ids_E=packed_PC[:, _SCALARS : _SCALARS + most + 1][used_PE].astype(np.int32),
        weights_E=weights_PE[used_PE],
        realised_logprob_P=floats_P3[:, 0].copy(),
        log_tail_mass_P=floats_P3[:, 1].copy(),
        entropy_P=floats_P3[:, 2].copy(),
    )
