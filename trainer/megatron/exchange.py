"""Tokens to every rank of an expert-parallel group, and what their experts make of them back: all sizes are known.

Every rank gets all tokens of the group, its experts compute theirs, and of each token the rank's sum over its experts
goes back and is added up there, in fp32 and in a fixed order. So the host waits for nothing, passes can be recorded as
CUDA graphs, and a rank with few tokens waits for no one's sizes. Each pass moves 2 (R - 1) rows a token and rank, R
ranks; to send a token's K rows alone would take 2 K (R - 1) / R: with K = 4 as much at R = 4, half as much at R = 8,
but the host waits for the sizes in every layer (two H200: 4.6 times the step).

A layer's pass of them is crossing.py.

Shapes: T tokens a rank, the same on all, R ranks, X = R T, K slots a token, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from trainer.megatron.collectives import all_gather


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

    def give(
        self, all_XD: torch.Tensor, lane: str = "rows", into_YD: torch.Tensor | None = None
    ) -> Arriving:
        """From each rank what it has for this one's tokens: [R T, ...], or [(R - 1) T, ...] and own. Rows that lie in
        `room` are not copied. into: takes others' rows, where own are apart.
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

    def give(
        self, all_XD: torch.Tensor, lane: str = "rows", into_YD: torch.Tensor | None = None
    ) -> Arriving:
        """See Exchange."""
        assert into_YD is None, "own rows are among those that arrive"
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
