"""A decoder layer as few kernels: compiled functions around the products, Triton between projection and output.

`attention_half` is the layer up to its experts, pure and of tensors alone: norm, projection (TPA's factors or fused),
queries, keys and values with QK-norm, rotation and value residual, attention with sinks, output projection, residual,
second norm. `shared_half` is the expert that every token visits (or the dense MLP). `fused_half` and `fused_shared`
compute the same on CUDA: what surrounds attention by torch.compile (around_attention.py; weights being arguments, one
compilation serves all layers of a kind), the rest by trainer/kernels/qkv.py and attention.py; the routed experts follow
by trainer/kernels/experts.py.

The modules of the layer stay Megatron's (transformer_impl: local) and hold the weights, so checkpoints, optimizers and
exports know no difference. Sampling runs the modules themselves: their rows attend over a cache (cached.py).

Shapes: S positions, B rows, D hidden, H query heads, G key-value heads, C head dim, P = C / 2 planes, R rank of TPA.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from trainer.megatron.around_attention import (
    after,
    after_attention,
    before,
    before_attention,
    rms_norm,
    shared_expert,
    two_products,
)
from trainer.megatron.attention import PackedRows, alibi, dense_attention
from trainer.megatron.moe import StudentMoE
from trainer.megatron.self_attention import ValueResidualAttention, ValueResidualLayer
from trainer.megatron.tpa import TPAProjection

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.norm import Unsummed

Weights = dict[str, torch.Tensor]
_FACTORS = ("a_query", "a_key", "a_value", "b_query", "b_key", "b_value")


class LayerShape(NamedTuple):
    """What tells one kind of layer from another: a layer's compilation is that of its shape.

    q_rank, kv_rank: of TPA, 0 for a fused projection. window, scale: of attention. mixes: v_1 is mixed in.
    gives: v_1 is returned.
    """

    groups: int
    queries: int
    head_dim: int
    q_rank: int
    kv_rank: int
    eps: float
    window: int | None
    scale: float
    rotated: bool
    mixes: bool
    gives: bool

    @property
    def heads(self) -> int:
        """Of queries."""
        return self.groups * self.queries


class Halfway(NamedTuple):
    """The layer's output is residual_SBD + what its experts make of x_SBD: once for the routed experts, once for their
    router and once for the shared expert. value_SBGC: v_1, of layer 1.
    """

    residual_SBD: torch.Tensor
    x_SBD: torch.Tensor
    router_x_SBD: torch.Tensor
    shared_x_SBD: torch.Tensor
    value_SBGC: torch.Tensor | None


def attention_half(
    hidden_SBD: torch.Tensor,
    first_value_SBGC: torch.Tensor | None,
    rotation_2SP: torch.Tensor,
    weights: Weights,
    rows: PackedRows,
    *,
    shape: LayerShape,
) -> Halfway:
    """See the module; in plain torch with dense attention. rotation_2SP: cos and sin of every position and plane, fp32.
    weights: `layer_weights`.

    Everything outside of products and attention is computed in fp32 (fp64 of fp64) and rounded once to the dtype of
    hidden where a product, or the residual stream, takes it.
    """
    maps, bias = projection(weights, shape)
    mixed_SBX = before_attention(hidden_SBD, weights["norm1"], bias, maps, shape.eps)
    query, key, value, first = queries_keys_values(
        mixed_SBX, first_value_SBGC, rotation_2SP, weights, shape
    )
    out_BHSC = dense_attention(
        *(heads.permute(1, 2, 0, 3) for heads in (query, key, value)),
        weights["sink"],
        rows,
        window=shape.window,
        score_function=alibi(shape.heads, 0) if shape.window is None else None,
        scale=shape.scale,
    )
    out_SBX = out_BHSC.permute(2, 0, 1, 3).flatten(2)
    residual_SBD, x_SBD = after_attention(hidden_SBD, out_SBX, after_weights(weights), shape.eps)
    return Halfway(residual_SBD, x_SBD, x_SBD, x_SBD, first)


def shared_half(half: Halfway, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the shared expert, or the dense MLP, makes of x; the residual), [S, B, D]; the layer adds both."""
    return two_products(half.shared_x_SBD, shared_weights(weights))[0], half.residual_SBD


def fused_half(
    hidden_SBD: torch.Tensor,
    first_value_SBGC: torch.Tensor | None,
    rotation_2SP: torch.Tensor,
    weights: Weights,
    rows: PackedRows,
    *,
    shape: LayerShape,
    unsummed: Unsummed | None = None,
) -> Halfway:
    """`attention_half` on CUDA in bf16: compiled functions before and after attention, two kernels between them.

    unsummed: see around_attention, `before` and `after`.
    """
    from trainer.kernels.attention import attention
    from trainer.kernels.qkv import qkv

    (S, B, D), tpa = hidden_SBD.shape, shape.q_rank > 0
    maps, bias = projection(weights, shape)
    of = (weights["norm1"], bias, maps, shape.eps, unsummed)
    mixed_TX, hidden_TD = before(hidden_SBD.flatten(0, 1), *of)
    heads = qkv(
        mixed_TX,
        weights["qkv_bias"] if tpa else None,
        weights["q_norm"],
        weights["k_norm"],
        rotation_2SP if shape.rotated else None,
        first_value_SBGC.flatten(0, 1) if shape.mixes else None,
        weights["value_residual"] if shape.mixes else None,
        rows=B,
        heads=shape.heads,
        groups=shape.groups,
        head_dim=shape.head_dim,
        q_rank=shape.q_rank,
        kv_rank=shape.kv_rank,
        eps=shape.eps,
    )
    query, key, value = (of.unflatten(0, (S, B)) for of in heads)
    out_SBHC = attention(
        *(query, key, value, weights["sink"], *rows.visible_range(shape.window)),
        window=shape.window,
        alibi=shape.window is None,
        scale=shape.scale,
    )
    out_TA = out_SBHC.view(S * B, -1)
    of = (after_weights(weights), weights["fc2_bias"], shape.eps, unsummed)
    outs = after(hidden_TD, out_TA, *of)
    return Halfway(*(out.view(S, B, D) for out in outs), value if shape.gives else None)


def fused_shared(half: Halfway, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """`shared_half` on CUDA in bf16, compiled."""
    inputs = (half.shared_x_SBD.flatten(0, 1), half.residual_SBD.flatten(0, 1))
    outs = shared_expert(*inputs, shared_weights(weights))
    return tuple(out.view_as(half.residual_SBD) for out in outs)


def queries_keys_values(
    mixed_SBX: torch.Tensor,
    first_value_SBGC: torch.Tensor | None,
    rotation_2SP: torch.Tensor,
    weights: Weights,
    shape: LayerShape,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What attention takes, and v_1 where the layer gives it: [S, B, H or G, C] each, in mixed's dtype."""
    dtype = mixed_SBX.dtype
    query, key, value = _split(mixed_SBX, weights, shape)
    query = rms_norm(query, weights["q_norm"], shape.eps)
    key = rms_norm(key, weights["k_norm"], shape.eps)
    if shape.rotated:
        query, key = rotated(query, rotation_2SP), rotated(key, rotation_2SP)
    value = value.to(dtype)
    first = value if shape.gives else None
    if shape.mixes:
        logit = weights["value_residual"]
        value = torch.sigmoid(logit) * value + torch.sigmoid(-logit) * first_value_SBGC
    return query.to(dtype), key.to(dtype), value.to(dtype), first


def rotated(x_SBHC: torch.Tensor, rotation_2SP: torch.Tensor) -> torch.Tensor:
    """Plane p, the channels p and p + P of each head, turned by its position's angle."""
    cos, sin = rotation_2SP.to(x_SBHC.dtype)[:, :, None, None, :].unbind(0)
    left, right = x_SBHC.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def projection(
    weights: Weights, shape: LayerShape
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor | None]:
    """Maps and bias of `before_attention`; the bias of TPA is added to the factors' products."""
    if shape.q_rank == 0:
        return (weights["qkv"],), weights["qkv_bias"]
    return tuple(weights[name] for name in _FACTORS), None


def after_weights(weights: Weights) -> tuple[torch.Tensor, ...]:
    """Those of `after_attention`, in its order."""
    return tuple(weights[name] for name in ("proj", "proj_bias", "norm2"))


def shared_weights(weights: Weights) -> tuple[torch.Tensor, ...]:
    """Those of `two_products`, in its order."""
    return tuple(weights[name] for name in ("fc1", "fc1_bias", "fc2", "fc2_bias"))


def _split(
    mixed_SBX: torch.Tensor, weights: Weights, shape: LayerShape
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """query [S, B, H, C], key and value [S, B, G, C], biases added; of TPA in fp32 or wider."""
    groups, queries, C = shape.groups, shape.queries, shape.head_dim
    if shape.q_rank == 0:
        mixed = mixed_SBX.unflatten(-1, (groups, queries + 2, C))
        query, key, value = mixed.split([queries, 1, 1], dim=-2)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)
    factors = mixed_SBX.split([len(weights[name]) for name in _FACTORS], dim=-1)
    bias = weights["qkv_bias"].view(groups, queries + 2, C).split([queries, 1, 1], dim=1)
    ranks = (shape.q_rank, shape.kv_rank, shape.kv_rank)
    query, key, value = (
        _product_of_factors(a, b, rank, C) + of.flatten(0, 1)
        for a, b, rank, of in zip(factors[:3], factors[3:], ranks, bias, strict=True)
    )
    return query, key, value


def _product_of_factors(
    a_SBX: torch.Tensor, b_SBY: torch.Tensor, rank: int, head_dim: int
) -> torch.Tensor:
    """[S, B, heads, C]: sum over the ranks of a [.., heads, R] times b [.., R, C], divided by R."""
    wide = torch.promote_types(a_SBX.dtype, torch.float32)
    a = a_SBX.to(wide).unflatten(-1, (-1, rank, 1))
    b = b_SBY.to(wide).unflatten(-1, (1, rank, head_dim))
    return (a * b).sum(dim=-2) / rank


def layer_weights(layer: TransformerLayer) -> Weights:
    """The parameters of `attention_half` by its names."""
    attention, core = layer.self_attention, layer.self_attention.core_attention
    feed = getattr(layer.mlp, "shared_experts", layer.mlp)
    qkv = attention.linear_qkv
    weights = {
        "norm1": layer.input_layernorm.weight,
        "q_norm": attention.q_layernorm.weight,
        "k_norm": attention.k_layernorm.weight,
        "qkv_bias": qkv.bias,
        "sink": core.sink,
        "proj": attention.linear_proj.weight,
        "proj_bias": attention.linear_proj.bias,
        "norm2": layer.pre_mlp_layernorm.weight,
        "fc1": feed.linear_fc1.weight,
        "fc1_bias": feed.linear_fc1.bias,
        "fc2": feed.linear_fc2.weight,
        "fc2_bias": feed.linear_fc2.bias,
    }
    if isinstance(qkv, TPAProjection):
        weights |= {name: getattr(qkv, name) for name in _FACTORS}
    else:
        weights["qkv"] = qkv.weight
    if hasattr(attention, "value_residual_logit"):
        weights["value_residual"] = attention.value_residual_logit
    return weights


class CompiledLayer(ValueResidualLayer):
    """A TransformerLayer that runs packed rows of training and evaluation by `attention_half`, and all others by its
    modules, which must be Megatron's own (transformer_impl: local) without tensor parallelism.
    """

    def forward(self, hidden_states: torch.Tensor, *arguments: Any, **keywords: Any) -> tuple:
        """hidden [S, B, D] and v_1, as of ValueResidualLayer; `rotary_pos_emb` is `rotation_table` for plain rows."""
        rows, context = keywords["packed_seq_params"], keywords.get("context")
        if not is_plain(rows):
            return super().forward(hidden_states, *arguments, **keywords)
        weights, moe = layer_weights(self), self.mlp if isinstance(self.mlp, StudentMoE) else None
        inputs = (hidden_states, context, keywords["rotary_pos_emb"], weights, rows)
        unsummed = None
        if self.self_attention.core_attention.backend == "dense":
            half = attention_half(*inputs, shape=self._kind)
            shared = functools.partial(shared_half, half, weights)
        else:
            unsummed = None if moe is None else moe.unsummed()
            half = fused_half(*inputs, shape=self._kind, unsummed=unsummed)
            shared = functools.partial(fused_shared, half, weights)
        if moe is None:
            shared_SBD, residual_SBD = shared()
            out_SBD = residual_SBD + shared_SBD
        else:
            padding, router_x = keywords.get("padding_mask"), half.router_x_SBD
            out_SBD = moe.routed(
                half.x_SBD, padding, shared, router_x_SBD=router_x, unsummed=unsummed
            )
        return out_SBD, context if half.value_SBGC is None else half.value_SBGC

    @functools.cached_property
    def _kind(self) -> LayerShape:
        config, attention = self.config, self.self_attention
        core, qkv = attention.core_attention, attention.linear_qkv
        factored = isinstance(qkv, TPAProjection)
        residual = isinstance(attention, ValueResidualAttention)
        return LayerShape(
            groups=config.num_query_groups,
            queries=config.num_attention_heads // config.num_query_groups,
            head_dim=config.kv_channels,
            q_rank=qkv.q_rank if factored else 0,
            kv_rank=qkv.kv_rank if factored else 0,
            eps=config.layernorm_epsilon,
            window=core.window,
            scale=core.scale,
            rotated=not config.no_rope_freq[self.layer_number - 1],
            mixes=residual and self.layer_number > 1,
            gives=residual and self.layer_number == 1,
        )


def is_plain(rows: PackedRows) -> bool:
    """Packed rows as training has them: no cache beside them, positions 0 .. S - 1."""
    return type(rows) is PackedRows and rows.position_SB is None


def rotation_table(angle_SC: torch.Tensor) -> torch.Tensor:
    """cos and sin of Megatron's angles [S, 1, 1, C], planes repeated, to [2, S, C / 2]."""
    angle_SP = angle_SC[:, 0, 0, : angle_SC.shape[-1] // 2]
    return torch.stack([angle_SP.cos(), angle_SP.sin()])
