"""The order of samples: a keyed permutation computed index by index, so that no order is ever stored.

Specified in docs/order.md and pinned by golden vectors; libraries promise no stable stream (docs/order.md, "Why").
All arithmetic is on unsigned 64-bit integers modulo 2^64.
"""

from __future__ import annotations

import numpy as np

from common.errors import ConfigError

ORDER_VERSION = 2
ROUNDS = 8
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLY_1, _MULTIPLY_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def feistel_permutation(indices: np.ndarray, n: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where each index of [0, n) lies in the order of (seed, epoch): a bijection of [0, n) onto itself.

    indices: integers of any shape, each in [0, n). seed, epoch: in [0, 2^64). Returns int64 of the same shape.
    """
    if not 0 <= seed <= _MASK or not 0 <= epoch <= _MASK:
        raise ConfigError("seed and epoch", got=f"{seed}, {epoch}", expected="0..2^64-1")
    values = np.asarray(indices).astype(np.uint64).ravel()
    if not 1 <= n < 1 << 63 or (values.size and int(values.max()) >= n):
        raise IndexError(f"indices outside 0..{n - 1}")
    bits, keys = (n - 1).bit_length(), _round_keys(seed, epoch)
    values = _encrypt(values, bits, keys)
    # The cipher permutes [0, 2^bits), less than 2n numbers: walk on until back in [0, n), twice on average at most.
    while (outside := np.flatnonzero(values >= n)).size:
        values[outside] = _encrypt(values[outside], bits, keys)
    return values.astype(np.int64).reshape(np.shape(indices))


def endless_order(positions_K: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Members at `positions_K` (int64, from 0) of the endless order over n things, epoch after epoch: int64 [K]."""
    epochs_K, within_K = np.divmod(positions_K, n)
    members_K = np.empty_like(within_K)
    for epoch in np.unique(epochs_K).tolist():
        here_K = epochs_K == epoch
        members_K[here_K] = feistel_permutation(within_K[here_K], n, seed=seed, epoch=epoch)
    return members_K


def in_share(positions_P: np.ndarray, share: float) -> np.ndarray:
    """Which positions belong to a share of them: bool [P]. Any run of positions holds the share to within one.

    A pure function of the position: (p + 1) * share and p * share lie in other whole numbers.
    """
    return share_before(positions_P + 1, share) > share_before(positions_P, share)


def share_before(positions_P: np.ndarray, share: float) -> np.ndarray:
    """How many positions before each belong to a share: floor(p * share) in IEEE double, int64 [P]."""
    return np.floor(positions_P * share).astype(np.int64)


def plain_seed(seed: int) -> int:
    """The seed of the order of rows without targets, where scored and plain rows are mixed (docs/order.md)."""
    return _mix(seed + 2 * _GOLDEN)


def prompt_seed(seed: int) -> int:
    """The seed of the order of prompts: else a dataset of one document a row would give its rows in the same order."""
    return _mix(seed + 3 * _GOLDEN)


def _encrypt(values: np.ndarray, bits: int, keys: list[int]) -> np.ndarray:
    """The Feistel cipher on `bits` bits: each round xors one half with a function of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    for number, key in enumerate(keys):
        if number % 2 == 0:
            high = high ^ (_mix_array(low ^ np.uint64(key)) & high_mask)
        else:
            low = low ^ (_mix_array(high ^ np.uint64(key)) & low_mask)
    return (high << low_bits) | low


def _round_keys(seed: int, epoch: int) -> list[int]:
    """Mixing between seed and epoch, not their sum: (seed, epoch + 1) shares nothing with (seed + 1, epoch)."""
    base = _mix(_mix(seed + _GOLDEN) + epoch)
    return [_mix(base + (number + 1) * _GOLDEN) for number in range(ROUNDS)]


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014; constants: Stafford's variant 13)."""
    value &= _MASK
    value = (value ^ (value >> 30)) * _MULTIPLY_1 & _MASK
    value = (value ^ (value >> 27)) * _MULTIPLY_2 & _MASK
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray) -> np.ndarray:
    """`_mix` of every element; unsigned arrays wrap around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    return values ^ (values >> np.uint64(31))
