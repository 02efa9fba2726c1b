from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import parse_config
from common.errors import ConfigError, SourceError
from common.files import sha256_file
from datastore.harmony import Reject, RenderConfig, Renderer
from datastore.source import (
    COLUMNS,
    Segment,
    SourceConfig,
    SourcePath,
    cut_units,
    inspect_source,
    locate_sources,
    read_segment,
)
from demo.sample import SCHEMA, write_sample

REVISION = "0d6813a2966662c39f22f0b9af28a0c1c9f7a437"


def a_table(num_rows: int, first: int = 0) -> pa.Table:
    columns = {name: [f"{name} {first + n}" for n in range(num_rows)] for name in COLUMNS}
    return pa.table(columns, schema=pa.schema([(name, pa.string()) for name in COLUMNS]))


def named(path: Path) -> SourcePath:
    return SourcePath(name=path.name, path=path)


def test_files_are_taken_once_by_name_over_folders(tmp_path):
    for name in ("b/2.parquet", "a/10.parquet", "c/1.parquet"):
        (tmp_path / name).parent.mkdir()
        pq.write_table(a_table(1), tmp_path / name)
    patterns = (f"{tmp_path}/*/*.parquet", str(tmp_path / "b" / "2.parquet"))
    found = locate_sources(SourceConfig(files=patterns))
    assert [source.name for source in found] == ["1.parquet", "10.parquet", "2.parquet"]


def test_a_pattern_without_files_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="nothing matches"):
        locate_sources(SourceConfig(files=(f"{tmp_path}/*.parquet",)))


def test_a_source_is_described_by_size_hash_and_rows(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(a_table(5), path)
    found = inspect_source(named(path))
    assert (found.name, found.rows) == ("x.parquet", 5)
    assert (found.bytes, found.sha256) == (path.stat().st_size, sha256_file(path))


def test_a_missing_column_names_file_and_column(tmp_path):
    pq.write_table(a_table(2).drop_columns(["constraints"]), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"x\.parquet has no column 'constraints'"):
        inspect_source(named(tmp_path / "x.parquet"))


def test_a_column_of_numbers_is_refused(tmp_path):
    table = a_table(2).drop_columns(["synth_id"]).append_column("synth_id", pa.array([1, 2]))
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"x\.parquet: column 'synth_id' is not text.*int64"):
        inspect_source(named(tmp_path / "x.parquet"))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_cut_file_is_named(tmp_path, keep):
    path = tmp_path / "x.parquet"
    pq.write_table(a_table(50), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    with pytest.raises(SourceError, match=r"x\.parquet cannot be read"):
        inspect_source(named(path))


def test_damage_inside_a_file_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(a_table(500), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"x\.parquet cannot be read"):
        list(read_segment(Segment(path=path, start=0, rows=500)))


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(1, 40))
def test_units_cut_all_rows_in_order(rows_per_file, unit_rows):
    paths = [Path(f"{n}.parquet") for n in range(len(rows_per_file))]
    units = cut_units(paths, rows_per_file, unit_rows)
    rows = [(s.path, s.start + i) for unit in units for s in unit for i in range(s.rows)]
    assert rows == [(p, i) for p, n in zip(paths, rows_per_file, strict=True) for i in range(n)]
    sizes = [sum(segment.rows for segment in unit) for unit in units]
    assert all(size == unit_rows for size in sizes[:-1])
    assert all(0 < size <= unit_rows for size in sizes)


@pytest.mark.parametrize("row_group_size", [1, 7, 64, 1000])
@pytest.mark.parametrize(("start", "rows"), [(0, 100), (0, 1), (6, 8), (7, 7), (63, 2), (99, 1)])
def test_a_segment_is_its_rows_for_any_row_groups(tmp_path, row_group_size, start, rows):
    path = tmp_path / "x.parquet"
    pq.write_table(a_table(100), path, row_group_size=row_group_size)
    found = [row.synth_id for row in read_segment(Segment(path=path, start=start, rows=rows))]
    assert found == [f"synth_id {n}" for n in range(start, start + rows)]


def test_a_segment_longer_than_a_batch(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(a_table(5000), path)
    found = [row.query for row in read_segment(Segment(path=path, start=900, rows=3000))]
    assert found == [f"query {n}" for n in range(900, 3900)]


@pytest.mark.parametrize("encode", [lambda c: c, lambda c: c.dictionary_encode()])
def test_bytes_that_are_no_text_are_rejected_alone(tmp_path, encode):
    wrong = pa.array([b"ok", b"caf\xe9", None], pa.binary()).view(pa.string())
    table = a_table(3).set_column(COLUMNS.index("query"), "query", encode(wrong))
    pq.write_table(table, tmp_path / "x.parquet")
    rows = list(read_segment(Segment(path=tmp_path / "x.parquet", start=0, rows=3)))
    found = [Renderer(RenderConfig()).render(row, 2048) for row in rows]
    assert not isinstance(found[0], Reject)
    assert found[1:] == [Reject("invalid_text"), Reject("empty_query")]


def test_files_win_over_the_hub():
    hub = {"repo": "PleIAs/SYNTH", "revision": REVISION}
    config = parse_config(SourceConfig, {"files": ["x.parquet"], "hub": hub}, "test")
    assert config.resolved() == {"files": ["x.parquet"], "hub": None}
    assert parse_config(SourceConfig, {"hub": hub}, "test").hub.split == "train"


@pytest.mark.parametrize("revision", ["main", REVISION[:10], REVISION.upper(), ""])
def test_a_revision_that_can_move_is_refused(revision):
    raw = {"hub": {"repo": "PleIAs/SYNTH", "revision": revision}}
    with pytest.raises(ConfigError, match="40 hex digits"):
        parse_config(SourceConfig, raw, "test")


def test_no_source_at_all_is_refused():
    with pytest.raises(ConfigError, match="files"):
        parse_config(SourceConfig, {}, "test")


@pytest.fixture
def offline_hub(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_hub_repository_gives_its_own_parquet_files(offline_hub, tmp_path):
    repo = tmp_path / "repo"
    written = write_sample(repo, rows=40, seed=0)
    config = parse_config(SourceConfig, {"hub": {"repo": str(repo), "revision": REVISION}}, "test")
    found = locate_sources(config)
    assert [source.name for source in found] == [path.name for path in written]
    hashes = [inspect_source(source).sha256 for source in found]
    assert hashes == [sha256_file(path) for path in written]
    assert pq.read_schema(found[0].path).equals(SCHEMA)


def test_a_hub_repository_that_is_not_there_is_an_error(offline_hub, tmp_path):
    hub = {"repo": str(tmp_path / "nowhere"), "revision": REVISION}
    with pytest.raises(SourceError, match="nowhere"):
        locate_sources(parse_config(SourceConfig, {"hub": hub}, "test"))


def test_a_hub_split_that_is_not_there_names_those_that_are(offline_hub, tmp_path):
    write_sample(tmp_path / "repo", rows=10, seed=0)
    hub = {"repo": str(tmp_path / "repo"), "revision": REVISION, "split": "test"}
    with pytest.raises(SourceError, match="splits: train"):
        locate_sources(parse_config(SourceConfig, {"hub": hub}, "test"))
