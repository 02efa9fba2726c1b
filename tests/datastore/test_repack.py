"""Another packing of the same documents: nothing of a document or of its targets changes, whatever interrupts it."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common.config import PROJECT_ROOT
from common.errors import ConfigError, FormatError, ResumeError, SourceError, VpmoeError
from common.files import exclusive_lock, sha256_file
from datastore.build import build_dataset
from datastore.cli import main
from datastore.data_config import DataConfig
from datastore.manifest import QuarantinedDocument, load_target_manifest
from datastore.packing import PackConfig, pack_documents
from datastore.reader import Dataset, TargetStore
from datastore.repack import repack_dataset
from datastore.repack_targets import _Stock
from datastore.selection import Selection
from datastore.types import SPLITS, DocTarget, RenderedDoc
from datastore.verify import verify_dataset
from demo.sample import write_sample
from tests.trainer.megatron.tiny import tiny_config
from trainer.data import RunData

SELECTION = Selection(fraction=0.7, min_tokens=60)
SMALL = ("pack.window=40",)


@pytest.fixture(scope="module")
def origin(small_dataset, handmade, tmp_path_factory) -> Path:
    """Rows of 256 tokens with the targets of two teachers: `tiny` scored all, `part` a part, one document in vain."""
    folder = tmp_path_factory.mktemp("origin") / "dataset"
    shutil.copytree(small_dataset, folder)
    handmade.write_targets(folder)
    dataset = Dataset.open(folder)
    split, index, number = next(
        (split, index, int(chosen[0]))
        for split in reversed(SPLITS)
        for index in range(dataset.num_rows(split))
        if len(chosen := np.flatnonzero(SELECTION.documents(dataset.row(split, index)))) > 1
    )
    shard, row = dataset.locate(split, index)
    failed = dataset.row(split, index).doc_ids[number]

    def documents_of(packed):
        chosen_D = SELECTION.documents(packed)
        return [
            document if chosen and doc_id != failed else None
            for document, chosen, doc_id in zip(
                handmade.row_documents(packed), chosen_D, packed.doc_ids, strict=True
            )
        ]

    quarantined = QuarantinedDocument(
        split=split, shard=shard, row=row, document=number, doc_id=failed.hex(), reason="poison"
    )
    handmade.write_targets(
        folder,
        slug="part",
        documents_of=documents_of,
        selection=SELECTION.resolved(),
        quarantine=(quarantined,),
    )
    assert verify_dataset(folder, workers=1) == []
    return folder


@pytest.fixture(scope="module")
def repacked(origin, tmp_path_factory) -> Path:
    """The same documents in rows of 384 tokens."""
    out = tmp_path_factory.mktemp("repacked") / "out"
    repack_dataset(origin, out, seq_len=384, overrides=SMALL, workers=1)
    return out


def values(target: DocTarget | None) -> tuple | None:
    """Every bit of a document's targets."""
    if target is None:
        return None
    stored = dataclasses.asdict(target.target)
    arrays = [v.tobytes() if isinstance(v, np.ndarray) else v for v in stored.values()]
    return (target.content_key, *arrays, *dataclasses.astuple(target.entropy_sums))


def documents(folder: Path, slug: str) -> dict[bytes, tuple]:
    """All that is stored of each document, by its id: split, tokens, spans, labels, targets."""
    dataset = Dataset.open(folder)
    store, found = TargetStore.open(dataset, slug), {}
    for split in SPLITS:
        for index in range(dataset.num_rows(split)):
            row = dataset.row(split, index)
            targets = store.documents(split, index, row) or [None] * len(row.doc_ids)
            labels = zip(row.languages, row.exercises, strict=True)
            parts = zip(row.documents(), row.doc_ids, labels, targets, strict=True)
            for place, doc_id, label, target in parts:
                assert doc_id not in found
                tokens, spans = row.tokens_T[place].tobytes(), row.spans_T[place].tobytes()
                found[doc_id] = (split, tokens, spans, label, values(target))
    return found


def content(folder: Path) -> dict[str, object]:
    """The hash of every file that is not state of the work; the dataset's manifest without the code's revision."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["git_sha"], manifest["self_sha256"]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes: dict[str, object] = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in files
        if path.parent.name != ".work"
    }
    return hashes | {"manifest.json": manifest}


@pytest.mark.parametrize("slug", ["tiny", "part"])
def test_every_document_and_its_targets_are_the_same_bit_by_bit(origin, repacked, tmp_path, slug):
    before = documents(origin, slug)
    assert documents(repacked, slug) == before
    has_targets = [document[-1] is not None for document in before.values()]
    assert all(has_targets) if slug == "tiny" else 0.3 < np.mean(has_targets) < 0.7
    repack_dataset(repacked, tmp_path / "back", seq_len=256, teachers=(slug,), workers=1)
    assert documents(tmp_path / "back", slug) == before
    rows = [Dataset.open(folder).num_rows("train") for folder in (origin, repacked)]
    assert rows[1] < rows[0]


def test_the_result_verifies_and_says_where_it_comes_from(origin, repacked):
    assert verify_dataset(repacked, workers=1) == []
    before, after = Dataset.open(origin).manifest, Dataset.open(repacked).manifest
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


@pytest.mark.parametrize("slug", ["tiny", "part"])
def test_the_target_manifest_keeps_what_it_says_of_the_teacher(origin, repacked, slug):
    before, after = load_target_manifest(origin, slug), load_target_manifest(repacked, slug)
    assert after.target_id != before.target_id
    assert after.origin == {
        "dataset": before.dataset_fingerprint,
        "target_id": before.target_id,
    }
    changed = {"target_id", "dataset_fingerprint", "origin", "files", "counts", "budget"}
    changed |= {"shard_budgets", "quarantine", "alignment"}
    assert after.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert after.counts == before.counts
    assert after.alignment["positions"] > 100
    for name in ("reasoning", "final", "control"):
        was, now = before.budget[name], after.budget[name]
        assert now["positions"] == was["positions"]
        # What cannot be seen in stored targets is carried, the rest recounted from the stored steps of 1/64 nat.
        assert now["kl_mean"] == pytest.approx(was["kl_mean"], rel=1e-9)
        assert now["kl_max"] == was["kl_max"] > 0
        assert now["entries"] == was["entries"]
        assert now["entropy"] == pytest.approx(was["entropy"], rel=1e-5)
        for figure in ("head_mass", "tail_mass", "realised_logprob"):
            assert now[figure] == pytest.approx(was[figure], abs=1 / 64)


def test_quarantined_documents_are_found_at_their_new_places(origin, repacked):
    (before,) = load_target_manifest(origin, "part").quarantine
    (after,) = load_target_manifest(repacked, "part").quarantine
    assert (after.doc_id, after.reason) == (before.doc_id, "poison")
    dataset = Dataset.open(repacked)
    rows = list(dataset.shard_rows(after.split, after.shard))
    assert rows[after.row].doc_ids[after.document].hex() == before.doc_id


def test_documents_longer_than_a_row_are_left_out_and_counted(origin, tmp_path):
    before = documents(origin, "tiny")
    fitting = {key: doc for key, doc in before.items() if len(doc[1]) // 4 <= 110}
    manifest, _ = repack_dataset(origin, tmp_path / "out", seq_len=110, workers=1)
    assert 0 < len(fitting) < len(before)
    assert documents(tmp_path / "out", "tiny") == fitting
    was = Dataset.open(origin).manifest.rejects
    assert manifest.rejects == was | {"longer_than_seq_len": len(before) - len(fitting)}
    assert manifest.config["max_doc_tokens"] == 110
    assert verify_dataset(tmp_path / "out", workers=1) == []


def test_a_length_that_no_document_fits_is_an_error(origin, tmp_path):
    with pytest.raises(SourceError, match=r"longer_than_seq_len.*larger --seq-len"):
        repack_dataset(origin, tmp_path / "out", seq_len=20, workers=1)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(("slug", "share"), [("tiny", 1.0), ("part", 0.5)])
def test_the_trainer_reads_it(repacked, slug, share):
    student = tiny_config().student.resolved() | {"vocab_size": 201_088}
    config = tiny_config(dataset=str(repacked), teacher=slug, student=student, kd_share=share)
    data = RunData.open(config)  # budgets and gate included
    scored = data.scored["train"].select(np.arange(4)).tolist()
    batch = data.batch("train", scored, [True] * 4)
    targets = [document for i in scored for document in read(repacked, slug, i)]
    assert int(batch.has_target_BT.sum()) == sum(
        len(document.target.positions_P) for document in targets if document
    )


def read(folder: Path, slug: str, index: int) -> list[DocTarget | None]:
    dataset = Dataset.open(folder)
    store = TargetStore.open(dataset, slug)
    return store.documents("train", index, dataset.row("train", index))


def test_two_workers_write_the_same_bytes(origin, repacked, tmp_path):
    repack_dataset(origin, tmp_path / "out", seq_len=384, overrides=SMALL, workers=2)
    assert content(tmp_path / "out") == content(repacked)


def test_a_finished_repack_is_left_alone_and_another_teacher_can_follow(origin, repacked, tmp_path):
    out = tmp_path / "out"
    repack_dataset(origin, out, seq_len=384, overrides=SMALL, teachers=("tiny",), workers=1)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.*") if path.is_file()}
    repack_dataset(origin, out, seq_len=384, overrides=SMALL, workers=1)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert content(out) == content(repacked)


def test_the_command(origin, repacked, tmp_path):
    out = tmp_path / "out"
    arguments = [str(origin), "--seq-len", "384", "--out", str(out), *SMALL, "--workers", "1"]
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

origin, out = map(Path, sys.argv[1:])

def repack(out, kill_at):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    real, calls = os.replace, 0
    def replace(*names):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*names)
    os.replace = replace
    repack_dataset(origin, out, seq_len=300, workers=1)
    os._exit(0)

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
def test_a_full_disk_is_told_and_the_repack_can_go_on(origin, repacked, tmp_path, rename):
    def repack() -> None:
        repack_dataset(origin, tmp_path / "out", seq_len=384, overrides=SMALL, workers=1)

    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.MonkeyPatch.context() as patch:
        stop_at_rename(patch, rename, full)
        with pytest.raises(VpmoeError, match=r"full.*same command"):
            repack()
    repack()
    assert content(tmp_path / "out") == content(repacked)


def test_finished_target_shards_are_kept_and_a_damaged_one_is_made_again(
    origin, repacked, tmp_path
):
    def repack() -> None:
        repack_dataset(origin, tmp_path / "out", seq_len=384, overrides=SMALL, workers=1)

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
def test_killed_with_its_workers_at_work_and_started_again(origin, repacked, tmp_path):
    command = [sys.executable, "-c", "from datastore.cli import main; main()", "repack"]
    command += [str(origin), "--seq-len", "384", "--out", str(tmp_path / "out"), *SMALL]
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
    origin, repacked, small_dataset
):
    with pytest.raises(ResumeError, match=r"config\.seq_len: 384 -> 512"):
        repack_dataset(origin, repacked, seq_len=512, overrides=SMALL, workers=1)
    config = Dataset.open(small_dataset).manifest.config | {"out": str(repacked), "seq_len": 384}
    with pytest.raises(ResumeError, match=r"origin.* -> null"):
        build_dataset(DataConfig(**config), workers=1)


def test_a_second_process_is_refused(origin, tmp_path):
    with (
        exclusive_lock(tmp_path / "out" / ".work" / "lock", "test"),
        pytest.raises(ResumeError, match="another process"),
    ):
        repack_dataset(origin, tmp_path / "out", seq_len=384, workers=1)


@pytest.mark.parametrize("where", [".", "inside", ".."])
def test_the_origin_is_never_written_to(origin, where):
    before = content(origin)
    with pytest.raises(ConfigError, match="apart from"):
        repack_dataset(origin, origin / where, seq_len=384, workers=1)
    assert content(origin) == before


@pytest.mark.parametrize("override", ["seq_len=512", "render.reasoning=low", "pack.windw=3"])
def test_only_the_packing_can_be_changed(origin, tmp_path, override):
    with pytest.raises(ConfigError, match=r"pack\.key=value|did you mean 'window'"):
        repack_dataset(origin, tmp_path / "out", overrides=(override,), workers=1)


def test_targets_that_are_absent_or_damaged_stop_it(origin, tmp_path):
    with pytest.raises(FormatError, match="no target store"):
        repack_dataset(origin, tmp_path / "out", teachers=("absent",), workers=1)
    damaged = tmp_path / "damaged"
    shutil.copytree(origin, damaged)
    shard = damaged / "targets/tiny/train/shard-00001.arrow"
    stored = bytearray(shard.read_bytes())
    stored[len(stored) // 2] ^= 1
    shard.write_bytes(stored)
    with pytest.raises(FormatError, match=r"tiny/train/shard-00001"):
        repack_dataset(damaged, tmp_path / "out", seq_len=384, workers=1)
    assert not (tmp_path / "out" / "targets/tiny/manifest.json").exists()


def test_other_targets_under_the_name_of_the_teacher_are_kept(origin, repacked, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(repacked, out)
    path = out / "targets" / "tiny" / "manifest.json"
    path.unlink()
    identity = out / "targets" / "tiny" / ".work" / "identity.json"
    identity.write_text(json.dumps({"dataset": "of a scoring"}))
    with pytest.raises(ResumeError, match="other targets"):
        repack_dataset(origin, out, seq_len=384, overrides=SMALL, workers=1)


def test_only_the_targets_of_a_window_are_held():
    lengths = np.random.RandomState(0).randint(10, 40, 500).tolist()
    numbered = [
        RenderedDoc(
            doc_id=number.to_bytes(16, "big"),
            tokens_T=np.zeros(length, np.int32),
            spans_T=np.ones(length, np.uint8),
            language="",
            exercise="",
        )
        for number, length in enumerate(lengths)
    ]
    read = 0

    def stored():
        nonlocal read
        for document in numbered:
            read += 1
            yield (document.doc_id, 0), None

    stock, taken = _Stock(stored()), 0
    for row in pack_documents(numbered, seq_len=64, config=PackConfig(window=32)):
        for doc_id in row.doc_ids:
            assert stock.take((doc_id, 0)) is None
            taken += 1
        assert read - taken <= 32
    assert taken == 500
    with pytest.raises(FormatError, match="not in its origin"):
        stock.take((bytes(16), 0))
