"""Tokens to every rank of an expert-parallel group, and what their experts make of them back: all sizes are known.

Every rank gets all tokens of the group, its experts compute theirs, and of each token the rank's sum over its experts
goes back and is added up there, in fp32 and in a fixed order. So the host waits for nothing, passes can be recorded as
CUDA graphs, and a rank with few tokens waits for no one's sizes. Each pass moves 2 (R - 1) rows a token and rank, R
ranks; to send a token's K rows alone would take 2 K (R - 1) / R: with K = 4 as much at R = 4, half as much at R = 8,
but the host waits for the sizes in every layer (two H200: 4.6 times the step).

A `Crossing` is one pass. What it has begun goes on beside other work until it is waited for: rows go out beside the
router and the sort, and come back beside the shared expert; gradients go out beside the shared expert's, and come back
beside those of the experts' weights. The order backward is autograd's: of what is ready, what was made last goes first,
so what waits must have been made before what it is to run beside.

Shapes: T tokens a rank, the same on all, R ranks, X = R T, K slots a token, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from common.errors import EngineError
from trainer.megatron.collectives import all_gather

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Slotted

_GRADIENTS = "gradients"  # the owner of those that are gathered, of all layers: each is used up before the next


@dataclass
class Arriving:
    """Rows on their way. own_TD: those that are here anyhow, if they are not among the rows."""

    rows: torch.Tensor
    own_TD: torch.Tensor | None
    ready: Callable[[], Any]
    held: Any = None

    def wait(self) -> torch.Tensor:
        """The rows; what is queued from now on finds them there."""
        self.ready()
        self.held = None  # nothing reads what was sent any more
        return self.rows


class Exchange(Protocol):
    """Between the ranks of a group. lane: exchanges of one lane go one after another, of two beside each other.

    What is gathered may be overwritten by the next that is gathered by the same lane for the same owner.
    """

    rank: int
    ranks: int

    def gather(self, own_TX: torch.Tensor, lane: str = "rows", owner: Hashable = None) -> Arriving:
        """All ranks' rows, [R T, ...] in the order of ranks. Own ones that lie in `place` are not copied."""
        ...

    def place(
        self, like_TX: torch.Tensor, lane: str = "rows", owner: Hashable = None
    ) -> torch.Tensor:
        """Where to write what will be gathered."""
        ...

    def give(self, all_XD: torch.Tensor, lane: str = "rows") -> Arriving:
        """From each rank what it has for this one's tokens: [R T, ...], or [(R - 1) T, ...] and own. Rows that lie in
        `room` are not copied.
        """
        ...

    def room(self, like_XD: torch.Tensor) -> torch.Tensor:
        """Where to write what will be given by the lane of rows."""
        ...


class Collectives:
    """By torch.distributed's collectives: an Exchange of ranks on CPU."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.ranks = group, group.rank(), group.size()

    def gather(self, own_TX: torch.Tensor, lane: str = "rows", owner: Hashable = None) -> Arriving:
        """See Exchange."""
        own_TX = own_TX.contiguous()
        rows = own_TX.new_empty(self.ranks * len(own_TX), *own_TX.shape[1:])
        return Arriving(rows, None, all_gather(rows, own_TX, group=self._group, async_op=True).wait)

    def place(
        self, like_TX: torch.Tensor, lane: str = "rows", owner: Hashable = None
    ) -> torch.Tensor:
        """See Exchange."""
        return torch.empty_like(like_TX)

    def give(self, all_XD: torch.Tensor, lane: str = "rows") -> Arriving:
        """See Exchange."""
        all_XD = all_XD.contiguous()
        rows = torch.empty_like(all_XD)
        work = dist.all_to_all_single(rows, all_XD, group=self._group, async_op=True)
        return Arriving(rows, None, work.wait, held=all_XD)

    def room(self, like_XD: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        return torch.empty_like(like_XD)


def exchange_over(group: dist.ProcessGroup) -> Exchange | None:
    """The exchange of a group, by peers' memory on CUDA and by collectives on CPU; None for a group of one."""
    if group.size() == 1:
        return None
    if dist.get_backend(group) != "nccl":
        return Collectives(group)
    from trainer.megatron.peers import Peers

    return Peers(group)


class GatheredRows:
    """Of a layer: they stay where they are until its next pass gathers others."""

    latest: Crossing | None = None  # the pass that they are of


class Crossing:
    """One pass of a layer's tokens to the experts of all ranks and back, and of its gradients.

    kept: the layer's rows, which are not copied; gradients of x are then taken from here (trainer/kernels/norm.py,
    Unsummed), before the layer's next pass. None: rows are copied, and autograd has their gradients.
    """

    def __init__(self, exchange: Exchange, kept: GatheredRows | None = None) -> None:
        self.exchange, self._kept = exchange, kept
        self._rows: Arriving | None = None
        self._choices: Arriving | None = None
        self._gates: Arriving | None = None
        self._own: Slotted | None = None

    def gather(self, x_TD: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Send this rank's rows; what is returned waits for all ranks' [X, D]."""
        arriving = self.exchange.gather(x_TD.detach(), owner=self._kept)
        if self._kept is not None:
            self._kept.latest = self
            return arriving.wait
        return lambda: _Gathered.apply(x_TD, arriving.wait().clone(), self.exchange)

    def send_choices(self, gates_TK: torch.Tensor, experts_TK: torch.Tensor) -> None:
        """Send this rank's, as soon as they are known. gates: fp32 or fp64, experts: integers."""
        # One exchange for both: gates as they are, in whole words.
        words = [gates_TK.detach().contiguous().view(torch.int32), experts_TK.to(torch.int32)]
        both = words[0].new_empty(len(words[0]), sum(of.shape[1] for of in words))
        own = torch.cat(words, dim=1, out=self.exchange.place(both, "choices"))
        self._choices = self.exchange.gather(own, "choices")

    def gathered_choices(
        self, gates_TK: torch.Tensor, experts_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates and experts of all ranks' tokens, [X, K] each, of which this rank's were sent."""
        arriving, self._choices = self._choices, None
        assert arriving is not None, "no choices were sent in this pass"
        return _GatheredChoices.apply(gates_TK, experts_TK, arriving.wait(), self)

    def room_for_x(self, like_TD: torch.Tensor) -> torch.Tensor:
        """See Unsummed: what is written there is gathered from there."""
        return self.exchange.place(like_TD, owner=self._kept)

    def room_for_gradient(self, like_TD: torch.Tensor) -> torch.Tensor:
        """See Unsummed: the layer before gathers it from there."""
        return self.exchange.place(like_TD, owner=_GRADIENTS)

    def send(
        self, rows_ND: torch.Tensor, place_XK: torch.Tensor, held_1: torch.Tensor | None
    ) -> torch.Tensor:
        """[X, D]: sums over each token's slots here (dispatch.sum_slots) for other ranks, on their way. Those of this
        rank's own tokens are not in it: `give_back` and `take` have them by slots.
        """
        from trainer.kernels.dispatch import sum_slots
        from trainer.kernels.norm import Slotted

        sums_XD, ranks = self.exchange.room(rows_ND[: len(place_XK)]), self.exchange.ranks
        parts = zip(place_XK.chunk(ranks), sums_XD.chunk(ranks), strict=True)
        for rank, (place, out) in enumerate(parts):
            if rank == self.exchange.rank:
                self._own = Slotted(rows_ND, place, held_1)
            else:
                sum_slots(rows_ND, place, held_1=held_1, out_TD=out)
        self._rows = self.exchange.give(sums_XD)
        return sums_XD

    def give_back(
        self, sums_XD: torch.Tensor, bases: Callable[[], list[torch.Tensor]]
    ) -> torch.Tensor:
        """[T, D]: the sum over ranks of what they have for this rank's tokens, and of bases: at most two [T, D].

        sums_XD: of `send`, or what is still to be sent. bases: called while rows are on their way.
        """
        sums_XD = _Awaited.apply(sums_XD, self)
        arriving, self._rows = self._rows or self.exchange.give(sums_XD.detach()), None
        own, self._own = self._own, None
        return _GivenBack.apply(sums_XD, arriving, own, self, *bases())

    def await_gradients(self) -> None:
        """Of the sums given back."""
        self._take_rows().wait()

    def send_gradients(self, grad_TD: torch.Tensor) -> torch.Tensor:
        """Of this rank's tokens to all ranks: [X, D], to be waited for (`await_gradients`)."""
        if self._kept is not None and self._kept.latest is not self:
            raise EngineError(
                "gradients of an expert-parallel layer that has run again since: its gathered rows are overwritten",
                remedy="finish the backward pass of a micro-batch before the next forward pass",
            )
        self._rows = self.exchange.gather(grad_TD.contiguous(), owner=_GRADIENTS)
        return self._rows.rows

    def leave(
        self,
        rows_ND: torch.Tensor,
        place_XK: torch.Tensor,
        gates_grad_XK: torch.Tensor,
        held_1: torch.Tensor | None,
    ) -> None:
        """See Unsummed: both gradients are on their way from here."""
        self._gates = self.exchange.give(gates_grad_XK, "choices")
        self.send(rows_ND, place_XK, held_1)

    def take(self) -> list[Slotted]:
        """See Unsummed: this rank's by slots, the others' summed by rank."""
        from trainer.kernels.norm import Slotted

        arrived, own = self._take_rows(), self._own
        arrived.wait()
        self._own = None
        return [own, Slotted(arrived.rows, _places(arrived, self.exchange))]

    def gates_gradient(self, grad_XK: torch.Tensor) -> torch.Tensor:
        """[T, K]: each gate's from the rank that holds its expert; the others have zeros."""
        arriving, self._gates = self._gates or self.exchange.give(grad_XK, "choices"), None
        arriving.wait()
        return _sum(arriving, self.exchange)

    def _take_rows(self) -> Arriving:
        taken, self._rows = self._rows, None
        assert taken is not None, "nothing is on its way in this pass"
        return taken


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _x_TD: torch.Tensor, all_XD: torch.Tensor, exchange: Exchange
    ) -> torch.Tensor:
        ctx.exchange = exchange
        return all_XD

    @staticmethod
    def backward(ctx: Any, grad_XD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arriving = ctx.exchange.give(grad_XD)
        arriving.wait()
        return _sum(arriving, ctx.exchange), None, None


class _GatheredChoices(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gates_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        words_XW: torch.Tensor,
        crossing: Crossing,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.crossing, topk = crossing, experts_TK.shape[1]
        gates, experts = words_XW.split([words_XW.shape[1] - topk, topk], dim=1)
        gates_XK = gates.contiguous().view(gates_TK.dtype)
        experts_XK = experts.to(experts_TK.dtype).contiguous()
        ctx.mark_non_differentiable(experts_XK)
        return gates_XK, experts_XK

    @staticmethod
    def backward(ctx: Any, gates_grad_XK: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
        return ctx.crossing.gates_gradient(gates_grad_XK), None, None, None


class _Awaited(torch.autograd.Function):
    """Backward, waits for the gradients of what goes back."""

    @staticmethod
    def forward(ctx: Any, sums_XD: torch.Tensor, crossing: Crossing) -> torch.Tensor:
        ctx.crossing = crossing
        return sums_XD.view_as(sums_XD)

    @staticmethod
    def backward(ctx: Any, grad_XD: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.crossing.await_gradients()
        return grad_XD, None


class _GivenBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        _sums_XD: torch.Tensor,
        arriving: Arriving,
        own: Slotted | None,
        crossing: Crossing,
        *bases_TD: torch.Tensor,
    ) -> torch.Tensor:
        ctx.crossing, ctx.num_bases = crossing, len(bases_TD)
        arriving.wait()
        if own is None:
            return _sum(arriving, crossing.exchange, *bases_TD)
        return _sum_with_slots(arriving, crossing.exchange, own, *bases_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.crossing.send_gradients(grad_TD), None, None, None, *[grad_TD] * ctx.num_bases


def _sum(arrived: Arriving, exchange: Exchange, *bases_TD: torch.Tensor) -> torch.Tensor:
    """[T, D]: over ranks and bases, in fp32 or wider, rounded once."""
    rows_YD, own = arrived.rows, [] if arrived.own_TD is None else [arrived.own_TD]
    bases = [*own, *bases_TD]
    if rows_YD.is_cuda and rows_YD.dtype == torch.bfloat16:
        from trainer.kernels.dispatch import sum_slots

        return sum_slots(rows_YD, _places(arrived, exchange), bases)
    wide = torch.promote_types(rows_YD.dtype, torch.float32)
    ranks = _ranks_among(arrived, exchange)
    total = rows_YD.unflatten(0, (ranks, -1)).sum(dim=0, dtype=wide)
    return sum(bases, start=total).to(rows_YD.dtype)


def _sum_with_slots(
    arrived: Arriving, exchange: Exchange, own: Slotted, *bases_TD: torch.Tensor
) -> torch.Tensor:
    """As `_sum`, this rank's own part by slots."""
    from trainer.kernels.dispatch import sum_slots

    assert arrived.own_TD is not None, "own rows have arrived too"
    more = (arrived.rows, _places(arrived, exchange))
    return sum_slots(own.rows_ND, own.place_TK, bases_TD, held_1=own.held_1, more=more)


def _ranks_among(arrived: Arriving, exchange: Exchange) -> int:
    """Whose rows they are: R, or R - 1 without its own."""
    return exchange.ranks - (arrived.own_TD is not None)


def _places(arrived: Arriving, exchange: Exchange) -> torch.Tensor:
    """[T, R or R - 1] int32: the rows of each token."""
    rows_YD = arrived.rows
    return _table(len(rows_YD), _ranks_among(arrived, exchange), rows_YD.device)


@functools.cache
def _table(num_rows: int, ranks: int, device: torch.device) -> torch.Tensor:
    """Made once for each size: a pass that is recorded has run before."""
    rows_Y = torch.arange(num_rows, dtype=torch.int32, device=device)
    return rows_Y.view(ranks, -1).t().contiguous()
