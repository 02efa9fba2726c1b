"""The attention kernels at tiny sizes under Triton's interpreter, against `dense_attention` in fp64.

    TRITON_INTERPRET=1 python -m pytest tests/trainer/test_attention_kernel.py

The interpreter is mended as in test_moe_kernels.py, whose fixture says why.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.trainer.attention_errors import dense_results, documents, errors, gaps, inputs

pytest.importorskip("triton", reason="needs triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
)
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.trainer.test_moe_kernels import interpreter  # noqa: F401

CASES = {  # positions, lengths of documents by row, heads and groups, width, window, ALiBi
    "window over documents": (300, [[5, 150, 40], [220, 1, 79]], (4, 2), 32, 128, False),
    "small window": (130, [[70, 20], [130, 0]], (2, 2), 16, 7, False),
    "documents with ALiBi": (300, [[5, 210, 40], [150, 1, 149]], (4, 2), 32, None, True),
    "one document": (257, [[257]], (4, 1), 16, None, True),
    "a position a document": (70, [[1] * 60], (2, 1), 16, None, True),
    "a whole number of blocks": (256, [[128, 128], [256, 0]], (2, 1), 128, None, False),
    "one position": (1, [[1]], (2, 1), 16, 128, False),
}


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_equal_dense_fp64(case) -> None:
    positions, lengths, heads, width, window, alibi = CASES[case]
    document_BS = documents("cpu", lengths, positions)
    of = inputs("cpu", positions, len(lengths), heads, width)
    for name, error in errors(of, document_BS, window=window, alibi=alibi).items():
        assert error <= 1, name


@pytest.mark.parametrize("queries", [16, 64])
@pytest.mark.parametrize("keys", [16, 64])
@pytest.mark.parametrize(
    ("window", "split", "turned"), [(None, True, True), (33, False, True), (33, True, False)]
)
def test_every_launch_in_fp32(queries, keys, window, split, turned) -> None:
    from trainer.kernels.attention import Launch, Launches, attend, gradients
    from trainer.megatron.attention import visible_range

    document_BS = documents("cpu", [[3, 90, 20], [100, 15, 35]], 150)
    *of, sink, grad = [t.float() for t in inputs("cpu", 150, 2, (4, 2), 16)]
    launch = Launch(queries, keys, 4, 2, split, turned)
    how = {"window": window, "alibi": window is None}
    low, high = visible_range(document_BS, window)
    out, lse = attend(*of, sink, low, **how, scale=0.25, launch=launch)
    grads = gradients(
        *(grad, *of, sink, low, high, out, lse),
        **how,
        scale=0.25,
        launches=Launches(launch, launch, launch),
    )
    want = dense_results([*of, sink, grad], document_BS, **how)
    for name, error in gaps(dict(zip(want, (out, *grads), strict=True)), want).items():
        assert error < 2e-6, name


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_ranges_equal_the_mask(window) -> None:
    from trainer.megatron.attention import PackedRows, visible_range

    document_BS = documents("cpu", [[3, 1, 20], [24, 0, 0], [0, 25, 0]], 30)
    low_BS, high_BS = visible_range(document_BS, window)
    mask_BSS = PackedRows(document_BS=document_BS).dense_mask(window)[:, 0]
    assert low_BS.dtype == high_BS.dtype == torch.int32
    assert torch.equal(low_BS.long(), mask_BSS.int().argmax(dim=2))
    assert torch.equal(high_BS.long(), 29 - mask_BSS.flip(1).int().argmax(dim=1))
    place = torch.arange(30)
    seen = (place >= low_BS[:, :, None]) & (place <= place[:, None])
    assert torch.equal(seen, mask_BSS)


def test_strides_of_other_layouts() -> None:
    document_BS = documents("cpu", [[30, 9], [40, 0]], 40)
    q, k, v, sink, grad = inputs("cpu", 40, 2, (2, 1), 16)
    q, k = (t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3) for t in (q, k))
    for name, error in errors(
        [q, k, v, sink.float(), grad], document_BS, window=9, alibi=False
    ).items():
        assert error <= 1, name


def test_what_does_not_fit_is_refused() -> None:
    from common.errors import ConfigError
    from trainer.kernels.attention import attention
    from trainer.megatron.attention import visible_range

    q, k, v, sink, _ = inputs("cpu", 20, 1, (2, 2), 16)
    ranges = visible_range(torch.zeros(1, 20, dtype=torch.int32), None)
    for change in (
        {0: q.float()},
        {1: k[:-1]},
        {2: v.mT.contiguous().mT},
        {3: sink.double()},
        {4: ranges[0].long()},
        {"scale": 0.0},
    ):
        of = [change.get(n, t) for n, t in enumerate([q, k, v, sink, *ranges])]
        with pytest.raises(ConfigError):
            attention(*of, window=None, alibi=True, scale=change.get("scale", 0.25))
