"""The attention kernels on CUDA at full width: right numbers, the same bits twice, no waiting for the device, and in a
CUDA graph.
"""

from __future__ import annotations

import pytest
import torch

from tests.trainer.attention_errors import documents, errors, inputs, kernel_results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WAYS = {"window": {"window": 128, "alibi": False}, "global": {"window": None, "alibi": True}}
HEADS, WIDTH = (8, 2), 128


def _documents(positions: int) -> torch.Tensor:
    """A row of several documents and padding, a row of one."""
    lengths = [positions // 3, 1, positions // 5, positions // 4]
    return documents("cuda", [lengths, [positions, 0, 0, 0]], positions)


@pytest.mark.parametrize("positions", [2048, 1337])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_and_gradients_equal_dense_fp64(positions, way) -> None:
    of = inputs("cuda", positions, 2, HEADS, WIDTH)
    for name, error in errors(of, _documents(positions), **WAYS[way]).items():
        assert error <= 1, name


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_twice_and_no_waiting(way) -> None:
    of, document_BS = inputs("cuda", 2048, 2, HEADS, WIDTH), _documents(2048)
    first = kernel_results(of, document_BS, **WAYS[way])
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = kernel_results(of, document_BS, **WAYS[way])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("way", WAYS)
def test_a_cuda_graph_follows_its_inputs(way) -> None:
    of, document_BS = inputs("cuda", 1000, 2, HEADS, WIDTH), _documents(1000)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel_results(of, document_BS, **WAYS[way])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = kernel_results(of, document_BS, **WAYS[way])
    # Other numbers and other documents in the same memory: the loops' lengths come from the device.
    for old, new in zip(of, inputs("cuda", 1000, 2, HEADS, WIDTH, seed=2), strict=True):
        old.copy_(new)
    document_BS.copy_(document_BS.flip(0))
    graph.replay()
    want = kernel_results(of, document_BS, **WAYS[way])
    for name, value in want.items():
        assert torch.equal(value, held[name]), name
