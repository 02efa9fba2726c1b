"""The mixture-of-experts layer on CUDA at full width: no waiting for the device, the same bits twice, right numbers."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def layer():
    from benchmarks.moe_layer import FULL, make_layers
    from trainer.config import ParallelConfig
    from trainer.megatron.topology import distributed
    from trainer.student_config import StudentConfig

    with distributed("cuda", ParallelConfig(), seed=1):
        made = make_layers(StudentConfig.model_validate(FULL), "bf16", "cuda")["ours"]
        generator = torch.Generator("cuda").manual_seed(3)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.02, generator=generator)
        yield made


def _pass(layer, seed: int = 0) -> list[torch.Tensor]:
    """The output of two rows with padding, and all gradients."""
    generator = torch.Generator("cuda").manual_seed(seed)
    x, weigh = (
        torch.randn(2048, 2, 1024, device="cuda", generator=generator).bfloat16() for _ in range(2)
    )
    padding_BS = torch.arange(2048, device="cuda") >= torch.tensor([[1900], [2048]], device="cuda")
    torch.cuda.synchronize()
    return _forward_backward(layer, x.requires_grad_(), padding_BS, weigh)


def _forward_backward(layer, x, padding_BS, weigh) -> list[torch.Tensor]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, bias = layer(x, padding_mask=padding_BS)
        grads = torch.autograd.grad(out, [x, *layer.parameters()], weigh)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bias is None
    return [out.detach(), *grads]


def test_no_host_synchronisation_and_the_same_bits_twice(layer) -> None:
    first, second = _pass(layer), _pass(layer)
    names = ["out", "x", *(name for name, _ in layer.named_parameters())]
    for name, one, other in zip(names, first, second, strict=True):
        assert torch.equal(one, other), name
        assert one.float().abs().max() > 0, name


def test_counts_leave_padding_out(layer) -> None:
    layer.router.local_tokens_per_expert.zero_()
    _pass(layer)
    assert layer.router.local_tokens_per_expert.sum() == 4 * (1900 + 2048)


def test_output_equals_the_formula(layer) -> None:
    """bf16 rows against fp32 products of the same weights, expert by expert, with the router's own choices."""
    x = torch.randn(512, 2, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(9))
    x = x.bfloat16()
    with torch.no_grad():
        got = layer(x)[0].flatten(0, 1).float()
        gates_TK, experts_TK = layer.router(x)
        rows, e = x.flatten(0, 1).float(), layer.experts
        want = torch.zeros_like(rows)
        for expert in range(256):
            gate_T = (gates_TK * (experts_TK == expert)).sum(dim=1, keepdim=True)
            inner = (rows @ e.fc1_weight[expert].float().t() + e.fc1_bias[expert]).relu().square()
            want += gate_T * (inner @ e.fc2_weight[expert].float().t() + e.fc2_bias[expert])
        fc1, fc2 = layer.shared_experts.linear_fc1, layer.shared_experts.linear_fc2
        inner = (rows @ fc1.weight.float().t() + fc1.bias).relu().square()
        want += inner @ fc2.weight.float().t() + fc2.bias
    assert (got - want).norm() < 1e-2 * want.norm()
