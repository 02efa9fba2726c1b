"""Errors of the router's product in bf16, for a CPU and a GPU test."""

from __future__ import annotations

import torch


def product_errors(device: str) -> dict[str, float]:
    """Largest error over its bound, of z, dx, dW and db at bf16 x and W; at most 1 when all is well.

    z: 2^-18 sum |x||W|, an fp32 sum of 1024 exact products. dx, dW: half a unit of bf16, to which they are rounded, and
    2^-15 sum |dz||.|: rounding dz itself to bf16 would err by 2^-9 of each term.
    """
    from trainer.megatron.router import _RouterProduct

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).bfloat16().to(device).requires_grad_()
        for shape in ((64, 4, 1024), (256, 1024), (256,))
    )
    grad = torch.randn(64, 4, 256, generator=generator).to(device)
    z = _RouterProduct.apply(x, weight, bias)
    assert z.dtype == torch.float32
    got = [z, *torch.autograd.grad(z, [x, weight, bias], grad)]
    x64, weight64, bias64, grad64 = (t.detach().double() for t in (x, weight, bias, grad))
    x64, grad64 = x64.flatten(0, 1), grad64.flatten(0, 1)
    want = [x64 @ weight64.t() + bias64, grad64 @ weight64, grad64.t() @ x64, grad64.sum(0)]
    sizes = [
        x64.abs() @ weight64.abs().t(),
        grad64.abs() @ weight64.abs(),
        grad64.abs().t() @ x64.abs(),
        grad64.abs().sum(0),
    ]
    parts = [(2**-18, 0.0), *[(2**-15, 2**-8)] * 3]
    return {
        name: float(((g.double().view_as(w) - w).abs() / (a * s + r * w.abs())).max())
        for name, g, w, s, (a, r) in zip(("z", "x", "W", "b"), got, want, sizes, parts, strict=True)
    }
