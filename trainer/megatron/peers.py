"""Exchanges between GPUs of one host by reading each other's memory: copies that hold no multiprocessor.

A rank's rows lie in a buffer that its peers have mapped (torch's symmetric memory), written there by the kernels that
make them; all wait for each other (one small kernel), and each copies what is its own, by the copy engines. Two H200:
67 MB in 0.19 ms, 350 GB/s, where NCCL's all-gather takes 0.29 and its programs hold multiprocessors
(benchmarks/results/two_gpus.json). All of it is recorded in CUDA graphs like any kernel.

Lanes are streams of their own. An exchange waits for its peers to lay down, not for them to have read: a buffer may be
written again since, between two uses, every rank waits for another exchange that its peers begin after reading. In the
lane of rows gathers and gifts alternate in both passes; a layer's choices lie between its two exchanges of rows.
The rows a layer gathers stay where they are until its next pass, so each layer has memory of its own for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from common.errors import EngineError
from trainer.megatron.exchange import Arriving

_LANES = ("rows", "choices")
_AHEAD = -1  # priority of their streams
# Bytes up to which a kernel reads a peer's: a copy engine takes one copy after another, and behind 67 MB the 1 MB of
# choices waited 0.15 ms.
_SMALL = 2**22
_STEPS = 8  # sizes of buffers to a power of two, so that rows of many lengths make few


class Peers:
    """An Exchange (exchange.py) of a group whose GPUs reach each other's memory. EngineError, at the first exchange,
    where they do not.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group, self.rank, self.ranks = group, group.rank(), group.size()
        # Ahead of what else is ready: barriers began 45 us late behind products that hold all multiprocessors, 100
        # behind `outer` (seen in a trace). Graphs keep priorities (torch's CUDAGraph: UseNodePriority).
        self._streams = {lane: torch.cuda.Stream(priority=_AHEAD) for lane in _LANES}
        self._buffers: dict[Hashable, list[_Buffer]] = {}  # the last of each is in use

    def gather(self, own_TX: torch.Tensor, lane: str = "rows", owner: Hashable = None) -> Arriving:
        """See Exchange."""
        buffer, *of_all = self._gathered(own_TX, lane, owner)
        rows_RTX = buffer.of(self.rank, *of_all)
        with self._beside(lane) as ready:
            _lay(rows_RTX[self.rank], own_TX)
            buffer.barrier()
            for peer in self._others():
                _copy(rows_RTX[peer], buffer.of(peer, *of_all)[peer])
        return Arriving(rows_RTX.flatten(0, 1), None, ready, held=own_TX)

    def place(
        self, like_TX: torch.Tensor, lane: str = "rows", owner: Hashable = None
    ) -> torch.Tensor:
        """See Exchange."""
        buffer, *_ = self._gathered(like_TX, lane, owner)
        start = self.rank * like_TX.numel()
        return buffer.of(self.rank, like_TX.shape, like_TX.dtype, start)

    def give(
        self, all_XD: torch.Tensor, lane: str = "rows", into_YD: torch.Tensor | None = None
    ) -> Arriving:
        """See Exchange; own rows are left where they lie."""
        all_RTD = all_XD.unflatten(0, (self.ranks, len(all_XD) // self.ranks))
        buffer = self._buffer(("given", lane), all_XD.nbytes)
        # In its room, a part of what is given lies behind those before it, on every rank alike.
        of_all = (all_RTD.shape, all_XD.dtype, buffer.start_of(all_XD))
        laid_RTD = buffer.of(self.rank, *of_all)
        rows_YD = torch.empty_like(all_RTD[1:].flatten(0, 1)) if into_YD is None else into_YD
        rows_PTD = rows_YD.unflatten(0, (self.ranks - 1, all_RTD.shape[1]))
        with self._beside(lane) as ready:
            _lay(laid_RTD, all_RTD)
            buffer.barrier()
            for peer in self._others():
                place = peer - (peer > self.rank)
                _copy(rows_PTD[place], buffer.of(peer, *of_all)[self.rank])
        return Arriving(rows_YD, laid_RTD[self.rank], ready, held=all_XD)

    def room(self, like_XD: torch.Tensor) -> torch.Tensor:
        """See Exchange."""
        buffer = self._buffer(("given", "rows"), like_XD.nbytes)
        return buffer.of(self.rank, like_XD.shape, like_XD.dtype)

    def _gathered(
        self, own_TX: torch.Tensor, lane: str, owner: Hashable
    ) -> tuple[_Buffer, tuple[int, ...], torch.dtype]:
        """The buffer of what is gathered, with the shape [R, T, ...] and dtype of what lies there."""
        buffer = self._buffer(("gathered", lane, owner), self.ranks * own_TX.nbytes)
        return buffer, (self.ranks, *own_TX.shape), own_TX.dtype

    def _others(self) -> list[int]:
        """The peers, the next one first: no GPU is read by all at once."""
        return [(self.rank + i) % self.ranks for i in range(1, self.ranks)]

    @contextlib.contextmanager
    def _beside(self, lane: str) -> Iterator[Any]:
        """Queue on a lane what runs beside the current stream, after what is queued there; gives what waits for it."""
        stream, done = self._streams[lane], torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield lambda: torch.cuda.current_stream().wait_event(done)
            done.record()

    def _buffer(self, use: Hashable, num_bytes: int) -> _Buffer:
        """Of at least these bytes. Every rank of the group asks for the same ones in the same order, and none is ever
        freed, as recorded passes have their addresses.
        """
        made = self._buffers.setdefault(use, [])
        if not made or made[-1].size < num_bytes:
            made.append(_Buffer(_rounded(num_bytes), self._group))
        return made[-1]


def _rounded(num_bytes: int) -> int:
    """Up to an eighth of the power of two below, at least 512."""
    num_bytes = max(num_bytes, 1)
    step = max(512, 2 ** (num_bytes.bit_length() - 1) // _STEPS)
    return -(-num_bytes // step) * step


def _lay(place: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy rows to their place unless they lie there."""
    if place.data_ptr() != rows.data_ptr():
        place.copy_(rows)


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

        self.size = size
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

    def of(
        self, rank: int, shape: Sequence[int], dtype: torch.dtype, start: int = 0
    ) -> torch.Tensor:
        """A rank's memory, from its element `start` on."""
        return self._handle.get_buffer(rank, shape, dtype, start)

    def start_of(self, rows: torch.Tensor) -> int:
        """Where rows lie in this rank's own memory, in elements; 0 of what lies elsewhere."""
        start = rows.data_ptr() - self._own.data_ptr()
        return start // rows.element_size() if 0 <= start < self.size else 0

    def barrier(self) -> None:
        """Queued: what follows finds what every rank wrote before its own."""
        self._handle.barrier(channel=0)
