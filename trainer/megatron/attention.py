"""Core attention: one set of mask and score functions, run by FlexAttention on CUDA and densely elsewhere.

Position i of a packed row sees position j when j <= i, both are of one document and, on a local layer, i - j < window
(the window counts i itself). Global layers add the ALiBi bias -m_h (i - j), m_h = 2^(-8 h / H), h = 1..H, in fp32
(arXiv 2108.12409). Every head has a learnable sink b_h: p_ij = exp(s_ij) / (exp(b_h) + sum_j exp(s_ij)), which equals
plain attention times sigmoid(lse - b_h).

Upstream facts handled (megatron/core/transformer): attention_bias is refused at dot_product_attention.py:157; a window
replaces the given mask at fusions/fused_softmax.py:321, so packed documents would leak; softmax_offset carries no
tensor-parallel attribute at dot_product_attention.py:127.

Shapes: S positions, B rows, H query heads and G key-value heads of this rank, D head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

Backend = Literal["flex", "dense"]
BLOCK = 128  # positions of a block of FlexAttention's masks, queries and keys alike
Index = torch.Tensor
MaskFunction = Callable[[Index, Index, Index, Index], torch.Tensor]
ScoreFunction = Callable[[torch.Tensor, Index, Index, Index, Index], torch.Tensor]


def visible(document_BS: torch.Tensor, window: int | None) -> MaskFunction:
    """mask(b, h, i, j): may position i of row b see position j? window=None: the whole document."""

    def causal_in_document(b: Index, h: Index, i: Index, j: Index) -> torch.Tensor:
        return (j <= i) & (document_BS[b, i] == document_BS[b, j])

    def causal_in_window(b: Index, h: Index, i: Index, j: Index) -> torch.Tensor:
        return (j <= i) & (i - j < window) & (document_BS[b, i] == document_BS[b, j])

    return causal_in_document if window is None else causal_in_window


def document_blocks(document_BS: torch.Tensor, window: int | None) -> BlockMask:
    """FlexAttention's block mask of `visible`, from where documents begin: no pass over S x S pairs, no host wait.

    The positions that i sees are those from low(i) to i, low(i) the first of its document or of its window, which never
    falls along a row. So block I sees block J where low of I's first position is at most J's last, and all pairs of the
    two (no mask to evaluate) where J lies before I and low of I's last position is at most J's first.
    """
    S, device = document_BS.shape[1], document_BS.device
    place_S = torch.arange(S, dtype=torch.int32, device=device)
    begins_BS = torch.ones_like(document_BS, dtype=torch.bool)
    begins_BS[:, 1:] = document_BS[:, 1:] != document_BS[:, :-1]
    low_BS = torch.where(begins_BS, place_S, 0).cummax(dim=1).values
    if window is not None:
        low_BS = torch.maximum(low_BS, place_S - (window - 1))
    first_N = torch.arange(0, S, BLOCK, device=device)
    last_N = (first_N + (BLOCK - 1)).clamp(max=S - 1)
    before_NN = first_N[None, :] < first_N[:, None]
    sees_BNN = before_NN & (low_BS[:, first_N, None] <= last_N)
    whole_BNN = before_NN & (low_BS[:, last_N, None] <= first_N)
    part_BNN = sees_BNN & ~whole_BNN | (first_N[None, :] == first_N[:, None])
    return BlockMask(
        (S, S),
        *_listed(part_BNN),
        *_listed(whole_BNN),
        *_listed(part_BNN.mT),
        *_listed(whole_BNN.mT),
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=visible(document_BS, window),
    )


def _listed(blocks_BNM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of each line are set, [B, 1, N], and their numbers first, ascending, [B, 1, N, M]; int32.

    FlexAttention's kernels take them for contiguous: argsort of a transposed view would hand on its strides.
    """
    order_BNM = blocks_BNM.to(torch.int8, memory_format=torch.contiguous_format).argsort(
        dim=-1, descending=True, stable=True
    )
    return blocks_BNM.sum(-1, dtype=torch.int32)[:, None], order_BNM.to(torch.int32)[:, None]


@functools.cache
def alibi(num_heads: int, first_head: int) -> ScoreFunction:
    """score(s, b, h, i, j) with the ALiBi bias; h counts the heads of this rank, `first_head` those before it."""

    def biased(score: torch.Tensor, b: Index, h: Index, i: Index, j: Index) -> torch.Tensor:
        slope = torch.exp2((h + (first_head + 1)).to(score.dtype) * (-8.0 / num_heads))
        return score - slope * (i - j).to(score.dtype)

    return biased


@dataclass
class PackedRows(PackedSeqParams):
    """The documents of one micro-batch, carried to every core attention by Megatron's packed_seq_params argument.

    That argument is closed over by recomputation, so it survives it. qkv_format stays "sbhd": rows keep their batch
    axis, and no path for the thd format runs. document_BS: int32, padding has a number of its own.
    position_SB: int64, below S, by which queries and keys are rotated; None for 0..S - 1 in every row.
    Masks are built once a micro-batch and window, by whichever layer asks first.
    """

    document_BS: torch.Tensor = field(kw_only=True)
    position_SB: torch.Tensor | None = field(default=None, kw_only=True)
    masks: dict[tuple[Backend, int | None], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = self.document_BS.shape[1]

    def attend(
        self,
        layer: CoreAttention,
        q_BHSD: torch.Tensor,
        k_BGSD: torch.Tensor,
        v_BGSD: torch.Tensor,
    ) -> torch.Tensor:
        """[B, H, S, D] by the layer's kernel. Sampling has its own ways to attend: trainer/megatron/cached.py."""
        return layer.kernel(
            q_BHSD,
            k_BGSD,
            v_BGSD,
            layer.sink,
            self,
            window=layer.window,
            score_function=layer.score_function,
            scale=layer.scale,
        )

    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's block mask."""
        if ("flex", window) not in self.masks:
            self.masks["flex", window] = document_blocks(self.document_BS, window)
        return self.masks["flex", window]

    def dense_mask(self, window: int | None) -> torch.Tensor:
        """bool [B, 1, S, S], True where attention may look."""
        if ("dense", window) not in self.masks:
            function = visible(self.document_BS, window)
            self.masks["dense", window] = function(
                *_indices(self.document_BS.shape, 1, self.document_BS.device)
            )
        return self.masks["dense", window]


def dense_attention(
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    sink_H: torch.Tensor,
    rows: PackedRows,
    *,
    window: int | None,
    score_function: ScoreFunction | None,
    scale: float,
) -> torch.Tensor:
    """The reference: the mask and score functions on every pair, in fp32 or wider. Returns [B, H, S, D] in q's
    dtype.
    """
    B, H, S, _ = q_BHSD.shape
    dtype = torch.promote_types(q_BHSD.dtype, torch.float32)
    groups = H // k_BGSD.shape[1]
    k_BHSD = k_BGSD.to(dtype).repeat_interleave(groups, dim=1)
    v_BHSD = v_BGSD.to(dtype).repeat_interleave(groups, dim=1)
    score_BHSS = q_BHSD.to(dtype) @ k_BHSD.transpose(-1, -2) * scale
    if score_function is not None:
        score_BHSS = score_function(score_BHSS, *_indices((B, S), H, q_BHSD.device))
    score_BHSS = score_BHSS.masked_fill(~rows.dense_mask(window), float("-inf"))
    sink_BHS1 = sink_H.to(dtype).view(1, H, 1, 1).expand(B, H, S, 1)
    probability_BHSS = torch.cat([score_BHSS, sink_BHS1], dim=-1).softmax(dim=-1)[..., :-1]
    return (probability_BHSS @ v_BHSD).to(q_BHSD.dtype)


def flexible_attention(
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    sink_H: torch.Tensor,
    rows: PackedRows,
    *,
    window: int | None,
    score_function: ScoreFunction | None,
    scale: float,
) -> torch.Tensor:
    """The same functions in FlexAttention's kernel; the sink scales the output by sigmoid(lse - b_h)."""
    return flexible_scores(
        q_BHSD,
        k_BGSD,
        v_BGSD,
        sink_H,
        rows.block_mask(window),
        score_function=score_function,
        scale=scale,
        flex=_compiled_flex(),
    )


def flexible_scores(
    q_BHSD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSD: torch.Tensor,
    sink_H: torch.Tensor,
    mask: BlockMask,
    *,
    score_function: ScoreFunction | None,
    scale: float,
    flex: Any = flex_attention,
) -> torch.Tensor:
    """`flexible_attention` of a mask; flex: FlexAttention, compiled unless the caller is. Returns [B, H, S, D]."""
    out_BHSD, aux = flex(
        q_BHSD,
        k_BGSD,
        v_BGSD,
        score_mod=score_function,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHSD.shape[1] != k_BGSD.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    gate_BHS = torch.sigmoid(aux.lse - sink_H.float()[None, :, None])
    return (out_BHSD * gate_BHS[..., None]).to(q_BHSD.dtype)


class CoreAttention(MegatronModule):
    """The `core_attention` of Megatron's SelfAttention: learnable sinks, packed documents, window or ALiBi by layer.

    The schedule is Megatron's own: with window_attn_skip_freq = 4 layers 4, 8, ... (1-based) are global.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *,
        backend: Backend,
        pg_collection: Any,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        heads = config.num_attention_heads // self.tp_group.size()
        local = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] + 1 if local else None
        self.score_function = (
            None if local else alibi(config.num_attention_heads, heads * self.tp_group.rank())
        )
        self.scale = config.kv_channels**-0.5
        self.backend = backend
        self.kernel = flexible_attention if backend == "flex" else dense_attention
        # Drawn for every head and sliced: the values, and all drawn after them, do not depend on the TP size.
        sink = torch.empty(config.num_attention_heads, device=torch.cuda.current_device())
        config.init_method(sink)
        first = heads * self.tp_group.rank()
        self.sink = torch.nn.Parameter(sink[first : first + heads].to(config.params_dtype).clone())
        self.sink.tensor_model_parallel = True
        self.sink.partition_dim, self.sink.partition_stride = 0, 1

    def forward(
        self,
        query_SBHD: torch.Tensor,
        key_SBGD: torch.Tensor,
        value_SBGD: torch.Tensor,
        attention_mask: None,
        *,
        packed_seq_params: PackedRows,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of every head in the way of `packed_seq_params`; returns [S, B, H * D]."""
        heads_first = (t.permute(1, 2, 0, 3) for t in (query_SBHD, key_SBGD, value_SBGD))
        out_BHSD = packed_seq_params.attend(self, *heads_first)
        return out_BHSD.permute(2, 0, 1, 3).flatten(2).contiguous()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The sink, split over TP on its only axis."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"sink": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )


def _indices(
    shape: tuple[int, int], heads: int, device: torch.device
) -> tuple[Index, Index, Index, Index]:
    B, S = shape
    axes = [torch.arange(n, device=device) for n in (B, heads, S, S)]
    b, h, i, j = (axis.view([-1 if d == n else 1 for d in range(4)]) for n, axis in enumerate(axes))
    return b, h, i, j


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)
