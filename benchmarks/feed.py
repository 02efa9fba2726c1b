"""Tokens/s of the feed: read and verify, decode, collate, and the Loader as a run has it, on real rows.

    python -m benchmarks.feed                          rows of VPMOE_SYNTH (or ../shared/synth), else the demo's sample
    python -m benchmarks.feed --readers 0,1,2,4 --folder runs/feed --out runs/feed.json

Rows and targets are those of benchmarks/feed_data.py. Tokens are positions of rows, padding included, as a step counts
them; the pages of the files are in memory. Time it on idle cores: load of others shows in every figure.

- stages: tokens/s of CPU time on one thread in the environment of a reader process (trainer/readers.py, ENVIRONMENT),
  and in a plain one (`stages_plain`: glibc's own ways with memory), best of ROUNDS over all rows. `read`: row and
  blob from the map, both hashes checked. `decode`: `decode_blob`. `collate`: `make_batch` (page-locking is not measured
  on a CPU). `together`: all three, micro-batch after micro-batch, as a reader does.
- threads: tokens/s of wall time that one and two threads of one process read together.
- beside: what reading costs a process that launches operators one after another, as a trainer without CUDA graphs does:
  operators/s alone, with a thread that reads without a pause, and with one reader process.
- loader: steps of one rank at `kd_share` 1, taken as fast as they come. readers 0: a thread of this process. `wall`:
  tokens/s; `reader_cpu`: tokens/s of CPU time of the reader processes together, their start not counted; `own_cpu`: the
  same of the process that trains.
- node: `reader_cpu` of the loader with one reader times the cores of a rank, and of a node of RANKS: what cores of
  this machine would give if memory bandwidth did not limit them; and the part of a core that a rank needs at
  TRAIN_TOKENS_PER_SEC.
Writes benchmarks/results/feed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.feed_data import SEQ_LEN, SLUG
from benchmarks.report import header
from common.config import PROJECT_ROOT, load_config
from common.files import write_json
from datastore.codec import decode_blob
from datastore.reader import Dataset, TargetStore
from trainer.batch import make_batch
from trainer.config import KDConfig
from trainer.data import Loader, RunData
from trainer.readers import ENVIRONMENT, ReaderProcesses, RowReader

RESULT = Path(__file__).parent / "results" / "feed.json"
MICRO_ROWS, STEP_ROWS = 8, 32
ROUNDS, STEPS, SECONDS = 5, 24, 3.0
RANKS, NODE_CORES, TRAIN_TOKENS_PER_SEC = 8, 128, 100_000


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--readers", default="0,1,2", help="numbers of reader processes to try")
    parser.add_argument("--folder", type=Path, help="keep the dataset here and use it again")
    parser.add_argument("--stages", type=Path, help="only print the stages of this dataset")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.stages is not None:
        print(json.dumps(stages(arguments.stages)))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = arguments.folder or Path(work)
        if not (folder / "data" / "targets" / SLUG / "manifest.json").is_file():
            # In a process of its own: what it frees would change how glibc gives memory to this one.
            _python("benchmarks.feed_data", str(folder))
        found = measure(folder / "data", [int(n) for n in arguments.readers.split(",")])
    # Other programs' load lowers every figure, those by CPU time through the caches and threads that cores share.
    load = {"load_average_at_the_end": round(os.getloadavg()[0], 2)}
    report = header(("numpy", "zstandard", "xxhash", "pyarrow", "torch")) | load | found
    write_json(arguments.out, report)


def measure(data: Path, readers: list[int]) -> dict[str, Any]:
    """All figures of a dataset."""
    dataset = Dataset.open(data)
    targets = TargetStore.open(dataset, SLUG)
    report: dict[str, Any] = {"data": figures(dataset, targets)}
    run_data = RunData(dataset, targets)
    own = ("benchmarks.feed", "--stages", str(data))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "stages": lambda: json.loads(_python(*own, **ENVIRONMENT)),
        "stages_plain": lambda: json.loads(_python(*own)),
        "threads": lambda: {str(count): threads(run_data, count) for count in (1, 2)},
        "beside": lambda: beside(run_data),
        **{f"loader_{n}": lambda n=n: loader(run_data, n) for n in readers},
    }
    for name, part in parts.items():
        report[name] = part()
        print(
            name, *(f"{key} {value:,}" for key, value in report[name].items()), sep="  ", flush=True
        )
    if (one := report.get("loader_1")) is not None:
        report["node"] = node(one["reader_cpu"])
        print("node", report["node"])
    return report


def node(per_core: int) -> dict[str, Any]:
    """What the cores of a node would read, and need."""
    return {
        "cores_of_rank": NODE_CORES // RANKS,
        "rank_tokens_per_sec": per_core * NODE_CORES // RANKS,
        "node_tokens_per_sec": per_core * NODE_CORES,
        "of_training_rate": round(per_core * NODE_CORES / (RANKS * TRAIN_TOKENS_PER_SEC), 1),
        "one_reader_of_training_rate": round(per_core / TRAIN_TOKENS_PER_SEC, 1),
        "cores_busy_a_rank": round(TRAIN_TOKENS_PER_SEC / per_core, 3),
    }


@contextlib.contextmanager
def reading(data: RunData, count: int) -> Iterator[list[int]]:
    """So many threads that read without a pause; the tokens that each has read so far."""
    stop, done = threading.Event(), [0] * count
    rows = range(data.dataset.num_rows("train") // MICRO_ROWS * MICRO_ROWS)

    def read(number: int) -> None:
        for first in itertools.cycle(range(0, len(rows), MICRO_ROWS)):
            if stop.is_set():
                return
            data.batch("train", rows[first : first + MICRO_ROWS], [True] * MICRO_ROWS)
            done[number] += MICRO_ROWS * SEQ_LEN

    started = [threading.Thread(target=read, args=(number,)) for number in range(count)]
    for thread in started:
        thread.start()
    try:
        yield done
    finally:
        stop.set()
        for thread in started:
            thread.join()


def threads(data: RunData, count: int) -> int:
    """Tokens/s that so many threads read together."""
    with reading(data, count) as done:
        begin, before = time.perf_counter(), sum(done)
        time.sleep(SECONDS)
        return round((sum(done) - before) / (time.perf_counter() - begin))


def beside(data: RunData) -> dict[str, int]:
    """Small operators/s of a process alone, beside a thread that reads, and beside a reader process."""
    found = {"alone": _operators()}
    with reading(data, 1):
        found["with_thread"] = _operators()
    rows = list(range(MICRO_ROWS))
    readers = ReaderProcesses(data.dataset, data.targets, count=1)
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            readers.read([(rows, [True] * MICRO_ROWS)], pin=False)

    thread = threading.Thread(target=collect)
    thread.start()
    found["with_process"] = _operators()
    stop.set()
    thread.join()
    readers.close()
    return found


def _operators() -> int:
    x, count = torch.zeros(4), 0
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for _ in range(20):
            x.add_(1)
        count += 20
    return round(count / SECONDS)


def loader(data: RunData, readers: int) -> dict[str, int]:
    """Tokens/s of a Loader with so many reader processes."""
    batch = f"batch={{global_batch_size: {STEP_ROWS}, micro_batch_size: {MICRO_ROWS}}}"
    config = load_config(KDConfig, PROJECT_ROOT / "configs/demo.yaml", (batch, "kd_share=1"))
    stream = data.stream(config)
    device = torch.device("cpu")
    loader = Loader(data, stream, config, dp_rank=0, dp_size=1, device=device, readers=readers)
    pids = [] if loader._readers is None else loader._readers.pids()
    for _ in range(4):  # the first reads open the shards
        loader.next()
        loader.finished()
    theirs, own, begin = sum(map(_cpu_of, pids)), time.process_time(), time.perf_counter()
    for _ in range(STEPS):
        loader.next()
        loader.finished()
    wall, own = time.perf_counter() - begin, time.process_time() - own
    theirs = sum(map(_cpu_of, pids)) - theirs
    loader.close()
    tokens = STEPS * STEP_ROWS * SEQ_LEN
    found = {"wall": round(tokens / wall), "own_cpu": round(tokens / own)}
    return found | ({"reader_cpu": round(tokens / theirs)} if pids else {})


def _cpu_of(pid: int) -> float:
    """Seconds of CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures(dataset: Dataset, targets: TargetStore) -> dict[str, float | int]:
    """What is read: entries and bytes a target position."""
    positions = entries = heads = num_bytes = 0
    mass = 0.0
    rows = dataset.num_rows("train")
    for index in range(rows):
        row = dataset.row("train", index)
        num_bytes += len(targets.blob("train", index, row.row_hash) or b"")
        for document in targets.documents("train", index, row) or []:
            assert document is not None
            target = document.target
            positions, entries = positions + len(target.positions_P), entries + len(target.ids_E)
            heads += int(target.num_head_P.sum())
            mass += float((1 - np.exp(target.log_tail_mass_P.astype(np.float64))).sum())
    return {
        "rows": rows,
        "seq_len": dataset.manifest.seq_len,
        "target_positions": positions,
        "entries_per_target": round(entries / positions, 2),
        "head_entries_per_target": round(heads / positions, 2),
        "head_mass": round(mass / positions, 3),
        "bytes_per_target": round(num_bytes / positions, 2),
    }


def _python(*arguments: str, **environment: str) -> str:
    """What a module prints that runs in a process of its own."""
    command, env = [sys.executable, "-m", *arguments], os.environ | environment
    return subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout


def stages(data: Path) -> dict[str, int]:
    """Tokens/s of CPU time of each stage on one thread."""
    dataset = Dataset.open(data)
    targets = TargetStore.open(dataset, SLUG)
    indices = range(dataset.num_rows("train"))
    rows = [dataset.row("train", index) for index in indices]
    blobs = [targets.blob("train", i, row.row_hash) for i, row in zip(indices, rows, strict=True)]
    documents = [
        decode_blob(blob, row, targets.order)
        for blob, row in zip(blobs, rows, strict=True)
        if blob is not None
    ]
    groups = [slice(first, first + MICRO_ROWS) for first in range(0, len(rows), MICRO_ROWS)]

    def read() -> None:
        for index in indices:
            targets.blob("train", index, dataset.row("train", index).row_hash)

    def decode() -> None:
        for blob, row in zip(blobs, rows, strict=True):
            decode_blob(blob or b"", row, targets.order)

    def collate() -> None:
        for group in groups:
            make_batch(rows[group], documents[group])

    def together() -> None:
        reader = RowReader(dataset, targets)
        for group in groups:
            reader.batch("train", indices[group], [True] * len(indices[group]))

    tokens = len(rows) * dataset.manifest.seq_len
    ways = {"read": read, "decode": decode, "collate": collate, "together": together}
    return {name: round(tokens / _cpu_sec(work)) for name, work in ways.items()}


def _cpu_sec(work: Callable[[], None]) -> float:
    """The least CPU time of ROUNDS runs after one that warms up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
