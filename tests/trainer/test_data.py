"""What a run reads: every rank's micro-batches together are the stream's global batches, targets by position."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import AlignmentError, ConfigError, FormatError
from datastore.reader import Dataset, TargetStore
from tests.datastore import conftest as made
from tests.trainer.megatron.tiny import tiny_config
from trainer.data import Loader, RunData, valid_batches
from trainer.readers import ReaderProcesses

SEQ_LEN = 288


ROWS = [(number,) for number in range(8)] + [(8,), (9, 13), (10,), (11,), (12,)]


def _write(folder: Path, **targets) -> Path:
    """Eight train rows in two shards, five valid rows; the second of these holds two documents, each other row one."""
    rows = [made.pack([made.document(number) for number in numbers], SEQ_LEN) for numbers in ROWS]
    shards = {"train": [rows[:5], rows[5:8]], "valid": [rows[8:]]}
    made.write_dataset(folder, shards, seq_len=SEQ_LEN)
    made.write_targets(folder, **targets)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every train row is scored."""
    return _write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def partial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows 1, 2, 5 and 6 of train are scored, and the first documents of rows 1 and 2 of valid."""

    def documents_of(row):
        documents = made.row_documents(row)
        return [documents[0]] + [None] * (len(documents) - 1)

    folder = tmp_path_factory.mktemp("partial")
    return _write(folder, unscored=(0, 3, 4, 7), documents_of=documents_of)


def _config(dataset: Path, **changes):
    student = tiny_config().student.resolved() | {"vocab_size": 201_088}
    return tiny_config(dataset=str(dataset), student=student, **changes)


def _read(
    dataset: Path, dp_size: int, micro: int, steps: int, kd_share: float = 0.5
) -> list[list[tuple[bytes, bool]]]:
    """Per step the rows in global order, each as its tokens and whether it has targets."""
    batch = {"global_batch_size": 4, "micro_batch_size": micro}
    config = _config(dataset, batch=batch, kd_share=kd_share)
    data = RunData.open(config)
    loaders = [
        Loader(
            data,
            data.stream(config),
            config,
            dp_rank=r,
            dp_size=dp_size,
            device=torch.device("cpu"),
        )
        for r in range(dp_size)
    ]
    read = []
    for _ in range(steps):
        batches = [batch for loader in loaders for batch in loader.next()]
        for loader in loaders:
            loader.finished()
        read.append(
            [
                (tokens_T.numpy().tobytes(), bool(scored_T.any()))
                for batch in batches
                for tokens_T, scored_T in zip(batch.tokens_BT, batch.has_target_BT, strict=True)
            ]
        )
    assert all(loader.stream.consumed == 4 * steps for loader in loaders)
    return read


@pytest.mark.parametrize("name", ["dataset", "partial"])
@pytest.mark.parametrize(("dp_size", "micro"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_any_cut_reads_the_same_global_batches(name, dp_size, micro, request) -> None:
    folder = request.getfixturevalue(name)
    whole = _read(folder, 1, 4, steps=5)
    assert _read(folder, dp_size, micro, steps=5) == whole
    assert len({tokens for step in whole[:2] for tokens, _ in step}) == 8
    assert [sum(scored for _, scored in step) for step in whole] == [2] * 5


def test_a_partial_run_mixes_scored_and_plain_rows_by_the_share(partial) -> None:
    dataset = RunData.open(_config(partial)).dataset
    names = {dataset.row("train", i).tokens_T.astype(np.int64).tobytes(): i for i in range(8)}
    for share, scored in ((0.0, 0), (0.25, 1), (0.75, 3), (1.0, 4)):
        rows = [row for step in _read(partial, 1, 4, 4, share) for row in step]
        assert sum(used for _, used in rows) == 4 * scored
        assert {names[tokens] for tokens, used in rows if used} <= {1, 2, 5, 6}
        plain = {names[tokens] for tokens, used in rows if not used}
        assert plain <= (set(range(8)) if share == 0 else {0, 3, 4, 7})
    everything = {names[tokens] for step in _read(partial, 1, 4, 2, 0.0) for tokens, _ in step}
    assert everything == set(range(8))


def test_without_a_teacher_every_row_is_read_and_none_is_scored(partial) -> None:
    config = _config(partial, teacher=None, loss={"kd_weight": 0})
    data = RunData.open(config)
    assert data.stream(config).state()["scored_rows"] == 0
    assert sorted(data.stream(config).peek(0).tolist()) == list(range(8))


def test_a_share_of_nothing_scored_is_refused_before_the_run(tmp_path) -> None:
    folder = _write(tmp_path, documents_of=_only_pairs)
    with pytest.raises(ConfigError, match="kd_share=0"):
        RunData.open(_config(folder, kd_share=0.5))
    opened = Dataset.open(folder)
    data = RunData(opened, TargetStore.open(opened, "tiny"))
    assert [data.scored[split].size for split in ("train", "valid")] == [0, 1]


def _only_pairs(row) -> list:
    """Targets where a row holds two documents, which is in valid alone."""
    documents = made.row_documents(row)
    return documents if len(documents) == 2 else [None]


def test_a_row_whose_targets_vanished_is_an_error(partial) -> None:
    data = RunData.open(_config(partial))
    data.batch("train", [1, 2], [True, True])
    with pytest.raises(FormatError, match="train row 3 has no targets"):
        data.batch("train", [1, 3], [True, True])


def test_evaluation_uses_the_targets_that_there_are(partial) -> None:
    data = RunData.open(_config(partial))
    batches = list(valid_batches(data, rows=None, dp_rank=0, dp_size=1, micro_batch_size=2))
    found = np.concatenate([batch.has_target_BT.any(dim=1).numpy() for batch in batches])
    assert found.tolist() == [False, True, True, False, False, False]  # the last fills the batch
    pair = batches[0].doc_ids_BT[1]
    assert set(pair[batches[0].has_target_BT[1]].tolist()) == {0}


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_evaluation_reads_every_valid_row_once_and_as_often_on_each_rank(dataset, dp_size) -> None:
    data = RunData.open(_config(dataset))
    ranks = [
        list(valid_batches(data, rows=None, dp_rank=r, dp_size=dp_size, micro_batch_size=2))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert {len(batch.tokens_BT) for batches in ranks for batch in batches} == {2}
    seen = [
        tokens_T.numpy().tobytes()
        for batches in ranks
        for batch in batches
        for tokens_T, spans_T in zip(batch.tokens_BT, batch.label_spans_BT, strict=True)
        if spans_T.any()
    ]
    expected = [data.dataset.row("valid", i).tokens_T.astype(np.int64).tobytes() for i in range(5)]
    assert sorted(seen) == sorted(expected)


def test_another_vocabulary_is_refused(dataset) -> None:
    with pytest.raises(ConfigError, match=r"student\.vocab_size"):
        RunData.open(tiny_config(dataset=str(dataset)))


def test_targets_outside_the_budget_are_refused(dataset) -> None:
    with pytest.raises(AlignmentError, match="error budget"):
        RunData.open(_config(dataset, budget={"min_head_mass": 0.999999}))


@pytest.fixture
def loading() -> Iterator[list[Loader]]:
    """Loaders put here are closed."""
    loaders: list[Loader] = []
    yield loaders
    for loader in loaders:
        loader.close()


def _loader(dataset: Path, readers: int, **batch: int) -> Loader:
    config = _config(dataset, batch=batch or {"global_batch_size": 4, "micro_batch_size": 1})
    data = RunData.open(config)
    stream = data.stream(config)
    device = torch.device("cpu")
    return Loader(data, stream, config, dp_rank=0, dp_size=1, device=device, readers=readers)


@pytest.mark.parametrize("readers", [1, 3])
def test_reader_processes_give_what_a_thread_gives(partial, loading, readers: int) -> None:
    """Every tensor of every micro-batch, bit by bit, in order; memory grows with the second, larger loader's."""
    for micro in (1, 2):
        ways = [
            _loader(partial, of, global_batch_size=4, micro_batch_size=micro) for of in (0, readers)
        ]
        loading += ways
        for _ in range(3):
            here, there = (way.next() for way in ways)
            for way in ways:
                way.finished()
            assert len(here) == len(there) == 4 // micro
            for one, other in zip(here, there, strict=True):
                for field in dataclasses.fields(one):
                    mine, theirs = getattr(one, field.name), getattr(other, field.name)
                    assert mine.dtype == theirs.dtype, field.name
                    assert torch.equal(mine, theirs), field.name


def test_batches_outlive_the_memory_that_they_were_read_into(dataset, loading) -> None:
    loader = _loader(dataset, 1)
    loading.append(loader)
    first = loader.next()
    kept = [batch.tokens_BT.clone() for batch in first]
    for _ in range(2):
        loader.finished()
        loader.next()
    loader.close()
    assert all(torch.equal(batch.tokens_BT, mine) for batch, mine in zip(first, kept, strict=True))


def test_what_a_reader_process_finds_is_told_with_its_row(dataset, loading, tmp_path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    loader = _loader(folder, 2)
    loading.append(loader)
    assert loader.problem(60) is None
    loader.next()
    assert loader.problem(60) is None
    for path in (folder / "train").glob("*.arrow"):
        os.truncate(path, path.stat().st_size - 8)
    loader.finished()
    loader.next()
    loader.finished()
    problem = loader.problem(60)
    assert problem is not None and "wrong size" in problem
    assert problem.startswith("cannot read train row ") and "of step 3: shard " in problem


def test_a_reader_process_that_dies_is_told(dataset, loading) -> None:
    loader = _loader(dataset, 2)
    loading.append(loader)
    assert loader.problem(60) is None
    os.kill(loader._readers.pids()[1], signal.SIGKILL)
    loader.next()
    problem = loader.problem(60)
    assert problem is not None and "a reader process died; got exit code -9" in problem


def test_a_reader_process_that_stands_still_is_waited_for_and_can_be_ended(
    dataset, loading
) -> None:
    loader = _loader(dataset, 1)
    loading.append(loader)
    assert loader.problem(60) is None
    os.kill(loader._readers.pids()[0], signal.SIGSTOP)
    loader.next()
    problem = loader.problem(0.2)
    assert problem is not None and problem.startswith("has waited 0.2 s for train row ")
    loader.close()
    problem = loader.problem(60)
    assert problem is not None and "a reader process died" in problem
    _until(lambda: not any(t.name == "reader" and t.is_alive() for t in threading.enumerate()))


def _until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_reader_processes_end_with_their_loader(dataset) -> None:
    """Also one that nobody closed: its pipe ends when the loader is collected."""
    loader = _loader(dataset, 1)
    assert loader.problem(60) is None
    process = loader._readers._processes[0]._process
    del loader
    _until(lambda: process.poll() is not None)
    assert process.returncode == 0


def test_a_dataset_replaced_under_a_run_stops_its_readers(dataset, tmp_path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    opened = Dataset.open(folder)
    shutil.rmtree(folder)
    made.three_a_row(folder, 3 * SEQ_LEN)
    with pytest.raises(FormatError, match="was replaced"):
        ReaderProcesses(opened, None, count=1)
