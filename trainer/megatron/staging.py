"""Host memory for an asynchronous checkpoint: a copy of this rank's part of the state, kept from save to save.

Why not Megatron's own: it copies tensor by tensor into fresh pageable memory, which the kernel zeroes page by page
while the training waits. Here one block is mapped and pinned once, and a save is one copy at the speed of the bus.
"""

from __future__ import annotations

import mmap
import socket

import numpy as np
import torch
import torch.distributed as dist

from common.errors import ConfigError, EngineError
from common.host import free_host_bytes

_ALIGN_BYTES = 64
_SPARE_BYTES = 1 << 30  # left to everything else on the host
_GIB = 2**30


class HostStaging:
    """One pinned block of host memory on this rank, grown when a larger state comes."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._bytes = np.empty(0, dtype=np.uint8)

    def reserve(self, sizes: list[int]) -> None:
        """Make room for tensors of these bytes. Every rank calls it, before its first copy.

        Raises ConfigError on every rank when a host has less free memory than its ranks need together.
        """
        need = sum(map(_aligned, sizes))
        more = 0 if need <= len(self._bytes) else need
        require_host_memory(more)
        if more:
            self._release()
            self._bytes = _mapped(need)
            if self._cuda:
                _pin(self._bytes)

    def copy(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Copies in host memory, valid until the next call; complete on return. The block must be large enough."""
        copies, start = [], 0
        for tensor in tensors:
            num_bytes = tensor.nbytes
            host = torch.from_numpy(self._bytes[start : start + num_bytes])
            copies.append(host.view(tensor.dtype).view(tensor.shape))
            copies[-1].copy_(tensor.detach(), non_blocking=True)
            start += _aligned(num_bytes)
        torch.cuda.synchronize()
        return copies

    def _release(self) -> None:
        if self._cuda and len(self._bytes):
            torch.cuda.cudart().cudaHostUnregister(self._bytes.ctypes.data)
        self._bytes = np.empty(0, dtype=np.uint8)


def require_host_memory(need_bytes: int) -> None:
    """Refuse on every rank when the ranks of a host together need more than it has free. Every rank calls it."""
    mine = (socket.gethostname(), need_bytes, free_host_bytes())
    every: list[tuple[str, int, int]] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for host in sorted({name for name, _, _ in every}):
        needs = [need for name, need, _ in every if name == host and need]
        free = min(free for name, _, free in every if name == host)
        if needs and sum(needs) + _SPARE_BYTES > free:
            raise ConfigError(
                "checkpoint.asynchronous: true keeps a copy of the state in host memory, and it does not fit",
                got=f"{free / _GIB:.1f} GiB free on the host of these {len(needs)} ranks",
                expected=f"{(sum(needs) + _SPARE_BYTES) / _GIB:.1f} GiB (copy and 1 GiB to spare)",
                remedy="set checkpoint.asynchronous=false, or use a host with more memory",
            )


def _mapped(num_bytes: int) -> np.ndarray:
    """Private memory outside every allocator, in huge pages where the kernel has them: pinning walks every page."""
    block = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8)


def _pin(block: np.ndarray) -> None:
    code = torch.cuda.cudart().cudaHostRegister(block.ctypes.data, block.nbytes, 0)
    if int(code):
        raise EngineError(
            f"{block.nbytes / _GIB:.1f} GiB of host memory cannot be pinned (cudaHostRegister: {code})",
            remedy="raise the limit of locked memory (ulimit -l), or set checkpoint.asynchronous=false",
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
