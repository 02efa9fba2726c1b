"""The four steps of the reduction with torch's operations, for a CPU. Legend and contract: datastore/reduce.py.

With t the threshold: an id of probability >= t lies in a block of mass >= t, so the K heaviest blocks hold the whole
head. Draws are found in two levels: the block by its cumulative mass, then the id inside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_BLOCK = 128


@dataclass(slots=True)
class Blocks:
    """Probabilities within this rank's shard: probs_NBW fp32 (used up by `split`), their exact sum a row, its lse."""

    probs_NBW: torch.Tensor
    total_N: torch.Tensor
    shard_lse_N: torch.Tensor

    def share(self, lse_N: torch.Tensor) -> torch.Tensor:
        """Factor from a probability within the shard to one over all ranks, float64 [N]."""
        return (self.shard_lse_N - lse_N).exp() / self.total_N


def workspace(logits_NV: torch.Tensor) -> torch.Tensor:
    """What `measure` needs beside the logits; fresh memory a chunk costs more than the arithmetic (page faults)."""
    return torch.empty_like(logits_NV)


def measure(
    logits_NV: torch.Tensor, local_id_N: torch.Tensor, space_NV: torch.Tensor
) -> tuple[torch.Tensor, Blocks]:
    """float64 [3, N]: log-sum-exp of the shard, expectation of its logits, logit of the realised id (0 elsewhere).

    Uses up the logits.
    """
    probs_NV = torch.softmax(logits_NV, dim=-1, out=space_NV)
    probs_NBW = probs_NV.view(len(probs_NV), -1, _block_width(logits_NV.shape[1]))
    total_N = probs_NBW.sum(-1).double().sum(-1)  # 1 but for fp32 rounding of softmax's own sum
    realised_z_N = _owned_logit(logits_NV, local_id_N)
    top_z_N = logits_NV.amax(-1).double()
    shard_lse_N = top_z_N - (probs_NV.amax(-1).double() / total_N).log()
    expectation_N = logits_NV.mul_(probs_NV).sum(-1).double() / total_N
    scalars_3N = torch.stack([shard_lse_N, expectation_N, realised_z_N])
    return scalars_3N, Blocks(probs_NBW, total_N, shard_lse_N)


def _block_width(vocab: int) -> int:
    """The largest power of two <= 128 that divides the shard: 201,088 = 1571 * 128, so 128 / TP."""
    return min(_BLOCK, vocab & -vocab)


def _owned_logit(logits_NV: torch.Tensor, local_id_N: torch.Tensor) -> torch.Tensor:
    last = logits_NV.shape[1] - 1
    owned_N = (local_id_N >= 0) & (local_id_N <= last)
    z_N = logits_NV.gather(1, local_id_N.clamp(0, last)[:, None])[:, 0].double()
    return z_N.where(owned_N, 0.0)


def split(
    logits_NV: torch.Tensor, blocks: Blocks, lse_N: torch.Tensor, threshold: float, most: int
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """((logits fp32 [N, K], local ids int32 [N, K], number in use [N]) of the head, tail mass float64 [N, B]).

    The head is zeroed in `blocks`, so that the mass of its blocks is summed anew, without cancellation.
    """
    probs_NBW, share_N = blocks.probs_NBW, blocks.share(lse_N)
    mass_NB = probs_NBW.sum(-1)
    width = probs_NBW.shape[2]
    heavy_NK = mass_NB.topk(min(most, mass_NB.shape[1]), sorted=False).indices
    candidates_NKW = probs_NBW.gather(1, heavy_NK[:, :, None].expand(-1, -1, width))
    is_head_NKW = candidates_NKW.double() * share_N[:, None, None] >= threshold
    mass_NB.scatter_(1, heavy_NK, candidates_NKW.masked_fill(is_head_NKW, 0.0).sum(-1))
    # The head first, by falling probability: what lies behind num_N is not in use.
    flat = candidates_NKW.flatten(1)
    where_NK = flat.topk(min(most, flat.shape[1])).indices
    ids_NK = heavy_NK.gather(1, where_NK // width) * width + where_NK % width
    in_use_NK = is_head_NKW.flatten(1).gather(1, where_NK)
    probs_NV = probs_NBW.flatten(1)
    p_NK = probs_NV.gather(1, ids_NK)
    probs_NV.scatter_(1, ids_NK, p_NK.masked_fill(in_use_NK, 0.0))
    z_NK = (p_NK.double() * share_N[:, None]).log() + lse_N[:, None]
    heads = (z_NK.float(), ids_NK.int(), in_use_NK.sum(-1))
    return heads, mass_NB.double() * share_N[:, None]


def draw(
    logits_NV: torch.Tensor,
    blocks: Blocks,
    lse_N: torch.Tensor,
    threshold: float,
    tail_NB: torch.Tensor,
    points_NJ: torch.Tensor,
) -> torch.Tensor:
    """The local id int32 [N, J] that holds each point of the shard's tail mass; anything for points below 0."""
    cumulative_NB = tail_NB.cumsum(-1)
    block_NJ, base_NJ = _locate(cumulative_NB, points_NJ)
    width = blocks.probs_NBW.shape[2]
    inside_NJW = blocks.probs_NBW.gather(1, block_NJ[:, :, None].expand(-1, -1, width))
    share_N = blocks.share(lse_N)
    inside_NJW = inside_NJW.double().mul_(share_N[:, None, None]).cumsum(-1)
    within_NJ, _ = _locate(inside_NJW, (points_NJ - base_NJ)[:, :, None])
    return (block_NJ * width + within_NJ[:, :, 0]).int()


def _locate(cumulative: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the interval of `cumulative` [..., B] that holds each point [..., J], and where it starts.

    A point that rounding puts at or past the end falls in the last interval that has mass.
    """
    last = (cumulative < cumulative[..., -1:]).sum(-1, keepdim=True)
    index = torch.minimum(torch.searchsorted(cumulative, points, right=True), last)
    before = cumulative.gather(-1, (index - 1).clamp(min=0))
    return index, before.where(index > 0, 0.0)


def pack(
    counts_N2: torch.Tensor,
    floats_N3: torch.Tensor,
    lse_N: torch.Tensor,
    z_NK: torch.Tensor,
    ids_NK: torch.Tensor,
    draws_NJ: torch.Tensor,
) -> torch.Tensor:
    """Packed rows int32 [N, C]; equal logits stand in the order of their ids. What is not in use is 0."""
    num_head_N1, num_draws_N1 = counts_N2.long().split(1, dim=1)
    slots_K = torch.arange(z_NK.shape[1], device=z_NK.device)
    z_NK = z_NK.masked_fill(slots_K >= num_head_N1, -torch.inf)
    by_id = ids_NK.argsort(dim=-1)
    order = by_id.gather(1, z_NK.gather(1, by_id).argsort(dim=-1, descending=True, stable=True))
    most = draws_NJ.shape[1] - 1
    packed_NC = counts_N2.new_zeros(len(z_NK), counts_N2.shape[1] + 3 + 2 * most + 1)
    packed_NC[:, :2], packed_NC[:, 2:5] = counts_N2, floats_N3.view(torch.int32)
    in_use_NK = slots_K < num_head_N1
    logprobs_NK = (z_NK.gather(1, order).double() - lse_N[:, None]).clamp(max=0).float()
    bits_NK = logprobs_NK.masked_fill(~in_use_NK, 0.0).view(torch.int32)
    packed_NC[:, 6 + most : 6 + most + len(slots_K)] = bits_NK
    ids_NJ = packed_NC[:, 5 : 6 + most]
    ids_NJ[:, : len(slots_K)] = ids_NK.gather(1, order).int().masked_fill(~in_use_NK, 0)
    slots_J = torch.arange(most + 1, device=z_NK.device)
    column_NJ = (num_head_N1 + slots_J).clamp(max=most)
    drawn_NJ = draws_NJ.int().masked_fill(slots_J >= num_draws_N1, 0)
    ids_NJ.scatter_add_(1, column_NJ, drawn_NJ)
    return packed_NC
