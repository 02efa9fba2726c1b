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
            parts = self._parts.get(use, [])
            if not parts or parts[0].nbytes < num_bytes:
                parts = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(self._ranks)]
                self._parts[use] = parts

        def of(rank: int, shape: Any, dtype: torch.dtype, start: int = 0) -> torch.Tensor:
            words = parts[rank].view(dtype)[start:]
            return words[: torch.Size(shape).numel()].view(shape)

        def start_of(rows: torch.Tensor) -> int:
            starts = [rows.data_ptr() - part.data_ptr() for part in parts]
            inside = [start for start in starts if 0 <= start < parts[0].nbytes]
            return inside[0] // rows.element_size() if inside else 0

        return SimpleNamespace(of=of, start_of=start_of, barrier=self._met.wait)


def _peers(rank: int, ranks: int, memory: _Memory, monkeypatch) -> Any:
    from trainer.megatron.peers import Peers

    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: None)
    peers = Peers(SimpleNamespace(rank=lambda: rank, size=lambda: ranks))
    monkeypatch.setattr(peers, "_buffer", memory.buffer)
    monkeypatch.setattr(peers, "_beside", lambda _lane: contextlib.nullcontext(lambda: None))
    return peers


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("in_place", [True, False])
def test_every_rank_gets_what_all_have(ranks, in_place, monkeypatch) -> None:
    memory, rows_RTD = _Memory(ranks), torch.arange(ranks * T * D).view(ranks, T, D).float()
    peers = [_peers(rank, ranks, memory, monkeypatch) for rank in range(ranks)]

    def gather(of: Any) -> torch.Tensor:
        own = rows_RTD[of.rank]
        return of.gather(of.place(own).copy_(own) if in_place else own).wait()

    with ThreadPoolExecutor(ranks) as pool:
        got = list(pool.map(gather, peers))
    assert all(torch.equal(rows, rows_RTD.flatten(0, 1)) for rows in got)


def test_rows_stay_until_their_owner_gathers_others(monkeypatch) -> None:
    memory, rows_RTD = _Memory(2), torch.arange(2 * T * D).view(2, T, D).float()
    peers = [_peers(rank, 2, memory, monkeypatch) for rank in range(2)]

    def gather(of: Any) -> list[torch.Tensor]:
        own = rows_RTD[of.rank]
        first, second = of.gather(own, owner="first").wait(), of.gather(-own, owner="second").wait()
        kept = first.clone(), second.clone()
        return [*kept, of.gather(2 * own, owner="first").wait(), second, first]

    all_XD = rows_RTD.flatten(0, 1)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(gather, peers):
            wants = (all_XD, -all_XD, 2 * all_XD, -all_XD, 2 * all_XD)
            assert all(torch.equal(rows, want) for rows, want in zip(got, wants, strict=True))


def test_a_buffer_serves_all_that_fit_and_grows_by_eighths(monkeypatch) -> None:
    from trainer.megatron import peers

    monkeypatch.setattr(torch.cuda, "Stream", lambda **_: None)
    monkeypatch.setattr(peers, "_Buffer", lambda size, _group: SimpleNamespace(size=size))
    of = peers.Peers(SimpleNamespace(rank=lambda: 0, size=lambda: 2))
    sizes = [of._buffer("rows", n).size for n in (2**20 + 1, 2**20, 5, 2**21, 0)]
    assert sizes == [2**20 + 2**17] * 3 + [2**21] * 2
    assert of._buffer("choices", 0).size == 512
    waste = [peers._rounded(n) / n for n in range(4096, 70_000, 97)]
    assert min(waste) >= 1 and max(waste) <= 1.125


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


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_others_have_arrives_in_parts_where_it_is_wanted(ranks, monkeypatch) -> None:
    memory, given = _Memory(ranks), torch.arange(ranks * ranks * T * D).float()
    given_RRTD, spans = given.view(ranks, ranks, T, D), [(0, 3), (3, T)]
    peers = [_peers(rank, ranks, memory, monkeypatch) for rank in range(ranks)]

    def give(of: Any) -> list[torch.Tensor]:
        room, into_YD = of.room(given_RRTD[of.rank].flatten(0, 1)), torch.zeros((ranks - 1) * T, D)
        for start, end in spans:
            part = room[ranks * start : ranks * end]
            part.copy_(given_RRTD[of.rank, :, start:end].flatten(0, 1))
            into = into_YD[(ranks - 1) * start : (ranks - 1) * end]
            arriving = of.give(part, into_YD=into)
            assert arriving.wait().data_ptr() == into.data_ptr()
            assert torch.equal(arriving.own_TD, given_RRTD[of.rank, of.rank, start:end])
        return [into_YD[(ranks - 1) * start : (ranks - 1) * end] for start, end in spans]

    with ThreadPoolExecutor(ranks) as pool:
        for rank, parts in enumerate(pool.map(give, peers)):
            others = [other for other in range(ranks) if other != rank]
            for got, (start, end) in zip(parts, spans, strict=True):
                assert torch.equal(got, given_RRTD[others, rank, start:end].flatten(0, 1))


def test_gpus_that_do_not_reach_each_other_are_refused_with_a_remedy(monkeypatch) -> None:
    import torch.distributed._symmetric_memory as symmetric_memory

    from common.errors import EngineError
    from trainer.megatron.peers import _Buffer

    def refuse(*_, **__):
        raise RuntimeError("CUDA driver error: peer access is not supported\nat somewhere")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symmetric_memory, "empty", refuse)
    with pytest.raises(EngineError, match="peer access is not supported") as raised:
        _Buffer(1024, None)
    assert "parallel.distributed_optimizer=true" in str(raised.value)
