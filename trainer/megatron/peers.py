"""Exchanges between GPUs of one host by reading each other's memory: copies that hold no multiprocessor.

A rank lays its rows down in a buffer that its peers have mapped (torch's symmetric memory), all wait for each other
(one small kernel), and each copies what is its own, by the copy engines. Two H200: 67 MB in 0.19 ms, 350 GB/s, where
NCCL's all-gather takes 0.29 and its programs hold multiprocessors (benchmarks/results/two_gpus.json). All of it is
recorded in CUDA graphs like any kernel.

Lanes are streams of their own. An exchange waits for its peers to lay down, not for them to have read: a buffer may be
written again since, between two uses, every rank waits for another exchange that its peers begin after reading. In the
lane of rows gathers and gifts alternate in both passes; a layer's choices lie between its two exchanges of rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from common.errors import EngineError
from trainer.megatron.exchange import Arriving

_LANES = {"rows": -1, "choices": -1, "own rows": 0}  # and their streams' priorities
# Bytes up to which a kernel reads a peer's: a copy engine takes one copy after another, and behind 67 MB the 1 MB of
# choices waited 0.15 ms.
_SMALL = 2**22
_LEAST = 2**16  # bytes of a buffer; sizes are powers of two, so that rows of many lengths make few


class Peers:
    """An Exchange (exchange.py) of a group whose GPUs reach each other's memory. EngineError, at the first exchange,
    where they do not.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.ranks = group, group.rank(), group.size()
        # Ahead of what else is ready: barriers began 45 us late behind products that hold all multiprocessors, 100
        # behind `outer` (seen in a trace). Graphs keep priorities (torch's CUDAGraph: UseNodePriority).
        self._streams = {
            lane: torch.cuda.Stream(priority=priority) for lane, priority in _LANES.items()
        }
        self._buffers: dict[tuple[str, int], _Buffer] = {}

    def gather(self, own_TX: torch.Tensor, lane: str = "rows", *, kept: bool = True) -> Arriving:
        """See Exchange."""
        of_all = (self.ranks, *own_TX.shape), own_TX.dtype
        buffer = self._buffer(f"gathered {lane}", self.ranks * own_TX.nbytes)
        laid_RTX = buffer.of(self.rank, *of_all)
        rows_RTX = own_TX.new_empty(of_all[0]) if kept else laid_RTX
        with self._beside(lane) as ready:
            laid_RTX[self.rank].copy_(own_TX)
            buffer.barrier()
            for peer in self._others():
                _copy(rows_RTX[peer], buffer.of(peer, *of_all)[peer])
        rows = rows_RTX.flatten(0, 1)
        if not kept:
            return Arriving(rows, None, ready, held=own_TX)
        with self._beside("own rows") as own_ready:
            rows_RTX[self.rank].copy_(own_TX)
        return Arriving(rows, None, lambda: (ready(), own_ready()), held=own_TX)

    def give(self, all_XD: torch.Tensor, lane: str = "rows") -> Arriving:
        """See Exchange; own rows are left where they lie. Rows that lie in `room` are not copied."""
        all_RTD = all_XD.unflatten(0, (self.ranks, len(all_XD) // self.ranks))
        buffer, of_all = self._buffer(f"given {lane}", all_XD.nbytes), (all_RTD.shape, all_XD.dtype)
        laid_RTD = buffer.of(self.rank, *of_all)
        rows_PTD = all_RTD.new_empty(self.ranks - 1, *all_RTD.shape[1:])
        with self._beside(lane) as ready:
            if laid_RTD.data_ptr() != all_XD.data_ptr():
                laid_RTD.copy_(all_RTD)
            buffer.barrier()
            for peer in self._others():
                place = peer - (peer > self.rank)
                _copy(rows_PTD[place], buffer.of(peer, *of_all)[self.rank])
        return Arriving(rows_PTD.flatten(0, 1), laid_RTD[self.rank], ready, held=all_XD)

    def room(self, like_XD: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        buffer = self._buffer("given rows", like_XD.nbytes)
        return buffer.of(self.rank, like_XD.shape, like_XD.dtype)

    def _others(self) -> list[int]:
        """The peers, the next one first: no GPU is read by all at once."""
        return [(self.rank + i) % self.ranks for i in range(1, self.ranks)]

    @contextlib.contextmanager
    def _beside(self, lane: str) -> Iterator[Any]:
        """Queue on a lane what runs beside the current stream, after what is queued there; gives what waits for it."""
        stream, main = self._streams[lane], torch.cuda.current_stream()
        done = torch.cuda.Event()
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            yield lambda: torch.cuda.current_stream().wait_event(done)
            done.record()

    def _buffer(self, use: str, num_bytes: int) -> _Buffer:
        """Of at least these bytes. Every rank of the group asks for the same ones in the same order, and none is ever
        freed, as recorded passes have their addresses.
        """
        size = max(_LEAST, 1 << (num_bytes - 1).bit_length())
        if (use, size) not in self._buffers:
            self._buffers[use, size] = _Buffer(size, self._group)
        return self._buffers[use, size]


def _copy(rows: torch.Tensor, of_peer: torch.Tensor) -> None:
    """Into rows, contiguous both; by a copy engine where they are many."""
    if rows.nbytes > _SMALL:
        rows.copy_(of_peer)
    else:
        words = rows.view(torch.int32)
        torch.add(of_peer.view(torch.int32), 0, out=words)


class _Buffer:
    """Bytes that all ranks of a group can read."""

    def __init__(self, size: int, group: dist.ProcessGroup) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        device = torch.device("cuda", torch.cuda.current_device())
        try:
            self._own = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            self._handle = symmetric_memory.rendezvous(self._own, group.group_name)
        except RuntimeError as error:
            raise EngineError(
                "the GPUs of an expert-parallel group cannot reach each other's memory",
                got=str(error).splitlines()[0],
                expected="GPUs of one host, with NVLink or peer access over PCIe",
                remedy="put each group on one host, or share experts out instead of spreading them: parallel.expert=1 "
                "and parallel.distributed_optimizer=true",
            ) from error

    def of(self, rank: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A rank's bytes."""
        return self._handle.get_buffer(rank, shape, dtype)

    def barrier(self) -> None:
        """Queued: what follows finds what every rank wrote before its own."""
        self._handle.barrier(channel=0)
