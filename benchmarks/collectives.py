"""The collectives that training uses, by themselves: milliseconds and GB/s in and out of a rank.

    torchrun --nproc-per-node 2 -m benchmarks.collectives
    torchrun --nproc-per-node 2 -m benchmarks.collectives --device cpu --megabytes 1

Of R ranks with S bytes each, in place: an all-reduce moves 2 S (R - 1) / R in and as much out of a rank, a
reduce-scatter or an all-gather S (R - 1) / R, an all-to-all S (R - 1) / R. On CUDA also the exchanges of expert
parallelism (trainer/megatron/peers.py), which move as much. Prints on rank 0.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from trainer.megatron.collectives import all_gather, reduce_scatter


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[134, 4295])
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    found = {f"{mb} MB": measure(mb * 10**6, arguments.device) for mb in arguments.megabytes}
    if dist.get_rank() == 0:
        print(json.dumps(found, indent=2), flush=True)
    dist.destroy_process_group()


def measure(num_bytes: int, device: str) -> dict[str, dict[str, float]]:
    """By collective; the size is that of the whole buffer in fp32, in bf16 half of it."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.ones(num_bytes // 4 // ranks * ranks, device=device)
    half = whole.to(torch.bfloat16)
    own, own_half = whole.view(ranks, -1)[rank], half.view(ranks, -1)[rank]
    other = torch.empty_like(half)
    part = (ranks - 1) / ranks
    works: dict[str, tuple[float, Callable[[], Any]]] = {
        "all_reduce fp32": (2 * part * whole.nbytes, lambda: dist.all_reduce(whole)),
        "reduce_scatter fp32": (part * whole.nbytes, lambda: reduce_scatter(own, whole)),
        "all_gather bf16": (part * half.nbytes, lambda: all_gather(half, own_half)),
        "all_to_all bf16": (part * half.nbytes, lambda: dist.all_to_all_single(other, half)),
    }
    if device == "cuda":
        from trainer.megatron.peers import Peers

        peers, moved = Peers(dist.group.WORLD), part * half.nbytes
        works["gather by peers' memory bf16"] = (moved, lambda: peers.gather(own_half).wait())
        works["give by peers' memory bf16"] = (moved, lambda: peers.give(half).wait())
    return {name: _timed(*of, device) for name, of in works.items()}


def _timed(moved: float, work: Callable[[], Any], device: str, times: int = 5) -> dict[str, float]:
    for _ in range(2):
        work()
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    seconds = (time.perf_counter() - began) / times
    return {"ms": round(1e3 * seconds, 3), "GB/s": round(moved / seconds / 1e9, 1)}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    main()
