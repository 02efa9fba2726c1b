"""FlexAttention against the dense reference, forward and backward, on packed rows."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
B, S, H, G, D = 2, 640, 8, 2, 128
KINDS = {"local": (128, False), "global": (None, True)}


def _documents(seed: int) -> torch.Tensor:
    """Documents of random lengths, the last positions padding."""
    generator = torch.Generator().manual_seed(seed)
    starts_BS = torch.rand(B, S, generator=generator) < 0.01
    document_BS = starts_BS.cumsum(dim=1, dtype=torch.int32)
    document_BS[:, -20:] = -1
    return document_BS.cuda()


def _attend(
    backend: str, kind: str, inputs: list[torch.Tensor], document_BS: torch.Tensor
) -> torch.Tensor:
    from trainer.megatron.attention import PackedRows, alibi, dense_attention, flexible_attention

    window, biased = KINDS[kind]
    attend = flexible_attention if backend == "flex" else dense_attention
    score = alibi(H, 0) if biased else None
    rows = PackedRows(document_BS=document_BS)
    return attend(*inputs, rows, window=window, score_function=score, scale=D**-0.5)


def _inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(B, H, S, D), (B, G, S, D), (B, G, S, D), (H,)]
    return [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("kind", KINDS)
def test_flex_equals_the_dense_reference(kind) -> None:
    """bf16 kernels against fp32 arithmetic on the same bf16 inputs: errors of the order of bf16's 2^-8."""
    weigh = torch.randn(B, H, S, D, generator=torch.Generator().manual_seed(1)).cuda()
    results = []
    for backend, dtype in (("flex", torch.bfloat16), ("dense", torch.float32)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in _inputs(torch.bfloat16)]
        out = _attend(backend, kind, inputs, _documents(3))
        grads = torch.autograd.grad((out.float() * weigh).sum(), inputs)
        results.append([t.float() for t in (out, *grads)])
    for name, got, expected in zip(["out", "q", "k", "v", "sink"], *results, strict=True):
        assert (got - expected).norm() < 2e-2 * expected.norm(), name


def test_new_micro_batches_do_not_compile_again() -> None:
    from torch._dynamo.utils import counters

    inputs = _inputs(torch.bfloat16)
    for kind in KINDS:
        _attend("flex", kind, inputs, _documents(0)).sum().backward()
    compiled = counters["stats"]["unique_graphs"]
    for seed in range(1, 6):
        for kind in KINDS:
            _attend("flex", kind, inputs, _documents(seed)).sum().backward()
    assert counters["stats"]["unique_graphs"] == compiled
