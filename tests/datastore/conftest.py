"""Rows and datasets made by hand with the real writers: every value known, every size tiny."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import tokenizer
from datastore.harmony import RenderConfig, Renderer
from datastore.manifest import (
    DatasetManifest,
    SpanTokens,
    SplitCounts,
    TokenizerInfo,
    commit_manifest,
    dataset_fingerprint,
)
from datastore.shard import FORMAT_VERSION, write_token_shard
from datastore.types import PackedRow, RenderedDoc, SourceRow, Split

DATASET_ID = "ab" * 32


def random_row(rng: np.random.Generator, seq_len: int) -> PackedRow:
    """Any ids, spans and documents that the container accepts; no Harmony in it."""
    num_docs = int(rng.integers(1, min(4, seq_len + 1)))
    ends = np.sort(rng.choice(np.arange(1, seq_len + 1), num_docs, replace=False))
    return PackedRow(
        tokens_T=rng.integers(0, tokenizer.VOCAB_SIZE, seq_len).astype(np.int32),
        spans_T=rng.integers(0, 3, seq_len).astype(np.uint8),
        doc_ends_D=ends.astype(np.int32),
        doc_ids=tuple(rng.bytes(16) for _ in range(num_docs)),
        row_hash=0,
    )


def document(number: int, answer: str = "") -> RenderedDoc:
    """A short document whose text depends on `number`, through the real renderer."""
    row = SourceRow(
        synth_id=f"made-{number}",
        query=f"What is {number} + 1? 🙂",
        synthetic_reasoning=f"{number} + 1 is {number + 1}.",
        synthetic_answer=answer or f"It is {number + 1}. 日本語 שלום",
        exercise=None,
        constraints=None,
        language="en",
    )
    rendered = Renderer(RenderConfig()).render(row, 1 << 20)
    assert isinstance(rendered, RenderedDoc)
    return rendered


def pack(documents: list[RenderedDoc], seq_len: int) -> PackedRow:
    """One row of whole documents back to back, then padding."""
    tokens = np.full(seq_len, tokenizer.PAD, np.int32)
    spans = np.zeros(seq_len, np.uint8)
    ends = np.cumsum([len(d.tokens_T) for d in documents]).astype(np.int32)
    tokens[: ends[-1]] = np.concatenate([d.tokens_T for d in documents])
    spans[: ends[-1]] = np.concatenate([d.spans_T for d in documents])
    ids = tuple(d.doc_id for d in documents)
    return PackedRow(tokens_T=tokens, spans_T=spans, doc_ends_D=ends, doc_ids=ids, row_hash=0)


def count(rows: list[PackedRow], seq_len: int) -> SplitCounts:
    """Counts by plain loops over single tokens."""
    spans, control, documents = [0, 0, 0], 0, 0
    for row in rows:
        documents += len(row.doc_ids)
        for position in range(int(row.doc_ends_D[-1])):
            spans[row.spans_T[position]] += 1
            control += row.spans_T[position] > 0 and row.tokens_T[position] >= 199_998
    return SplitCounts(
        rows=len(rows),
        documents=documents,
        tokens=sum(spans),
        tokens_by_span=SpanTokens(ignored=spans[0], reasoning=spans[1], final=spans[2]),
        control_targets=int(control),
        padding=len(rows) * seq_len - sum(spans),
        fill=sum(spans) / (len(rows) * seq_len) if rows else 0.0,
    )


def write_dataset(
    folder: Path,
    shards: dict[Split, list[list[PackedRow]]],
    *,
    seq_len: int,
    dataset_id: str = DATASET_ID,
) -> DatasetManifest:
    """A committed dataset of the given rows, shard by shard."""
    files = {
        split: [
            write_token_shard(
                folder, rows, dataset_id=dataset_id, split=split, shard=shard, seq_len=seq_len
            )
            for shard, rows in enumerate(shards_of_split)
        ]
        for split, shards_of_split in shards.items()
    }
    manifest = DatasetManifest(
        format_version=FORMAT_VERSION,
        files=files,
        dataset_id=dataset_id,
        fingerprint=dataset_fingerprint(dataset_id, seq_len, files),
        seq_len=seq_len,
        git_sha=None,
        config={},
        config_hash="0" * 64,
        tokenizer=TokenizerInfo(),
        renderer_version="1",
        sources=(),
        split_rule={},
        counts={
            split: count(list(itertools.chain.from_iterable(parts)), seq_len)
            for split, parts in shards.items()
        },
        rejects={"empty_query": 2},
        truncated={},
    )
    commit_manifest(folder, manifest)
    return manifest


@pytest.fixture(scope="session")
def handmade() -> SimpleNamespace:
    """The makers above, for tests that need rows of their own."""
    makers: list[Callable] = [random_row, document, pack, count, write_dataset]
    return SimpleNamespace(**{make.__name__: make for make in makers}, dataset_id=DATASET_ID)
