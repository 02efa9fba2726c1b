"""Errors of the bf16 kernels of the expert layer, for a CPU and a GPU test."""

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


def grouped_errors(device: str) -> dict[str, float]:
    """Distance of the grouped products in bf16 from the loop in fp32, over 2e-2 of the loop's norm; biases and empty
    experts included. Infinite where an expert without rows got a gradient.
    """
    from trainer.megatron.experts import _grouped, _loop

    E, D, F = 8, 128, 64
    rows_E = torch.tensor([70, 0, 33, 1, 128, 0, 7, 17])
    N = int(rows_E.sum())
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, D), (E, F, D), (E, F), (E, D, F), (E, D)]
    start = [torch.randn(s, generator=generator).to(device, torch.bfloat16) * 0.3 for s in shapes]
    weigh = torch.randn(N, D, generator=generator).to(device)
    gate = torch.rand(N, generator=generator).to(device).requires_grad_()
    results = []
    for compute, dtype in ((_grouped, torch.bfloat16), (_loop, torch.float32)):
        x, *parameters = (t.to(dtype).requires_grad_() for t in start)
        out = compute(x, rows_E, gate, *parameters)
        grads = torch.autograd.grad((out.float() * weigh).sum(), [gate, x, *parameters])
        results.append([t.float() for t in (out, *grads)])
    names = ["out", "gate", "x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"]
    errors = {}
    for name, got, want in zip(names, *results, strict=True):
        errors[name] = float((got - want).norm() / (2e-2 * want.norm()))
        if name.startswith("fc") and got[1].abs().max() > 0:
            errors[name] = float("inf")
    return errors
