"""A shard gives back what was written, or refuses: every bit, every cut, every exchange."""

import contextlib
import dataclasses
import hashlib
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AlignmentError, FormatError
from datastore.shard import (
    FileEntry,
    TargetShard,
    TokenShard,
    write_target_shard,
    write_token_shard,
)
from datastore.types import PackedRow

DATASET_ID, TARGET_ID = "ab" * 32, "cd" * 32
SEQ_LEN = 8
BLOBS = [(2**64 - 1, b"first"), (7, None), (0, b"\x00" * 40)]


def values(row: PackedRow) -> tuple:
    arrays = (row.tokens_T.tolist(), row.spans_T.tolist(), row.doc_ends_D.tolist())
    return (*arrays, row.doc_ids, row.languages, row.exercises)


def write(folder: Path, rows, *, shard: int = 0, split="train", seq_len: int = SEQ_LEN, **identity):
    place = {
        "dataset_id": DATASET_ID,
        "split": split,
        "shard": shard,
        "seq_len": seq_len,
    } | identity
    return write_token_shard(folder, rows, **place)


def read(folder: Path, entry: FileEntry, *, shard: int = 0, split="train", seq_len=SEQ_LEN):
    reader = TokenShard(
        folder, entry, dataset_id=DATASET_ID, split=split, shard=shard, seq_len=seq_len
    )
    return [reader.row(index) for index in range(reader.num_rows)]


def read_blobs(folder: Path, entry: FileEntry, blobs=BLOBS, *, target_id: str = TARGET_ID):
    reader = TargetShard(folder, entry, target_id=target_id, split="train", shard=0)
    return [(row_hash, reader.blob(i, row_hash)) for i, (row_hash, _) in enumerate(blobs)]


@pytest.fixture
def rows(handmade) -> list[PackedRow]:
    rng = np.random.default_rng(5)
    return [handmade.random_row(rng, SEQ_LEN) for _ in range(3)]


@given(num_rows=st.integers(0, 150), seq_len=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_rows_come_back(handmade, tmp_path_factory, num_rows, seq_len, seed) -> None:
    folder = tmp_path_factory.mktemp("shard")
    rng = np.random.default_rng(seed)
    rows = [handmade.random_row(rng, seq_len) for _ in range(num_rows)]
    entry = write(folder, iter(rows), seq_len=seq_len)
    found = read(folder, entry, seq_len=seq_len)
    assert [values(row) for row in found] == [values(row) for row in rows]
    content = (folder / entry.name).read_bytes()
    assert (entry.rows, entry.bytes) == (num_rows, len(content))
    assert entry.sha256 == hashlib.sha256(content).hexdigest()


def test_the_file_is_what_the_format_page_says(tmp_path, rows) -> None:
    """Read by Arrow alone; the row hash put together from bytes in the documented order."""
    entry = write(tmp_path, rows, shard=7, split="valid")
    table = pa.ipc.open_file(tmp_path / "valid" / "shard-00007.arrow").read_all()
    assert table.schema.metadata == {
        b"vpmoe.format": b"2",
        b"vpmoe.kind": b"tokens",
        b"vpmoe.dataset_id": DATASET_ID.encode(),
        b"vpmoe.split": b"valid",
        b"vpmoe.shard": b"7",
        b"vpmoe.seq_len": b"8",
    }
    for number, (row, stored) in enumerate(zip(rows, table.to_pylist(), strict=True)):
        assert stored["tokens"] == row.tokens_T.tolist()
        assert stored["spans"] == row.spans_T.tolist()
        assert stored["doc_ends"] == row.doc_ends_D.tolist()
        assert stored["doc_ids"] == list(row.doc_ids)
        assert stored["languages"] == list(row.languages)
        assert stored["exercises"] == list(row.exercises)
        content = struct.pack(
            f"<32sBIII8i8B{len(row.doc_ids)}i",
            *(bytes.fromhex(DATASET_ID), 1, 7, number, len(row.doc_ids)),
            *(stored["tokens"] + stored["spans"] + stored["doc_ends"]),
        ) + b"".join(stored["doc_ids"])
        for label in stored["languages"] + stored["exercises"]:
            content += struct.pack("<I", len(label.encode())) + label.encode()
        assert stored["row_hash"] == xxhash.xxh3_64(content).intdigest()
    assert entry.name == "valid/shard-00007.arrow"


def test_the_target_file_is_what_the_format_page_says(tmp_path) -> None:
    entry = write_target_shard(tmp_path, BLOBS, target_id=TARGET_ID, split="train", shard=3)
    table = pa.ipc.open_file(tmp_path / entry.name).read_all()
    assert table.schema.metadata[b"vpmoe.kind"] == b"targets"
    for number, ((row_hash, blob), stored) in enumerate(zip(BLOBS, table.to_pylist(), strict=True)):
        content = struct.pack("<32sBIIQ", bytes.fromhex(TARGET_ID), 0, 3, number, row_hash)
        blob_hash = xxhash.xxh3_64(content + (blob or b"")).intdigest()
        assert stored == {"blob": blob, "row_hash": row_hash, "blob_hash": blob_hash}


def test_reading_copies_nothing_and_views_are_read_only(tmp_path, handmade) -> None:
    rng = np.random.default_rng(0)
    entry = write(tmp_path, [handmade.random_row(rng, 512) for _ in range(130)], seq_len=512)
    before = pa.total_allocated_bytes()
    found = read(tmp_path, entry, seq_len=512)
    assert pa.total_allocated_bytes() == before
    with pytest.raises(ValueError, match="read-only"):
        found[0].tokens_T[0] = 1


def test_writing_twice_gives_the_same_bytes(tmp_path, rows) -> None:
    first, second = (write(tmp_path / name, rows) for name in "ab")
    assert first == second
    assert (tmp_path / "a" / first.name).read_bytes() == (tmp_path / "b" / first.name).read_bytes()


def outcomes_of_flips(flip_bit, path: Path, read_again, expected) -> dict[str, int]:
    """Flip each bit of the file alone: how often reading is refused, and how often it gives the same values."""
    outcomes = {"refused": 0, "same": 0}
    for bit in range(path.stat().st_size * 8):
        flip_bit(path, bit)
        try:
            found = read_again()
        except FormatError:
            outcomes["refused"] += 1
        else:
            assert found == expected, f"bit {bit} changed the values silently"
            outcomes["same"] += 1
        flip_bit(path, bit)
    return outcomes


@pytest.mark.slow
def test_no_flipped_bit_of_a_token_shard_gives_wrong_rows(tmp_path, handmade, rows) -> None:
    entry = write(tmp_path, rows)

    def read_again() -> list:
        return [values(row) for row in read(tmp_path, entry)]

    expected = [values(row) for row in rows]
    outcomes = outcomes_of_flips(handmade.flip_bit, tmp_path / entry.name, read_again, expected)
    # Bits that carry no data (the schema's first copy, Arrow's padding) are caught by the file's sha256 alone.
    assert outcomes["refused"] > outcomes["same"]


@pytest.mark.slow
def test_no_flipped_bit_of_a_target_shard_gives_wrong_blobs(tmp_path, handmade) -> None:
    entry = write_target_shard(tmp_path, BLOBS, target_id=TARGET_ID, split="train", shard=0)
    outcomes = outcomes_of_flips(
        handmade.flip_bit, tmp_path / entry.name, lambda: read_blobs(tmp_path, entry), BLOBS
    )
    assert outcomes["refused"] > outcomes["same"]


def data_bits(path: Path) -> list[int]:
    """The bits of the buffers of the first batch, by searching each buffer's bytes in the file."""
    content = path.read_bytes()
    batch = pa.ipc.open_file(pa.BufferReader(content)).get_batch(0)
    bits: list[int] = []
    for column in batch.columns:
        for buffer in filter(None, column.buffers()):
            if len(buffer) >= 8:
                start = content.index(buffer.to_pybytes())
                bits += range(start * 8, (start + len(buffer)) * 8)
    return bits


def test_every_flipped_bit_of_the_data_is_refused(tmp_path, handmade, rows) -> None:
    entry = write(tmp_path, rows)
    path = tmp_path / entry.name
    bits = data_bits(path)
    assert len(bits) > 3 * SEQ_LEN * 40
    for bit in bits:
        handmade.flip_bit(path, bit)
        with pytest.raises(FormatError, match=r"shard-00000\.arrow.*; restore the file"):
            read(tmp_path, entry)
        handmade.flip_bit(path, bit)


def test_every_truncation_is_refused(tmp_path, rows) -> None:
    entry = write(tmp_path, rows)
    path = tmp_path / entry.name
    for size in reversed(range(entry.bytes)):
        os.truncate(path, size)
        with pytest.raises(FormatError, match="wrong size"):
            read(tmp_path, entry)
        # Also with a manifest that lists the short size: Arrow's footer is gone.
        with pytest.raises(FormatError, match="not a readable Arrow file"):
            read(tmp_path, entry.model_copy(update={"bytes": size}))


def test_zeroed_blocks_are_refused(tmp_path, handmade) -> None:
    rng = np.random.default_rng(1)
    rows = [handmade.random_row(rng, 1024) for _ in range(20)]
    entry = write(tmp_path, rows, seq_len=1024)
    path = tmp_path / entry.name
    content = path.read_bytes()
    for start in range(4096, 4 * 20 * 1024, 4096):
        path.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
        with pytest.raises(FormatError):
            read(tmp_path, entry, seq_len=1024)


def test_a_file_that_shrinks_while_mapped_is_an_error_not_a_signal(tmp_path, handmade) -> None:
    rng = np.random.default_rng(1)
    entry = write(tmp_path, [handmade.random_row(rng, 4096) for _ in range(8)], seq_len=4096)
    reader = TokenShard(
        tmp_path, entry, dataset_id=DATASET_ID, split="train", shard=0, seq_len=4096
    )
    reader.row(0)
    os.truncate(tmp_path / entry.name, 4096)
    with pytest.raises(FormatError, match="wrong size"):
        reader.row(7)


def rewrite(path: Path, order: list[int]) -> None:
    """Write the shard's own rows, with their own hashes, in another order."""
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    batch = table.take(order).combine_chunks().to_batches()[0]
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_batch(batch)


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 1, 1], [0, 0, 2], [0, 1], [0, 1, 2, 2]])
def test_rows_swapped_repeated_or_lost_are_refused(tmp_path, rows, order) -> None:
    entry = write(tmp_path, rows)
    path = tmp_path / entry.name
    rewrite(path, order)
    entry = entry.model_copy(update={"bytes": path.stat().st_size})
    with pytest.raises(FormatError, match=r"row"):
        read(tmp_path, entry)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"shard": 1}, "vpmoe.shard"),
        ({"split": "valid"}, "vpmoe.split"),
        ({"dataset_id": "ef" * 32}, "vpmoe.dataset_id"),
    ],
)
def test_a_shard_of_another_place_is_refused(tmp_path, rows, change, named) -> None:
    entry = write(tmp_path, rows)
    foreign = write(tmp_path / "foreign", rows, **change)
    os.replace(tmp_path / "foreign" / foreign.name, tmp_path / entry.name)
    with pytest.raises(FormatError, match=named):
        read(tmp_path, entry.model_copy(update={"bytes": foreign.bytes}))


def test_a_shard_of_another_length_or_kind_is_refused(tmp_path, rows) -> None:
    entry = write(tmp_path, rows)
    with pytest.raises(FormatError, match=r"vpmoe\.seq_len"):
        read(tmp_path, entry, seq_len=16)
    targets = write_target_shard(tmp_path, BLOBS, target_id=DATASET_ID, split="train", shard=0)
    with pytest.raises(FormatError, match=r"vpmoe\.kind"):
        read(tmp_path, targets)


def forged(tmp_path: Path, row: PackedRow, column: str, value: list) -> FileEntry:
    """A shard of one row whose `column` was replaced through Arrow, all else kept."""
    entry = write(tmp_path, [row])
    path = tmp_path / entry.name
    table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all()
    number = table.schema.get_field_index(column)
    columns = [c.combine_chunks() for c in table.columns]
    columns[number] = pa.array(value, table.schema.types[number])
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=table.schema))
    return entry.model_copy(update={"bytes": path.stat().st_size})


@pytest.mark.parametrize(
    "column", ["tokens", "spans", "doc_ends", "doc_ids", "languages", "exercises", "row_hash"]
)
def test_null_values_are_refused(tmp_path, rows, column) -> None:
    with pytest.raises(FormatError, match=r"null values|other documents"):
        read(tmp_path, forged(tmp_path, rows[0], column, [None]))


def test_a_label_that_is_no_utf8_is_refused(tmp_path, rows) -> None:
    """Found when a batch is first seen, and when it is damaged after that."""
    row = dataclasses.replace(rows[0], languages=("französisch",) * len(rows[0].doc_ids))
    entry = write(tmp_path, [row])
    reader = TokenShard(
        tmp_path, entry, dataset_id=DATASET_ID, split="train", shard=0, seq_len=SEQ_LEN
    )
    reader.row(0)
    with open(tmp_path / entry.name, "r+b", buffering=0) as handle:
        handle.seek((tmp_path / entry.name).read_bytes().index("ö".encode()))
        handle.write(b"\xff")
    with pytest.raises(FormatError, match=r"row 0 is damaged: a label is no UTF-8.*restore"):
        reader.row(0)
    with pytest.raises(FormatError, match=r"rows 0\.\.0 are damaged.*UTF"):
        read(tmp_path, entry)


@pytest.mark.parametrize("end", [-1, 2**30, 2**31 - 1])
def test_the_end_of_a_label_outside_the_file_is_refused(tmp_path, rows, end) -> None:
    """Damaged after the batch was checked, it still cuts nothing but the file's own texts: slices clamp."""
    row = dataclasses.replace(rows[0], languages=("",) * (len(rows[0].doc_ids) - 1) + ("q" * 77,))
    entry = write(tmp_path, [row])
    reader = TokenShard(
        tmp_path, entry, dataset_id=DATASET_ID, split="train", shard=0, seq_len=SEQ_LEN
    )
    reader.row(0)
    offsets = np.array([0] * len(row.doc_ids) + [77], "<i4").tobytes()
    with open(tmp_path / entry.name, "r+b", buffering=0) as handle:
        handle.seek((tmp_path / entry.name).read_bytes().index(offsets) + len(offsets) - 4)
        handle.write(struct.pack("<i", end))
    with contextlib.suppress(FormatError):
        assert values(reader.row(0)) == values(row)
    with pytest.raises(FormatError, match=r"rows 0\.\.0 are damaged"):
        read(tmp_path, entry)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokens_T": np.full(8, 201_088, np.int32)}, "outside the vocabulary; got 201088"),
        ({"tokens_T": np.full(8, -1, np.int32)}, "outside the vocabulary; got -1"),
        ({"tokens_T": np.zeros(7, np.int32)}, "tokens has the wrong shape"),
        ({"tokens_T": np.zeros(8, np.int64)}, "tokens has the wrong shape"),
        ({"spans_T": np.zeros(8, np.int32)}, "spans has the wrong shape"),
        ({"doc_ends_D": np.array([4, 3], np.int32)}, "not strictly ascending"),
        ({"doc_ends_D": np.array([4, 4], np.int32)}, "not strictly ascending"),
        ({"doc_ends_D": np.array([0, 4], np.int32)}, "not strictly ascending"),
        ({"doc_ends_D": np.array([4, 9], np.int32)}, "not strictly ascending"),
        ({"doc_ends_D": np.array([], np.int32)}, "not strictly ascending"),
        ({"doc_ids": (b"x" * 16,)}, "doc_ids do not match"),
        ({"doc_ids": (b"x" * 16, b"x" * 15)}, "doc_ids do not match"),
        ({"languages": ("en",)}, "languages and exercises do not match"),
        ({"exercises": ("rag", "", "")}, "languages and exercises do not match"),
    ],
)
def test_a_row_that_breaks_the_format_is_not_written(tmp_path, rows, change, message) -> None:
    good = dataclasses.replace(
        rows[0],
        doc_ends_D=np.array([4, 8], np.int32),
        doc_ids=(b"x" * 16, b"y" * 16),
        languages=("en", ""),
        exercises=("", "rag"),
    )
    with pytest.raises(FormatError, match=f"row 1 cannot be written.*{message}"):
        write(tmp_path, [good, dataclasses.replace(good, **change)])
    assert list((tmp_path / "train").iterdir()) == []


def test_an_intact_blob_of_other_tokens_is_an_alignment_error(tmp_path) -> None:
    entry = write_target_shard(tmp_path, BLOBS, target_id=TARGET_ID, split="train", shard=0)
    reader = TargetShard(tmp_path, entry, target_id=TARGET_ID, split="train", shard=0)
    for index, (row_hash, blob) in enumerate(BLOBS):
        assert reader.blob(index, row_hash) == blob
        with pytest.raises(AlignmentError, match="other tokens"):
            reader.blob(index, row_hash ^ 1)


def test_an_empty_blob_is_not_written(tmp_path) -> None:
    with pytest.raises(FormatError, match=r"row 1 .*empty"):
        write_target_shard(
            tmp_path, [(1, b"a"), (2, b"")], target_id=TARGET_ID, split="train", shard=0
        )
    assert list((tmp_path / "train").iterdir()) == []


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_outside_is_an_index_error(tmp_path, rows, index) -> None:
    entry = write(tmp_path, rows)
    reader = TokenShard(
        tmp_path, entry, dataset_id=DATASET_ID, split="train", shard=0, seq_len=SEQ_LEN
    )
    with pytest.raises(IndexError):
        reader.row(index)
