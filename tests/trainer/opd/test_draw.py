"""Drawing tokens: SplitMix64 against its published numbers, uniformity, and the distribution function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.opd.draw import draw, mix, signed, uniforms

GAMMA = 0x9E3779B97F4A7C15
# The stream of seed 1234567, as the reference implementation in C prints it.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]
LAST = 1 - 2.0**-53


def _ints(numbers: list[int]) -> torch.Tensor:
    return torch.tensor([signed(number) for number in numbers], dtype=torch.int64)


def test_mix_gives_the_published_numbers() -> None:
    states = _ints([1234567 + (n + 1) * GAMMA for n in range(5)])
    assert [number % 2**64 for number in mix(states).tolist()] == PUBLISHED


@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**20)), min_size=1, max_size=50)
)
def test_uniforms_are_numbers_of_the_stream_of_a_mixed_key(pairs) -> None:
    keys, numbers = zip(*pairs, strict=True)
    found = uniforms(_ints(list(keys)), torch.tensor(numbers))
    seeds = mix(_ints(list(keys))).tolist()
    states = _ints(
        [seed + (number + 1) * GAMMA for seed, number in zip(seeds, numbers, strict=True)]
    )
    expected = [(bits % 2**64 >> 11) / 2**53 for bits in mix(states).tolist()]
    assert found.tolist() == expected
    assert min(expected) >= 0 and max(expected) < 1


def test_uniforms_fill_the_unit_interval_evenly_and_neighbours_are_not_alike() -> None:
    """2^18 numbers, keys and positions as they are used: small, and each the neighbour of others.

    Chi-square of 256 bins: mean 255, deviation 22.6, so 400 is 6 deviations out; a correlation deviates by 1 / 512.
    """
    keys, positions = torch.meshgrid(torch.arange(512), torch.arange(512), indexing="ij")
    found = uniforms(keys.flatten(), positions.flatten()).view(512, 512).numpy()
    counts = np.bincount((found.ravel() * 256).astype(int), minlength=256)
    assert ((counts - 1024) ** 2 / 1024).sum() < 400
    for one, other in [(found[1:], found[:-1]), (found[:, 1:], found[:, :-1])]:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 5 / 512
    assert len(np.unique(found)) == found.size


def test_every_token_gets_its_share_of_the_unit_interval() -> None:
    """N numbers at equal distances: an interval of length p holds N p of them, give or take one."""
    N = 20_000
    logits_V = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 3
    grid_N = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    tokens_N, logprobs_N = draw(logits_V.expand(N, -1), grid_N)
    wide_V = logits_V.double().numpy()
    logprobs_V = wide_V - np.log(np.exp(wide_V).sum())
    counts_V = np.bincount(tokens_N.numpy(), minlength=300)
    assert np.abs(counts_V - N * np.exp(logprobs_V)).max() < 1.01
    np.testing.assert_allclose(logprobs_N.numpy(), logprobs_V[tokens_N.numpy()], atol=2e-6, rtol=0)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, LAST])
def test_a_token_without_probability_is_never_drawn(uniform) -> None:
    never = float("-inf")
    logits_BV = torch.tensor([[never, 0, never, 0, never], [-200, 5, -200, -200, -200]])
    tokens_B, logprobs_B = draw(logits_BV, torch.full((2,), uniform, dtype=torch.float64))
    assert tokens_B.tolist() == [1 if uniform < 0.5 else 3, 1]
    np.testing.assert_allclose(logprobs_B.tolist(), [-np.log(2), 0], atol=1e-6)


def test_the_whole_vocabulary_of_equal_logits_does_not_overflow() -> None:
    tokens_B, _ = draw(torch.zeros(3, 201_088), torch.tensor([0.0, 0.5, LAST], dtype=torch.float64))
    assert tokens_B.tolist() == [0, 100_544, 201_087]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_give_no_number(value) -> None:
    tokens_B, logprobs_B = draw(
        torch.tensor([[0.0, value, 1.0], [0.0, 1.0, 2.0]]),
        torch.full((2,), LAST, dtype=torch.float64),
    )
    assert 0 <= int(tokens_B[0]) < 3 and not torch.isfinite(logprobs_B[0])
    assert tokens_B[1] == 2 and torch.isfinite(logprobs_B[1])
