"""Core attention: masks and scores as functions, evaluated densely, and the Triton kernels that compute the same.

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

Backend = Literal["triton", "dense"]
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


def visible_range(
    document_BS: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(low_BS, high_BS), int32: the first position that each position sees, and the last one that sees it.

    document_BS: integers, equal for the positions of a document, which follow each other; padding has a number of its
    own. window counts the position itself; None: the whole document. Both results never fall along a row.
    """
    place_S = torch.arange(document_BS.shape[1], dtype=torch.int32, device=document_BS.device)
    edge_BS = document_BS[:, 1:] != document_BS[:, :-1]
    begins_BS = torch.nn.functional.pad(edge_BS, (1, 0), value=True)
    ends_BS = torch.nn.functional.pad(edge_BS, (0, 1), value=True)
    low_BS = torch.where(begins_BS, place_S, 0).cummax(dim=1).values
    ends_BS = torch.where(ends_BS, place_S, document_BS.shape[1]).flip(1)
    high_BS = ends_BS.cummin(dim=1).values.flip(1)
    if window is not None:
        low_BS = torch.maximum(low_BS, place_S - (window - 1))
        high_BS = torch.minimum(high_BS, place_S + (window - 1))
    return low_BS.contiguous(), high_BS.contiguous()


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

    def visible_range(self, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [B, S] each: the first position that each one sees, and the last that sees it."""
        if ("triton", window) not in self.masks:
            self.masks["triton", window] = visible_range(self.document_BS, window)
        return self.masks["triton", window]

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


def kernel_attention(
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
    """The same by the Triton kernels, bf16 on CUDA; of score functions they know ALiBi of all heads."""
    from trainer.kernels.attention import attention

    out_SBHD = attention(
        *(heads.permute(2, 0, 1, 3) for heads in (q_BHSD, k_BGSD, v_BGSD)),
        sink_H,
        *rows.visible_range(window),
        window=window,
        alibi=score_function is not None,
        scale=scale,
    )
    return out_SBHD.permute(1, 2, 0, 3)


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
        self.kernel = kernel_attention if backend == "triton" else dense_attention
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
