"""Time of a whole build (rendering, packing, writing, hashing) against tiktoken's own batch encoding of the same text.

    python -m benchmarks.build [--rows 48000] [--source 'FOLDER/*.parquet']

Both run on the same cores, one after the other, alternating; the fastest of each counts, as what the code needs when
the cores are its own. CPU seconds (all processes, user and system) are noted beside wall time: they hold on a machine
that others use too. The source rows are repeated under new ids until there are enough of them; without
--source (or a folder of real rows in VPMOE_SYNTH) they are the generated sample, whose documents are shorter.
"""

from __future__ import annotations

import glob
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import header
from common import tokenizer
from common.config import PROJECT_ROOT
from datastore.build import build_dataset
from datastore.data_config import DataConfig
from datastore.manifest import DatasetManifest
from demo.sample import SCHEMA, write_sample

RESULT = Path(__file__).parent / "results" / "build.json"
TEXTS = ["query", "synthetic_reasoning", "synthetic_answer"]
BATCH_TEXTS = 6000
REPEATS = 3


def write_rows(pattern: str, folder: Path, num_rows: int) -> list[Path]:
    """`num_rows` rows with ids of their own, from the files of `pattern` in turn, as four files."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(glob.glob(pattern)))
    rows = table.select(SCHEMA.names).to_pylist()
    paths = []
    for part in range(4):
        numbers = range(num_rows * part // 4, num_rows * (part + 1) // 4)
        copies = [{**rows[n % len(rows)], "synth_id": f"row-{n}"} for n in numbers]
        paths.append(folder / f"rows-{part}.parquet")
        pq.write_table(pa.Table.from_pylist(copies, schema=SCHEMA), paths[-1], row_group_size=1000)
    return paths


def clock() -> np.ndarray:
    """Now: wall seconds and CPU seconds of this process and its ended children."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return np.array([time.perf_counter(), cpu])


def encode_seconds(paths: list[Path], cores: int) -> np.ndarray:
    """Wall and CPU of tiktoken's encode_ordinary_batch over every text; reading the texts is not counted."""
    encoding, seconds = tokenizer.encoding(), np.zeros(2)
    for path in paths:
        columns = pq.read_table(path, columns=TEXTS).to_pydict()
        texts = [text for name in TEXTS for text in columns[name] if text]
        for start in range(0, len(texts), BATCH_TEXTS):
            batch = texts[start : start + BATCH_TEXTS]
            begin = clock()
            encoding.encode_ordinary_batch(batch, num_threads=cores)
            seconds += clock() - begin
    return seconds


def build_seconds(paths: list[Path], out: Path, cores: int) -> tuple[np.ndarray, DatasetManifest]:
    """Wall and CPU of a whole build from start to manifest, worker processes and their start included."""
    files = tuple(map(str, paths))
    source_rows = sum(pq.read_metadata(path).num_rows for path in paths)
    config = DataConfig(
        source={"files": files}, shard={"source_rows": -(-source_rows // (2 * cores))}, out=str(out)
    )
    begin = clock()
    manifest = build_dataset(config, workers=cores)
    return clock() - begin, manifest


@click.command()
@click.option("--rows", default=48_000, show_default=True)
@click.option("--source", help="Glob of parquet files in the SYNTH schema.")
def main(rows: int, source: str | None) -> None:
    """Measure, print and write benchmarks/results/build.json."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if source is None and (real := os.environ.get("VPMOE_SYNTH")):
            source = f"{real}/*.parquet"
        kind = "real SYNTH rows, repeated" if source else "generated sample, repeated"
        if source is None:
            write_sample(folder / "sample", rows=2000, seed=0)
            source = str(folder / "sample" / "*.parquet")
        paths = write_rows(source, folder, rows)
        encode, build = [], []
        for repeat in range(REPEATS):
            encode.append(encode_seconds(paths, cores))
            seconds, manifest = build_seconds(paths, folder / f"out-{repeat}", cores)
            build.append(seconds)
    encode_sec, encode_cpu = np.round(encode, 3).T.tolist()
    build_sec, build_cpu = np.round(build, 3).T.tolist()
    tokens = sum(counts.tokens for counts in manifest.counts.values())
    result = header(("tiktoken", "pyarrow", "numpy")) | {
        "rows": {"number": rows, "kind": kind, "documents_tokens": tokens},
        "workers": cores,
        "encode_batch_sec": encode_sec,
        "encode_batch_cpu_sec": encode_cpu,
        "build_sec": build_sec,
        "build_cpu_sec": build_cpu,
        "ratio": round(min(build_sec) / min(encode_sec), 3),
        "cpu_ratio": round(min(build_cpu) / min(encode_cpu), 3),
        "build_tokens_per_sec": round(tokens / min(build_sec)),
        "fill": manifest.counts["train"].fill,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(json.dumps(result, indent=2))
    click.echo(f"written to {RESULT.relative_to(PROJECT_ROOT)}")


if __name__ == "__main__":
    main()
