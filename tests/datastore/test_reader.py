"""Rows and targets by index: the right ones, from any process, or an error that names the file."""

import itertools
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import AlignmentError, FormatError
from datastore.reader import OPEN_SHARDS, Dataset, TargetStore
from datastore.target import row_target
from datastore.types import PackedRow, SparseTarget

SEQ_LEN = 256


def same(one: PackedRow, other: PackedRow) -> bool:
    arrays = ("tokens_T", "spans_T", "doc_ends_D")
    equal = all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)
    return equal and one.doc_ids == other.doc_ids


@pytest.fixture(scope="module")
def rows(handmade) -> list[PackedRow]:
    return [handmade.pack([handmade.document(number)], SEQ_LEN) for number in range(7)]


@pytest.fixture
def folder(tmp_path, handmade, rows) -> Path:
    shards = {"train": [rows[:2], rows[2:3], rows[3:5]], "valid": [rows[5:]]}
    handmade.write_dataset(tmp_path, shards, seq_len=SEQ_LEN)
    return tmp_path


def test_an_index_counts_over_the_shards(folder, rows) -> None:
    dataset = Dataset.open(folder)
    assert (dataset.num_rows("train"), dataset.num_rows("valid")) == (5, 2)
    assert [dataset.locate("train", i) for i in range(5)] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (2, 0),
        (2, 1),
    ]
    found = [dataset.row("train", i) for i in range(5)] + [
        dataset.row("valid", i) for i in range(2)
    ]
    assert all(same(one, other) for one, other in zip(found, rows, strict=True))
    assert same(dataset.row("train", np.int64(4)), rows[4])


@pytest.mark.parametrize("index", [-1, 5])
def test_an_index_outside_is_refused(folder, index) -> None:
    with pytest.raises(IndexError):
        Dataset.open(folder).row("train", index)


def test_a_split_without_rows_is_empty(tmp_path, handmade, rows) -> None:
    handmade.write_dataset(tmp_path, {"train": [rows]}, seq_len=SEQ_LEN)
    assert Dataset.open(tmp_path).num_rows("valid") == 0


def test_missing_and_short_files_are_named_at_opening(folder) -> None:
    path = folder / "train" / "shard-00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(FormatError, match=r"train/shard-00001\.arrow has the wrong size"):
        Dataset.open(folder)
    path.unlink()
    with pytest.raises(FormatError, match=r"train/shard-00001\.arrow is missing"):
        Dataset.open(folder)
    assert Dataset.open(folder, check_sizes=False).num_rows("train") == 5


def test_exchanged_shards_are_refused(folder) -> None:
    one, other = (folder / "train" / f"shard-0000{n}.arrow" for n in (0, 2))
    assert one.stat().st_size == other.stat().st_size
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    dataset = Dataset.open(folder)
    with pytest.raises(FormatError, match=r"shard-00000\.arrow is another shard: vpmoe\.shard"):
        dataset.row("train", 0)


def test_a_shard_of_the_same_shape_from_another_dataset_is_refused(
    folder, handmade, rows, tmp_path_factory
) -> None:
    other = tmp_path_factory.mktemp("other")
    shards = {"train": [rows[3:5]], "valid": []}
    handmade.write_dataset(other, shards, seq_len=SEQ_LEN, dataset_id="ef" * 32)
    shutil.copy(other / "train/shard-00000.arrow", folder / "train/shard-00000.arrow")
    dataset = Dataset.open(folder)
    with pytest.raises(FormatError, match=r"vpmoe\.dataset_id differs"):
        dataset.row("train", 0)


def test_a_stale_manifest_beside_rebuilt_shards_is_refused(folder, handmade, rows) -> None:
    stale = (folder / "manifest.json").read_bytes()
    swapped = {"train": [rows[3:5], rows[2:3], rows[:2]], "valid": [rows[5:]]}
    handmade.write_dataset(folder, swapped, seq_len=SEQ_LEN, dataset_id="ef" * 32)
    (folder / "manifest.json").write_bytes(stale)
    with pytest.raises(FormatError):
        Dataset.open(folder).row("train", 0)


def positions_of(target: SparseTarget) -> list[dict[int, float]]:
    """The weight of each stored id, position by position; the order of draws says nothing."""
    bounds = itertools.pairwise(target.offsets_P1.tolist())
    ids, weights = target.ids_E.tolist(), target.weights_E.tolist()
    return [dict(zip(ids[a:b], weights[a:b], strict=True)) for a, b in bounds]


def test_targets_come_back_beside_their_rows(folder, handmade, rows) -> None:
    handmade.write_targets(folder, unscored=(1,))
    dataset = Dataset.open(folder)
    store = TargetStore.open(dataset, "tiny")
    for split, index in [("train", 0), ("train", 4), ("valid", 0)]:
        row = dataset.row(split, index)
        documents = store.documents(split, index, row)
        expected = row_target(handmade.row_documents(row), row)
        found = row_target(documents, row)
        assert np.array_equal(found.positions_P, expected.positions_P)
        for before, after in zip(positions_of(expected), positions_of(found), strict=True):
            assert before.keys() == after.keys()
            assert [after[i] for i in before] == pytest.approx(list(before.values()), rel=0.1)
    assert store.documents("train", 1, dataset.row("train", 1)) is None


def test_targets_of_another_row_are_refused(folder, handmade) -> None:
    handmade.write_targets(folder)
    dataset = Dataset.open(folder)
    store = TargetStore.open(dataset, "tiny")
    with pytest.raises(AlignmentError, match="other tokens"):
        store.documents("train", 0, dataset.row("train", 1))


def test_targets_of_another_dataset_are_refused(folder, handmade, rows) -> None:
    handmade.write_targets(folder)
    changed = {"train": [rows[1::-1], rows[2:3], rows[3:5]], "valid": [rows[5:]]}
    handmade.write_dataset(folder, changed, seq_len=SEQ_LEN)
    with pytest.raises(AlignmentError, match="scored for another dataset"):
        TargetStore.open(Dataset.open(folder), "tiny")


def test_a_target_store_of_another_codec_or_cut_is_refused(folder, handmade) -> None:
    dataset = Dataset.open(folder)
    handmade.write_targets(folder, codec_version=99)
    with pytest.raises(FormatError, match="another codec version"):
        TargetStore.open(dataset, "tiny")
    manifest = handmade.write_targets(folder)
    files = {"train": manifest.entries("train")[:2], "valid": manifest.entries("valid")}
    handmade.write_targets(folder, files=files)
    with pytest.raises(FormatError, match="do not stand beside"):
        TargetStore.open(dataset, "tiny")
    handmade.write_targets(folder)
    (folder / "targets/tiny/valid/shard-00000.arrow").unlink()
    with pytest.raises(FormatError, match="is missing"):
        TargetStore.open(dataset, "tiny")


def read_all(source: Dataset | TargetStore) -> list[int]:
    dataset = source.dataset if isinstance(source, TargetStore) else source
    rows = [dataset.row("train", i) for i in range(dataset.num_rows("train"))]
    if isinstance(source, TargetStore):
        assert all(source.documents("train", i, row) for i, row in enumerate(rows))
    return [row.row_hash for row in rows]


def test_pickles_are_small_and_work_after_use(folder, handmade) -> None:
    handmade.write_targets(folder)
    dataset = Dataset.open(folder)
    for source in (dataset, TargetStore.open(dataset, "tiny")):
        before = read_all(source)
        content = pickle.dumps(source)
        assert len(content) < 1024
        assert read_all(pickle.loads(content)) == before


def test_a_pickle_does_not_open_a_replaced_dataset(folder, handmade, rows) -> None:
    content = pickle.dumps(Dataset.open(folder))
    handmade.write_dataset(folder, {"train": [rows[:1]], "valid": []}, seq_len=SEQ_LEN)
    with pytest.raises(FormatError, match="replaced while it was in use"):
        pickle.loads(content)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_read_the_same_rows(folder, method) -> None:
    dataset = Dataset.open(folder)
    before = read_all(dataset)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(hashes_of, [dataset] * 4) == [before] * 4
    assert read_all(dataset) == before


def hashes_of(dataset: Dataset) -> list[int]:
    return [dataset.row("train", i).row_hash for i in range(dataset.num_rows("train"))]


def test_open_shards_are_bounded(tmp_path, handmade, rows) -> None:
    shards = {"train": [[rows[0]]] * (OPEN_SHARDS + 10), "valid": []}
    handmade.write_dataset(tmp_path, shards, seq_len=SEQ_LEN)
    dataset = Dataset.open(tmp_path)
    for index in range(dataset.num_rows("train")):
        dataset.row("train", index)
    maps = Path("/proc/self/maps").read_text().count(str(tmp_path))
    assert 0 < maps <= OPEN_SHARDS


_READ_ALL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from datastore.reader import Dataset
dataset = Dataset.open(sys.argv[1])
rows = [dataset.row("train", i) for i in range(dataset.num_rows("train"))]
again = [dataset.row("train", i) for i in reversed(range(len(rows)))]
assert [int(r.tokens_T[0]) for r in rows] == [int(r.tokens_T[0]) for r in reversed(again)]
print(len(rows), sum(int(r.tokens_T[0]) for r in rows))
"""


@pytest.mark.slow
def test_two_thousand_shards_with_few_file_descriptors(tmp_path, handmade) -> None:
    """All rows are kept alive at once: 2000 maps, and still no file descriptor."""
    rng = np.random.default_rng(0)
    rows = [handmade.random_row(rng, 8) for _ in range(2000)]
    handmade.write_dataset(tmp_path, {"train": [[row] for row in rows], "valid": []}, seq_len=8)
    done = subprocess.run(
        [sys.executable, "-c", _READ_ALL, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2000", str(sum(int(row.tokens_T[0]) for row in rows))]


@pytest.mark.parametrize("unscored", [(), (0,), (1, 3), (0, 1, 2, 3, 4)])
def test_scored_rows_are_those_with_a_blob(folder, handmade, unscored) -> None:
    """Over shards, by number of the split; the same rows as asking each for its targets."""
    handmade.write_targets(folder, unscored=unscored)
    dataset = Dataset.open(folder)
    store = TargetStore.open(dataset, "tiny")
    for split in ("train", "valid"):
        rows = range(dataset.num_rows(split))
        found = store.scored_rows(split)
        blobs = [store.blob(split, i, dataset.row(split, i).row_hash) for i in rows]
        assert found.mask().tolist() == [blob is not None for blob in blobs]
        assert found.select(np.arange(found.size)).tolist() == [
            i for i in rows if i not in unscored
        ]


def test_a_store_that_is_whole_by_its_counts_is_not_searched(folder, handmade) -> None:
    """On a large dataset the search touches every shard; here it would find one missing."""
    shard = folder / "targets/tiny/train/shard-00001.arrow"
    for unscored in ((), (0,)):
        handmade.write_targets(folder, unscored=unscored)
        shard.unlink()
        store = TargetStore.open(Dataset.open(folder), "tiny", check_sizes=False)
        if unscored:
            with pytest.raises(FormatError, match="is missing"):
                store.scored_rows("train")
        else:
            assert store.scored_rows("train").mask().all()


def test_a_split_without_shards_has_no_scored_rows(tmp_path, handmade, rows) -> None:
    handmade.write_dataset(tmp_path, {"train": [rows]}, seq_len=SEQ_LEN)
    handmade.write_targets(tmp_path)
    store = TargetStore.open(Dataset.open(tmp_path), "tiny")
    assert [store.scored_rows(split).num_rows for split in ("train", "valid")] == [7, 0]


def test_a_flipped_validity_bit_is_an_error_when_scored_rows_are_asked(folder, handmade) -> None:
    """A row cannot slip from one pool to the other: the bitmap is found by what it does to the answer."""
    handmade.write_targets(folder, unscored=(0,))
    path = folder / "targets/tiny/train/shard-00000.arrow"
    store = TargetStore.open(Dataset.open(folder), "tiny")
    assert store.scored_rows("train").mask().tolist() == [False, True, True, True, True]
    refused, silent = 0, 0
    validity = np.uint8(0b10)  # row 0 null, row 1 valid
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for offset in np.flatnonzero(content == validity):
        for bit in (0, 1):
            handmade.flip_bit(path, 8 * int(offset) + bit)
            try:
                mask = TargetStore.open(Dataset.open(folder), "tiny").scored_rows("train").mask()
                silent += mask.tolist() != [False, True, True, True, True]
            except FormatError:
                refused += 1
            handmade.flip_bit(path, 8 * int(offset) + bit)
    assert refused >= 2 and silent == 0
