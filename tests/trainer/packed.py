"""Packed rows and stored targets of random content, for tests of batches and losses."""

from __future__ import annotations

import numpy as np

from common.tokenizer import PAD
from datastore.target import (
    content_key,
    entropy_sums,
    position_uniforms,
    reduce_logprobs,
    target_positions,
)
from datastore.types import DocTarget, PackedRow


def random_document(
    rng: np.random.Generator, prompt: int, reasoning: int, final: int, vocab: int
) -> tuple[np.ndarray, np.ndarray]:
    """tokens int32 and spans uint8 of a document: prompt, reasoning, final, one end token of span 0."""
    spans_T = np.repeat([0, 1, 2, 0], [prompt, reasoning, final, 1]).astype(np.uint8)
    tokens_T = rng.integers(0, vocab, len(spans_T)).astype(np.int32)
    tokens_T[-1] = PAD
    return tokens_T, spans_T


def pack(documents: list[tuple[np.ndarray, np.ndarray]], seq_len: int) -> PackedRow:
    """The documents back to back, then padding."""
    lengths = [len(tokens_T) for tokens_T, _ in documents]
    fill = seq_len - sum(lengths)
    assert fill >= 0
    tokens_T = np.concatenate([d[0] for d in documents] + [np.full(fill, PAD, dtype=np.int32)])
    spans_T = np.concatenate([d[1] for d in documents] + [np.zeros(fill, dtype=np.uint8)])
    return PackedRow(
        tokens_T=tokens_T.astype(np.int32),
        spans_T=spans_T.astype(np.uint8),
        doc_ends_D=np.cumsum(lengths).astype(np.int32),
        doc_ids=tuple(bytes([number]) * 16 for number in range(len(documents))),
        languages=("",) * len(documents),
        exercises=("",) * len(documents),
        row_hash=0,
    )


def score(
    document: tuple[np.ndarray, np.ndarray],
    logprobs_PV: np.ndarray,
    threshold: float = 1 / 50,
) -> DocTarget:
    """The stored target of a document whose teacher says `logprobs_PV` at its target positions."""
    tokens_T, spans_T = document
    positions_P = target_positions(tokens_T, spans_T)
    key = content_key(tokens_T)
    target = reduce_logprobs(
        logprobs_PV,
        tokens_T[positions_P + 1],
        positions_P,
        position_uniforms(key, positions_P),
        threshold,
    )
    assert target.entropy_P is not None
    sums = entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P)
    return DocTarget(content_key=key, target=target, entropy_sums=sums)


def random_logprobs(rng: np.random.Generator, num_positions: int, vocab: int) -> np.ndarray:
    """Peaked random distributions, float64 natural logs [P, V]."""
    logits_PV = 2.5 * rng.standard_normal((num_positions, vocab))
    return logits_PV - np.log(np.exp(logits_PV).sum(axis=1, keepdims=True))


def random_row(
    rng: np.random.Generator, shapes: list[tuple[int, int, int]], seq_len: int, vocab: int
) -> tuple[PackedRow, list[DocTarget]]:
    """A packed row of documents of (prompt, reasoning, final) tokens and its targets."""
    documents = [random_document(rng, *shape, vocab=vocab) for shape in shapes]
    targets = [
        score(document, random_logprobs(rng, len(target_positions(*document)), vocab))
        for document in documents
    ]
    return pack(documents, seq_len), targets
