"""Packed rows: what the reduction on the device returns for each position, and how to read it. Pure numpy.

A packed row is int32 [5 + J + K] with K most head entries and J = K + 1 most draws: number of head entries, number of
draws, then bit patterns of float32: realised logprob, log tail mass, entropy; then the ids (head by falling
probability, draws ascending) and the head logprobs.
"""

from __future__ import annotations

import numpy as np

from datastore.types import SparseTarget

SCALARS = 5


def most_heads(threshold: float) -> int:
    """The most ids that can have probability >= threshold."""
    return int(1 / threshold + 1e-9)


def packed_width(threshold: float) -> int:
    """Columns of a packed row."""
    return SCALARS + 2 * most_heads(threshold) + 1


def has_nan(packed_PC: np.ndarray) -> bool:
    """Whether a realised logprob, log tail mass or entropy is no number."""
    return bool(np.isnan(np.ascontiguousarray(packed_PC[:, 2:SCALARS]).view(np.float32)).any())


def unpack(packed_PC: np.ndarray, positions_P: np.ndarray, threshold: float) -> SparseTarget:
    """The sparse target that packed rows int32 [P, C] hold, at `positions_P`."""
    most = most_heads(threshold)
    num_head_P, num_draws_P = packed_PC[:, 0], packed_PC[:, 1]
    floats_P3 = np.ascontiguousarray(packed_PC[:, 2:SCALARS]).view(np.float32)
    slots_J = np.arange(most + 1)
    is_head_PJ = slots_J < num_head_P[:, None]
    used_PJ = slots_J < (num_head_P + num_draws_P)[:, None]
    weights_PJ = np.full(is_head_PJ.shape, threshold, dtype=np.float32)
    logprobs_PK = np.ascontiguousarray(packed_PC[:, SCALARS + most + 1 :]).view(np.float32)
    heads_PK = is_head_PJ[:, :most]
    weights_PJ[:, :most][heads_PK] = np.exp(logprobs_PK[heads_PK].astype(np.float64))
    offsets_P1 = np.zeros(len(packed_PC) + 1, dtype=np.int64)
    np.cumsum(num_head_P + num_draws_P, out=offsets_P1[1:])
    return SparseTarget(
        threshold=threshold,
        positions_P=positions_P.astype(np.int32),
        num_head_P=num_head_P.astype(np.int32),
        offsets_P1=offsets_P1,
        ids_E=packed_PC[:, SCALARS : SCALARS + most + 1][used_PJ].astype(np.int32),
        weights_E=weights_PJ[used_PJ],
        realised_logprob_P=floats_P3[:, 0].copy(),
        log_tail_mass_P=floats_P3[:, 1].copy(),
        entropy_P=floats_P3[:, 2].copy(),
    )
