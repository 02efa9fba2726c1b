"""Ratios of sums with their sampling error, from moments that are kept while streaming. Pure.

A ratio such as nats a target is sum(a) / sum(b) over clusters (documents, rows, shards) that were drawn independently;
what is inside one cluster may be correlated. Linearised variance (Cochran, Sampling Techniques, 6.5):
n / (n - 1) * sum((a - R b)^2) / sum(b)^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

# Student's t at 97.5 % for 1 to 10 degrees of freedom; beyond, `student_t` expands it.
_STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Ratio:
    """sum(a) / sum(b) over `clusters` clusters. standard_error: NaN below two clusters, which tell no error."""

    value: float
    standard_error: float
    clusters: int

    def half_width(self) -> float:
        """Half the 95 % confidence interval."""
        return student_t(self.clusters - 1) * self.standard_error


@dataclass
class Moments:
    """Count, sums and products of K named quantities over clusters. float64; sums over shards in shard order repeat."""

    names: tuple[str, ...]
    clusters: int = 0
    sums_K: np.ndarray = field(init=False)
    products_KK: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.names)
        self.sums_K, self.products_KK = np.zeros(size), np.zeros((size, size))

    def add(self, values_NK: np.ndarray) -> None:
        """N clusters, their quantities in the order of `names`."""
        self.clusters += len(values_NK)
        self.sums_K += values_NK.sum(axis=0)
        self.products_KK += values_NK.T @ values_NK

    def merge(self, other: Moments) -> None:
        """Take in the clusters of `other`, which has the same names."""
        self.clusters += other.clusters
        self.sums_K += other.sums_K
        self.products_KK += other.products_KK

    def sum(self, name: str) -> float:
        """Sum of one quantity."""
        return float(self.sums_K[self.names.index(name)])

    def ratio(self, above: Sequence[str], below: str) -> Ratio:
        """(sum of all `above`) / (sum of `below`), NaN where `below` sums to 0."""
        a_K = np.array([float(name in above) for name in self.names])
        b_K = np.array([float(name == below) for name in self.names])
        total = float(b_K @ self.sums_K)
        if total == 0:
            return Ratio(math.nan, math.nan, self.clusters)
        value = float(a_K @ self.sums_K) / total
        error = math.nan
        if self.clusters > 1:
            residual_K = a_K - value * b_K
            # The residuals sum to 0, so this is their spread; rounding may leave it just below 0.
            squares = max(float(residual_K @ self.products_KK @ residual_K), 0.0)
            error = math.sqrt(squares * self.clusters / (self.clusters - 1)) / abs(total)
        return Ratio(value, error, self.clusters)


def student_t(degrees: int) -> float:
    """The 97.5 % quantile of Student's t, NaN below one degree of freedom; off by 1e-4 at most."""
    if degrees < 1:
        return math.nan
    if degrees <= len(_STUDENT_T):
        return _STUDENT_T[degrees - 1]
    z, n = NormalDist().inv_cdf(0.975), degrees
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
