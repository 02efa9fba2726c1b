"""Exchanges by peers' memory on made-up memory: ranks are threads, buffers tensors of a list that all can read."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

T, D = 5, 4


class _Memory:
    """What the buffers of all ranks are, by use; in place of `_Buffer`."""

    def __init__(self, ranks: int) -> None:
        self._ranks, self._met, self._parts = ranks, threading.Barrier(ranks), {}
        self._lock = threading.Lock()

    def buffer(self, use: str, num_bytes: int) -> Any:
        with self._lock:
            made = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(self._ranks)]
            parts = self._parts.setdefault((use, num_bytes), made)

        def of(rank: int, shape: Any, dtype: torch.dtype) -> torch.Tensor:
            return parts[rank].view(dtype).view(shape)

        return SimpleNamespace(of=of, barrier=self._met.wait)


def _peers(rank: int, ranks: int, memory: _Memory, monkeypatch) -> Any:
    from trainer.megatron.peers import Peers

    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: None)
    peers = Peers(SimpleNamespace(rank=lambda: rank, size=lambda: ranks))
    monkeypatch.setattr(peers, "_buffer", memory.buffer)
    monkeypatch.setattr(peers, "_beside", lambda _lane: contextlib.nullcontext(lambda: None))
    return peers


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("kept", [True, False])
def test_every_rank_gets_what_all_have(ranks, kept, monkeypatch) -> None:
    memory, rows_RTD = _Memory(ranks), torch.arange(ranks * T * D).view(ranks, T, D).float()
    peers = [_peers(rank, ranks, memory, monkeypatch) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        got = list(pool.map(lambda of: of.gather(rows_RTD[of.rank], kept=kept).wait(), peers))
    assert all(torch.equal(rows, rows_RTD.flatten(0, 1)) for rows in got)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("in_room", [True, False])
def test_every_rank_gets_what_others_have_for_it(ranks, in_room, monkeypatch) -> None:
    memory, given = _Memory(ranks), torch.arange(ranks * ranks * T * D).float()
    given_RRTD = given.view(ranks, ranks, T, D)
    peers = [_peers(rank, ranks, memory, monkeypatch) for rank in range(ranks)]

    def give(of: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rows = given_RRTD[of.rank].flatten(0, 1)
        arriving = of.give(of.room(rows).copy_(rows) if in_room else rows)
        return arriving.wait(), arriving.own_TD

    with ThreadPoolExecutor(ranks) as pool:
        got = list(pool.map(give, peers))
    for rank, (rows, own) in enumerate(got):
        others = [given_RRTD[other, rank] for other in range(ranks) if other != rank]
        assert torch.equal(rows, torch.cat(others)) and torch.equal(own, given_RRTD[rank, rank])
