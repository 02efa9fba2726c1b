"""Tokens to every rank of an expert-parallel group, and what their experts make of them back: all sizes are known.

Every rank gets all tokens of the group (all-gather), its experts compute theirs, and of each token the rank's sum over
its experts goes back (all-to-all) and is added up there, in fp32 and in the order of ranks. So the host waits for
nothing, passes can be recorded as CUDA graphs, and a rank with few tokens waits for no one's sizes. Each pass moves
2 (R - 1) rows a token and rank, R ranks; to send a token's K rows alone would take 2 K (R - 1) / R: with K = 4 as much
at R = 4, half as much at R = 8, but the host waits for the sizes in every layer (two H200: 4.6 times the step).

Shapes: T tokens a rank, the same on all, R ranks, K slots a token, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trainer.megatron.collectives import all_gather

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Unsummed


class Gathering:
    """Rows of all ranks, on their way: `wait` gives them."""

    def __init__(
        self, x_TD: torch.Tensor, group: dist.ProcessGroup, unsummed: Unsummed | None = None
    ) -> None:
        """unsummed: what takes the gradients of x by ranks instead of autograd, see trainer/kernels/norm.py."""
        self._x_TD, self._group, self._unsummed = x_TD, group, unsummed
        self._all_XD, self._work = _begin(x_TD.detach(), group)

    def wait(self) -> torch.Tensor:
        """[R T, D] in the order of ranks; once."""
        self._work.wait()
        return _Gathered.apply(self._x_TD, self._all_XD, self._group, self._unsummed)


def gather_choices(
    gates_TK: torch.Tensor, experts_TK: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and experts of all ranks' tokens, [R T, K] each."""
    gates = Gathering(gates_TK, group)
    experts_XK, work = _begin(experts_TK, group)
    work.wait()
    return gates.wait(), experts_XK


def give_back(
    sums_XD: torch.Tensor, group: dist.ProcessGroup, *bases_TD: torch.Tensor
) -> torch.Tensor:
    """[T, D]: the sum over ranks of what they have for this rank's tokens, and of bases. sums_XD: [R T, D]."""
    return _GivenBack.apply(sums_XD, group, *bases_TD)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        _x_TD: torch.Tensor,
        all_XD: torch.Tensor,
        group: dist.ProcessGroup,
        unsummed: Unsummed | None,
    ) -> torch.Tensor:
        ctx.group, ctx.unsummed = group, unsummed
        return all_XD

    @staticmethod
    def backward(ctx: Any, grad_XD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts_XD = _exchanged(grad_XD, ctx.group)
        if ctx.unsummed is None:
            return _sum(parts_XD, ctx.group), None, None, None
        ctx.unsummed.slotted = (parts_XD, _places(parts_XD, ctx.group))
        return None, None, None, None


class _GivenBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sums_XD: torch.Tensor, group: dist.ProcessGroup, *bases_TD: torch.Tensor
    ) -> torch.Tensor:
        ctx.group, ctx.num_bases = group, len(bases_TD)
        return _sum(_exchanged(sums_XD, group), group, *bases_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        all_XD, work = _begin(grad_TD, ctx.group)
        work.wait()
        return all_XD, None, *[grad_TD] * ctx.num_bases


def _begin(x_TD: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, Any]:
    all_XD = x_TD.new_empty(group.size() * len(x_TD), *x_TD.shape[1:])
    return all_XD, all_gather(all_XD, x_TD.contiguous(), group=group, async_op=True)


def _exchanged(all_XD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[R T, D]: from each rank what it has for this one's tokens."""
    parts_XD = torch.empty_like(all_XD, memory_format=torch.contiguous_format)
    dist.all_to_all_single(parts_XD, all_XD.contiguous(), group=group)
    return parts_XD


def _sum(parts_XD: torch.Tensor, group: dist.ProcessGroup, *bases_TD: torch.Tensor) -> torch.Tensor:
    """Over ranks and bases, at most two, in fp32 or wider, rounded once."""
    if parts_XD.is_cuda and parts_XD.dtype == torch.bfloat16:
        from trainer.kernels.dispatch import sum_slots

        return sum_slots(parts_XD, _places(parts_XD, group), bases_TD)
    wide = torch.promote_types(parts_XD.dtype, torch.float32)
    total = parts_XD.unflatten(0, (group.size(), -1)).sum(dim=0, dtype=wide)
    return sum(bases_TD, start=total).to(parts_XD.dtype)


def _places(parts_XD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[T, R] int32: the rows of each token."""
    rows_X = torch.arange(len(parts_XD), dtype=torch.int32, device=parts_XD.device)
    return rows_X.view(group.size(), -1).t().contiguous()
