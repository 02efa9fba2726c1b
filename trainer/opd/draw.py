"""Drawing a token from logits with one counted random number. Pure.

The random numbers are SplitMix64 (Steele, Lea, Flood 2014): number n of the stream of seed s is mix(s + (n + 1) gamma),
gamma = 0x9E3779B97F4A7C15. A rollout's stream has the seed mix(key), and the number of a token is its position in the
document. So a draw depends on key, position and logits alone: not on the slot, the batch, the order or other draws.

The distribution function is summed in integers: weight_v = floor(2^44 exp(z_v - max z)), at most 2^44, so sums of up to
2^18 of them are exact in int64, the same in any order, on CPU and CUDA (where a cumulative sum of floats would not
repeat bit by bit). A token loses less than 2^-44 of the most probable one's probability; one that loses all of it is
never drawn.

Legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_WEIGHT_BITS = 44


def signed(number: int) -> int:
    """The int64 with the bits of a uint64: torch has no arithmetic for unsigned ones."""
    number &= 2**64 - 1
    return number - 2**64 if number >= 2**63 else number


def mix(bits: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finaliser on int64, a bijection; products wrap modulo 2^64."""
    first, second = (signed(number) for number in _MULTIPLIERS)
    bits = (bits ^ _shifted(bits, 30)) * first
    bits = (bits ^ _shifted(bits, 27)) * second
    return bits ^ _shifted(bits, 31)


def uniforms(key_B: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    """Number `number_B` of the streams of `key_B` (int64 both): float64 [B], multiples of 2^-53 in [0, 1)."""
    bits_B = mix(mix(key_B) + (number_B + 1) * signed(_GAMMA))
    return _shifted(bits_B, 11).double() * 2.0**-53


def draw(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each row by its distribution function, and its log-probability in the dtype of the logits.

    logits_BV: float32 or float64, V <= 2^18. Returns tokens int64 and logprobs [B], both within the vocabulary even
    where logits are not finite; the log-probability is NaN there.
    """
    # In place: on CPU fresh memory for [B, V] takes longer than the arithmetic.
    weight_BV = (logits_BV - logits_BV.amax(dim=1, keepdim=True)).exp_().mul_(2.0**_WEIGHT_BITS)
    ends_BV = weight_BV.to(torch.int64).cumsum_(dim=1)
    total_B = ends_BV[:, -1]
    # The product may be rounded up to the whole sum.
    target_B = torch.minimum((uniform_B * total_B.double()).to(torch.int64), total_B - 1)
    # The first token whose sum is above the target: one of weight 0 has the sum of the token before it.
    token_B = torch.searchsorted(ends_BV, target_B.unsqueeze(1), right=True).squeeze(1)
    token_B = token_B.clamp(max=logits_BV.shape[1] - 1)
    # A drawn token weighs at least 1, so its exponential has all its digits.
    share_B = weight_BV.gather(1, token_B.unsqueeze(1)).squeeze(1) / weight_BV.sum(dim=1)
    return token_B, share_B.log()


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right: torch's carries the sign."""
    return (bits >> count) & (2 ** (64 - count) - 1)
