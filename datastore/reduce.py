"""Hidden states to sparse teacher targets, on the device that holds the lm_head, in bounded chunks of positions.

Legend: N positions, V ids of this rank's vocabulary shard, B blocks of W consecutive ids, K most head entries,
J most tail draws (K + 1), R ranks, C columns of a packed row.

The rows that it makes are described in datastore/packed.py.

A chunk goes through four steps; between them ranks exchange scalars and packed entries, never logits:
measure (log-sum-exp, expectation), split (head entries, tail mass of each block), draw (ids at the systematic
points), pack. The CUDA form (reduce_triton) reads the logits once in `measure`, and after that only the blocks that
hold a head entry or a draw; the CPU form (reduce_torch) does the same with torch's operations.
The reference of both is `target.reduce_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed as dist

from datastore.packed import most_heads, packed_width


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
    """Packed rows int32 [N, C] of N positions, at most `chunk` of them as logits at any time.

    hidden_ND, head_VD: the final hidden states and this rank's lm_head rows, of one dtype. Logits are fp32: bf16
    ones tie the top id in about 5 % of positions (measured). realised_N: int64 ids of the next tokens.
    uniforms_N: float64 in [0, 1), the systematic draw's offset of each position. Never waits for the device.
    """
    num_rows = hidden_ND.shape[0]
    packed_NC = torch.empty(
        (num_rows, packed_width(threshold)), dtype=torch.int32, device=hidden_ND.device
    )
    logits_NV = torch.empty(
        (min(chunk, num_rows), head_VD.shape[0]), dtype=torch.float32, device=hidden_ND.device
    )
    space_NV = _kernels(hidden_ND.device).workspace(logits_NV)
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
            space_NV=None if space_NV is None else space_NV[:size],
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
    space_NV: torch.Tensor | None,
) -> torch.Tensor:
    """Packed rows int32 [N, C] of fp32 logits [N, V] of this rank's shard; the same on every rank.

    Uses up the logits. space_NV: the device's workspace.
    """
    kernels = _kernels(logits_NV.device)
    most = most_heads(threshold)
    scalars_3N, blocks = kernels.measure(logits_NV, realised_N - shard.first_id, space_NV)
    lse_RN, expectation_RN, realised_z_RN = shard.gather(scalars_3N).unbind(1)
    lse_N = lse_RN.logsumexp(0)
    entropy_N = lse_N - (expectation_RN * (lse_RN - lse_N).exp()).sum(0)

    heads, tail_NB = kernels.split(logits_NV, blocks, lse_N, threshold, most)
    ends_RN = shard.gather(tail_NB.sum(-1)).cumsum(0)
    end_N = ends_RN[shard.rank()]
    start_N = ends_RN[shard.rank() - 1] if shard.rank() else torch.zeros_like(end_N)

    steps_J = torch.arange(most + 1, device=uniforms_N.device)
    points_NJ = (steps_J + uniforms_N[:, None]) * threshold
    mine_NJ = (points_NJ >= start_N[:, None]) & (points_NJ < end_N[:, None])
    local_NJ = torch.where(mine_NJ, points_NJ - start_N[:, None], -1.0)
    draws_NJ = kernels.draw(logits_NV, blocks, lse_N, threshold, tail_NB, local_NJ)
    draws_NJ = shard.gather((draws_NJ + shard.first_id).where(mine_NJ, 0)).sum(0)

    z_NK, ids_NK, num_head_N = _joined_heads(*heads, shard)
    # The clamps only undo rounding past what a probability can be.
    floats_N3 = torch.stack(
        [
            (realised_z_RN.sum(0) - lse_N).clamp(max=0),
            ends_RN[-1].log().clamp(max=0),
            entropy_N.clamp(min=0),
        ],
        dim=1,
    )
    counts_N2 = torch.stack([num_head_N, (points_NJ < ends_RN[-1][:, None]).sum(-1)], dim=1)
    return kernels.pack(counts_N2.int(), floats_N3.float(), lse_N, z_NK, ids_NK, draws_NJ)


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from datastore import reduce_triton

        return reduce_triton
    from datastore import reduce_torch

    return reduce_torch


def _joined_heads(
    z_NK: torch.Tensor, local_id_NK: torch.Tensor, num_N: torch.Tensor, shard: VocabShard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The head entries of all ranks: fp32 logits and ids [N, K], in any order, the first num_N of each row in use.

    Together they are at most K, as each has a probability of at least the threshold.
    """
    ids_NK = local_id_NK + shard.first_id
    if shard.group is None:
        return z_NK, ids_NK, num_N
    most = z_NK.shape[1]
    bits_N2K = torch.stack([z_NK.view(torch.int32), ids_NK], dim=1)
    own_N1K = num_N[:, None, None].expand(-1, 1, most).int()
    all_RN3K = shard.gather(torch.cat([bits_N2K, own_N1K], dim=1))
    z_RNK = all_RN3K[:, :, 0].contiguous().view(torch.float32)
    unused_RNK = torch.arange(most, device=num_N.device) >= all_RN3K[:, :, 2]
    every_z = z_RNK.masked_fill(unused_RNK, -torch.inf).permute(1, 0, 2).flatten(1)
    every_id = all_RN3K[:, :, 1].permute(1, 0, 2).flatten(1)
    z_NK, where_NK = every_z.topk(most, dim=1)
    return z_NK, every_id.gather(1, where_NK), all_RN3K[:, :, 2, 0].sum(0)
