"""Run a function on several gloo processes of this machine and collect what each returns."""

from __future__ import annotations

import datetime
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parents[2])
_COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)


def run_gloo(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_sec: float = 300
) -> list[Any]:
    """Call `function(rank, *args)` on `world_size` fresh processes joined by gloo; results in order of rank.

    `function` is a module-level function; arguments and results are pickled. The processes start by spawn, have
    one thread each, and RANK, WORLD_SIZE, LOCAL_RANK set. They meet through a file, so no port is taken. An
    exception or a death in any of them raises RuntimeError here, with its traceback, and ends the others.
    """
    if function.__module__ == "__main__":
        # The children would run the script again as __main__, and so would theirs.
        raise ValueError(f"{function.__name__} is of a script: put it into a module")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="vpmoe-gloo-") as folder:
        where = (function.__code__.co_filename, function.__module__, function.__qualname__)
        processes = [
            context.Process(target=_child, args=(where, rank, world_size, folder, args))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        try:
            _join(processes, Path(folder), timeout_sec)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads(_result(folder, rank).read_bytes()) for rank in range(world_size)]


def _join(processes: list[Any], folder: Path, timeout_sec: float) -> None:
    waiting = {process.sentinel: rank for rank, process in enumerate(processes)}
    while waiting:
        ended = multiprocessing.connection.wait(list(waiting), timeout=timeout_sec)
        if not ended:
            raise RuntimeError(f"ranks {sorted(waiting.values())} still run after {timeout_sec} s")
        for sentinel in ended:
            rank = waiting.pop(sentinel)
            processes[rank].join()
            if processes[rank].exitcode != 0:
                error = folder / f"error-{rank}"
                reason = error.read_text() if error.exists() else "no traceback"
                code = processes[rank].exitcode
                raise RuntimeError(f"rank {rank} ended with code {code}:\n{reason}")


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}"


def _child(where: tuple[str, str, str], rank: int, world_size: int, folder: str, args: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=_COLLECTIVE_TIMEOUT,
        )
        result = _load(*where)(rank, *args)
        _result(folder, rank).write_bytes(pickle.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)


def _load(path: str, module: str, qualname: str) -> Callable[..., Any]:
    """The function, by its file: pytest may have given its module a name that cannot be imported by."""
    if _ROOT not in sys.path:
        sys.path.insert(0, _ROOT)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules[module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return getattr(loaded, qualname)
