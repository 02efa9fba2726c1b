"""Ray, the engine room of several machines: the same worker in actors, the same unit function in tasks.

Ray places work, passes messages and notices deaths. Files pass through the shared file system, never through Ray.
The only module that imports ray (optional extra `cluster`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from common.errors import ConfigError, EngineError, VpmoeError
from datastore.score_fleet import Event, Failed, Host
from datastore.score_job import ScoreRun, ShardJob
from datastore.score_worker import StartEngine
from datastore.teacher import TeacherConfig

Job = TypeVar("Job")
Result = TypeVar("Result")
# What passes through Ray's object store is kilobytes; its default is 30 % of the memory.
_LOCAL_STORE_BYTES = 100 << 20
_CLOSE_SEC = 30.0


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The ray module, connected for the block. address: auto, local (a Ray of this process's own) or HOST:PORT.

    Raises ConfigError when ray is not installed or no Ray answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--ray needs the package ray", remedy="pip install 'vpmoe[cluster]', on every machine"
        ) from None
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _LOCAL_STORE_BYTES}
        options |= {"num_cpus": len(os.sched_getaffinity(0))}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray at {address}: {error}",
            remedy="start it with `ray start --head`, give its RAY_AUTH_TOKEN, or take --ray local",
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def run_jobs(
    function: Callable[[Job], Result], jobs: Iterable[Job], *, address: str
) -> Iterator[Result]:
    """`function` of every job in tasks of one CPU each, as they finish; a task whose worker dies is run again.

    An error of a job is raised here, and the others are given up. Raises ConfigError as `connected` does, VpmoeError
    when a job's worker died more often than Ray retries.
    """
    with connected(address) as ray:
        task = ray.remote(num_cpus=1, max_retries=3)(function)
        running = [task.remote(job) for job in jobs]
        while running:
            done, running = ray.wait(running)
            try:
                yield from ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise VpmoeError(
                    f"a worker of the cluster died: {error}",
                    remedy="what is finished is kept: run the same command again",
                ) from None


class RayRoom:
    """Engines in Ray actors: each has the GPUs of one engine, or one CPU. An actor ends when its engine fails."""

    def __init__(self, ray: Any, run: ScoreRun, start: StartEngine) -> None:
        self._ray, self._arguments = ray, (run, start)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}

    def start(self, number: int) -> None:
        run, _ = self._arguments
        actor = self._ray.remote(Host).options(**_resources(run.teacher), max_restarts=0)
        self._actors[number] = actor.remote(*self._arguments)
        self._running[self._actors[number].begin.remote()] = number

    def submit(self, number: int, job: ShardJob | None) -> None:
        self._running[self._actors[number].work.remote(job)] = number

    def wait(self, timeout: float) -> tuple[int, Event] | None:
        done, _ = self._ray.wait(list(self._running), timeout=timeout)
        if not done:
            return None
        number = self._running.pop(done[0])
        try:
            event = self._ray.get(done[0])
        except self._ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()[0]
            event = Failed(EngineError(f"its actor died: {text}"), is_final=False)
        if isinstance(event, Failed):
            self.kill(number)
        return number, event

    def kill(self, number: int) -> None:
        self._ray.kill(self._actors.pop(number))
        self._running = {call: n for call, n in self._running.items() if n != number}

    def close(self, *, at_once: bool) -> None:
        closing = [] if at_once else [actor.close.remote() for actor in self._actors.values()]
        if closing:
            self._ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_SEC)
        for actor in self._actors.values():
            self._ray.kill(actor)


def cluster_engines(ray: Any, teacher: TeacherConfig, wanted: int | None) -> int:
    """Engines that the cluster has room for, at most `wanted`. Raises ConfigError when there is room for none."""
    resources = ray.cluster_resources()
    needed = {"GPU" if key == "num_gpus" else "CPU": n for key, n in _resources(teacher).items()}
    room = min(int(resources.get(key, 0) // n) for key, n in needed.items())
    if not room:
        raise ConfigError(
            f"the cluster has no room for an engine of teacher {teacher.name}",
            got=f"{resources.get('GPU', 0):.0f} GPUs, {resources.get('CPU', 0):.0f} CPUs",
            expected=", ".join(f"{n} {key}" for key, n in needed.items()),
        )
    return min(room, wanted or room)


def _resources(teacher: TeacherConfig) -> dict[str, int]:
    """Of an actor: one CPU for the engine; on GPUs its tensor-parallel group and one CPU more for the encoders."""
    if teacher.engine.device == "cpu":
        return {"num_cpus": 1}
    return {"num_cpus": 2, "num_gpus": teacher.engine.tensor_parallel_size}
