"""The vocabulary-parallel reduction: ranks that hold a slice of the vocabulary agree with one that holds all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from datastore.packed import unpack
from datastore.reduce import VocabShard, reduce_hidden
from tests.distributed.gloo import run_gloo

ROWS, THRESHOLD = 12, 1 / 50
# Vocabulary and scale of the logits: flat, middling, peaked, and the real vocabulary (blocks of 64 ids a rank).
CASES = [(4096, 0.05), (4096, 0.5), (4096, 2.0), (201_088, 1.0)]


def problem(vocab: int, scale: float):
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(ROWS, 32, generator=generator)
    head = torch.randn(vocab, 32, generator=generator) * scale
    # The first row's mass lies in one shard, far from all other logits.
    head[vocab - 3] = 40 * hidden[0] / hidden[0].norm()
    realised = torch.randint(0, vocab, (ROWS,), generator=generator)
    return hidden, head, realised, torch.rand(ROWS, generator=generator).double()


def reduce_shard(rank: int, ranks: int, vocab: int, scale: float) -> np.ndarray:
    hidden, head, realised, uniforms = problem(vocab, scale)
    mine = vocab // ranks
    shard = VocabShard(first_id=rank * mine, group=dist.group.WORLD if ranks > 1 else None)
    rows = head[rank * mine : (rank + 1) * mine].contiguous()
    return reduce_hidden(
        hidden, rows, realised, uniforms, threshold=THRESHOLD, chunk=5, shard=shard
    ).numpy()


def reduce_all(rank: int, ranks: int) -> list[np.ndarray]:
    return [reduce_shard(rank, ranks, *case) for case in CASES]


@pytest.fixture(scope="module")
def both_ranks() -> list[list[np.ndarray]]:
    return run_gloo(reduce_all, 2, 2)


@pytest.mark.parametrize("case", range(len(CASES)), ids=str)
def test_two_ranks_equal_one(both_ranks: list[list[np.ndarray]], case: int) -> None:
    np.testing.assert_array_equal(both_ranks[0][case], both_ranks[1][case])
    together = unpack(both_ranks[0][case], np.arange(ROWS), THRESHOLD)
    alone = unpack(reduce_shard(0, 1, *CASES[case]), np.arange(ROWS), THRESHOLD)
    np.testing.assert_array_equal(together.num_head_P, alone.num_head_P)
    np.testing.assert_array_equal(together.offsets_P1, alone.offsets_P1)
    np.testing.assert_array_equal(together.ids_E, alone.ids_E)
    np.testing.assert_allclose(together.weights_E, alone.weights_E, rtol=1e-4)
    np.testing.assert_allclose(
        np.exp(together.log_tail_mass_P), np.exp(alone.log_tail_mass_P), atol=5e-6
    )
    for name in ("realised_logprob_P", "entropy_P"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), atol=1e-4)
