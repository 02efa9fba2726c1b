"""A sealed rollout buffer is a dataset with targets: its readers take it, and `verify` sees each fault."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from common.errors import AlignmentError, ConfigError, ResumeError
from datastore.cli import main
from datastore.manifest import (
    DatasetManifest,
    TargetManifest,
    commit_manifest,
    load_dataset_manifest,
    load_target_manifest,
)
from datastore.reader import Dataset, TargetStore
from datastore.rollout_records import BufferPlace, read_record, write_record
from datastore.rollout_records import SampledRecord as Record
from datastore.rollout_shard import RolloutShard, write_logprob_shard, write_rollout_shard
from datastore.rollouts import RolloutBuffer
from datastore.types import SPLITS
from datastore.verify import verify_dataset
from datastore.verify_buffer import is_unsealed_buffer, verify_buffer
from tests.datastore.rollout_cases import (
    IDENTITY,
    SEQ_LEN,
    SLUG,
    TEACHER,
    content,
    filled,
    held_out,
    open_buffer,
    shard_of,
    targets_for,
    targets_of,
)
from tests.distributed.runs import steps_of, train
from tests.trainer.megatron.tiny import tiny_config
from trainer.batch import make_batch


@pytest.fixture(scope="module")
def prompts(tmp_path_factory, handmade) -> DatasetManifest:
    folder = tmp_path_factory.mktemp("prompts")
    handmade.three_a_row(folder, 512)
    return load_dataset_manifest(folder)


def seal(buffer: RolloutBuffer, prompts: DatasetManifest) -> tuple[DatasetManifest, TargetManifest]:
    valid = held_out()
    return buffer.seal(TEACHER, prompts, valid, targets_for(valid))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, prompts) -> Path:
    folder = tmp_path_factory.mktemp("sealed") / "buffer"
    with filled(folder, shards=3) as buffer:
        seal(buffer, prompts)
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "buffer")
    return tmp_path / "buffer"


def kinds(folder: Path) -> list[str]:
    return sorted(fault.kind for fault in verify_dataset(folder))


def test_a_sealed_buffer_is_a_dataset(whole, prompts) -> None:
    assert verify_dataset(whole) == [] and not is_unsealed_buffer(whole)
    dataset = Dataset.open(whole)
    manifest, info = dataset.manifest, dataset.manifest.rollouts
    assert (info.prompts, info.identity) == (prompts.fingerprint, IDENTITY)
    assert manifest.sources == prompts.sources and manifest.seq_len == SEQ_LEN
    assert {split: counts.rollouts for split, counts in info.counts.items()} == {
        "train": 18,
        "valid": 4,
    }
    assert info.counts["train"].verdicts == {
        "valid": 6,
        "cut_reasoning": 3,
        "cut_final": 6,
        "end_of_text": 3,
    }
    assert (info.counts["train"].first_version, info.counts["valid"].last_version) == (0, 9)
    store = TargetStore.open(dataset, SLUG)
    for split in SPLITS:
        assert dataset.num_rows(split) == store.scored_rows(split).size > 0
    buffer = RolloutBuffer.open_reader(whole)
    index = 0
    for shard in range(3):
        for scored in buffer.rows(shard):
            row = dataset.row("train", index)
            assert row.row_hash == scored.row.row_hash
            for one, other in zip(
                store.documents("train", index, row), scored.documents, strict=True
            ):
                assert one.content_key == other.content_key
                assert one.target.weights_E.tobytes() == other.target.weights_E.tobytes()
            index += 1
    assert index == dataset.num_rows("train")


def test_sealing_again_changes_nothing_and_nothing_can_be_added(folder, prompts) -> None:
    before = content(folder)
    with open_buffer(folder) as buffer:
        manifest, targets = seal(buffer, prompts)
        with pytest.raises(ResumeError, match="sealed"):
            buffer.append(shard_of(3))
        with pytest.raises(ResumeError, match="sealed"):
            buffer.add_targets(0, [])
    assert manifest == load_dataset_manifest(folder)
    assert targets == load_target_manifest(folder, SLUG)
    assert content(folder) == before


def test_a_seal_that_was_killed_is_done_again(whole, folder, prompts) -> None:
    (folder / "manifest.json").unlink()
    with open_buffer(folder) as buffer:
        assert not list((folder / "valid").glob("*.arrow"))
        seal(buffer, prompts)
    assert content(folder) == content(whole)


def test_what_is_not_scored_cannot_be_sealed(tmp_path, prompts) -> None:
    with open_buffer(tmp_path) as buffer:
        with pytest.raises(ResumeError, match="no shard"):
            seal(buffer, prompts)
        for number in range(3):
            buffer.append(shard_of(number))
        buffer.add_targets(1, targets_of(buffer, 1))
        with pytest.raises(ResumeError, match=r"no targets of 2 shards \(0, 2\)"):
            seal(buffer, prompts)
        assert not (tmp_path / "manifest.json").exists()


def test_another_teacher_is_refused(tmp_path, prompts) -> None:
    with filled(tmp_path, shards=1) as buffer, pytest.raises(ConfigError, match="threshold"):
        buffer.seal(TEACHER | {"threshold": 0.1}, prompts)


def test_too_little_to_judge_is_not_sealed(tmp_path, prompts) -> None:
    with open_buffer(tmp_path) as buffer:
        buffer.append(shard_of(0)[:1])
        buffer.add_targets(0, targets_of(buffer, 0))
        with pytest.raises(AlignmentError, match=r"too few scored tokens.*longer ones"):
            buffer.seal(TEACHER, prompts)
    assert not list(tmp_path.rglob("manifest.json"))
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path), "--row", "0"])
    assert shown.exit_code == 1 and "its run seals it after the last step" in shown.output


def test_without_held_out_rollouts_the_valid_split_is_empty(tmp_path, prompts) -> None:
    with filled(tmp_path, shards=2) as buffer:
        buffer.seal(TEACHER, prompts)
    assert Dataset.open(tmp_path).num_rows("valid") == 0
    assert verify_dataset(tmp_path) == []


def test_an_unsealed_buffer_is_verified_as_far_as_it_is(tmp_path, handmade) -> None:
    with filled(tmp_path, shards=2) as buffer:
        buffer.append(shard_of(2))
        assert is_unsealed_buffer(tmp_path)
        assert verify_buffer(tmp_path) == []
        shown = CliRunner().invoke(main, ["verify", str(tmp_path), "--workers", "1"])
        assert shown.exit_code == 0
        assert "not sealed" in shown.stdout and "3 sampled, 2 of them with targets" in shown.stdout
    for name in (
        "train",
        "rollouts/train",
        f"targets/{SLUG}/train",
        f"targets/{SLUG}/logprobs/train",
    ):
        path = tmp_path / name / "shard-00001.arrow"
        handmade.flip_bit(path, 8 * (path.stat().st_size // 2))
        (fault,) = [one for one in verify_buffer(tmp_path) if one.kind == "file sha256"]
        assert fault.file == f"{name}/shard-00001.arrow"
        handmade.flip_bit(path, 8 * (path.stat().st_size // 2))


def test_a_record_that_counts_otherwise_is_a_fault(tmp_path) -> None:
    with filled(tmp_path, shards=1) as buffer:
        path = buffer.place.sampled("train", 0)
    record = read_record(Record, path)
    for update, kind in (
        ({"counts": record.counts.model_copy(update={"final": 1})}, "rollout counts"),
        ({"row_counts": record.row_counts.model_copy(update={"final": 1})}, "counts"),
    ):
        write_record(path, record.model_copy(update=update))
        assert [fault.kind for fault in verify_buffer(tmp_path)] == [kind]
    path.write_bytes(b"{}")
    assert [fault.kind for fault in verify_buffer(tmp_path)] == ["record"]


def rewrite_rollouts(folder: Path, change) -> list[str]:
    """The faults of a sealed buffer whose first rollouts were changed before the real writer hashed them."""
    manifest = load_dataset_manifest(folder)
    place = {"dataset_id": manifest.dataset_id, "split": "train", "shard": 0}
    entry = manifest.rollouts.files["train"][0]
    shard = RolloutShard(folder / "rollouts", entry, **place)
    stored = [shard.rollout(index)[0] for index in range(entry.rows)]
    stored[0] = dataclasses.replace(stored[0], **change(stored[0]))
    entry = write_rollout_shard(folder / "rollouts", stored, **place)
    files = manifest.rollouts.files
    files = files | {"train": (entry, *files["train"][1:])}
    info = manifest.rollouts.model_copy(update={"files": files})
    commit_manifest(folder, manifest.model_copy(update={"rollouts": info}))
    faults = {fault.kind: fault for fault in verify_dataset(folder)}
    return sorted(faults)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda one: {"verdict": "valid"}, ["rollout", "rollout counts"]),
        (lambda one: {"policy_version": 5}, ["policy versions", "rollout", "rollout counts"]),
        (lambda one: {"policy_version": -1}, ["rollout", "rollout counts"]),
        (lambda one: {"prompt": 99}, ["rollout"]),
        (lambda one: {"prompt_id": bytes(16)}, ["rollout", "rollout prompts"]),
        (lambda one: {"reasoning": "high"}, ["rollout counts", "rollout prompts"]),
        (lambda one: {"row_hash": 7}, ["rollout"]),
        (lambda one: {"final_tokens": 7}, ["rollout", "rollout counts"]),
        (lambda one: {"logprobs_S": one.logprobs_S[1:]}, ["rollout"]),
        (lambda one: {"logprobs_S": -one.logprobs_S}, ["rollout logprobs"]),
        (lambda one: {"logprobs_S": one.logprobs_S - np.float32(np.inf)}, ["rollout logprobs"]),
    ],
)
def test_a_rollout_that_contradicts_its_tokens_is_a_fault(folder, change, expected) -> None:
    # The teacher's logprobs are bound to the hash of the rollout that was changed.
    assert rewrite_rollouts(folder, change) == sorted([*expected, "teacher logprobs"])


def test_a_rollout_at_the_place_of_another_is_a_fault(folder) -> None:
    manifest = load_dataset_manifest(folder)
    shard = RolloutShard(
        folder / "rollouts",
        manifest.rollouts.files["train"][0],
        dataset_id=manifest.dataset_id,
        split="train",
        shard=0,
    )
    other = shard.rollout(1)[0]
    found = rewrite_rollouts(folder, lambda one: {"row": other.row, "document": other.document})
    assert found == ["rollout", "rollout counts"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda exact: exact - np.float32(0.1), "nats from that of the targets"),
        (lambda exact: np.minimum(exact + np.float32(0.1), 0), "nats from that of the targets"),
        (lambda exact: exact * np.float32(np.nan), "not finite"),
        (lambda exact: exact[1:], "logprobs of"),
    ],
)
def test_teacher_logprobs_that_are_not_those_of_the_targets_are_a_fault(
    folder, change, message
) -> None:
    buffer = RolloutBuffer.open_reader(folder)
    rollouts = buffer.read_shard("train", 0).rollouts
    exact = {
        sampled.sampling_logprob_S.tobytes(): sampled.teacher_logprob_S
        for scored in buffer.rows(0)
        for sampled in scored.sampled
    }
    logprobs = [(of, exact[one.logprobs_S.tobytes()]) for one, of in rollouts]
    logprobs[2] = logprobs[2][0], change(logprobs[2][1])
    manifest = load_target_manifest(folder, SLUG)
    entry = write_logprob_shard(
        folder / "targets" / SLUG / "logprobs",
        logprobs,
        target_id=manifest.target_id,
        split="train",
        shard=0,
    )
    files = manifest.logprobs | {"train": (entry, *manifest.logprobs["train"][1:])}
    commit_manifest(
        BufferPlace(folder, SLUG).targets, manifest.model_copy(update={"logprobs": files})
    )
    (fault,) = verify_dataset(folder)
    assert (fault.kind, fault.row) == ("teacher logprobs", 2) and message in fault.message


def test_files_that_are_absent_or_not_listed_are_faults(folder) -> None:
    rollouts, logprobs = folder / "rollouts/train", folder / f"targets/{SLUG}/logprobs/train"
    shutil.copy(rollouts / "shard-00000.arrow", rollouts / "shard-00009.arrow")
    (logprobs / "shard-00001.arrow").unlink()
    faults = {fault.kind: fault for fault in verify_dataset(folder)}
    assert faults["unlisted file"].file == "rollouts/train/shard-00009.arrow"
    assert faults["missing file"].file == f"targets/{SLUG}/logprobs/train/shard-00001.arrow"


def test_counts_that_the_manifest_states_wrongly_are_a_fault(folder) -> None:
    manifest = load_dataset_manifest(folder)
    counts = manifest.rollouts.counts
    wrong = counts["train"].model_copy(update={"modes": {"low": 18}})
    info = manifest.rollouts.model_copy(update={"counts": counts | {"train": wrong}})
    commit_manifest(folder, manifest.model_copy(update={"rollouts": info}))
    assert kinds(folder) == ["rollout counts"]


def test_the_reports_show_rollouts(whole) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(whole), "--row", "1"], catch_exceptions=False)
    assert shown.exit_code == 0
    for word in ("cut_reasoning", "medium", "policy version", "cut_reasoning"):
        assert word in shown.stdout
    stats = CliRunner().invoke(main, ["stats", str(whole)], catch_exceptions=False).stdout
    assert "train: 18 rollouts; cut_final 33.3%, valid 33.3%, cut_reasoning 16.7%" in stats
    assert "policy versions 0 to 1" in stats


def test_a_repack_refuses_rollouts(whole, tmp_path) -> None:
    done = CliRunner().invoke(main, ["repack", str(whole), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2 and "dataset of rollouts" in done.output


def test_an_old_manifest_is_still_read(folder) -> None:
    """One that was written before there were rollouts lacks their keys."""
    manifest = load_dataset_manifest(folder)
    values = manifest.model_dump(exclude={"rollouts"})
    assert DatasetManifest(**values).rollouts is None
    targets = load_target_manifest(folder, SLUG).model_dump(exclude={"logprobs"})
    assert TargetManifest(**targets).logprobs is None


def test_rows_of_a_buffer_make_a_batch(whole) -> None:
    scored = RolloutBuffer.open_reader(whole).rows(0)
    batch = make_batch([one.row for one in scored], [one.documents for one in scored])
    for number, one in enumerate(scored):
        sampled = sum(len(values.sampling_logprob_S) for values in one.sampled)
        assert int(batch.has_target_BT[number].sum()) == sampled
    assert torch.isfinite(batch.teacher_logprob_BT).all()


@pytest.mark.slow
def test_kd_trains_on_a_sealed_buffer(whole, tmp_path) -> None:
    student = tiny_config().student.resolved()
    student |= {"vocab_size": 201_088, "hidden": 16, "head_dim": 4}
    values = {
        "dataset": str(whole),
        "teacher": SLUG,
        "student": student,
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"lr": 1e-2},
        "steps": 6,
        "eval": {"every": 3, "rows": 4},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(**values).resolved()))
    train(1, path, tmp_path / "run")
    losses = [value for _, value in steps_of(tmp_path / "run", "loss/total")]
    assert len(losses) == 6 and losses[-1] < losses[0]
