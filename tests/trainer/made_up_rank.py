"""An exchange of expert parallelism with a second rank that is made up."""

from __future__ import annotations

from typing import Any

import torch


class Alone:
    """Of the first of two ranks; the other brings zeros and has nothing for this one's tokens.

    own: a rank's own rows are left where they lie, as by trainer/megatron/peers.py. log: what was begun and waited for.
    in_place: of each gather, whether its rows lay in their place.
    """

    rank, ranks = 0, 2

    def __init__(self, own: bool) -> None:
        self._own, self.log = own, []
        self.placed: dict[Any, torch.Tensor] = {}
        self.in_place: list[bool] = []

    def gather(self, own_TX: torch.Tensor, lane: str = "rows", owner: Any = None) -> Any:
        """See trainer/megatron/exchange.py."""
        place = self.placed.pop((lane, owner), None)
        self.in_place.append(place is not None and place.data_ptr() == own_TX.data_ptr())
        rows = torch.cat([own_TX, torch.zeros_like(own_TX)])
        return self._arriving(f"gather {lane}", rows, None)

    def place(self, like_TX: torch.Tensor, lane: str = "rows", owner: Any = None) -> torch.Tensor:
        """See trainer/megatron/exchange.py."""
        self.placed[lane, owner] = torch.empty_like(like_TX)
        return self.placed[lane, owner]

    def give(self, all_XD: torch.Tensor, lane: str = "rows", into_YD: Any = None) -> Any:
        """See trainer/megatron/exchange.py; a rank's own rows may be written after it was called."""
        own, other = all_XD.chunk(2)
        assert self._own or into_YD is None
        nothing = torch.zeros_like(other) if into_YD is None else into_YD.zero_()
        rows = nothing if self._own else torch.cat([own, nothing])
        return self._arriving(f"give {lane}", rows, own if self._own else None)

    def room(self, like_XD: torch.Tensor) -> torch.Tensor:
        """See trainer/megatron/exchange.py."""
        return torch.empty_like(like_XD)

    def _arriving(self, what: str, rows: torch.Tensor, own: torch.Tensor | None) -> Any:
        from trainer.megatron.exchange import Arriving

        self.log.append(what)
        return Arriving(rows, own, lambda: self.log.append(f"wait for {what}"))
