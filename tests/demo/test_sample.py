from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datastore.harmony import RenderConfig, Renderer
from datastore.source import COLUMNS
from datastore.types import RenderedDoc, SourceRow
from demo.sample import AWKWARD, make_row, write_sample

LANGUAGES = {"en", "fr", "de", "es", "it", "pl", "nl", "la", "ar"}


def test_files_hold_the_synth_schema_with_its_types(sample_parquet):
    schema = pq.read_schema(sample_parquet[0])
    texts = (
        "synth_id language exercise model query query_seed_url query_seed_text additional_seed_url"
    )
    texts += " seed_license constraints script synthetic_reasoning synthetic_answer"
    assert schema.names == [*texts.split(), "words"]
    assert schema.field("words").type == pa.int64()
    assert {schema.field(name).type for name in texts.split()} == {pa.string()}


def test_the_same_seed_gives_the_same_files(tmp_path):
    digests = [
        [
            hashlib.sha256(path.read_bytes()).hexdigest()
            for path in write_sample(folder, rows=60, seed=seed)
        ]
        for folder, seed in ((tmp_path / "a", 1), (tmp_path / "b", 1), (tmp_path / "c", 2))
    ]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_a_row_depends_on_its_number_alone(tmp_path):
    paths = write_sample(tmp_path, rows=101, seed=4)
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert rows == [make_row(number, 4) for number in range(101)]
    ids = [row["synth_id"] for row in rows if row["synth_id"]]
    assert len(set(ids)) == len(ids)


def test_languages_exercises_and_awkward_cases_are_all_there():
    rows = [make_row(number, 0) for number in range(400)]
    assert {row["language"] for row in rows} >= LANGUAGES
    assert {row["exercise"] for row in rows} >= {"rag", "math exercise", "memorization"}
    for kind, changes in AWKWARD:
        assert sum(changes.items() <= row.items() for row in rows) == 2, kind


def test_most_documents_are_short():
    renderer = Renderer(RenderConfig())
    rows = (make_row(number, 0) for number in range(400))
    found = [renderer.render(SourceRow(**{c: row[c] for c in COLUMNS}), 512) for row in rows]
    lengths = [len(doc.tokens_T) for doc in found if isinstance(doc, RenderedDoc)]
    assert np.percentile(lengths, 95) < 260
    assert min(lengths) > len(renderer.prefix_T)
