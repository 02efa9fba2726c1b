"""Core attention against a loop over single positions in float64, and the masks it rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.megatron.attention import (
    PackedRows,
    alibi,
    dense_attention,
    visible_range,
)

B, S, H, G, D = 2, 23, 4, 2, 8
DOCUMENTS = [[0] * 9 + [1] * 11 + [-1] * 3, [0] * 23]


def _inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(B, H, S, D), (B, G, S, D), (B, G, S, D), (H,)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


def _by_hand(q, k, v, sink, *, window: int | None, with_alibi: bool) -> np.ndarray:
    """One query at a time: the visible keys listed, exponentials summed with the sink's."""
    out = np.zeros((B, H, S, D))
    for b in range(B):
        for h in range(H):
            slope = 2.0 ** (-8.0 * (h + 1) / H) if with_alibi else 0.0
            for i in range(S):
                first = 0 if window is None else max(0, i - window + 1)
                seen = [j for j in range(first, i + 1) if DOCUMENTS[b][j] == DOCUMENTS[b][i]]
                scores = [
                    float(q[b, h, i] @ k[b, h // (H // G), j]) / math.sqrt(D) - slope * (i - j)
                    for j in seen
                ]
                total = math.exp(float(sink[h])) + sum(math.exp(s) for s in scores)
                for j, score in zip(seen, scores, strict=True):
                    out[b, h, i] += math.exp(score) / total * v[b, h // (H // G), j].numpy()
    return out


@pytest.mark.parametrize(
    ("window", "with_alibi"), [(None, True), (5, False), (1, False), (128, False)]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_dense_attention_equals_a_loop_over_positions(window, with_alibi, dtype, tolerance) -> None:
    inputs = _inputs(dtype)
    rows = PackedRows(document_BS=torch.tensor(DOCUMENTS, dtype=torch.int32))
    score = alibi(H, 0) if with_alibi else None
    out = dense_attention(*inputs, rows, window=window, score_function=score, scale=D**-0.5)
    expected = _by_hand(*(t.double() for t in inputs), window=window, with_alibi=with_alibi)
    np.testing.assert_allclose(out.double().numpy(), expected, atol=tolerance, rtol=0)


def test_a_window_of_128_reaches_back_127_positions() -> None:
    rows = PackedRows(document_BS=torch.zeros(1, 300, dtype=torch.int32))
    seen = rows.dense_mask(128)[0, 0]
    assert torch.nonzero(seen[200]).flatten().tolist() == list(range(73, 201))
    assert torch.nonzero(seen[40]).flatten().tolist() == list(range(41))


@pytest.mark.parametrize("positions", [1, 48, 300])
@pytest.mark.parametrize("window", [None, 1, 6, 128])
def test_visible_ranges_are_those_of_the_mask_function(positions, window) -> None:
    generator = torch.Generator().manual_seed(positions)
    document_BS = torch.randint(0, 6, (3, positions), generator=generator).sort(dim=1).values.int()
    document_BS[0, positions - positions // 5 :] = -1
    low_BS, high_BS = visible_range(document_BS, window)
    rows = PackedRows(document_BS=document_BS)
    seen_BSS = rows.dense_mask(window)[:, 0]
    place_S = torch.arange(positions)
    within = (place_S >= low_BS[:, :, None]) & (place_S <= place_S[:, None])
    assert torch.equal(seen_BSS, within)
    last_BS = torch.where(seen_BSS, place_S[:, None], -1).amax(dim=1)
    assert torch.equal(high_BS.long(), last_BS)
    assert (low_BS.dtype, high_BS.dtype) == (torch.int32, torch.int32)


def test_slopes_of_a_tensor_parallel_rank_are_those_of_its_heads() -> None:
    zero, one = torch.zeros(()), torch.ones((), dtype=torch.int64)
    every = [-float(alibi(8, 0)(zero, None, torch.tensor(h), one, 0 * one)) for h in range(8)]
    second = [-float(alibi(8, 4)(zero, None, torch.tensor(h), one, 0 * one)) for h in range(4)]
    assert every == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert second == every[4:]


def test_gradients_pass_a_numerical_check() -> None:
    inputs = [t[:, :2, :7] if t.ndim == 4 else t[:2] for t in _inputs(torch.float64)]
    inputs = [inputs[0][:1], inputs[1][:1, :1], inputs[2][:1, :1], inputs[3]]
    rows = PackedRows(document_BS=torch.tensor([[0, 0, 0, 0, 1, 1, 1]], dtype=torch.int32))

    def attend(*tensors):
        return dense_attention(*tensors, rows, window=3, score_function=alibi(2, 0), scale=0.3)

    assert torch.autograd.gradcheck(attend, [t.clone().requires_grad_() for t in inputs])
