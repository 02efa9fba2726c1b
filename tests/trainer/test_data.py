"""What a run reads: every rank's micro-batches together are the stream's global batches, targets by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import AlignmentError, ConfigError
from tests.datastore import conftest as made
from tests.trainer.megatron.tiny import tiny_config
from trainer.data import Loader, RunData, uses_targets, valid_batches

SEQ_LEN = 192


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [made.pack([made.document(number)], SEQ_LEN) for number in range(13)]
    made.write_dataset(
        folder, {"train": [rows[:5], rows[5:8]], "valid": [rows[8:]]}, seq_len=SEQ_LEN
    )
    made.write_targets(folder, unscored=(2,))
    return folder


def _config(dataset: Path, **changes):
    student = tiny_config().student.resolved() | {"vocab_size": 201_088}
    return tiny_config(dataset=str(dataset), student=student, **changes)


def _read(dataset: Path, dp_size: int, micro: int, steps: int) -> list[list[tuple[bytes, bool]]]:
    """Per step the rows in global order, each as its tokens and whether it has targets."""
    config = _config(
        dataset, batch={"global_batch_size": 4, "micro_batch_size": micro}, kd_share=0.5
    )
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
        read.append(
            [
                (tokens_T.numpy().tobytes(), bool(scored_T.any()))
                for batch in batches
                for tokens_T, scored_T in zip(batch.tokens_BT, batch.has_target_BT, strict=True)
            ]
        )
    assert all(loader.stream.consumed == 4 * steps for loader in loaders)
    for loader in loaders:
        loader.close()
    return read


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 2), (2, 1), (2, 2), (4, 1)])
def test_any_cut_reads_the_same_global_batches(dataset, dp_size, micro) -> None:
    whole = _read(dataset, 1, 4, steps=5)
    assert _read(dataset, dp_size, micro, steps=5) == whole
    assert len({tokens for step in whole[:2] for tokens, _ in step}) == 8


def test_a_share_of_the_rows_uses_targets() -> None:
    for share in (0.0, 0.25, 0.3, 0.5, 1.0):
        used_P = uses_targets(np.arange(1000), share)
        assert abs(used_P.sum() - 1000 * share) < 1 + 1e-9
        windows = np.lib.stride_tricks.sliding_window_view(used_P, 16).sum(axis=1)
        assert windows.max() - windows.min() <= 1
    np.testing.assert_array_equal(
        uses_targets(np.arange(40), 0.3)[17:], uses_targets(np.arange(17, 40), 0.3)
    )


@pytest.mark.parametrize("dp_size", [1, 2, 3])
def test_evaluation_reads_every_valid_row_once_and_as_often_on_each_rank(dataset, dp_size) -> None:
    data = RunData.open(_config(dataset))
    ranks = [
        list(valid_batches(data, rows=None, dp_rank=r, dp_size=dp_size, micro_batch_size=2))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
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
