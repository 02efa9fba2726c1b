"""The order of ids: a permutation by counted frequency, on disk under its hash."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from common.errors import FormatError
from common.files import sha256_bytes
from common.tokenizer import VOCAB_SIZE
from datastore import id_order
from datastore.id_order import IdOrder, count_order
from datastore.reader import Dataset

SEQ_LEN = 256


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, handmade) -> Dataset:
    folder = tmp_path_factory.mktemp("order") / "dataset"
    rows = [handmade.pack([handmade.document(i)], SEQ_LEN) for i in range(6)]
    handmade.write_dataset(
        folder, {"train": [rows[:2], rows[2:4]], "valid": [rows[4:]]}, seq_len=SEQ_LEN
    )
    return Dataset.open(folder)


def expected_order(dataset: Dataset, rows: int) -> list[int]:
    """Counted by plain loops over the first rows: train, then valid."""
    counts: Counter[int] = Counter()
    places = [("train", i) for i in range(4)] + [("valid", i) for i in range(2)]
    for split, index in places[:rows]:
        row = dataset.row(split, index)
        for token, span in zip(row.tokens_T.tolist(), row.spans_T.tolist(), strict=True):
            counts[token] += span != 0
    return sorted(range(VOCAB_SIZE), key=lambda token: (-counts[token], token))


def test_targets_are_counted(dataset: Dataset) -> None:
    order = count_order(dataset)
    assert order.ids_V.tolist() == expected_order(dataset, rows=6)
    assert order.ids_V.dtype == order.ranks_V.dtype == np.int32
    assert np.array_equal(order.ids_V[order.ranks_V], np.arange(VOCAB_SIZE))


def test_counting_ends_after_the_first_targets(dataset: Dataset, monkeypatch) -> None:
    """A whole row at a time, so that the answer depends on rows and not on shards or batches."""
    sizes = [int((dataset.row("train", i).spans_T != 0).sum()) for i in range(4)]
    monkeypatch.setattr(id_order, "COUNTED_TARGETS", sum(sizes[:2]) + 1)
    assert count_order(dataset).ids_V.tolist() == expected_order(dataset, rows=3)


def test_a_folder_keeps_the_order(tmp_path: Path) -> None:
    order = IdOrder.of(np.random.default_rng(0).permutation(VOCAB_SIZE))
    order.write(tmp_path)
    content = (tmp_path / "id_order.bin").read_bytes()
    assert content == b"".join(int(i).to_bytes(4, "little") for i in order.ids_V)
    assert order.sha256 == sha256_bytes(content)
    found = IdOrder.read(tmp_path, order.sha256)
    assert np.array_equal(found.ids_V, order.ids_V) and np.array_equal(found.ranks_V, order.ranks_V)
    assert found.sha256 == order.sha256 != IdOrder.identity().sha256


def test_another_order_is_refused(tmp_path: Path, handmade) -> None:
    order = IdOrder.identity()
    with pytest.raises(FormatError, match="is missing"):
        IdOrder.read(tmp_path, order.sha256)
    order.write(tmp_path)
    for wrong in ("", "0" * 64):
        with pytest.raises(FormatError, match="not the order of these targets"):
            IdOrder.read(tmp_path, wrong)
    for bit in (0, 17, 8 * 4 * VOCAB_SIZE - 1):
        handmade.flip_bit(tmp_path / "id_order.bin", bit)
        with pytest.raises(FormatError, match="not the order of these targets"):
            IdOrder.read(tmp_path, order.sha256)
        handmade.flip_bit(tmp_path / "id_order.bin", bit)


def test_only_permutations_are_orders(tmp_path: Path) -> None:
    ids_V = np.arange(VOCAB_SIZE)
    for wrong in (
        ids_V[:-1],
        np.append(ids_V, 0),
        np.where(ids_V == 5, 6, ids_V),
        np.where(ids_V == 5, -1, ids_V),
        np.where(ids_V == 5, VOCAB_SIZE, ids_V),
    ):
        with pytest.raises(FormatError, match="an order of ids"):
            IdOrder.of(wrong)
    content = ids_V.astype("<u4").tobytes()[:-4] + bytes(4)
    (tmp_path / "id_order.bin").write_bytes(content)
    with pytest.raises(FormatError, match="an order of ids"):
        IdOrder.read(tmp_path, sha256_bytes(content))


def test_ties_and_unseen_ids_stand_by_id(dataset: Dataset) -> None:
    """The tokenizer merges usual pairs first, so small ids are usual ones where nothing was counted."""
    order = count_order(dataset)
    counts = Counter(
        token
        for split, rows in (("train", 4), ("valid", 2))
        for i in range(rows)
        for token in dataset.row(split, i).tokens_T[dataset.row(split, i).spans_T != 0].tolist()
    )
    groups = itertools.groupby(order.ids_V.tolist(), key=lambda token: counts[token])
    sizes = [
        (count, len(ids), ids == sorted(ids)) for count, ids in ((c, list(g)) for c, g in groups)
    ]
    assert all(is_sorted for _, _, is_sorted in sizes)
    assert [count for count, _, _ in sizes] == sorted({c for c, _, _ in sizes}, reverse=True)
    assert sizes[-1][0] == 0 and sizes[-1][1] > 200_000
