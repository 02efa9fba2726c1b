"""A pool of worker processes for long stages: started by spawn, results in any order, no orphans.

Workers end with their parent, however it dies: an orphan would go on writing into a folder that the next run holds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from common.errors import VpmoeError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, workers: int
) -> Iterator[Result]:
    """`function` of every job, as they finish; in this process when one worker is asked for.

    `function` and the jobs are pickled. An error of a job is raised here and ends the workers at once. Raises
    VpmoeError when a worker dies.
    """
    jobs = list(jobs)
    if workers == 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    stop_reader, stop_writer = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, end_with_parent, (stop_reader,))
    is_done = False
    try:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            yield future.result()
        is_done = True
    except BrokenProcessPool:
        raise VpmoeError(
            "a worker process died (killed, or out of memory)",
            remedy="what is finished is kept: run the same command again, perhaps with fewer workers",
        ) from None
    finally:
        if not is_done:
            stop_writer.close()
        pool.shutdown(wait=True, cancel_futures=True)
        stop_writer.close()
        stop_reader.close()


def end_with_parent(stop: multiprocessing.connection.Connection) -> None:
    """Start of a worker process: it ends when the parent closes or loses its end of the pipe `stop`."""
    # Ctrl-C reaches the whole process group; the parent decides and closes `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(stop,), daemon=True).start()


def _end_with(stop: multiprocessing.connection.Connection) -> None:
    """End this process when the parent closes its end of the pipe, which the kernel does if it is killed."""
    multiprocessing.connection.wait([stop])
    os._exit(1)
