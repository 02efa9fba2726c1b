from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.config import CONFIG_ROOT, PROJECT_ROOT
from common.errors import ResumeError, SourceError, VpmoeError
from common.files import exclusive_lock, sha256_file
from datastore.build import build_dataset
from datastore.data_config import DataConfig
from datastore.harmony import parse
from datastore.reader import Dataset
from datastore.types import SPLITS
from demo.sample import SCHEMA, make_row, write_sample

CLI = [sys.executable, "-c", "from datastore.cli import main; main()", "build"]
SMALL = ("split.valid_fraction=0.15", "shard.source_rows=25", "shard.valid_rows=8", "seq_len=512")


def a_config(sources: list[Path], out: Path, **changes: object) -> DataConfig:
    values: dict[str, object] = {
        "source": {"files": [str(path) for path in sources]},
        "split": {"valid_fraction": 0.15},
        "shard": {"source_rows": 25, "valid_rows": 8},
        "seq_len": 512,
        "out": str(out),
    }
    return DataConfig(**(values | changes))


def command(sources: list[Path], out: Path, workers: int, *more: str) -> list[str]:
    files = f"source.files={json.dumps([str(path) for path in sources])}"
    config = ["--manifest", str(CONFIG_ROOT / "data" / "demo.yaml"), "--workers", str(workers)]
    return [*CLI, *config, *SMALL, files, f"out={out}", *more]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1", **changes}


def content(folder: Path) -> dict[str, object]:
    """Everything a dataset holds: hashes of the files, and the manifest without the code's revision."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["git_sha"], manifest["self_sha256"]
    del manifest["config"]["source"], manifest["config_hash"]
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "manifest.json"]
    return {"manifest": manifest} | {str(p.relative_to(folder)): sha256_file(p) for p in files}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sample(tmp_path_factory.mktemp("sources"), rows=250, seed=3)


@pytest.fixture(scope="module")
def reference(sources, tmp_path_factory) -> Path:
    """The dataset that one process builds without any interruption."""
    out = tmp_path_factory.mktemp("reference") / "out"
    build_dataset(a_config(sources, out), workers=1)
    return out


def documents(folder: Path) -> Iterator[tuple[str, bytes, tuple[str, str], str]]:
    """(split, doc id, (language, exercise), user content) of every document, read back from disk."""
    dataset = Dataset.open(folder)
    for split in SPLITS:
        for index in range(dataset.num_rows(split)):
            row = dataset.row(split, index)
            labels = zip(row.languages, row.exercises, strict=True)
            for place, doc_id, of_doc in zip(row.documents(), row.doc_ids, labels, strict=True):
                yield split, doc_id, of_doc, parse(row.tokens_T[place])[2].text


def test_every_good_row_is_in_the_dataset_once(reference, sources):
    rows = [row for path in sources for row in pq.read_table(path).to_pylist()]
    found, manifest = list(documents(reference)), Dataset.open(reference).manifest
    assert len({doc_id for _, doc_id, _, _ in found}) == len(found)
    assert len(found) + sum(manifest.rejects.values()) == len(rows)
    # Among 250 rows, rows 7, 27, ... 247 are awkward: 13, the ten kinds in turn; six kinds give no document.
    assert manifest.rejects == {
        **{"empty_query": 2, "empty_reasoning": 2, "empty_answer": 1, "missing_id": 1},
        **{"rag_without_sources": 1, "final_too_long": 1},
    }
    assert manifest.truncated == {"analysis": 2, "user": 1}
    named = [row for row in rows if row["synth_id"]]
    asked = {hashlib.blake2b(r["synth_id"].encode(), digest_size=16).digest(): r for r in named}
    for _, doc_id, labels, text in found:
        row = asked[doc_id]
        assert text.endswith(row["query"])
        assert labels == (row["language"] or "", row["exercise"] or "")
    assert len({labels for _, _, labels, _ in found}) > 2


def test_counts_are_those_of_the_rows(reference):
    dataset = Dataset.open(reference)
    for split in SPLITS:
        counts = dataset.manifest.counts[split]
        rows = [dataset.row(split, i) for i in range(dataset.num_rows(split))]
        tokens = sum(int(row.doc_ends_D[-1]) for row in rows)
        by_span = [sum(int((row.spans_T == s).sum()) for row in rows) for s in (1, 2)]
        assert (counts.rows, counts.documents) == (len(rows), sum(len(r.doc_ids) for r in rows))
        assert (counts.tokens, counts.padding) == (tokens, 512 * len(rows) - tokens)
        assert [counts.tokens_by_span.reasoning, counts.tokens_by_span.final] == by_span
        assert counts.control_targets == 8 * counts.documents  # four in each assistant message
        assert counts.fill == pytest.approx(tokens / (512 * len(rows)))
    assert len(dataset.manifest.entries("train")) == 10
    assert len(dataset.manifest.entries("valid")) > 1


def test_no_trace_of_the_work_is_left(reference):
    assert [path.name for path in (reference / ".work").iterdir()] == ["lock"]
    assert not list(reference.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "1"},
        {"LC_ALL": "tr_TR.UTF-8", "TZ": "America/St_Johns", "PYTHONHASHSEED": "77"},
    ],
)
def test_three_workers_anywhere_write_the_same_bytes(reference, sources, tmp_path, changes):
    out = tmp_path / "out"
    done = subprocess.run(
        command(sources, out, 3), env=environment(**changes), capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()
    assert content(out) == content(reference)


def test_where_sources_lie_does_not_matter(reference, sources, tmp_path):
    for path in sources:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = a_config([tmp_path / "*.parquet"], tmp_path / "out")
    assert (
        build_dataset(config, workers=1).fingerprint == Dataset.open(reference).manifest.fingerprint
    )


def test_a_finished_dataset_is_left_alone(reference, sources):
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*") if path.is_file()}
    done = subprocess.run(
        command(sources, reference, 2), env=environment(), capture_output=True, timeout=120
    )
    assert done.returncode == 0
    assert b"nothing to do" in done.stderr
    del before[reference / ".work" / "lock"]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())


# A build that is killed just before its n-th rename, for every n, each time finished by a second one.
_KILL_AT_EVERY_COMMIT = """
import json, os, shutil, signal, sys
from pathlib import Path
from common import tokenizer
from datastore.build import build_dataset
from datastore.data_config import DataConfig
from tests.datastore.killed import run_killed

config = DataConfig(**json.loads(sys.argv[1]))
tokenizer.encoding()

def build(kill_at):
    return run_killed(lambda: build_dataset(config, workers=1), kill_at)

kill_at = 1
while True:
    shutil.rmtree(config.out, ignore_errors=True)
    status = build(kill_at)
    if status == 0:
        break
    assert status == -signal.SIGKILL and not Path(config.out, "manifest.json").exists()
    assert build(None) == 0
    os.rename(config.out, f"{config.out}-{kill_at}")
    kill_at += 1
"""


@pytest.mark.slow
def test_killed_before_any_commit_a_second_run_ends_at_the_same_bytes(tmp_path):
    sources = write_sample(tmp_path / "sources", rows=60, seed=3)
    build_dataset(a_config(sources, tmp_path / "whole"), workers=1)
    config = a_config(sources, tmp_path / "out").resolved()
    subprocess.run(
        [sys.executable, "-c", _KILL_AT_EVERY_COMMIT, json.dumps(config)],
        **{"env": environment(), "check": True, "timeout": 600},
    )
    interrupted = sorted(tmp_path.glob("out-*"))
    assert len(interrupted) == 12  # plan, three units of three files, one valid shard, the manifest
    for folder in interrupted:
        assert content(folder) == content(tmp_path / "whole"), folder.name


@pytest.mark.slow
def test_killed_with_its_workers_at_work_and_started_again(reference, sources, tmp_path):
    out, rng = tmp_path / "out", random.Random(5)
    for num_finished in (0, 3, 6):
        process = subprocess.Popen(
            command(sources, out, 2), env=environment(), stderr=subprocess.DEVNULL
        )
        wait_for(lambda n=num_finished: len(list((out / ".work").glob("unit-*.json"))) >= n)
        time.sleep(rng.uniform(0, 0.1))
        workers = children(process.pid)
        process.kill()
        process.wait()
        # No orphan goes on writing beside the next run.
        wait_for(lambda pids=workers: not any(map(is_alive, pids)))
    assert not (out / "manifest.json").exists()
    done = subprocess.run(command(sources, out, 2), env=environment(), timeout=300)
    assert done.returncode == 0
    assert content(out) == content(reference)


@pytest.mark.slow
def test_a_dead_worker_is_told_and_the_build_can_go_on(reference, sources, tmp_path):
    process = subprocess.Popen(
        command(sources, tmp_path / "out", 2), env=environment(), stderr=subprocess.PIPE
    )
    wait_for(lambda: len(children(process.pid)) >= 2 or process.poll() is not None)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert b"a worker process died" in errors
    config = a_config(sources, tmp_path / "out")
    assert (
        build_dataset(config, workers=1).fingerprint == Dataset.open(reference).manifest.fingerprint
    )


def children(pid: int) -> list[int]:
    """The worker processes of `pid`, oldest first; not the resource tracker of multiprocessing."""
    try:
        pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(p) for p in pids if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, timeout_sec: float = 60.0) -> None:
    end = time.monotonic() + timeout_sec
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def stop_at_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """Let the `number`-th rename of this process fail with `error`, as the system would."""
    real, calls = os.replace, 0

    def replace(*names: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        real(*names)

    monkeypatch.setattr(os, "replace", replace)


def interrupted(config: DataConfig, rename: int) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_rename(patch, rename, KeyboardInterrupt())
        build_dataset(config, workers=1)


@pytest.mark.parametrize("errno_name", ["ENOSPC", "EDQUOT"])
@pytest.mark.parametrize("rename", [1, 2, 12, 33])
def test_a_full_disk_is_told_and_the_build_can_go_on(
    reference, sources, tmp_path, monkeypatch, errno_name, rename
):
    config = a_config(sources, tmp_path / "out")
    full = OSError(getattr(errno, errno_name), "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(VpmoeError, match=r"full.*same command"):
        stop_at_rename(patch, rename, full)
        build_dataset(config, workers=1)
    build_dataset(config, workers=1)
    assert content(tmp_path / "out") == content(reference)


def test_finished_shards_are_kept_and_a_damaged_one_is_made_again(reference, sources, tmp_path):
    config, out = a_config(sources, tmp_path / "out"), tmp_path / "out"
    interrupted(config, rename=20)
    first, second = sorted((out / "train").glob("*.arrow"))[:2]
    damaged = bytearray(second.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    second.write_bytes(damaged)
    kept = first.stat().st_mtime_ns
    build_dataset(config, workers=1)
    assert first.stat().st_mtime_ns == kept
    assert content(out) == content(reference)


@pytest.mark.parametrize("is_finished", [False, True])
def test_another_config_in_the_same_folder_is_refused_with_the_difference(
    sources, tmp_path, is_finished
):
    config = a_config(sources, tmp_path / "out")
    if is_finished:
        build_dataset(config, workers=1)
    else:
        interrupted(config, rename=5)
    other = a_config(sources, tmp_path / "out", seq_len=640, render={"reasoning": "low"})
    with pytest.raises(ResumeError) as error:
        build_dataset(other, workers=1)
    for part in ("config.seq_len: 512 -> 640", 'config.render.reasoning: "high" -> "low"', "out="):
        assert part in str(error.value)


def test_changed_sources_are_refused(sources, tmp_path):
    config = a_config(sources, tmp_path / "out")
    interrupted(config, rename=5)
    with pytest.raises(ResumeError, match=r"sources\.1\.1: .* -> absent"):
        build_dataset(a_config(sources[:1], tmp_path / "out"), workers=1)


def test_a_second_builder_is_refused(sources, tmp_path):
    config = a_config(sources, tmp_path / "out")
    with (
        exclusive_lock(tmp_path / "out" / ".work" / "lock", "test"),
        pytest.raises(ResumeError, match="another process"),
    ):
        build_dataset(config, workers=1)


def test_shards_of_unknown_origin_are_not_overwritten(sources, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "shard-00000.arrow").write_bytes(b"precious")
    with pytest.raises(ResumeError, match="neither a manifest nor a plan"):
        build_dataset(a_config(sources, tmp_path / "out"), workers=1)


@pytest.mark.parametrize(("fraction", "empty"), [(0.0, "valid"), (1.0, "train")])
def test_a_split_may_be_empty(sources, tmp_path, fraction, empty):
    config = a_config(sources, tmp_path / "out", split={"valid_fraction": fraction})
    manifest = build_dataset(config, workers=1)
    assert manifest.counts[empty].rows == 0
    assert manifest.entries(empty) == ()
    assert not list((tmp_path / "out" / empty).glob("*"))
    assert len(list(documents(tmp_path / "out"))) == 242


def write_rows(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path


def test_a_unit_without_documents_keeps_its_number(tmp_path):
    good = [make_row(n, 0) for n in range(6)]
    bad = [{**row, "query": None} for row in good]
    source = write_rows(
        tmp_path / "x.parquet", good + bad + [{**r, "synth_id": f"b{r['synth_id']}"} for r in good]
    )
    shard, split = {"source_rows": 6}, {"valid_fraction": 0.0}
    config = a_config([source], tmp_path / "out", shard=shard, split=split)
    manifest = build_dataset(config, workers=1)
    assert [entry.rows > 0 for entry in manifest.entries("train")] == [True, False, True]
    assert len(list(documents(tmp_path / "out"))) == 12


def test_a_source_without_documents_is_an_error_with_reasons(tmp_path):
    source = write_rows(tmp_path / "x.parquet", [{**make_row(n, 0), "query": ""} for n in range(5)])
    with pytest.raises(SourceError, match="empty_query 5"):
        build_dataset(a_config([source], tmp_path / "out"), workers=1)
    with pytest.raises(SourceError, match="no rows at all"):
        empty = write_rows(tmp_path / "y.parquet", [])
        build_dataset(a_config([empty], tmp_path / "out2"), workers=1)
