"""Another packing of the same documents: nothing of them changes, whatever interrupts it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from common.config import PROJECT_ROOT
from common.errors import ConfigError, ResumeError, SourceError, VpmoeError
from common.files import exclusive_lock
from datastore.build import build_dataset
from datastore.cli import main
from datastore.data_config import DataConfig
from datastore.manifest import load_target_manifest
from datastore.reader import Dataset
from datastore.repack import repack_dataset
from datastore.types import SPLITS
from datastore.verify import verify_dataset
from demo.sample import write_sample
from tests.datastore.repacks import SMALL, content, documents


def test_the_result_verifies_and_says_where_it_comes_from(repack_origin, repacked):
    assert verify_dataset(repacked, workers=1) == []
    before, after = Dataset.open(repack_origin).manifest, Dataset.open(repacked).manifest
    assert after.origin == {
        "fingerprint": before.fingerprint,
        "dataset_id": before.dataset_id,
        "seq_len": 256,
    }
    assert (after.seq_len, after.config["seq_len"], after.config["max_doc_tokens"]) == (
        384,
        384,
        256,
    )
    assert after.config["pack"]["window"] == 40
    assert (after.sources, after.split_rule) == (before.sources, before.split_rule)
    assert (after.rejects, after.truncated) == (before.rejects, before.truncated)
    assert after.dataset_id != before.dataset_id
    for split in SPLITS:
        kept = ("documents", "tokens", "tokens_by_span", "control_targets")
        was, now = before.counts[split], after.counts[split]
        assert [getattr(was, key) for key in kept] == [getattr(now, key) for key in kept]


def test_documents_longer_than_a_row_are_left_out_and_counted(repack_origin, tmp_path):
    before = documents(repack_origin, "tiny")
    fitting = {key: doc for key, doc in before.items() if len(doc[1]) // 4 <= 110}
    manifest, _ = repack_dataset(repack_origin, tmp_path / "out", seq_len=110, workers=1)
    assert 0 < len(fitting) < len(before)
    assert documents(tmp_path / "out", "tiny") == fitting
    was = Dataset.open(repack_origin).manifest.rejects
    assert manifest.rejects == was | {"longer_than_seq_len": len(before) - len(fitting)}
    assert manifest.config["max_doc_tokens"] == 110
    assert verify_dataset(tmp_path / "out", workers=1) == []


def test_a_length_that_no_document_fits_is_an_error(repack_origin, tmp_path):
    with pytest.raises(SourceError, match=r"longer_than_seq_len.*larger --seq-len"):
        repack_dataset(repack_origin, tmp_path / "out", seq_len=20, workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_two_workers_write_the_same_bytes(repack_origin, repacked, tmp_path):
    repack_dataset(repack_origin, tmp_path / "out", seq_len=384, overrides=SMALL, workers=2)
    assert content(tmp_path / "out") == content(repacked)


def test_a_finished_repack_is_left_alone_and_another_teacher_can_follow(
    repack_origin, repacked, tmp_path
):
    out = tmp_path / "out"
    repack_dataset(repack_origin, out, seq_len=384, overrides=SMALL, teachers=("tiny",), workers=1)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.is_file()}
    repack_dataset(repack_origin, out, seq_len=384, overrides=SMALL, workers=1)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert content(out) == content(repacked)


def test_the_command(repack_origin, repacked, tmp_path):
    out = tmp_path / "out"
    arguments = [
        str(repack_origin),
        "--seq-len",
        "384",
        "--out",
        str(out),
        *SMALL,
        "--workers",
        "1",
    ]
    done = CliRunner().invoke(main, ["repack", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    assert load_target_manifest(out, "part").target_id in done.output
    assert content(out) == content(repacked)


# A repack that is killed just before its n-th rename, for every n, each time finished by a second one.
_KILL_AT_EVERY_COMMIT = """
import os, signal, sys
from pathlib import Path
from common import tokenizer
from datastore.repack import repack_dataset
from tests.datastore.killed import run_killed

origin, out = map(Path, sys.argv[1:])
os.fsync = lambda fd: None  # a killed process loses nothing that it wrote; only a power cut would

def repack(out, kill_at):
    return run_killed(lambda: repack_dataset(origin, out, seq_len=300, workers=1), kill_at)

kill_at = 0
while True:
    kill_at += 1
    place = out / str(kill_at)
    status = repack(place, kill_at)
    if status == 0:
        break
    assert status == -signal.SIGKILL and not (place / "targets/tiny/manifest.json").exists()
    assert repack(place, None) == 0
"""


@pytest.mark.slow
def test_killed_before_any_commit_a_second_run_ends_at_the_same_bytes(handmade, tmp_path):
    config = DataConfig(
        source={"files": [str(p) for p in write_sample(tmp_path / "s", rows=30, seed=3)]},
        render={"developer": "Think, then answer."},
        split={"valid_fraction": 0.3},
        shard={"source_rows": 15, "valid_rows": 1},
        seq_len=256,
        out=str(tmp_path / "origin"),
    )
    build_dataset(config, workers=1)
    handmade.write_targets(tmp_path / "origin")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", _KILL_AT_EVERY_COMMIT]
    command += [str(tmp_path / "origin"), str(tmp_path / "out")]
    subprocess.run(command, env=environment, check=True, timeout=600)
    results = sorted((tmp_path / "out").iterdir(), key=lambda path: int(path.name))
    whole = content(results.pop())
    num_valid = len([name for name in whole if name.startswith("valid/")])
    assert num_valid > 1
    # plan, two units of two files, the valid shards, the manifest; identity, order, two files a shard, the manifest.
    assert len(results) == (2 + 4 + num_valid) + (3 + 4 + 2 * num_valid)
    for folder in results:
        assert content(folder) == whole, folder.name


def stop_at_rename(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    real, calls = os.replace, 0

    def replace(*names: object) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        real(*names)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("rename", [1, 6, 24])
def test_a_full_disk_is_told_and_the_repack_can_go_on(repack_origin, repacked, tmp_path, rename):
    def repack() -> None:
        repack_dataset(repack_origin, tmp_path / "out", seq_len=384, overrides=SMALL, workers=1)

    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        stop_at_rename(patch, rename, full)
        with pytest.raises(VpmoeError, match=r"full.*same command"):
            repack()
    repack()
    assert content(tmp_path / "out") == content(repacked)


def test_finished_target_shards_are_kept_and_a_damaged_one_is_made_again(
    repack_origin, repacked, tmp_path
):
    def repack() -> None:
        repack_dataset(repack_origin, tmp_path / "out", seq_len=384, overrides=SMALL, workers=1)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at_rename(patch, 22, KeyboardInterrupt())
        repack()
    first, second, *_ = sorted((tmp_path / "out/targets/part/train").glob("*.arrow"))
    damaged = bytearray(second.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    second.write_bytes(damaged)
    kept = first.stat().st_mtime_ns
    repack()
    assert first.stat().st_mtime_ns == kept
    assert content(tmp_path / "out") == content(repacked)


@pytest.mark.slow
def test_killed_with_its_workers_at_work_and_started_again(repack_origin, repacked, tmp_path):
    command = [sys.executable, "-c", "from datastore.cli import main; main()", "repack"]
    command += [str(repack_origin), "--seq-len", "384", "--out", str(tmp_path / "out"), *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT)}
    first = subprocess.Popen(
        [*command, "--workers", "2"], env=environment, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "out" / "targets").exists() and first.poll() is None:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run([*command, "--workers", "2"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert content(tmp_path / "out") == content(repacked)


def test_another_repack_in_the_same_folder_is_refused_with_the_difference(
    repack_origin, repacked, small_dataset
):
    with pytest.raises(ResumeError, match=r"config\.seq_len: 384 -> 512"):
        repack_dataset(repack_origin, repacked, seq_len=512, overrides=SMALL, workers=1)
    config = Dataset.open(small_dataset).manifest.config | {"out": str(repacked), "seq_len": 384}
    with pytest.raises(ResumeError, match=r"origin.* -> null"):
        build_dataset(DataConfig(**config), workers=1)


def test_a_second_process_is_refused(repack_origin, tmp_path):
    with (
        exclusive_lock(tmp_path / "out" / ".work" / "lock", "test"),
        pytest.raises(ResumeError, match="another process"),
    ):
        repack_dataset(repack_origin, tmp_path / "out", seq_len=384, workers=1)


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_origin_is_never_written_to(repack_origin, where):
    before = content(repack_origin)
    with pytest.raises(ConfigError, match="apart from"):
        repack_dataset(repack_origin, repack_origin / where, seq_len=384, workers=1)
    assert content(repack_origin) == before


@pytest.mark.parametrize("override", ["seq_len=512", "render.reasoning=low", "pack.windw=3"])
def test_only_the_packing_can_be_changed(repack_origin, tmp_path, override):
    with pytest.raises(ConfigError, match=r"pack\.key=value|did you mean 'window'"):
        repack_dataset(repack_origin, tmp_path / "out", overrides=(override,), workers=1)
