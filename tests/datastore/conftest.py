"""Rows and datasets made by hand with the real writers: every value known, every size tiny."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import tokenizer
from datastore import codec
from datastore.budget import BudgetSums, row_budget
from datastore.harmony import RenderConfig, Renderer
from datastore.id_order import IdOrder
from datastore.manifest import (
    DatasetManifest,
    SpanTokens,
    SplitCounts,
    TargetManifest,
    TokenizerInfo,
    commit_manifest,
    dataset_fingerprint,
    target_folder,
)
from datastore.reader import Dataset
from datastore.shard import FORMAT_VERSION, write_target_shard, write_token_shard
from datastore.target import (
    content_key,
    entropy_sums,
    position_uniforms,
    reduce_logprobs,
    target_positions,
)
from datastore.types import DocTarget, PackedRow, RenderedDoc, SourceRow, Split
from tests.datastore.repacks import repack_origin as repack_origin
from tests.datastore.repacks import repacked as repacked

DATASET_ID, TARGET_ID = "ab" * 32, "cd" * 32
THRESHOLD = 1 / 50


def random_row(rng: np.random.Generator, seq_len: int) -> PackedRow:
    """Any ids, spans and documents that the container accepts; no Harmony in it."""
    num_docs = int(rng.integers(1, min(4, seq_len + 1)))
    ends = np.sort(rng.choice(np.arange(1, seq_len + 1), num_docs, replace=False))
    return PackedRow(
        tokens_T=rng.integers(0, tokenizer.VOCAB_SIZE, seq_len).astype(np.int32),
        spans_T=rng.integers(0, 3, seq_len).astype(np.uint8),
        doc_ends_D=ends.astype(np.int32),
        doc_ids=tuple(rng.bytes(16) for _ in range(num_docs)),
        languages=tuple(rng.choice(["", "en", "日本語"], num_docs).tolist()),
        exercises=tuple(rng.choice(["", "rag"], num_docs).tolist()),
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
    return PackedRow(
        tokens_T=tokens,
        spans_T=spans,
        doc_ends_D=ends,
        doc_ids=tuple(d.doc_id for d in documents),
        languages=tuple(d.language for d in documents),
        exercises=tuple(d.exercise for d in documents),
        row_hash=0,
    )


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


def three_a_row(folder: Path, seq_len: int) -> Path:
    """A dataset of 24 documents, three a row, in two train shards of three rows and a valid one of two."""
    documents = [document(i) for i in range(24)]
    rows = [pack(documents[i : i + 3], seq_len) for i in range(0, 24, 3)]
    shards = {"train": [rows[:3], rows[3:6]], "valid": [rows[6:]]}
    write_dataset(folder, shards, seq_len=seq_len)
    return folder


def document_target(tokens_T: np.ndarray, spans_T: np.ndarray) -> DocTarget:
    """Targets of a made-up teacher that gives each realised token about half the mass."""
    return _document_target(tokens_T.tobytes(), spans_T.tobytes())


@functools.cache
def _document_target(tokens: bytes, spans: bytes) -> DocTarget:
    tokens_T, spans_T = np.frombuffer(tokens, np.int32), np.frombuffer(spans, np.uint8)
    positions_P = target_positions(tokens_T, spans_T)
    realised_P = tokens_T[positions_P + 1]
    rng = np.random.default_rng(len(tokens))
    # All mass lies on some 200 ids: the reduction of their columns alone, ids ascending, is that of the vocabulary.
    others = rng.choice(tokenizer.VOCAB_SIZE, 200, replace=False)
    ids_K = np.union1d(others, realised_P).astype(np.int32)
    realised_K = np.searchsorted(ids_K, realised_P)
    logits_PK = rng.normal(0, 2, (len(positions_P), len(ids_K)))
    logits_PK[np.arange(len(positions_P)), realised_K] = 7.0
    logits_PK -= np.log(np.exp(logits_PK).sum(axis=1, keepdims=True))
    key = content_key(tokens_T)
    uniforms_P = position_uniforms(key, positions_P)
    target = reduce_logprobs(logits_PK, realised_K, positions_P, uniforms_P, THRESHOLD)
    target = dataclasses.replace(target, ids_E=ids_K[target.ids_E])
    sums = entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P)
    return DocTarget(content_key=key, target=target, entropy_sums=sums)


def varied_target(tokens_T: np.ndarray, spans_T: np.ndarray) -> DocTarget:
    """Targets of a made-up teacher of a few hundred ids that likes some documents, and final text, more than others."""
    return _varied_target(tokens_T.tobytes(), spans_T.tobytes())


@functools.cache
def _varied_target(tokens: bytes, spans: bytes) -> DocTarget:
    tokens_T, spans_T = np.frombuffer(tokens, np.int32), np.frombuffer(spans, np.uint8)
    positions_P = target_positions(tokens_T, spans_T)
    key = content_key(tokens_T)
    rng = np.random.default_rng(key)
    ids_S = np.union1d(rng.integers(0, tokenizer.VOCAB_SIZE, 150), tokens_T).astype(np.int32)
    realised_P = np.searchsorted(ids_S, tokens_T[positions_P + 1])
    logits_PS = rng.normal(0, 2, (len(positions_P), len(ids_S)))
    liking_P = rng.normal(4, 2) + spans_T[positions_P + 1]
    logits_PS[np.arange(len(positions_P)), realised_P] = rng.normal(liking_P, 3)
    logprobs_PS = logits_PS - np.log(np.exp(logits_PS).sum(axis=1, keepdims=True))
    uniforms_P = position_uniforms(key, positions_P)
    target = reduce_logprobs(logprobs_PS, realised_P, positions_P, uniforms_P, THRESHOLD)
    target = dataclasses.replace(target, ids_E=ids_S[target.ids_E])
    sums = entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P)
    return DocTarget(content_key=key, target=target, entropy_sums=sums)


def row_documents(row: PackedRow) -> list[DocTarget]:
    return [document_target(row.tokens_T[doc], row.spans_T[doc]) for doc in row.documents()]


def write_targets(
    folder: Path,
    *,
    slug: str = "tiny",
    unscored: tuple[int, ...] = (),
    documents_of: Callable[[PackedRow], list[DocTarget | None]] = row_documents,
    budget_of: Callable[[PackedRow], list[DocTarget | None]] = row_documents,
    **changes,
) -> TargetManifest:
    """A committed target store for a whole dataset.

    Rows numbered in `unscored` (of a split), or of which `documents_of` gives only None, get no blob. Budgets state
    what `budget_of` of the scored documents holds.
    """
    dataset, order = Dataset.open(folder), IdOrder.identity()
    order.write(target_folder(folder, slug))
    budget, shard_budgets = BudgetSums(), {split: [] for split in dataset.manifest.files}
    counts = {split: {"documents": 0, "tokens": 0} for split in dataset.manifest.files}
    files: dict[Split, list] = {split: [] for split in dataset.manifest.files}
    for split, entries in dataset.manifest.files.items():
        first = 0
        for shard, entry in enumerate(entries):
            blobs: list[tuple[int, bytes | None]] = []
            of_shard = BudgetSums()
            for index in range(first, first + entry.rows):
                row = dataset.row(split, index)
                documents = [] if index in unscored else documents_of(row)
                scored = [number for number, document in enumerate(documents) if document]
                if not scored:
                    blobs.append((row.row_hash, None))
                    continue
                blob = codec.encode_blob(documents, row, order)
                blobs.append((row.row_hash, blob))
                exact = [d if n in scored else None for n, d in enumerate(budget_of(row))]
                of_shard = of_shard.merged(row_budget(exact, blob, row, order))
                counts[split]["documents"] += len(scored)
                lengths = np.diff(row.doc_ends_D, prepend=0)
                counts[split]["tokens"] += int(lengths[scored].sum())
            budget = budget.merged(of_shard)
            shard_budgets[split].append(of_shard.budget().resolved())
            first += entry.rows
            place = {"target_id": TARGET_ID, "split": split, "shard": shard}
            files[split].append(write_target_shard(target_folder(folder, slug), blobs, **place))
    found = {
        "files": files,
        "budget": budget.budget().model_dump(),
        "counts": counts,
        "shard_budgets": shard_budgets,
        "id_order_sha256": order.sha256,
    }
    manifest = TargetManifest(**(_target_identity(dataset, slug) | found | changes))
    commit_manifest(target_folder(folder, slug), manifest)
    return manifest


def _target_identity(dataset: Dataset, slug: str) -> dict:
    """What a target manifest states before a row is scored."""
    return {
        "format_version": FORMAT_VERSION,
        "codec_version": codec.CODEC_VERSION,
        "target_id": TARGET_ID,
        "dataset_fingerprint": dataset.manifest.fingerprint,
        "teacher": {},
        "slug": slug,
        "engine": {},
        "mode": {"system": None, "reasoning": "high"},
        "temperature": 1.0,
        "threshold": THRESHOLD,
        "tokenizer": TokenizerInfo(),
        "alignment": {},
        "selection": {},
        "quarantine": (),
        "canary": {},
        "self_noise": {},
    }


def flip_bit(path: Path, bit: int) -> None:
    """Invert one bit in place; again to restore it. (Rewriting the file costs a flush to disk each time.)"""
    with open(path, "r+b", buffering=0) as handle:
        handle.seek(bit // 8)
        (byte,) = handle.read(1)
        handle.seek(bit // 8)
        handle.write(bytes([byte ^ 1 << bit % 8]))


@pytest.fixture(scope="session")
def handmade() -> SimpleNamespace:
    """The makers above, for tests that need rows of their own."""
    makers: list[Callable] = [random_row, document, pack, count, write_dataset, three_a_row]
    makers += [document_target, varied_target, row_documents, write_targets, flip_bit]
    return SimpleNamespace(**{make.__name__: make for make in makers}, dataset_id=DATASET_ID)
