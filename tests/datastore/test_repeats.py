"""Rows whose synth_id came before are rejected and counted, wherever in the input they stand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore.build import build_dataset
from datastore.data_config import DataConfig
from datastore.reader import Dataset
from datastore.repeats import repeated_rows
from datastore.verify import verify_dataset
from demo.sample import write_sample


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of 50 rows; rows 3, 60 and 99 repeat the ids of rows 0, 10 and 60, with other texts."""
    folder = tmp_path_factory.mktemp("repeats")
    paths = write_sample(folder, rows=100, seed=5)
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    ids = table["synth_id"].to_pylist()
    for later, earlier in ((3, 0), (60, 10), (99, 60)):
        ids[later] = ids[earlier]
    table = table.set_column(table.schema.get_field_index("synth_id"), "synth_id", pa.array(ids))
    changed = [folder / "a.parquet", folder / "b.parquet"]
    pq.write_table(table.slice(0, 50), changed[0])
    pq.write_table(table.slice(50), changed[1])
    return changed


@pytest.mark.parametrize("workers", [1, 2])
def test_later_rows_of_an_id_are_found(files: list[Path], workers: int) -> None:
    assert repeated_rows(files, [50, 50], workers).tolist() == [3, 60, 99]


def test_rows_without_an_id_are_no_repeats(tmp_path: Path) -> None:
    path = tmp_path / "ids.parquet"
    ids = [None, "", None, " ", " ", "a", "b", "a", "a", b"\xff".decode("utf-8", "surrogateescape")]
    binary = pa.array([i if i is None else i.encode("utf-8", "surrogateescape") for i in ids])
    column = pa.Array.from_buffers(pa.string(), len(ids), binary.buffers())
    pq.write_table(pa.table({"synth_id": column}), path)
    assert repeated_rows([path], [len(ids)], 1).tolist() == [7, 8]


def test_a_build_keeps_the_first_row_of_an_id(files: list[Path], tmp_path: Path) -> None:
    config = DataConfig(
        source={"files": [str(path) for path in files]},
        split={"valid_fraction": 0.2},
        shard={"source_rows": 30},
        seq_len=512,
        out=str(tmp_path / "out"),
    )
    manifest = build_dataset(config, workers=1)
    assert manifest.rejects["duplicate_id"] == 3
    assert (
        sum(manifest.rejects.values()) + sum(c.documents for c in manifest.counts.values()) == 100
    )
    assert verify_dataset(Path(config.out)) == []
    dataset = Dataset.open(config.out)
    ids = [
        i
        for s in ("train", "valid")
        for r in range(dataset.num_rows(s))
        for i in dataset.row(s, r).doc_ids
    ]
    assert len(ids) == len(set(ids))
