"""Masses of a blob: head logprobs, tail mass and realised logprob as few symbols. Pure, vectorised.

A head is stored as its shape (steps of 1/16 nat below its first entry) and scaled to the mass that the tail leaves. The
tail mass lies in a cell of width t that the number of draws and the position's uniform number name; within it, two
or four raw bits, or, with at most one draw, a logarithmic step. A realised token in the head needs two bits more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datastore.codec_ids import damaged, within_positions

STEPS_PER_NAT = 16
# Of a head logprob: 1/32 by its own step, 1/32 by the steps of the others in the sum, 1/32 by the tail mass.
MAX_HEAD_ERROR = 3 / 32
REALISED_STEPS_PER_NAT = 32
RESIDUAL_BITS, BELOW_BITS = 2, 5
NO_TAIL = 255  # the tail step of a head that holds all
_MAX_TAIL_STEP = 254
_FALLOFF = np.exp(-np.arange(256) / STEPS_PER_NAT)


@dataclass(frozen=True, slots=True)
class Shape:
    """What the counts of a position say about its masses; the same for an encoder and a decoder.

    num_head_P, num_draws_P: int64. low_P, high_P: float64, lowest and highest tail mass. threshold: t.
    """

    num_head_P: np.ndarray
    num_draws_P: np.ndarray
    low_P: np.ndarray
    high_P: np.ndarray
    threshold: float

    @classmethod
    def of(
        cls,
        num_head_P: np.ndarray,
        num_draws_P: np.ndarray,
        uniforms_P: np.ndarray,
        threshold: float,
    ) -> Shape:
        """k draws at the uniform number u mean a tail from (k - 1 + u) t to (k + u) t; h head entries leave 1 - h t."""
        num_head_P, num_draws_P = num_head_P.astype(np.int64), num_draws_P.astype(np.int64)
        points_P = num_draws_P + uniforms_P
        low_P = np.maximum((points_P - 1) * threshold, 0.0)
        high_P = np.minimum(points_P * threshold, 1 - num_head_P * threshold)
        high_P = np.maximum(high_P, low_P + threshold / 64)
        return cls(num_head_P, num_draws_P, low_P, high_P, threshold)

    @property
    def stepped_P(self) -> np.ndarray:
        """Positions whose tail mass is a logarithmic step: a head, and at most one draw."""
        return (self.num_head_P > 0) & (self.num_draws_P < 2)

    @property
    def tail_steps(self) -> int:
        """Logarithmic steps a nat: the mass of a head is then off by at most 1/32 of itself."""
        return 4 if self.threshold <= 1 / 12 else 32

    def tail_widths(self) -> np.ndarray:
        """Raw bits of the tail mass: 4 where little mass may be left to the head, else 2; int64 [P]."""
        widths_P = np.where(1 - self.high_P < 4 * self.threshold, 4, 2)
        return np.where((self.num_head_P > 0) & ~self.stepped_P, widths_P, 0)

    def realised_widths(self, place_P: np.ndarray) -> np.ndarray:
        """Raw bits of the realised logprob, by the realised token's place in the head (1.., 0: not in it)."""
        certain_P = (self.num_head_P == 1) & (self.num_draws_P == 0)
        return np.where(place_P == 0, BELOW_BITS, np.where(certain_P, 0, RESIDUAL_BITS))


def quantise_tail(shape: Shape, tail_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tail masses (float64 [P]) as (steps of the stepped positions uint8, raw values int64 [P])."""
    low_P, high_P = shape.low_P, shape.high_P
    stepped_P = shape.stepped_P
    tail, high = tail_P[stepped_P], high_P[stepped_P]
    steps = np.full(len(tail), NO_TAIL, np.uint8)
    some = tail > 0
    below = np.floor(np.log(high[some] / tail[some]) * shape.tail_steps)
    steps[some] = np.clip(below, 0, _MAX_TAIL_STEP)
    levels_P = 1 << shape.tail_widths()
    raw_P = np.floor((tail_P - low_P) / (high_P - low_P) * levels_P).astype(np.int64)
    return steps, np.clip(raw_P, 0, levels_P - 1)


def tail_masses(
    shape: Shape, steps: np.ndarray, raw_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Tail mass and its log, float64 [P] each. Raises FormatError where a head is left with nothing."""
    low_P, high_P = shape.low_P, shape.high_P
    tail_P = low_P + (high_P - low_P) * (raw_P + 0.5) / (1 << shape.tail_widths())
    tail_P[shape.num_head_P == 0] = 1.0
    stepped_P = shape.stepped_P
    stepped = high_P[stepped_P] * np.exp(-(steps + 0.5) / shape.tail_steps)
    stepped = np.maximum(stepped, low_P[stepped_P])
    stepped[steps == NO_TAIL] = 0.0
    tail_P[stepped_P] = stepped
    if np.any((tail_P >= 1) & (shape.num_head_P > 0)):
        raise damaged("a tail leaves no mass to its head")
    if np.any((tail_P == 0) & (shape.num_draws_P > 0)):
        raise damaged("draws of a tail without mass")
    with np.errstate(divide="ignore"):
        return tail_P, np.log(tail_P)


def quantise_head(weights_H: np.ndarray, num_head_P: np.ndarray) -> np.ndarray:
    """Steps of each head entry below the entry before it, 0 for a first: int64 [H]."""
    counts = num_head_P[num_head_P > 0]
    logprobs_H = np.log(weights_H.astype(np.float64))
    starts = np.cumsum(counts) - counts
    below_H = np.rint((np.repeat(logprobs_H[starts], counts) - logprobs_H) * STEPS_PER_NAT)
    steps_H = np.diff(below_H, prepend=0.0).astype(np.int64)
    steps_H[starts] = 0
    return steps_H


def head_weights(steps_H: np.ndarray, num_head_P: np.ndarray, tail_P: np.ndarray) -> np.ndarray:
    """Probabilities of head entries, float64 [H]: the shape of each head, scaled to the mass 1 - tail."""
    counts = num_head_P[num_head_P > 0]
    if not len(counts):
        return np.empty(0)
    below_H = within_positions(steps_H, num_head_P)
    if below_H.max() > 255:
        raise damaged("a head entry lies far below the threshold")
    weights_H = _FALLOFF[below_H]
    sums = np.add.reduceat(weights_H, np.cumsum(counts) - counts)
    weights_H *= np.repeat((1 - tail_P[num_head_P > 0]) / sums, counts)
    return weights_H


def quantise_realised(
    realised_P: np.ndarray, shape: Shape, place_P: np.ndarray, base_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Realised logprobs as (whole nats below ln t of tokens outside the head uint8, raw values int64 [P]).

    base_P: logprob of the head entry at place_P, float64; ignored where place_P is 0.
    """
    residual_P = np.floor((realised_P - base_P) * REALISED_STEPS_PER_NAT)
    raw_P = np.clip(residual_P + (1 << RESIDUAL_BITS - 1), 0, (1 << RESIDUAL_BITS) - 1)
    raw_P[shape.realised_widths(place_P) == 0] = 0
    outside_P = place_P == 0
    below = (np.log(shape.threshold) - realised_P[outside_P]) * REALISED_STEPS_PER_NAT
    below = np.clip(below, 0, (256 << BELOW_BITS) - 1).astype(np.int64)
    raw_P[outside_P] = below & (1 << BELOW_BITS) - 1
    return (below >> BELOW_BITS).astype(np.uint8), raw_P.astype(np.int64)


def realised_logprobs(
    whole: np.ndarray,
    raw_P: np.ndarray,
    shape: Shape,
    place_P: np.ndarray,
    base_P: np.ndarray,
) -> np.ndarray:
    """Realised logprobs, float64 [P]: middles of their steps, at most 0."""
    residual_P = (raw_P - (1 << RESIDUAL_BITS - 1) + 0.5) / REALISED_STEPS_PER_NAT
    residual_P[shape.realised_widths(place_P) == 0] = 0.0
    found_P = base_P + residual_P
    outside_P = place_P == 0
    steps = whole.astype(np.int64) << BELOW_BITS | raw_P[outside_P]
    found_P[outside_P] = np.log(shape.threshold) - (steps + 0.5) / REALISED_STEPS_PER_NAT
    return np.minimum(found_P, 0.0)
