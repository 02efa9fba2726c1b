"""Rows of rollouts beside rows of an anchor, for tests of the on-policy loss."""

from __future__ import annotations

import numpy as np

from datastore.rollout import ScoredTokens
from datastore.types import DocTarget, PackedRow
from tests.trainer.packed import random_row

MixedRow = tuple[PackedRow, list[DocTarget | None] | None, list[ScoredTokens | None] | None]


def random_samples(
    rng: np.random.Generator, documents: list[DocTarget], spread: float = 1.0
) -> list[ScoredTokens]:
    """Logprobs of every target token of the documents; the teacher's are those of its targets."""
    samples = []
    for document in documents:
        teacher_S = document.target.realised_logprob_P
        noise_S = spread * rng.standard_normal(len(teacher_S))
        samples.append(
            ScoredTokens(
                sampling_logprob_S=np.minimum(teacher_S + noise_S, 0).astype(np.float32),
                teacher_logprob_S=teacher_S,
            )
        )
    return samples


def mixed_rows(count: int, seq_len: int, vocab: int, seed: int = 0) -> list[MixedRow]:
    """Rows of rollouts with targets; every third is a row of the anchor, without targets."""
    rng = np.random.default_rng(seed)
    rows: list[MixedRow] = []
    for number in range(count):
        shapes = [(2, int(rng.integers(1, 9)), int(rng.integers(1, 6))) for _ in range(2)]
        row, documents = random_row(rng, shapes, seq_len, vocab)
        if number % 3 == 2:
            rows.append((row, None, None))
        else:
            rows.append((row, list(documents), list(random_samples(rng, documents))))
    return rows
