"""The fused loss on CUDA: the truths of the CPU tests in float32 and bf16, and bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.trainer.losses.lm_head_cases import (
    check,
    check_rows_of_likely_labels,
    far_above,
    likely_labels,
    make_case,
    with_heads,
    with_kd,
)
from tests.trainer.losses.sampling import mixed_rows
from trainer.batch import make_batch
from trainer.losses.chunk import TokenTargets
from trainer.losses.coefficients import Coefficients
from trainer.losses.fused_linear import fused_linear_eval, fused_linear_loss
from trainer.losses.objective import batch_loss
from trainer.losses.policy import PolicyLossConfig
from trainer.losses.spans import LossConfig, span_counts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 2**20


def make_inputs(
    num_tokens: int, hidden: int, vocab: int, entries: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, TokenTargets, Coefficients]:
    generator = torch.Generator("cuda").manual_seed(0)
    cuda = {"generator": generator, "device": "cuda"}
    hidden_TD = torch.randn(num_tokens, hidden, **cuda).to(dtype).requires_grad_()
    weight_VD = (torch.randn(vocab, hidden, **cuda) * 2 / hidden**0.5).to(dtype).requires_grad_()
    stride = vocab // entries
    ids_NK = torch.randint(0, stride, (num_tokens, entries), **cuda)
    targets = TokenTargets(
        index_N=torch.arange(num_tokens, device="cuda")[num_tokens // 8 :],
        labels_N=torch.randint(0, vocab, (num_tokens,), **cuda),
        ids_NK=(ids_NK + stride * torch.arange(entries, device="cuda")).int(),
        weights_NK=torch.rand(num_tokens, entries, **cuda) / entries,
    )
    num = len(targets.index_N)
    targets = TokenTargets(
        targets.index_N, targets.labels_N[:num], targets.ids_NK[:num], targets.weights_NK[:num]
    )
    coefficients = Coefficients(torch.rand(num, **cuda), torch.rand(num, **cuda))
    return hidden_TD, weight_VD, targets, coefficients


@pytest.mark.parametrize("chunk_tokens", [64, 100, 4096])
@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-6, 2e-6), (torch.bfloat16, 1e-6, 6e-3)],
)
def test_the_dense_float64_form(
    dtype: torch.dtype, loss_tolerance: float, gradient_tolerance: float, chunk_tokens: int
) -> None:
    inputs = hidden_TD, weight_VD, targets, of = make_inputs(512, 64, 20_011, 24, dtype)
    loss, (ce_N, kd_N, _) = fused_linear_loss(*inputs, chunk_tokens=chunk_tokens)
    gradients = torch.autograd.grad(loss, (hidden_TD, weight_VD))
    logits_NV = hidden_TD.double()[targets.index_N] @ weight_VD.double().T
    exact_ce_N = functional.cross_entropy(logits_NV, targets.labels_N, reduction="none")
    picked_NK = logits_NV.gather(1, targets.ids_NK.long())
    exact_kd_N = logits_NV.logsumexp(dim=1) - (targets.weights_NK.double() * picked_NK).sum(dim=1)
    exact_loss = (of.ce_N.double() * exact_ce_N + of.kd_N.double() * exact_kd_N).sum()
    exact = torch.autograd.grad(exact_loss, (hidden_TD, weight_VD))
    assert abs(loss.item() / exact_loss.item() - 1) < loss_tolerance
    torch.testing.assert_close(ce_N.double(), exact_ce_N, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(kd_N.double(), exact_kd_N, rtol=1e-6, atol=1e-5)
    for gradient, wanted in zip(gradients, exact, strict=True):
        error = (gradient.double() - wanted.double()).norm() / wanted.double().norm()
        assert error.item() < gradient_tolerance
    losses, top_N = fused_linear_eval(hidden_TD, weight_VD, targets, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(losses[:2], (ce_N, kd_N))
    near_NV = logits_NV.detach() >= logits_NV.detach().amax(dim=1, keepdim=True) - 1e-4
    assert near_NV.gather(1, top_N[:, None]).all()


@pytest.mark.parametrize(
    ("entries", "tokens", "hidden", "vocab", "chunk"),
    [
        (0, 1, 64, 130, 100),
        (1, 193, 72, 1000, 50),
        (5, 600, 100, 4099, 256),  # rows of 200 bytes: by pointers
        (20, 300, 1024, 20_011, 128),
    ],
)
def test_the_kernels_at_any_size(
    entries: int, tokens: int, hidden: int, vocab: int, chunk: int
) -> None:
    case = make_case(entries, tokens=tokens, hidden=hidden, vocab=vocab, device="cuda")
    check(case, chunk)
    check(with_kd(case), chunk)
    if entries > 1:
        check(with_heads(case, kl=False), chunk)
        check(with_heads(case, kl=True), chunk)
        of = with_heads(case, kl=True)
        losses, top_N = fused_linear_eval(
            of.hidden_TD, of.weight_VD, of.targets, chunk_tokens=chunk
        )
        torch.testing.assert_close(losses, of.run(torch.bfloat16, chunk)[1])
        logits_NV = of.logits()
        near_NV = logits_NV >= logits_NV.amax(dim=1, keepdim=True) - 1e-4
        assert near_NV.gather(1, top_N[:, None]).all()


def test_rows_far_above_their_label_are_computed_again() -> None:
    case = far_above(make_case(1, tokens=500, hidden=64, vocab=5000, device="cuda"))
    logits_NV = case.logits()
    above_N = logits_NV.amax(dim=1) - logits_NV.gather(1, case.targets.labels_N[:, None])[:, 0]
    assert (above_N > 90).any() and (above_N < 20).any()
    check(case, 300, atol=1e-3)  # logits of several hundred


def test_a_likely_label_keeps_its_gradient() -> None:
    case = likely_labels(make_case(0, scale=0.5, device="cuda"))
    check(case)
    check_rows_of_likely_labels(case)


def test_a_step_in_bf16_can_be_captured_in_a_graph() -> None:
    hidden_TD, weight_VD, targets, of = make_inputs(512, 64, 20_011, 24, torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        loss, _ = fused_linear_loss(hidden_TD, weight_VD, targets, of, chunk_tokens=200)
        return loss.detach(), *torch.autograd.grad(loss, (hidden_TD, weight_VD))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden_TD.mul_(-1.5)
    graph.replay()
    for one, other in zip(captured, step(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_the_chunk_and_the_gradients(dtype: torch.dtype) -> None:
    """Above the inputs: a chunk of e in bf16, or of float32 logits, the gradients, and rows of hidden size."""
    num_tokens, hidden, vocab, chunk = 4096, 256, 201_088, 256
    inputs = make_inputs(num_tokens, hidden, vocab, 16, dtype)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = fused_linear_loss(*inputs, chunk_tokens=chunk)
    forward_peak = torch.cuda.max_memory_allocated() - before
    loss.backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    weight_gradient = vocab * hidden * 4
    rows = 4 * num_tokens * hidden * 4 + 64 * MIB
    assert forward_peak < chunk * vocab * dtype.itemsize + weight_gradient + rows
    # The backward pass scales the weight's gradient into a new tensor of its dtype.
    scaled = weight_gradient + vocab * hidden * dtype.itemsize
    assert peak < max(forward_peak, scaled + rows) + rows
    full_logits = num_tokens * vocab * 4
    assert peak < full_logits / 3


def test_two_runs_are_bitwise_equal() -> None:
    inputs = make_inputs(512, 64, 20_011, 24, torch.bfloat16)
    runs = []
    for _ in range(2):
        loss, (ce_N, kd_N, _) = fused_linear_loss(*inputs, chunk_tokens=200)
        runs.append((loss.detach(), ce_N, kd_N, *torch.autograd.grad(loss, inputs[:2])))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


CONFIDENCE = {"m": -3.0, "tau": 1.0, "w_min": 0.1, "w_max": 2.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LossConfig(kd_weight=0.5, confidence=CONFIDENCE, chunk_tokens=32),
        PolicyLossConfig(objective="policy_gradient", advantage_clip=2.0, chunk_tokens=32),
        PolicyLossConfig(objective="reverse_kl", chunk_tokens=32),
    ],
    ids=["kd", "policy_gradient", "reverse_kl"],
)
def test_a_step_never_waits_for_the_device(
    config: LossConfig | PolicyLossConfig, dtype: torch.dtype
) -> None:
    batch = make_batch(*zip(*mixed_rows(3, 40, 97), strict=True)).pin_memory().to("cuda")
    hidden_BTD = torch.randn(3, 40, 16, device="cuda", dtype=dtype, requires_grad=True)
    weight_VD = torch.randn(97, 16, device="cuda", dtype=dtype, requires_grad=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, sums_CM = batch_loss(hidden_BTD, weight_VD, batch, span_counts(batch), config)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(sums_CM).all() and hidden_BTD.grad.any()
