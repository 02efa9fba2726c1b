"""The kernel of queries, keys and values on CUDA at full width: right numbers, the same bits twice, no waiting for the
device, and in a CUDA graph.
"""

from __future__ import annotations

import pytest
import torch

from tests.trainer.qkv_kernel_errors import NAMES, errors, inputs, results, sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# TPA, rotated, mixed: local layers, layer 1, global layers, and what no layer is.
KINDS = [(True, True, True), (True, True, False), (False, False, True), (False, True, False)]


@pytest.mark.parametrize(("tpa", "turned", "mixes"), KINDS)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_equals_plain_fp64(rows, tpa, turned, mixes) -> None:
    # 203 positions fill no whole number of programs.
    got = errors("cuda", 203, sizes(tpa, rows), turned=turned, mixes=mixes, seed=rows)
    for name, error in got.items():
        assert error <= 1, name


def test_more_rows_than_a_program_holds_by_itself() -> None:
    for rows in (20, 64):
        for name, error in errors("cuda", 9, sizes(True, rows), turned=True, mixes=True).items():
            assert error <= 1, (rows, name)


@pytest.mark.parametrize("tpa", [True, False])
def test_the_same_bits_twice_without_waiting_for_the_device(tpa) -> None:
    of = sizes(tpa, 8)
    leaves = inputs("cuda", 1024, of, turned=tpa, mixes=True)
    first = results(leaves, of)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = results(leaves, of)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, one in first.items():
        assert torch.equal(one, second[name]), name


@pytest.mark.parametrize("tpa", [True, False])
def test_a_cuda_graph_gives_what_the_launches_gave(tpa) -> None:
    from trainer.kernels import qkv_backward
    from trainer.kernels.qkv import forward
    from trainer.kernels.qkv_heads import QKVShape

    of = sizes(tpa, 8)
    shape = QKVShape(**of)
    drawn = [inputs("cuda", 256, of, turned=tpa, mixes=True, seed=seed) for seed in (1, 2)]
    held, other = ([leaves[name] for name in NAMES] for leaves in drawn)
    grads = [torch.randn_like(t) for t in forward(*held, shape=shape)]

    def both(tensors: list) -> tuple[torch.Tensor | None, ...]:
        outs = forward(*tensors, shape=shape)
        return (*outs, *qkv_backward.gradients(*grads, *tensors, shape=shape))

    want = both(other)
    both(held)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = both(held)
    for into, source in zip(held, other, strict=True):
        if into is not None:
            into.copy_(source)
    graph.replay()
    for one, expected in zip(got, want, strict=True):
        assert (one is None) == (expected is None)
        assert one is None or torch.equal(one, expected)
