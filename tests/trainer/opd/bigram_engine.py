"""A made-up teacher for tests of the OPD loop: a true distribution that a student can learn, without a model.

It prefers the pairs of neighbouring tokens that stand in the answers of the documents it was made from, and keeps apart
three phases: before the first <|channel|> of a document, after it (reasoning), after the second (final). So it likes
Harmony's marks in their order, which no random stream has. At each position
    q(v) = 0.90 * share of v after this token in this phase + 0.09 * share of v in this phase + 0.01 / 201088,
with all of the first two parts on the second where the token was never seen in the phase. It is causal, does not depend
on the reasoning effort, and its values are exact: `BigramTeacher.logprobs` gives the whole distribution.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from common.tokenizer import CHANNEL, VOCAB_SIZE
from datastore.prompt import ScoreRequest
from datastore.target import position_uniforms, target_positions
from datastore.types import SparseTarget
from tests.datastore.line_engine import THRESHOLD, LineEngine
from tests.datastore.made_engine import pack

PAIR, SINGLE, ANY = 0.90, 0.09, 0.01
FLOOR = ANY / VOCAB_SIZE


def phases(tokens_T: np.ndarray) -> np.ndarray:
    """Of each token, the <|channel|> marks up to and with it, at most 2: int64 [T]."""
    return np.minimum(np.cumsum(tokens_T == CHANNEL), 2)


@dataclass(frozen=True)
class _Row:
    """The distribution of one context: of the seen ids [n], and what `reduce_logprobs` gives of the whole."""

    probs_n: np.ndarray
    head_ids: np.ndarray
    cumulative: np.ndarray  # [2n+1] of the tail: gap of unseen ids, seen id, gap, seen id, ..., gap
    log_tail_mass: float
    entropy: float


class BigramTeacher:
    """documents: (tokens_T int32, spans_T uint8) each, of which the answers are counted."""

    def __init__(self, documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        triples = []
        for tokens_T, spans_T in documents:
            positions_P = target_positions(tokens_T, spans_T)
            phases_P = phases(tokens_T)[positions_P]
            triples.append(
                np.stack([phases_P, tokens_T[positions_P], tokens_T[positions_P + 1]], 1)
            )
        found, counts = np.unique(np.concatenate(triples), axis=0, return_counts=True)
        self.ids_n = np.unique(found[:, 2])
        next_i = np.searchsorted(self.ids_n, found[:, 2])
        size = len(self.ids_n)
        self._single_3n = np.stack(
            [np.bincount(next_i[w], counts[w], size) for w in (found[:, 0] == p for p in range(3))]
        )
        self._single_3n /= np.maximum(self._single_3n.sum(1, keepdims=True), 1)
        self._pairs: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for (phase, before, _), place, count in zip(
            found.tolist(), next_i.tolist(), counts.tolist(), strict=True
        ):
            places, of = self._pairs.setdefault((phase, before), ([], []))
            places.append(place)
            of.append(count)
        self._row = functools.lru_cache(maxsize=512)(self._make_row)

    def logprobs(self, phase: int, before: int) -> np.ndarray:
        """ln q over the whole vocabulary after the token `before` in a phase: float64 [V]."""
        probs_V = np.full(VOCAB_SIZE, FLOOR)
        probs_V[self.ids_n] = self._probs(phase, before)
        return np.log(probs_V)

    def target(self, request: ScoreRequest) -> SparseTarget:
        """Targets of a request at its positions, in document coordinates; draws as `reduce_logprobs` makes them."""
        prompt_T, at_P = request.prompt_T, request.positions_P - request.shift
        phases_T = phases(prompt_T)
        rows = [self._row(int(phases_T[at]), int(prompt_T[at])) for at in at_P.tolist()]
        uniforms_P = position_uniforms(request.content_key, request.positions_P)
        draws = [self._draws(row, u) for row, u in zip(rows, uniforms_P.tolist(), strict=True)]
        entries = [np.concatenate([r.head_ids, d]) for r, d in zip(rows, draws, strict=True)]
        weights = [
            np.concatenate([self._of_ids(r, r.head_ids), np.full(len(d), THRESHOLD)])
            for r, d in zip(rows, draws, strict=True)
        ]
        realised = [
            self._of_ids(r, prompt_T[[at + 1]])[0]
            for r, at in zip(rows, at_P.tolist(), strict=True)
        ]
        return SparseTarget(
            threshold=THRESHOLD,
            positions_P=request.positions_P,
            num_head_P=np.array([len(r.head_ids) for r in rows], np.int32),
            offsets_P1=np.cumsum([0, *map(len, entries)]).astype(np.int64),
            ids_E=np.concatenate([np.empty(0), *entries]).astype(np.int32),
            weights_E=np.concatenate([np.empty(0), *weights]).astype(np.float32),
            realised_logprob_P=np.log(np.array(realised)).astype(np.float32),
            log_tail_mass_P=np.array([r.log_tail_mass for r in rows], np.float32),
            entropy_P=np.array([r.entropy for r in rows], np.float32),
        )

    def _probs(self, phase: int, before: int) -> np.ndarray:
        single_n = self._single_3n[phase]
        pair_n = np.zeros(len(self.ids_n))
        if (phase, before) in self._pairs:
            places, counts = self._pairs[phase, before]
            pair_n[places] = np.array(counts) / sum(counts)
            probs_n = PAIR * pair_n + SINGLE * single_n
        else:
            probs_n = (PAIR + SINGLE) * single_n
        return probs_n + FLOOR

    def _make_row(self, phase: int, before: int) -> _Row:
        probs_n = self._probs(phase, before)
        in_head_n = probs_n >= THRESHOLD
        heads = np.flatnonzero(in_head_n)
        heads = heads[np.argsort(-probs_n[heads], kind="stable")]
        gaps = np.diff(self.ids_n, prepend=-1, append=VOCAB_SIZE) - 1
        masses = np.empty(2 * len(probs_n) + 1)
        masses[0::2], masses[1::2] = gaps * FLOOR, np.where(in_head_n, 0.0, probs_n)
        unseen = VOCAB_SIZE - len(probs_n)
        entropy = -(probs_n * np.log(probs_n)).sum() - unseen * FLOOR * np.log(FLOOR)
        return _Row(
            probs_n=probs_n,
            head_ids=self.ids_n[heads],
            cumulative=np.cumsum(masses),
            log_tail_mass=float(np.log(masses.sum())),
            entropy=float(entropy),
        )

    def _draws(self, row: _Row, uniform: float) -> np.ndarray:
        """The ids of the tail at which the points (j + uniform) * threshold fall, ascending."""
        points = (np.arange(int(1 / THRESHOLD) + 1) + uniform) * THRESHOLD
        points = points[points < row.cumulative[-1]]
        slots = np.searchsorted(row.cumulative, points, side="right")
        gap = slots // 2
        first = np.concatenate([[-1], self.ids_n])[gap] + 1  # of the gap's ids
        last = np.concatenate([self.ids_n, [VOCAB_SIZE]])[gap] - 1
        into = points - np.concatenate([[0.0], row.cumulative])[slots]
        inside = np.clip(first + np.floor(into / FLOOR).astype(np.int64), first, last)
        return np.where(slots % 2, np.append(self.ids_n, 0)[gap], inside)

    def _of_ids(self, row: _Row, ids: np.ndarray) -> np.ndarray:
        places = np.minimum(np.searchsorted(self.ids_n, ids), len(self.ids_n) - 1)
        return np.where(self.ids_n[places] == ids, row.probs_n[places], FLOOR)


class BigramEngine(LineEngine):
    """The line engine with the targets of a BigramTeacher; its harmful tokens are two that no text holds."""

    fatal, poison = VOCAB_SIZE - 1, VOCAB_SIZE - 2

    def __init__(
        self, teacher: BigramTeacher, batch_tokens: int = 2048, seconds: float = 0.0
    ) -> None:
        super().__init__(batch_tokens, seconds)
        self._teacher = teacher

    def packed(self, request: ScoreRequest) -> np.ndarray:
        target = self._teacher.target(request)
        return pack(replace(target, positions_P=request.positions_P))
