"""Errors of the attention kernels against `dense_attention` in fp64, for the tests and the benchmark."""

from __future__ import annotations

from typing import Any

import torch

NAMES = ("out", "q", "k", "v", "sink")


def documents(device: str, lengths: list[list[int]], positions: int) -> torch.Tensor:
    """document_BS int32: of each row documents of these lengths, then padding numbered -1."""
    ends_BD = torch.tensor(lengths, device=device).cumsum(1)
    place_BS = torch.arange(positions, device=device).expand(len(lengths), -1).contiguous()
    document_BS = torch.searchsorted(ends_BD, place_BS, right=True)
    return torch.where(document_BS == ends_BD.shape[1], -1, document_BS).int()


def inputs(
    device: str, positions: int, rows: int, heads: tuple[int, int], width: int, seed: int = 1
) -> list[torch.Tensor]:
    """q, k, v as views of one projection, the sink and the gradient of the output; bf16. heads: queries, groups."""
    make = torch.Generator(device).manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, device=device, generator=make)  # noqa: E731
    (H, G), qkv = heads, None
    qkv = draw(positions, rows, H + 2 * G, width).bfloat16()
    grad = draw(positions, rows, H, width).bfloat16()
    return [*qkv.split([H, G, G], dim=2), draw(H).bfloat16(), grad]


def kernel_results(
    of: list[torch.Tensor], document_BS: torch.Tensor, *, window: int | None, alibi: bool
) -> dict[str, torch.Tensor]:
    """Output and gradients of `attention`."""
    from trainer.kernels.attention import attention
    from trainer.megatron.attention import visible_range

    *leaves, grad = of
    leaves = [t.detach().requires_grad_() for t in leaves]
    ranges = visible_range(document_BS, window)
    scale = leaves[0].shape[-1] ** -0.5
    out = attention(*leaves, *ranges, window=window, alibi=alibi, scale=scale)
    grads = torch.autograd.grad(out, leaves, grad)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def dense_results(
    of: list[torch.Tensor], document_BS: torch.Tensor, *, window: int | None, alibi: bool
) -> dict[str, torch.Tensor]:
    """The same by `dense_attention` in fp64."""
    from trainer.megatron.attention import PackedRows, dense_attention
    from trainer.megatron.attention import alibi as biased

    *leaves, grad = (t.detach().double() for t in of)
    leaves = [t.requires_grad_() for t in leaves]
    heads_first = [t.permute(1, 2, 0, 3) for t in leaves[:3]]
    out = dense_attention(
        *heads_first,
        leaves[3],
        PackedRows(document_BS=document_BS),
        window=window,
        score_function=biased(len(leaves[3]), 0) if alibi else None,
        scale=leaves[0].shape[-1] ** -0.5,
    ).permute(2, 0, 1, 3)
    grads = torch.autograd.grad(out, leaves, grad)
    return dict(zip(NAMES, (out.detach(), *grads), strict=True))


def gaps(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative distance in norm of each."""
    return {n: float((got[n].double() - w).norm() / w.norm()) for n, w in want.items()}


def errors(of: list[torch.Tensor], document_BS: torch.Tensor, **how: Any) -> dict[str, float]:
    """Of output and gradients, over 1e-2: a bf16 number is off by up to 4e-3, here p, ds and the result are rounded."""
    found = gaps(kernel_results(of, document_BS, **how), dense_results(of, document_BS, **how))
    return {name: error / 1e-2 for name, error in found.items()}
