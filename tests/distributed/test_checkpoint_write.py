"""Asynchronous checkpoints: the state of their step, complete or not there, one at a time, failures told to all."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import ConfigError
from tests.distributed.gloo import run_gloo
from tests.distributed.stored import assert_same_tensors, newest, stored_tensors
from tests.trainer.megatron.tiny import SEQ_LEN, micro_batches, step, tiny_config, tiny_rows
from trainer.checkpoints import Progress, read_progress, stored_steps, sweep

EXPERT = {"expert": 2}


@contextmanager
def _trainer(parallel: dict[str, int]) -> Iterator[Any]:
    from trainer.megatron.step import Trainer
    from trainer.megatron.topology import distributed

    config = tiny_config(parallel=parallel)
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        yield Trainer(config, topology, SEQ_LEN)


def _writer(folder: Path, trainer: Any, *, asynchronous: bool) -> Any:
    from trainer.megatron.checkpoint_write import CheckpointWriter

    return CheckpointWriter(folder, trainer, keep=2, asynchronous=asynchronous)


def _progress(done: int) -> Progress:
    return Progress(step=done, stream={}, provenance={})


def _train(trainer: Any, steps: int) -> None:
    for _ in range(steps):
        step(trainer, micro_batches(tiny_rows(4, seed=trainer.topology.rank), 2), 1e-2)


@contextmanager
def _slow_disk() -> Iterator[threading.Event]:
    """Writing threads wait at every tensor until the event is set, as they would for a disk."""
    plain, moved = torch.save, threading.Event()

    def save(content: Any, stream: Any, **keywords: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert moved.wait(60)
        plain(content, stream, **keywords)

    torch.save = save
    try:
        yield moved
    finally:
        moved.set()
        torch.save = plain


@contextmanager
def _full_disk() -> Iterator[None]:
    plain = torch.save

    def save(content: Any, stream: Any, **keywords: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(content, stream, **keywords)

    torch.save = save
    try:
        yield
    finally:
        torch.save = plain


def _saves(rank: int, folder: str, parallel: dict[str, int]) -> dict[str, Any]:
    from trainer.megatron.staging import require_host_memory

    here = Path(folder)
    with _trainer(parallel) as trainer:
        together = _writer(here / "sync", trainer, asynchronous=False)
        aside = _writer(here / "async", trainer, asynchronous=True)
        _train(trainer, 1)
        aside.reserve()
        assert aside.save(_progress(1)) is None
        seen: dict[str, Any] = {"first": aside.finish()}
        _train(trainer, 1)
        seen["sync"] = together.save(_progress(2))
        with _slow_disk() as moved:
            assert aside.save(_progress(2)) is None
            _train(trainer, 2)
            seen["polled"] = aside.poll()
            seen["meanwhile"] = read_progress(here / "async").step
            moved.set()
            seen["second"] = aside.save(_progress(4))  # waits for the one before
        seen["third"] = aside.finish()
        seen["nothing left"] = (aside.poll(), aside.finish())
        try:
            require_host_memory(10**16 * (1 - rank))
        except ConfigError as error:
            seen["refused"] = str(error)
        return seen


@pytest.mark.parametrize("parallel", [{}, EXPERT], ids=["one", "two"])
def test_later_steps_do_not_leak_into_a_checkpoint(tmp_path, parallel) -> None:
    ranks = run_gloo(_saves, 2 if parallel else 1, str(tmp_path), parallel)
    for seen in ranks:
        assert (seen["polled"], seen["meanwhile"]) == (None, 1)
        assert [seen[name].step for name in ("first", "second", "third")] == [1, 2, 4]
        assert seen["nothing left"] == (None, None)
        values = seen["second"].values
        assert 0 < values["checkpoint/blocking_sec"] < values["checkpoint/write_sec"]
        assert values["checkpoint/bytes"] == seen["sync"].values["checkpoint/bytes"]
        assert (
            "checkpoint.asynchronous" in seen["refused"]
            and "GiB free on the host" in seen["refused"]
        )
    assert stored_steps(tmp_path / "async") == [2, 4]
    assert newest(tmp_path / "async").name == "step-00000004"
    assert_same_tensors(tmp_path / "sync" / "step-00000002", tmp_path / "async" / "step-00000002")
    held = sum(
        t.numel() * t.element_size() for t in stored_tensors(newest(tmp_path / "async")).values()
    )
    assert ranks[0]["second"].values["checkpoint/bytes"] == held


def _fails_on_the_last_rank(rank: int, folder: str, parallel: dict[str, int]) -> list[str]:
    from trainer.megatron.checkpoint_write import UnwrittenError

    said = []
    with _trainer(parallel) as trainer:
        for asynchronous in (True, False):
            writer = _writer(Path(folder), trainer, asynchronous=asynchronous)
            _train(trainer, 1)
            done = len(said) + 1
            writer.save(_progress(3 * done), wait=True)
            with _full_disk() if rank == trainer.topology.world_size - 1 else _nothing():
                try:
                    writer.save(_progress(3 * done + 1))
                    while writer.poll() is None:  # at each border of steps, as the loop does
                        pass
                except UnwrittenError as error:
                    said.append(str(error))
            assert read_progress(Path(folder)).step == 3 * done
            writer.save(_progress(3 * done + 1), wait=True)
    return said


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_a_full_disk_of_one_rank_is_told_by_every_rank(tmp_path) -> None:
    ranks = run_gloo(_fails_on_the_last_rank, 2, str(tmp_path), EXPERT)
    assert ranks[0] == ranks[1] and len(ranks[0]) == 2
    for number, said in zip((4, 7), ranks[0], strict=True):
        assert f"checkpoint step-{number:08d} could not be written" in said
        assert "No space left on device" in said and "GiB free" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latest",
        "step-00000006",
        "step-00000007",
    ]


def _killed_while_writing(rank: int, folder: str) -> None:
    with _trainer({}) as trainer, _slow_disk() as moved:
        writer = _writer(Path(folder), trainer, asynchronous=True)
        _train(trainer, 1)
        moved.set()
        writer.save(_progress(1), wait=True)
        moved.clear()
        writer.save(_progress(2))
        os.kill(os.getpid(), signal.SIGKILL)


def _resumed(rank: int, folder: str) -> int:
    from trainer.megatron.checkpoint import load_checkpoint

    with _trainer({}) as trainer:
        progress = load_checkpoint(Path(folder), trainer)
        _writer(Path(folder), trainer, asynchronous=True).save(_progress(2), wait=True)
        return progress.step


def test_a_kill_while_writing_leaves_the_checkpoint_before(tmp_path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 ended with code -9"):
        run_gloo(_killed_while_writing, 1, str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".tmp-step-00000002",
        "latest",
        "step-00000001",
    ]
    sweep(tmp_path)
    assert run_gloo(_resumed, 1, str(tmp_path)) == [1]
    assert_same_tensors(tmp_path / "step-00000001", tmp_path / "step-00000002")
