"""Rows and targets made for the codec's tests: random teachers over the whole vocabulary, in rows of their own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from datastore.id_order import IdOrder
from datastore.target import position_uniforms, reduce_logprobs
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums

EDGE_IDS = [0, 1, 255, 256, 65535, 65536, 131071, 131072, 199998, 201086, 201087]
ARRAYS = (
    *("positions_P", "num_head_P", "offsets_P1", "ids_E", "weights_E"),
    *("realised_logprob_P", "log_tail_mass_P"),
)


def some_order() -> IdOrder:
    """An order in which no id has its own rank for long."""
    return IdOrder.of(np.random.default_rng(7).permutation(201_088))


def make_document(
    seed: int, positions: int, *, threshold: float = 1 / 50, spread: float = 2.5, vocab: int = 600
) -> tuple[DocTarget, np.ndarray]:
    """A reduced random teacher with ids over the whole vocabulary, and its realised ids (int32 [P])."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(positions, vocab)) * spread
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    positions_P = np.sort(rng.choice(3 * positions, positions, replace=False)).astype(np.int32)
    key = int(rng.integers(0, 2**64, dtype=np.uint64))
    # Half of the realised tokens are likely ones, so that heads hold them at any place.
    likely_P = (logprobs + rng.gumbel(size=logprobs.shape)).argmax(axis=1)
    realised_P = np.where(rng.random(positions) < 0.5, likely_P, rng.integers(0, vocab, positions))
    target = reduce_logprobs(
        logprobs, realised_P, positions_P, position_uniforms(key, positions_P), threshold
    )
    ids_V = np.union1d(rng.integers(0, 201088, 2 * vocab), EDGE_IDS)
    ids_V = np.union1d(rng.choice(ids_V, vocab, replace=False), EDGE_IDS)
    sums = rng.uniform(0, 1000, 3).tolist()
    document = DocTarget(
        content_key=key,
        target=replace(target, ids_E=ids_V[target.ids_E].astype(np.int32)),
        entropy_sums=TargetSums(reasoning=sums[0], final=sums[1], control=sums[2]),
    )
    return document, ids_V[realised_P].astype(np.int32)


def row_of(positions: list[np.ndarray], realised: list[np.ndarray], seed: int = 0) -> PackedRow:
    """Documents that score just these positions and continue them with these ids, then padding."""
    rng = np.random.default_rng(seed)
    tokens, spans = [], []
    for positions_P, realised_P in zip(positions, realised, strict=True):
        length = int(positions_P.max(initial=0)) + 3
        tokens_T = rng.integers(0, 201_088, length).astype(np.int32)
        spans_T = np.zeros(length, np.uint8)
        tokens_T[positions_P + 1] = realised_P
        spans_T[positions_P + 1] = 1
        tokens.append(tokens_T)
        spans.append(spans_T)
    return PackedRow(
        tokens_T=np.concatenate([*tokens, np.full(2, 199999, np.int32)]),
        spans_T=np.concatenate([*spans, np.zeros(2, np.uint8)]),
        doc_ends_D=np.cumsum([len(part) for part in tokens]).astype(np.int32),
        doc_ids=tuple(bytes([number]) * 16 for number in range(len(tokens))),
        row_hash=0,
        languages=("",) * len(tokens),
        exercises=("",) * len(tokens),
    )


def make_row(
    sizes: list[int], seed: int, threshold: float = 1 / 50, spread: float = 2.5
) -> tuple[list[DocTarget], PackedRow]:
    """One random document of each size, and their row."""
    made = [
        make_document(seed + i, size, threshold=threshold, spread=spread)
        for i, size in enumerate(sizes)
    ]
    documents, realised = [d for d, _ in made], [r for _, r in made]
    return documents, row_of([d.target.positions_P for d in documents], realised, seed)


def golden_case() -> tuple[list[DocTarget], PackedRow]:
    """The case of the golden files: peaked, empty, flat and very peaked documents."""
    made = [
        make_document(100 + i, size, spread=spread)
        for i, (size, spread) in enumerate([(5, 2.5), (0, 1.0), (3, 0.0), (7, 12.0)])
    ]
    documents, realised = [d for d, _ in made], [r for _, r in made]
    return documents, row_of([d.target.positions_P for d in documents], realised)


def as_arrays(documents: list[DocTarget]) -> dict[str, np.ndarray]:
    """Documents as named arrays, for an npz file."""
    arrays = {
        f"{number}.{name}": getattr(document.target, name)
        for number, document in enumerate(documents)
        for name in ARRAYS
    }
    sums = [d.entropy_sums for d in documents]
    arrays["content_keys"] = np.array([d.content_key for d in documents], dtype=np.uint64)
    arrays["entropy_sums"] = np.array([(s.reasoning, s.final, s.control) for s in sums])
    arrays["threshold"] = np.array(documents[0].target.threshold)
    return arrays


def from_arrays(arrays: dict[str, np.ndarray]) -> list[DocTarget]:
    """What `as_arrays` took apart."""
    return [
        DocTarget(
            content_key=int(key),
            target=SparseTarget(
                threshold=float(arrays["threshold"]),
                **{name: arrays[f"{number}.{name}"] for name in ARRAYS},
            ),
            entropy_sums=TargetSums(reasoning=sums[0], final=sums[1], control=sums[2]),
        )
        for number, (key, sums) in enumerate(
            zip(arrays["content_keys"].tolist(), arrays["entropy_sums"].tolist(), strict=True)
        )
    ]


def golden_row(arrays: dict[str, np.ndarray]) -> PackedRow:
    """The row of the golden files."""
    num_documents = len(arrays["row.doc_ends_D"])
    return PackedRow(
        **{name: arrays[f"row.{name}"] for name in ("tokens_T", "spans_T", "doc_ends_D")},
        doc_ids=tuple(bytes([number]) * 16 for number in range(num_documents)),
        row_hash=0,
        languages=("",) * num_documents,
        exercises=("",) * num_documents,
    )
