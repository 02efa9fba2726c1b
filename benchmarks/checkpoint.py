"""Checkpoints of a student: save, asynchronous save, load, against the raw speed of the same folder.

    python -m benchmarks.checkpoint configs/base.yaml --folder /scratch/ckpt --name one-h200
    torchrun --nproc-per-node 2 -m benchmarks.checkpoint configs/base.yaml parallel.expert=2 --folder /scratch/ckpt
    python -m benchmarks.checkpoint configs/demo.yaml --folder /tmp/ckpt

Needs no dataset: the state is that of a fresh student with its optimizer's moments. Needs room for one checkpoint in
the folder and, for the asynchronous saves, in host memory. Files are dropped from the page cache before they are read.
floor_sec: bytes by the speed at which one file, or four at once, are written (read) there in the same run. Writes
benchmarks/results/checkpoint-NAME.json on rank 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.report import header
from common.config import load_config
from common.files import write_json
from trainer.checkpoints import Progress, find_checkpoint
from trainer.config import KDConfig

RESULTS = Path(__file__).parent / "results"
SEQ_LEN = 2048
GIB = 2**30
_CHUNK = bytes(64 << 20)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--raw-gib", type=float, default=8.0, help="size of the raw file")
    parser.add_argument("--saves", type=int, default=2, help="of each kind, in turn")
    parser.add_argument("--no-asynchronous", action="store_true", help="too little host memory")
    parser.add_argument("--name", default="", help="of the result file; not written without one")
    arguments = parser.parse_intermixed_args()
    config = load_config(KDConfig, arguments.config, tuple(arguments.overrides))
    figures, rank = measure(
        config,
        arguments.folder,
        arguments.raw_gib,
        saves=arguments.saves,
        asynchronous=not arguments.no_asynchronous,
    )
    if rank:
        return
    report = {"what": (__doc__ or "").splitlines()[0]}
    report |= header(("torch", "megatron-core"), device=config.device) | figures
    for key, value in report.items():
        print(f"{key}: {value}", flush=True)
    if arguments.name:
        write_json(RESULTS / f"checkpoint-{arguments.name}.json", report)


def measure(
    config: KDConfig, folder: Path, raw_gib: float, *, saves: int, asynchronous: bool
) -> tuple[dict[str, Any], int]:
    """The figures, and this process's rank."""
    from trainer.megatron.checkpoint import load_checkpoint
    from trainer.megatron.step import Trainer
    from trainer.megatron.topology import distributed
    from trainer.megatron.weights import load_weights

    with distributed(config.device, config.parallel, config.seed) as topology:
        trainer = Trainer(config, topology, SEQ_LEN)
        _make_moments(trainer)
        before = _weights(trainer.student)
        raw = {
            f"{files} files": raw_speed(folder, int(raw_gib * GIB), files)
            for files in ((1, 4) if topology.rank == 0 else ())
        }
        topology.barrier()
        figures: dict[str, Any] = {"layout": topology.layout(), "raw_bytes_per_sec": raw}
        for kind in ("save", "asynchronous_save")[: 1 + asynchronous]:
            figures[kind] = _saves(trainer, folder, saves, asynchronous=kind != "save")
            for name, load in (
                ("load", lambda: load_checkpoint(folder, trainer)),
                ("load_weights", lambda: load_weights(folder, trainer.student)),
            ):
                _clear(trainer.student)
                _drop_from_cache(folder, topology)
                figures[kind][name] = {"seconds": _timed(load, topology)}
                figures[kind][name]["unequal"] = _unequal(before, _weights(trainer.student))
        if topology.rank == 0:
            shutil.rmtree(folder)
            _with_floors(figures)
        topology.barrier()
        return figures, topology.rank


def _make_moments(trainer: Any) -> None:
    """An update that changes nothing, after which the optimizer has all its states."""
    trainer.model.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    trainer.optimizer.prepare_grads()
    for group in trainer.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    trainer.optimizer.step_with_ready_grads()


def _saves(trainer: Any, folder: Path, saves: int, *, asynchronous: bool) -> dict[str, Any]:
    """Saves in turn, the first with whatever is made once; only the newest is kept on disk."""
    from trainer.megatron.checkpoint_write import CheckpointWriter

    writer = CheckpointWriter(folder, trainer, keep=1, asynchronous=asynchronous)
    found: dict[str, Any] = {"reserve_sec": _timed(writer.reserve, trainer.topology)}
    for number in range(1, saves + 1):
        if trainer.topology.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        trainer.topology.barrier()
        # A save that nothing waits for returns at once; `finish` here would count as standing still.
        saved = writer.save(Progress(step=1, stream={}, provenance={}))
        while saved is None:
            time.sleep(0.05)
            saved = writer.poll()
        found[f"save {number}"] = {
            key.removeprefix("checkpoint/"): value for key, value in saved.values.items()
        }
        if trainer.topology.rank == 0:
            print(saved.line(), flush=True)
    return found


def raw_speed(folder: Path, num_bytes: int, files: int) -> dict[str, float]:
    """Bytes a second of so many threads, each of which writes, then reads, one file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = max(1, num_bytes // len(_CHUNK) // files)
    paths = [folder / f"raw-{number}" for number in range(files)]

    def write(path: Path) -> None:
        with open(path, "wb", buffering=0) as file:
            for _ in range(chunks):
                file.write(_CHUNK)
            os.fsync(file.fileno())

    def read(path: Path) -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(memoryview(bytearray(len(_CHUNK)))):
                pass

    speeds = {}
    with ThreadPoolExecutor(files) as pool:
        for name, work in (("write", write), ("read", read)):
            began = time.perf_counter()
            list(pool.map(work, paths))
            speeds[name] = files * chunks * len(_CHUNK) / (time.perf_counter() - began)
            for path in paths:
                _forget(path)
    for path in paths:
        path.unlink()
    return speeds


def _with_floors(figures: dict[str, Any]) -> None:
    raw = {
        way: max(speeds[way] for speeds in figures["raw_bytes_per_sec"].values())
        for way in ("write", "read")
    }
    size = figures["save"]["save 1"]["bytes"]
    for kind in (figures[name] for name in ("save", "asynchronous_save") if name in figures):
        for saved in (kind[key] for key in kind if key.startswith("save ")):
            saved["gb_per_sec"] = size / saved["write_sec"] / 1e9
            saved["floor_sec"] = size / raw["write"]
        kind["load"] |= {
            "gb_per_sec": size / kind["load"]["seconds"] / 1e9,
            "floor_sec": size / raw["read"],
        }


def _timed(work: Callable[[], Any], topology: Any) -> float:
    import torch

    topology.barrier()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    topology.barrier()
    return time.perf_counter() - began


def _drop_from_cache(folder: Path, topology: Any) -> None:
    if topology.rank == 0:
        for path in find_checkpoint(folder).iterdir():
            _forget(path)
    topology.barrier()


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _weights(student: Any) -> dict[str, Any]:
    """Copies of all parameters of this rank, and of their fp32 masters."""
    found = {}
    for name, parameter in student.named_parameters():
        found[name] = parameter.detach().clone()
        if hasattr(parameter, "main_param"):
            found[f"{name} (master)"] = parameter.main_param.detach().clone()
    return found


def _unequal(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    """What differs on this rank, and how; empty when every bit is back."""
    import torch

    return {
        name: f"{int((value != after[name]).sum())} of {value.numel()} numbers, "
        f"{int((~torch.isfinite(value)).sum())} not finite before, {int((~torch.isfinite(after[name])).sum())} after"
        for name, value in before.items()
        if not torch.equal(value, after[name])
    }


def _clear(student: Any) -> None:
    for parameter in student.parameters():
        parameter.data.zero_()
        if hasattr(parameter, "main_param"):
            parameter.main_param.data.zero_()


if __name__ == "__main__":
    main()
