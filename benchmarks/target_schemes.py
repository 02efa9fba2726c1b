"""Ways to store a teacher's distribution, each as a function of the full distributions. Pure.

Every scheme takes a `Chunk` (the distributions of some positions of one document) and a seed, and gives sparse
weights. Schemes without chance ignore the seed. Vocabulary here is columns 0..V-1 in the order of ids.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from datastore.target import head_mask, position_uniforms
from datastore.types import SparseTarget

MAX_HEAD = 200
THRESHOLD, IID, SYSTEMATIC = "threshold (ours)", "iid draws", "systematic draws"
TOP_K, GHOST, POLYNOMIAL = "top-k renormalised", "top-k + ghost bucket", "DistillKit polynomial"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Positions of one document: probs_CV float64, each row a distribution. keys: its content key for each seed.

    What many schemes need is made once: the cumulative mass, the entropy, the largest probabilities with their columns.
    """

    probs_CV: torch.Tensor
    positions_C: np.ndarray
    realised_C: np.ndarray
    keys: tuple[int, ...]

    @functools.cached_property
    def cumulative_CV(self) -> torch.Tensor:
        return self.probs_CV.cumsum(dim=1)

    @functools.cached_property
    def entropy_C(self) -> torch.Tensor:
        """Nats."""
        return -torch.special.xlogy(self.probs_CV, self.probs_CV).sum(dim=1)

    @functools.cached_property
    def top_CK(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The MAX_HEAD largest probabilities, falling, and their columns."""
        return tuple(self.probs_CV.topk(min(MAX_HEAD, self.probs_CV.shape[1]), dim=1))

    def uniforms(self, seed: int) -> torch.Tensor:
        """float64 [C]: those that the store uses for a document of this seed's key."""
        return torch.from_numpy(position_uniforms(self.keys[seed], self.positions_C))


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """Stored entries in any order: position rows_E (int64), column columns_E (int64), weights_E, probs_E (float32).

    probs_E: the teacher's exact probability. counts_E: draws that hit the id, 0 where it stands with its probability.
    """

    rows_E: torch.Tensor
    columns_E: torch.Tensor
    weights_E: torch.Tensor
    probs_E: torch.Tensor
    counts_E: torch.Tensor

    @classmethod
    def joined(cls, parts: list[tuple[int, Entries]]) -> Entries:
        """Entries of many chunks, each with the number of its first position."""
        rows_E = torch.cat([part.rows_E + first for first, part in parts])
        names = ("columns_E", "weights_E", "probs_E", "counts_E")
        others = {name: torch.cat([getattr(part, name) for _, part in parts]) for name in names}
        return cls(rows_E=rows_E, **others)


def entries_at(chunk: Chunk, rows_E, columns_E, weights_E, counts_E=None) -> Entries:
    """Entries of a chunk; counts_E: 0 (stored with its probability) where none are given."""
    probs_E = chunk.probs_CV[rows_E, columns_E].float()
    counts_E = torch.zeros_like(rows_E) if counts_E is None else counts_E
    return Entries(
        rows_E=rows_E,
        columns_E=columns_E,
        weights_E=weights_E.float(),
        probs_E=probs_E,
        counts_E=counts_E.to(torch.int16),
    )


def threshold_target(chunk: Chunk, seeds: tuple[int, ...], threshold: float) -> list[SparseTarget]:
    """What `datastore.target.reduce_logprobs` gives at each seed, all positions at once; threshold >= 1/MAX_HEAD."""
    probs_CK, columns_CK = chunk.top_CK
    in_head_CK = probs_CK >= threshold
    head_rows, head_places = in_head_CK.nonzero(as_tuple=True)
    tail = _Tail(chunk, torch.where(in_head_CK, probs_CK, 0.0), columns_CK)
    realised_C = chunk.probs_CV[torch.arange(len(probs_CK)), torch.from_numpy(chunk.realised_C)]
    targets = []
    for seed in seeds:
        rows, columns = tail.draws(chunk.uniforms(seed), threshold)
        rows_E = torch.cat([head_rows, rows]).numpy()
        ids_E = torch.cat([columns_CK[head_rows, head_places], columns]).numpy()
        drawn = torch.full((len(rows),), threshold, dtype=torch.float64)
        weights_E = torch.cat([probs_CK[head_rows, head_places], drawn]).numpy()
        is_draw_E = np.arange(len(rows_E)) >= len(head_rows)
        # by position, the head before the draws; the head by falling probability, draws by id
        order_E = np.lexsort((ids_E, np.where(is_draw_E, 0, -weights_E), is_draw_E, rows_E))
        counts_C = np.bincount(rows_E, minlength=len(probs_CK))
        targets.append(
            SparseTarget(
                threshold=threshold,
                positions_P=chunk.positions_C,
                num_head_P=in_head_CK.sum(dim=1).int().numpy(),
                offsets_P1=np.concatenate([[0], np.cumsum(counts_C)]),
                ids_E=ids_E[order_E].astype(np.int32),
                weights_E=weights_E[order_E].astype(np.float32),
                realised_logprob_P=realised_C.log().clamp(max=0.0).float().numpy(),
                log_tail_mass_P=tail.mass_C.log().clamp(max=0.0).float().numpy(),
                entropy_P=chunk.entropy_C.float().numpy(),
            )
        )
    return targets


class _Tail:
    """Systematic draws over the mass outside the head, found on the cumulative mass of all ids.

    A point x of the tail lies at x + (mass of the head ids before it) of the whole, so no second cumulative sum over
    the vocabulary is needed. head_CK: probabilities of the head, 0 outside it; columns_CK: where they are.
    """

    def __init__(self, chunk: Chunk, head_CK: torch.Tensor, columns_CK: torch.Tensor) -> None:
        last = chunk.probs_CV.shape[1] - 1
        by_id_CK = torch.where(head_CK > 0, columns_CK, last + 1).sort(dim=1)
        self.cumulative_CV = chunk.cumulative_CV
        self.head_CK = head_CK.gather(1, by_id_CK.indices).cumsum(dim=1)
        below_CK = self.cumulative_CV.gather(1, by_id_CK.values.clamp(max=last)) - self.head_CK
        self.before_CK = torch.where(by_id_CK.values > last, torch.inf, below_CK)
        self.mass_C = (self.cumulative_CV[:, -1] - self.head_CK[:, -1]).clamp(min=0.0)

    def draws(self, uniforms_C: torch.Tensor, spacing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, columns) that the points (j + u) * spacing hit."""
        points_CJ = grid_points(uniforms_C, spacing)
        heads_before_CJ = torch.searchsorted(self.before_CK, points_CJ, right=True)
        shift_CK1 = torch.nn.functional.pad(self.head_CK, (1, 0))
        whole_CJ = points_CJ + shift_CK1.gather(1, heads_before_CJ)
        columns_CJ = torch.searchsorted(self.cumulative_CV, whole_CJ, right=True)
        rows, points = (points_CJ < self.mass_C[:, None]).nonzero(as_tuple=True)
        return rows, columns_CJ[rows, points]


def grid_points(uniforms_C: torch.Tensor, spacing: float) -> torch.Tensor:
    """(j + u) * spacing for j = 0, 1, ...: float64 [C, J], reaching past 1."""
    return (torch.arange(int(1 / spacing) + 2) + uniforms_C[:, None]) * spacing


def target_entries(chunk: Chunk, target: SparseTarget) -> Entries:
    """The entries of a target of this chunk, whose ids are columns."""
    counts_C = np.diff(target.offsets_P1)
    rows_E = torch.from_numpy(np.repeat(np.arange(len(counts_C)), counts_C))
    columns_E = torch.from_numpy(target.ids_E.astype(np.int64))
    in_head_E = head_mask(target.num_head_P, counts_C - target.num_head_P)
    drawn_E = torch.from_numpy(~in_head_E)
    return entries_at(chunk, rows_E, columns_E, torch.from_numpy(target.weights_E), drawn_E)


def systematic(chunk: Chunk, seed: int, num_points: int) -> Entries:
    """Systematic draws over the whole distribution, weight 1/n each."""
    mass_C1 = chunk.cumulative_CV[:, -1:]
    points_CJ = grid_points(chunk.uniforms(seed), 1 / num_points)[:, :num_points] * mass_C1
    return _counted(chunk, points_CJ)


def independent(chunk: Chunk, seed: int, num_draws: int) -> Entries:
    """Independent draws with replacement (random-sampling KD, arXiv 2503.16870), weight 1/n each."""
    first = int(chunk.positions_C[0])
    generator = torch.Generator().manual_seed((chunk.keys[seed] + first) % 2**63)
    shape = (len(chunk.probs_CV), num_draws)
    uniforms_CJ = torch.rand(shape, generator=generator, dtype=torch.float64)
    return _counted(chunk, uniforms_CJ * chunk.cumulative_CV[:, -1:])


def _counted(chunk: Chunk, points_CJ: torch.Tensor) -> Entries:
    """The ids that the points hit, each once, with its share of the points as weight."""
    num_points, vocab_size = points_CJ.shape[1], chunk.probs_CV.shape[1]
    columns_CJ = torch.searchsorted(chunk.cumulative_CV, points_CJ, right=True)
    columns_CJ.clamp_(max=vocab_size - 1)
    keys_CJ = torch.arange(len(columns_CJ))[:, None] * vocab_size + columns_CJ
    keys_E, counts_E = torch.unique(keys_CJ, return_counts=True)
    weights_E = counts_E / num_points
    return entries_at(chunk, keys_E // vocab_size, keys_E % vocab_size, weights_E, counts_E)


def top_k(chunk: Chunk, _seed: int, k: int) -> Entries:
    """The k largest probabilities, renormalised to 1."""
    probs_CK, columns_CK = (top_CK[:, :k] for top_CK in chunk.top_CK)
    rows = torch.arange(len(probs_CK)).repeat_interleave(k)
    weights_CK = probs_CK / probs_CK.sum(dim=1, keepdim=True)
    return entries_at(chunk, rows, columns_CK.flatten(), weights_CK.flatten())


def polynomial(chunk: Chunk, _seed: int, k: int) -> Entries:
    """DistillKit's cheapest form: top k, the first logprob exact, the others a least-squares curve of three terms.

    Terms 1, sqrt(r) and r of the rank r; renormalised. Its bf16 and fp32 rounding is left out.
    """
    probs_CK, columns_CK = (top_CK[:, :k] for top_CK in chunk.top_CK)
    ranks = torch.arange(1, k, dtype=torch.float64)
    terms_KM = torch.stack([torch.ones_like(ranks), ranks.sqrt(), ranks], dim=1)
    fit_KK = terms_KM @ torch.linalg.pinv(terms_KM)
    logs_CK = probs_CK.log()
    logs_CK[:, 1:] = logs_CK[:, 1:] @ fit_KK.T
    weights_CK = logs_CK.softmax(dim=1)
    rows = torch.arange(len(probs_CK)).repeat_interleave(k)
    return entries_at(chunk, rows, columns_CK.flatten(), weights_CK.flatten())


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One point of a curve: `family` names the curve, `size` its entries or draws, `seeds` its random repetitions."""

    family: str
    size: int
    draw: Callable[[Chunk, int, int], Entries]
    seeds: int


SEEDS = 3
THRESHOLDS = tuple(1 / n for n in (5, 8, 12, 16, 25, 33, 50, 100, 200))
SCHEMES = (
    *(Scheme(family=IID, size=n, draw=independent, seeds=SEEDS) for n in (12, 25, 50, 100)),
    *(Scheme(family=SYSTEMATIC, size=n, draw=systematic, seeds=SEEDS) for n in (12, 25, 50)),
    *(Scheme(family=TOP_K, size=k, draw=top_k, seeds=1) for k in (12, 50, 64)),
    Scheme(family=POLYNOMIAL, size=50, draw=polynomial, seeds=1),
)
