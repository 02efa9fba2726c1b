"""Errors of the kernel of queries, keys and values against plain fp64, for a CPU test, a GPU test and the benchmark."""

from __future__ import annotations

from typing import Any

import torch

BF16 = 6e-3  # bound of what is rounded to bf16 once or twice; what stays fp32 lies far below
NAMES = ("mixed", "bias", "q_norm", "k_norm", "rotation", "first_value", "logit")
Leaves = dict[str, torch.Tensor | None]


def sizes(tpa: bool, rows: int, head_dim: int = 128, heads: int = 8, groups: int = 2) -> dict:
    """The keywords of `qkv`."""
    named = {"rows": rows, "heads": heads, "groups": groups, "head_dim": head_dim}
    return named | {"q_rank": 4 if tpa else 0, "kv_rank": 2 if tpa else 0, "eps": 1e-5}


def inputs(
    device: str, positions: int, of: dict[str, Any], *, turned: bool, mixes: bool, seed: int = 0
) -> Leaves:
    """The seven tensors of `qkv`, of which some are None."""
    from trainer.kernels.qkv_heads import QKVShape

    shape, make = QKVShape(**of), torch.Generator(device).manual_seed(seed)
    tokens, dim = positions * shape.rows, shape.head_dim

    def draw(*size: int, std: float = 1.0, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(size, device=device, generator=make)).bfloat16()

    angle_SP = 3 * torch.randn(positions, dim // 2, device=device, generator=make)
    return {
        "mixed": draw(tokens, shape.mixed_width),
        "bias": draw(shape.bias_width, std=0.3) if shape.q_rank else None,
        "q_norm": draw(dim, std=0.2, mean=1.0),
        "k_norm": draw(dim, std=0.2, mean=1.0),
        "rotation": torch.stack([angle_SP.cos(), angle_SP.sin()]) if turned else None,
        "first_value": draw(tokens, shape.groups, dim) if mixes else None,
        "logit": torch.full((1,), 0.7, device=device) if mixes else None,
    }


def plain(leaves: Leaves, of: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """`qkv` by the functions of the compiled layer, in the dtypes of the leaves, without the rounding at its end."""
    from trainer.kernels.qkv_heads import QKVShape
    from trainer.megatron.fused_layer import _product_of_factors, rms_norm, rotated

    shape = QKVShape(**of)
    groups, queries, dim = shape.groups, shape.heads // shape.groups, shape.head_dim
    mixed_SBX = leaves["mixed"].unflatten(0, (-1, shape.rows))
    if shape.q_rank == 0:
        parts = mixed_SBX.unflatten(-1, (groups, queries + 2, dim)).split([queries, 1, 1], dim=-2)
        query, key, value = (part.flatten(2, 3) for part in parts)
    else:
        ranks = (shape.q_rank, shape.kv_rank, shape.kv_rank)
        heads = (shape.heads, groups, groups)
        widths = [n * rank for n, rank in zip(heads, ranks, strict=True)]
        widths += [rank * dim for rank in ranks]
        factors = mixed_SBX.split(widths, dim=-1)
        bias = leaves["bias"].view(groups, queries + 2, dim).split([queries, 1, 1], dim=1)
        query, key, value = (
            _product_of_factors(a, b, rank, dim) + of.flatten(0, 1)
            for a, b, rank, of in zip(factors[:3], factors[3:], ranks, bias, strict=True)
        )
    query = rms_norm(query, leaves["q_norm"], shape.eps)
    key = rms_norm(key, leaves["k_norm"], shape.eps)
    if leaves["rotation"] is not None:
        query, key = rotated(query, leaves["rotation"]), rotated(key, leaves["rotation"])
    query, key, value = (t.flatten(0, 1) for t in (query, key, value))
    if leaves["logit"] is not None:
        # Rounded in fp64 too: the logit's gradient is one sum of both signs, which may come out near zero.
        value, logit = value + (value.bfloat16() - value).detach(), leaves["logit"]
        value = torch.sigmoid(logit) * value + torch.sigmoid(-logit) * leaves["first_value"]
    return query, key, value


def upstream(outs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Drawn bf16 gradients of the outputs, heads before tokens in memory, as attention may give them."""
    make = torch.Generator(outs[0].device).manual_seed(5)
    return [
        torch.randn(t.transpose(0, 1).shape, device=t.device, generator=make)
        .bfloat16()
        .transpose(0, 1)
        for t in outs
    ]


def results(leaves: Leaves, of: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs and all gradients of the kernel."""
    from trainer.kernels.qkv import qkv

    return _with_gradients(lambda given: qkv(*(given[n] for n in NAMES), **of), leaves)


def _with_gradients(run: Any, leaves: Leaves) -> dict[str, torch.Tensor]:
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in leaves.items()}
    outs, used = run(leaves), {n: t for n, t in leaves.items() if t is not None}
    grads = [g.to(o.dtype) for g, o in zip(upstream(outs), outs, strict=True)]
    got = torch.autograd.grad(outs, list(used.values()), grads)
    named = dict(zip(("query", "key", "value"), (o.detach() for o in outs), strict=True))
    return named | {f"grad {n}": g for n, g in zip(used, got, strict=True)}


def errors(
    device: str, positions: int, of: dict[str, Any], *, turned: bool, mixes: bool, seed: int = 0
) -> dict[str, float]:
    """Norm of every output's and gradient's difference over its norm, over BF16: at most 1 is right."""
    leaves = inputs(device, positions, of, turned=turned, mixes=mixes, seed=seed)
    got = results(leaves, of)
    wide = {n: None if t is None else t.double() for n, t in leaves.items()}
    want = _with_gradients(lambda given: plain(given, of), wide)
    for name in want:
        source = leaves.get(name.removeprefix("grad "), leaves["mixed"])
        assert got[name].dtype == source.dtype and got[name].shape == want[name].shape, name
    return {n: float((got[n].double() - w).norm() / w.norm()) / BF16 for n, w in want.items()}
