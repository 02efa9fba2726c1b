"""Checkpoints: Megatron's torch_dist format, made atomic, kept few, bound to what they were trained on.

    checkpoints/latest                    name of the newest complete checkpoint, moved last
    checkpoints/step-00000020/            *.distcp, common.pt, metadata.json: Megatron's; vpmoe.json: ours
    checkpoints/.tmp-step-00000040/       left by a killed writer, swept at the next start

Weights and optimizer state are stored by global shape, so another number of data-parallel ranks reads them. Random
states belong to ranks and are taken over on the same layout only; no training step draws a number (dropout is 0).
"""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from common.errors import FormatError, ResumeError
from common.files import TMP_PREFIX, fsync_folder, write_bytes, write_json
from trainer.megatron.step import Trainer
from trainer.megatron.topology import Topology

VERSION = 1
_LATEST, _OURS = "latest", "vpmoe.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: optimizer steps done, state of the row stream, and what it was trained on and with.

    provenance: plain values by name; trainer/run.py says which must agree on a resume.
    """

    step: int
    stream: dict[str, Any]
    provenance: dict[str, Any]


def save_checkpoint(folder: Path, trainer: Trainer, progress: Progress, keep: int) -> None:
    """Write step-N, move `latest` to it, drop all but the newest `keep`. Every rank calls it.

    A kill at any moment leaves `latest` on a complete checkpoint.
    """
    topology = trainer.topology
    final = folder / f"step-{progress.step:08d}"
    unfinished = folder / f"{TMP_PREFIX}{final.name}"
    if topology.rank == 0:
        unfinished.mkdir(parents=True)
    topology.barrier()
    _write_in_this_process()
    try:
        dist_checkpointing.save(
            _state(trainer, loading=False, with_random=True),
            str(unfinished),
            sharded_strategy=("torch_dist", 1),
        )
    except (OSError, RuntimeError, CheckpointException) as error:
        raise _unwritten(unfinished, error) from error
    topology.barrier()
    if topology.rank == 0:
        ours = {"version": VERSION, "layout": topology.layout()} | asdict(progress)
        write_json(unfinished / _OURS, ours)
        _commit(folder, unfinished, final, keep)
    topology.barrier()


def load_checkpoint(folder: Path, trainer: Trainer) -> Progress:
    """Fill the trainer from the newest checkpoint and say where it stands. Every rank calls it."""
    path = latest_checkpoint(folder)
    if path is None:
        raise ResumeError(f"{folder} holds no checkpoint", remedy="train the run first")
    content = _read(path)
    same_layout = content["layout"] == trainer.topology.layout()
    loaded = dist_checkpointing.load(
        _state(trainer, loading=True, with_random=same_layout),
        str(path),
        strict="raise_all" if same_layout else "raise_unexpected",
    )
    trainer.student.load_state_dict(loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    if same_layout:
        _set_random_state(loaded["random"])
    return _progress(content)


def read_progress(folder: Path) -> Progress | None:
    """What the newest checkpoint says of itself, None when there is none; nothing is loaded."""
    path = latest_checkpoint(folder)
    return None if path is None else _progress(_read(path))


def latest_checkpoint(folder: Path) -> Path | None:
    """The folder that `latest` names. Raises FormatError when it is gone."""
    pointer = folder / _LATEST
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text().strip()
    if not (path / _OURS).is_file():
        raise FormatError(
            f"{pointer} names {path.name}, which is not a complete checkpoint",
            remedy=f"restore it, or write the name of another checkpoint into {_LATEST}",
        )
    return path


def sweep(folder: Path) -> None:
    """Remove what a killed writer left: unfinished folders, and complete ones that `latest` never reached."""
    newest = latest_checkpoint(folder)
    for path in folder.glob(f"{TMP_PREFIX}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("step-*"):
        if newest is None or path.name > newest.name:
            shutil.rmtree(path)


def _unwritten(unfinished: Path, error: BaseException) -> ResumeError:
    """A full disk reaches us as a writer's RuntimeError ("unexpected pos"), so the free space is told with it."""
    free_bytes = shutil.disk_usage(unfinished).free
    shutil.rmtree(unfinished, ignore_errors=True)
    cause = str(error).strip().splitlines()[-1]
    return ResumeError(
        f"checkpoint {unfinished.name.removeprefix(TMP_PREFIX)} could not be written to {unfinished.parent}: {cause}",
        got=f"{free_bytes / 2**30:.1f} GiB free at that moment",
        remedy="make room or lower checkpoint.keep, then run the same command: it goes on from the newest checkpoint",
    )


def _commit(folder: Path, unfinished: Path, final: Path, keep: int) -> None:
    for path in unfinished.rglob("*"):
        if path.is_file():
            _fsync_file(path)
    fsync_folder(unfinished)
    os.rename(unfinished, final)
    fsync_folder(folder)
    write_bytes(folder / _LATEST, f"{final.name}\n".encode())
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_in_this_process() -> None:
    """Give Megatron's writer a queue of this process.

    It would spawn a manager process for it (dist_checkpointing/strategies/filesystem_async.py:55): seconds at the first
    save, and an orphan after every kill. A synchronous save puts and gets in one process.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _state(trainer: Trainer, *, loading: bool, with_random: bool) -> dict[str, Any]:
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model = trainer.student.sharded_state_dict(metadata=metadata)
    optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return {"model": model, "optimizer": optimizer} | (
        {"random": _random_object(trainer.topology)} if with_random else {}
    )


def _random_object(topology: Topology) -> ShardedObject:
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape, offset = (topology.tp_size, topology.dp_size), (topology.tp_rank, topology.dp_rank)
    return ShardedObject("random", state, shape, offset, replica_id=0)


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _read(path: Path) -> dict[str, Any]:
    content = json.loads((path / _OURS).read_text(encoding="utf-8"))
    if content["version"] != VERSION:
        raise FormatError(
            f"checkpoint {path}", got=f"version {content['version']}", expected=f"version {VERSION}"
        )
    return content


def _progress(content: dict[str, Any]) -> Progress:
    return Progress(
        step=content["step"], stream=content["stream"], provenance=content["provenance"]
    )
