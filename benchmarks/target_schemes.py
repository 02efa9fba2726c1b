"""Ways to store a teacher's distribution, each as a function of the full distributions. Pure.

Every scheme takes a `Chunk` (the distributions of some positions of one document) and a seed, and gives sparse
weights. Schemes without chance ignore the seed. Vocabulary here is columns 0..V-1 in the order of ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from datastore.target import head_mask, position_uniforms
from datastore.types import SparseTarget

_SEED_STEP = 0x9E3779B97F4A7C15
THRESHOLD, IID, SYSTEMATIC = "threshold (ours)", "iid draws", "systematic draws"
TOP_K, GHOST, POLYNOMIAL = "top-k renormalised", "top-k + ghost bucket", "DistillKit polynomial"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Positions of one document: probs_CV float64, each row a distribution. key: the document's content key."""

    probs_CV: torch.Tensor
    positions_C: np.ndarray
    realised_C: np.ndarray
    key: int

    def uniforms(self, seed: int) -> torch.Tensor:
        """float64 [C]; seed 0 gives those that the store uses."""
        key = (self.key + seed * _SEED_STEP) % 2**64
        return torch.from_numpy(position_uniforms(key, self.positions_C))


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


def _entries(chunk: Chunk, rows_E, columns_E, weights_E, counts_E=None) -> Entries:
    probs_E = chunk.probs_CV[rows_E, columns_E].float()
    counts_E = torch.zeros_like(rows_E) if counts_E is None else counts_E
    return Entries(
        rows_E=rows_E,
        columns_E=columns_E,
        weights_E=weights_E.float(),
        probs_E=probs_E,
        counts_E=counts_E.to(torch.int16),
    )


def systematic_points(
    cumulative_CV: torch.Tensor, uniforms_C: torch.Tensor, spacing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns that the points (j + u) * spacing hit on a cumulative mass: (rows, columns), one pair a point."""
    num_points = int(1 / spacing) + 2
    points_CJ = (torch.arange(num_points) + uniforms_C[:, None]) * spacing
    columns_CJ = torch.searchsorted(cumulative_CV, points_CJ, right=True)
    rows, points = (points_CJ < cumulative_CV[:, -1:]).nonzero(as_tuple=True)
    return rows, columns_CJ[rows, points]


def threshold_target(chunk: Chunk, seeds: tuple[int, ...], threshold: float) -> list[SparseTarget]:
    """What `datastore.target.reduce_logprobs` gives at each seed, all positions at once."""
    probs_CV = chunk.probs_CV
    in_head_CV = probs_CV >= threshold
    tail_CV = torch.where(in_head_CV, 0.0, probs_CV)
    cumulative_CV = tail_CV.cumsum(dim=1)
    head_rows, head_columns = in_head_CV.nonzero(as_tuple=True)
    head_probs = probs_CV[head_rows, head_columns]
    log_tail_C = cumulative_CV[:, -1].log().clamp(max=0.0).float().numpy()
    entropy_C = -torch.special.xlogy(probs_CV, probs_CV).sum(dim=1).float().numpy()
    realised_C = probs_CV[torch.arange(len(probs_CV)), torch.from_numpy(chunk.realised_C)].log()
    targets = []
    for seed in seeds:
        rows, columns = systematic_points(cumulative_CV, chunk.uniforms(seed), threshold)
        all_rows = torch.cat([head_rows, rows]).numpy()
        ids_E = torch.cat([head_columns, columns]).numpy()
        drawn = torch.full((len(rows),), threshold, dtype=torch.float64)
        weights_E = torch.cat([head_probs, drawn]).numpy()
        is_draw_E = np.arange(len(all_rows)) >= len(head_rows)
        # by position, the head before the draws; the head by falling probability, draws by id
        order_E = np.lexsort((np.where(is_draw_E, ids_E, -weights_E), is_draw_E, all_rows))
        counts_C = np.bincount(all_rows, minlength=len(probs_CV))
        targets.append(
            SparseTarget(
                threshold=threshold,
                positions_P=chunk.positions_C,
                num_head_P=in_head_CV.sum(dim=1).int().numpy(),
                offsets_P1=np.concatenate([[0], np.cumsum(counts_C)]),
                ids_E=ids_E[order_E].astype(np.int32),
                weights_E=weights_E[order_E].astype(np.float32),
                realised_logprob_P=realised_C.clamp(max=0.0).float().numpy(),
                log_tail_mass_P=log_tail_C,
                entropy_P=entropy_C,
            )
        )
    return targets


def target_entries(chunk: Chunk, target: SparseTarget) -> Entries:
    """The entries of a target of this chunk, whose ids are columns."""
    counts_C = np.diff(target.offsets_P1)
    rows_E = torch.from_numpy(np.repeat(np.arange(len(counts_C)), counts_C))
    columns_E = torch.from_numpy(target.ids_E.astype(np.int64))
    in_head_E = head_mask(target.num_head_P, counts_C - target.num_head_P)
    drawn_E = torch.from_numpy(~in_head_E)
    return _entries(chunk, rows_E, columns_E, torch.from_numpy(target.weights_E), drawn_E)


def systematic(chunk: Chunk, seed: int, num_points: int) -> Entries:
    """Systematic draws over the whole distribution, weight 1/n each."""
    cumulative_CV = chunk.probs_CV.cumsum(dim=1)
    cumulative_CV[:, -1] = 1.0  # rounding must not lose the last point
    hits = systematic_points(cumulative_CV, chunk.uniforms(seed), 1 / num_points)
    return _counted(chunk, *hits, num_points)


def independent(chunk: Chunk, seed: int, num_draws: int) -> Entries:
    """Independent draws with replacement (random-sampling KD, arXiv 2503.16870), weight 1/n each."""
    cumulative_CV = chunk.probs_CV.cumsum(dim=1)
    generator = torch.Generator().manual_seed(
        (chunk.key + int(chunk.positions_C[0]) + seed * _SEED_STEP) % 2**63
    )
    shape = (len(cumulative_CV), num_draws)
    points_CJ = torch.rand(shape, generator=generator, dtype=torch.float64) * cumulative_CV[:, -1:]
    columns_CJ = torch.searchsorted(cumulative_CV, points_CJ, right=True)
    columns_CJ.clamp_(max=cumulative_CV.shape[1] - 1)
    rows = torch.arange(len(cumulative_CV)).repeat_interleave(num_draws)
    return _counted(chunk, rows, columns_CJ.flatten(), num_draws)


def _counted(chunk: Chunk, rows: torch.Tensor, columns: torch.Tensor, num_draws: int) -> Entries:
    vocab_size = chunk.probs_CV.shape[1]
    keys_E, counts_E = torch.unique(rows * vocab_size + columns, return_counts=True)
    weights_E = counts_E / num_draws
    return _entries(chunk, keys_E // vocab_size, keys_E % vocab_size, weights_E, counts_E)


def top_k(chunk: Chunk, _seed: int, k: int) -> Entries:
    """The k largest probabilities, renormalised to 1."""
    probs_CK, columns_CK = chunk.probs_CV.topk(k, dim=1)
    rows = torch.arange(len(probs_CK)).repeat_interleave(k)
    weights_CK = probs_CK / probs_CK.sum(dim=1, keepdim=True)
    return _entries(chunk, rows, columns_CK.flatten(), weights_CK.flatten())


def polynomial(chunk: Chunk, _seed: int, k: int) -> Entries:
    """DistillKit's cheapest form: top k, the first logprob exact, the others a least-squares curve of three terms.

    Terms 1, sqrt(r) and r of the rank r; renormalised. Its bf16 and fp32 rounding is left out.
    """
    probs_CK, columns_CK = chunk.probs_CV.topk(k, dim=1)
    ranks = torch.arange(1, k, dtype=torch.float64)
    terms_KM = torch.stack([torch.ones_like(ranks), ranks.sqrt(), ranks], dim=1)
    fit_KK = terms_KM @ torch.linalg.pinv(terms_KM)
    logs_CK = probs_CK.log()
    logs_CK[:, 1:] = logs_CK[:, 1:] @ fit_KK.T
    weights_CK = logs_CK.softmax(dim=1)
    rows = torch.arange(len(probs_CK)).repeat_interleave(k)
    return _entries(chunk, rows, columns_CK.flatten(), weights_CK.flatten())


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
