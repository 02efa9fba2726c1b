"""Attention over cached keys and values, for sampling: what stands where PackedRows stands in training.

Core attention asks `packed_seq_params` how to attend, so the modules that train are the modules that sample:

- PrefillRows: prompts packed into a row as in training, attended to by training's own kernel; their keys and values,
  normalised and rotated as core attention receives them, go to the cache of their slots.
- DecodeStep: one token a slot. Its key and value are appended, its query sees the cache; fp32 scores and softmax.

A layer's cache is a ring: position p lies at p modulo the length, which is the window on local layers and the longest
document on global ones. After position p is written, entry j holds a visible position exactly where j <= p: on a full
ring everything, the window's own positions. What an earlier rollout left lies beyond.

Positions count from the document's first token, also in prefilled rows: keys of a slot must share one origin.

Shapes: B slots, G key-value heads, H query heads, L entries of a slot, D head dim, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from trainer.megatron.attention import CoreAttention, PackedRows


class KVCache:
    """Keys and values of every layer, allocated once: two tensors [B, G, L, D] a layer, by its number from 1.

    In the dtype and on the device of the layer's sinks. longest: tokens of the longest document.
    """

    def __init__(self, layers: Sequence[CoreAttention], slots: int, longest: int) -> None:
        self.slots, self.longest = slots, longest
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in layers:
            config, length = layer.config, min(layer.window or longest, longest)
            shape = (slots, config.num_query_groups, length, config.kv_channels)
            keys, values = (
                torch.zeros(shape, dtype=layer.sink.dtype, device=layer.sink.device) for _ in "kv"
            )
            self._layers[layer.layer_number] = keys, values

    @property
    def num_bytes(self) -> int:
        """Of all layers."""
        return sum(2 * keys.numel() * keys.element_size() for keys, _ in self._layers.values())

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        return self._layers[number]

    def write(
        self, number: int, row_N: torch.Tensor, k_ND: torch.Tensor, v_ND: torch.Tensor
    ) -> None:
        """Put keys and values at rows (b G + g) L + entry of a layer; rows are distinct."""
        for cached_BGLD, new_ND in zip(self._layers[number], (k_ND, v_ND), strict=True):
            cached_BGLD.view(-1, cached_BGLD.shape[-1]).index_copy_(0, row_N, new_ND)


@dataclass
class PrefillRows(PackedRows):
    """One packed row of prompts. slot_N, at_N, left_N (int64 NumPy, over the row's tokens, padding left out): the slot,
    the place in the row, and how many tokens of the same prompt come after. Built by `prefill_rows`.
    """

    cache: KVCache = field(kw_only=True)
    slot_N: np.ndarray = field(kw_only=True)
    at_N: np.ndarray = field(kw_only=True)
    left_N: np.ndarray = field(kw_only=True)
    _places: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def attend(
        self, layer: Any, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor
    ) -> torch.Tensor:
        """Training's attention; keys and values are kept."""
        G, L = self.cache.layer(layer.layer_number)[0].shape[1:3]
        at_N, row_GN = self._where(G, L)
        kept = (t[0].index_select(1, at_N).flatten(0, 1) for t in (k_BGSD, v_BGSD))
        self.cache.write(layer.layer_number, row_GN.flatten(), *kept)
        return super().attend(layer, q_BHSD, k_BGSD, v_BGSD)

    def _where(self, groups: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the row of the tokens that a cache of this length keeps (a prompt's last ones), and their rows."""
        if length not in self._places:
            assert self.position_SB is not None
            kept = self.left_N < length
            at_N = torch.from_numpy(self.at_N[kept]).to(self.position_SB.device)
            slot_N = torch.from_numpy(self.slot_N[kept]).to(at_N.device)
            group_G1 = torch.arange(groups, device=at_N.device).unsqueeze(1)
            entry_N = self.position_SB[:, 0].index_select(0, at_N) % length
            self._places[length] = at_N, (slot_N * groups + group_G1) * length + entry_N
        return self._places[length]


def prefill_rows(
    cache: KVCache, prompts: Sequence[tuple[int, np.ndarray]], row_len: int, device: torch.device
) -> tuple[torch.Tensor, PrefillRows]:
    """Tokens [1, row_len] (0 at padding) and rows of the prompts (slot, integer tokens [T]), back to back."""
    tokens_S, position_S = (np.zeros(row_len, dtype=np.int64) for _ in range(2))
    document_S = np.full(row_len, -1, dtype=np.int32)
    slots, left, at = [], [], 0
    for number, (slot, tokens_T) in enumerate(prompts):
        place = slice(at, at + len(tokens_T))
        tokens_S[place], document_S[place] = tokens_T, number
        position_S[place] = np.arange(len(tokens_T))
        slots.append(np.full(len(tokens_T), slot))
        left.append(np.arange(len(tokens_T))[::-1])
        at = place.stop
    none = np.zeros(0, dtype=np.int64)
    rows = PrefillRows(
        document_BS=torch.from_numpy(document_S)[None].to(device),
        position_SB=torch.from_numpy(position_S)[:, None].to(device),
        cache=cache,
        slot_N=np.concatenate([none, *slots]),
        at_N=np.arange(at),
        left_N=np.concatenate([none, *left]),
    )
    return torch.from_numpy(tokens_S)[None].to(device), rows


@dataclass
class DecodeStep(PackedSeqParams):
    """One token in every slot of the cache, at position_B (int64). Never packed by Megatron: qkv_format is "sbhd"."""

    cache: KVCache = field(kw_only=True)
    position_B: torch.Tensor = field(kw_only=True)
    _places: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = self.cache.longest

    @property
    def position_SB(self) -> torch.Tensor:
        """[1, B]."""
        return self.position_B.unsqueeze(0)

    def attend(
        self, layer: Any, q_BHSD: torch.Tensor, k_BGSD: torch.Tensor, v_BGSD: torch.Tensor
    ) -> torch.Tensor:
        """[B, H, 1, D] in q's dtype. S = 1."""
        number = layer.layer_number
        key_BGLD, value_BGLD = self.cache.layer(number)
        B, G, L, D = key_BGLD.shape
        row_BG, hidden_BL = self._where(G, L)
        self.cache.write(number, row_BG.flatten(), k_BGSD.reshape(-1, D), v_BGSD.reshape(-1, D))
        q_NQD = q_BHSD.reshape(B * G, -1, D)
        score_NQL = _product(q_NQD, key_BGLD.flatten(0, 1).transpose(1, 2)) * layer.scale
        score_BHL = score_NQL.view(B, -1, L)
        if layer.score_function is not None:
            head_H1 = torch.arange(score_BHL.shape[1], device=score_BHL.device).unsqueeze(1)
            entry_L = torch.arange(L, device=score_BHL.device)
            position_B11 = self.position_B.view(B, 1, 1)
            score_BHL = layer.score_function(score_BHL, None, head_H1, position_B11, entry_L)
        score_BHL = score_BHL.masked_fill(hidden_BL.unsqueeze(1), float("-inf"))
        sink_BH1 = layer.sink.to(score_BHL.dtype).view(1, -1, 1).expand(B, -1, 1)
        probability_BHL = torch.cat([score_BHL, sink_BH1], dim=-1).softmax(dim=-1)[..., :-1]
        probability_NQL = probability_BHL.to(q_BHSD.dtype if q_BHSD.is_cuda else score_BHL.dtype)
        out_NQD = _product(probability_NQL.reshape(B * G, -1, L), value_BGLD.flatten(0, 1))
        return out_NQD.view(B, -1, 1, D).to(q_BHSD.dtype)

    def _where(self, groups: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows [B, G] of this step in a cache of this length, and which entries [B, L] hold nothing visible."""
        if length not in self._places:
            device = self.position_B.device
            first_B = torch.arange(self.cache.slots, device=device) * groups
            group_BG = first_B.unsqueeze(1) + torch.arange(groups, device=device)
            row_BG = group_BG * length + (self.position_B % length).unsqueeze(1)
            hidden_BL = torch.arange(length, device=device) > self.position_B.unsqueeze(1)
            self._places[length] = row_BG, hidden_BL
        return self._places[length]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched a @ b with an fp32 result (fp64 of fp64); bf16 on CUDA by tensor cores, as the training kernel does."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.bmm(a, b, out_dtype=torch.float32)
    wide = torch.promote_types(a.dtype, torch.float32)
    return torch.bmm(a.to(wide), b.to(wide))
