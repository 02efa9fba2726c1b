"""One pass of a layer's tokens through an expert-parallel group (exchange.py), beside other work.

What a `Crossing` has begun goes on until it is waited for: rows go out beside the router and the sort, and come back
beside the shared expert; gradients go out beside the shared expert's, and come back beside those of the experts'
weights. The order backward is autograd's: of what is ready, what was made last goes first, so what waits must have been
made before what it is to run beside.

Kernels write what is sent where peers read it (`room_for_x`, `room_for_gradient`, Exchange.room): copies made of it had
the exchanges begin 60 us late forward and 130 backward, beside work of 200 (32,768 tokens, two H200).

Shapes: T tokens a rank, the same on all, R ranks, X = R T, Y = (R - 1) T, K slots a token, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.errors import EngineError
from trainer.megatron.exchange import Arriving, Exchange

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Slotted

# Of the sums that go back: one is added up while the next is on its way, and the first leaves earlier.
PARTS = 2
_GRADIENTS = "gradients"  # the owner of those that are gathered, of all layers: each is used up before the next


@dataclass
class Returning:
    """Sums for this rank's tokens, on their way from the other ranks in parts, and its own by slots.

    rows_YD: all of them, of each part in the order of ranks; parts: first token, end, and what waits for it.
    """

    own: Slotted
    rows_YD: torch.Tensor
    parts: list[tuple[int, int, Arriving]]

    def wait(self) -> list[Slotted]:
        """Own and others', by slots."""
        for *_, arriving in self.parts:
            arriving.wait()
        others = self.own._replace(rows_ND=self.rows_YD, place_TK=self._places(), held_1=None)
        return [self.own, others]

    def add_up(self, *bases_TD: torch.Tensor) -> torch.Tensor:
        """[T, D]: the sum of all and of bases. Of a part it is made while the next is on its way."""
        from trainer.kernels.dispatch import sum_slots

        place_TR, T = self._places(), len(self.own.place_TK)
        out_TD = self.rows_YD.new_empty(T, *self.rows_YD.shape[1:])
        for start, end, arriving in self.parts:
            arriving.wait()
            sum_slots(
                *(self.own.rows_ND, self.own.place_TK[start:end], [b[start:end] for b in bases_TD]),
                held_1=self.own.held_1,
                more=(self.rows_YD, place_TR[start:end]),
                out_TD=out_TD[start:end],
            )
        return out_TD

    def _places(self) -> torch.Tensor:
        tokens = len(self.own.place_TK)
        return _table(tokens, len(self.rows_YD) // tokens, PARTS, self.rows_YD.device)


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
        self._sums: Returning | None = None
        self._choices: Arriving | None = None
        self._gates: Arriving | None = None

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
        """[X, D]: sums over each token's slots here (dispatch.sum_slots) for other ranks, on their way part by part.
        Those of this rank's own tokens are not in it: `give_back` and `take` have them by slots.
        """
        from trainer.kernels.dispatch import sum_slots
        from trainer.kernels.norm import Slotted

        sums_XD = self.exchange.room(rows_ND[: len(place_XK)])
        place_RTK = place_XK.unflatten(0, (self.exchange.ranks, -1))
        ranks, T = place_RTK.shape[:2]
        rows_YD = torch.empty_like(sums_XD[T:])
        self._sums = Returning(Slotted(rows_ND, place_RTK[self.exchange.rank], held_1), rows_YD, [])
        for start, end in _spans(T, PARTS):
            part_XD = sums_XD[ranks * start : ranks * end]
            for rank, out_TD in enumerate(part_XD.chunk(ranks)):
                if rank != self.exchange.rank:
                    place_TK = place_RTK[rank, start:end]
                    sum_slots(rows_ND, place_TK, held_1=held_1, out_TD=out_TD)
            into_YD = rows_YD[(ranks - 1) * start : (ranks - 1) * end]
            arriving = self.exchange.give(part_XD, into_YD=into_YD)
            self._sums.parts.append((start, end, arriving))
        return sums_XD

    def give_back(
        self, sums_XD: torch.Tensor, bases: Callable[[], list[torch.Tensor]]
    ) -> torch.Tensor:
        """[T, D]: the sum over ranks of what they have for this rank's tokens, and of bases: at most two [T, D].

        sums_XD: of `send`, or what is still to be sent. bases: called while rows are on their way.
        """
        sums_XD = _Awaited.apply(sums_XD, self)
        arriving = self._take_sums() if self._sums else self.exchange.give(sums_XD.detach())
        return _GivenBack.apply(sums_XD, arriving, self, *bases())

    def await_gradients(self) -> None:
        """Of the sums given back."""
        taken, self._rows = self._rows, None
        assert taken is not None, "no gradients are on their way in this pass"
        taken.wait()

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
        return self._take_sums().wait()

    def gates_gradient(self, grad_XK: torch.Tensor) -> torch.Tensor:
        """[T, K]: each gate's from the rank that holds its expert; the others have zeros."""
        arriving, self._gates = self._gates or self.exchange.give(grad_XK, "choices"), None
        arriving.wait()
        return _sum(arriving, self.exchange)

    def _take_sums(self) -> Returning:
        taken, self._sums = self._sums, None
        assert taken is not None, "no sums are on their way in this pass"
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
        arriving: Arriving | Returning,
        crossing: Crossing,
        *bases_TD: torch.Tensor,
    ) -> torch.Tensor:
        ctx.crossing, ctx.num_bases = crossing, len(bases_TD)
        if isinstance(arriving, Returning):
            return arriving.add_up(*bases_TD)
        arriving.wait()
        return _sum(arriving, crossing.exchange, *bases_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.crossing.send_gradients(grad_TD), None, None, *[grad_TD] * ctx.num_bases


def _sum(arrived: Arriving, exchange: Exchange, *bases_TD: torch.Tensor) -> torch.Tensor:
    """[T, D]: over ranks and bases, in fp32 or wider, rounded once."""
    rows_YD, own = arrived.rows, [] if arrived.own_TD is None else [arrived.own_TD]
    bases = [*own, *bases_TD]
    ranks = exchange.ranks - (arrived.own_TD is not None)
    if rows_YD.is_cuda and rows_YD.dtype == torch.bfloat16:
        from trainer.kernels.dispatch import sum_slots

        place_TR = _table(len(rows_YD) // ranks, ranks, 1, rows_YD.device)
        return sum_slots(rows_YD, place_TR, bases)
    wide = torch.promote_types(rows_YD.dtype, torch.float32)
    total = rows_YD.unflatten(0, (ranks, -1)).sum(dim=0, dtype=wide)
    return sum(bases, start=total).to(rows_YD.dtype)


def _spans(tokens: int, parts: int) -> list[tuple[int, int]]:
    """First token and end of each part; few tokens make fewer parts."""
    size = max(1, -(-tokens // parts))
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


@functools.cache
def _table(tokens: int, ranks: int, parts: int, device: torch.device) -> torch.Tensor:
    """[T, ranks] int32: the rows of each token where each part has those of one rank after those of another. Made once
    for each size: a pass that is recorded has run before.
    """
    rows = torch.arange(tokens * ranks, dtype=torch.int32, device=device)
    spans = _spans(tokens, parts)
    of_parts = [rows[ranks * start : ranks * end].view(ranks, -1).t() for start, end in spans]
    return torch.cat([rows.new_empty(0, ranks), *of_parts])
