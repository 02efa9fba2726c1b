"""From the student's parameters to those of trainer/hf/modeling_vpmoe.py: names, shapes, cuts. Pure.

docs/export.md has the table. Megatron's fused QKV holds, for each key-value group, its query heads, its key, its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from common import tokenizer
from common.errors import FormatError
from trainer.student_config import StudentConfig

Part = Literal["query", "key", "value"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STOP_IDS = (tokenizer.RETURN, tokenizer.ENDOFTEXT, tokenizer.CALL)
CODE_FILES = ("configuration_vpmoe.py", "modeling_vpmoe.py")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the export. source: the student's parameter that it is, or is cut from by `take`.

    always_fp32: log frequencies, value-residual logits and balancing biases lose their meaning in bf16.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    take: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    always_fp32: bool = False

    def size_bytes(self, dtype: torch.dtype) -> int:
        """Bytes in the export."""
        wide = torch.float32 if self.always_fp32 else dtype
        return torch.Size(self.shape).numel() * wide.itemsize

    def tensor(self, sources: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it is stored. Raises FormatError when its shape is another."""
        taken = self.take(sources[self.source].detach())
        if tuple(taken.shape) != self.shape:
            raise FormatError(
                f"{self.source}, exported as {self.name}",
                got=f"shape {tuple(taken.shape)}",
                expected=f"{self.shape}",
            )
        return taken.to(torch.float32 if self.always_fp32 else dtype).contiguous()


def entries(student: StudentConfig) -> list[Entry]:
    """Every tensor of the export, in the order of the model."""
    V, D = student.vocab_size, student.hidden
    found = [
        Entry(
            name="model.embed_tokens.weight",
            shape=(V, D),
            source="embedding.word_embeddings.weight",
        )
    ]
    if student.grape_m is not None:
        found.append(
            Entry(
                name="model.rotary.log_frequency",
                shape=(student.head_dim // 2,),
                source="rotary_pos_emb.log_frequency",
                always_fp32=True,
            )
        )
    for layer in range(student.layers):
        found += _layer(student, layer)
    return [
        *found,
        Entry(name="model.norm.weight", shape=(D,), source="decoder.final_layernorm.weight"),
        Entry(name="lm_head.weight", shape=(V, D), source="output_layer.weight"),
    ]


def require_complete(
    found: list[Entry], sources: Mapping[str, torch.Tensor], what: str = "the student"
) -> None:
    """FormatError unless every parameter is exported, whole and once, and every entry has its parameter."""
    wanted = {entry.source for entry in found}
    faults = [f"{name} is unknown to the export" for name in sorted(set(sources) - wanted)]
    faults += [f"{name} is missing" for name in sorted(wanted - set(sources))]
    numbers: dict[str, int] = dict.fromkeys(wanted, 0)
    for entry in found:
        numbers[entry.source] += torch.Size(entry.shape).numel()
    faults += [
        f"{name} has {sources[name].numel()} numbers, the export {number} of it"
        for name, number in sorted(numbers.items())
        if name in sources and sources[name].numel() != number
    ]
    names = [entry.name for entry in found]
    faults += [
        f"{name} is exported twice" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if faults:
        raise FormatError(
            f"{what} and its export differ:\n  " + "\n  ".join(faults[:20]) + "\n",
            remedy="export with the code that trained the run, or add the parameter to trainer/export_names.py",
        )


def hf_config(student: StudentConfig, *, seq_len: int, dtype: str) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["VpMoEForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_vpmoe.VpMoEConfig",
            "AutoModel": "modeling_vpmoe.VpMoEModel",
            "AutoModelForCausalLM": "modeling_vpmoe.VpMoEForCausalLM",
        },
        "model_type": "vpmoe",
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
        "vocab_size": student.vocab_size,
        "hidden_size": student.hidden,
        "num_hidden_layers": student.layers,
        "num_attention_heads": student.heads,
        "num_key_value_heads": student.kv_groups,
        "head_dim": student.head_dim,
        "intermediate_size": student.ffn,
        "num_dense_layers": student.dense_layers,
        "num_experts": student.experts,
        "num_experts_per_tok": student.experts_per_token,
        "moe_intermediate_size": student.expert_width,
        "shared_expert_intermediate_size": student.shared_width,
        "n_group": student.router.groups,
        "topk_group": student.router.group_topk,
        "routed_scaling_factor": student.router.scaling,
        "sliding_window": student.window,
        "global_every": student.global_every,
        "rotary_base": student.rotary_base,
        "rms_norm_eps": student.norm_eps,
        "initializer_range": student.init_std,
        "max_position_embeddings": seq_len,
        "tpa_query_rank": None if student.tpa is None else student.tpa.q_rank,
        "tpa_kv_rank": None if student.tpa is None else student.tpa.kv_rank,
        "frequency_log_scale": None if student.grape_m is None else student.grape_m.log_scale,
        "value_residual": student.value_residual is not None,
        "use_cache": True,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.STARTOFTEXT,
        "eos_token_id": tokenizer.RETURN,
        "pad_token_id": tokenizer.PAD,
    }


def generation_config() -> dict[str, Any]:
    """generation_config.json: greedy; stops at <|return|>, <|endoftext|> and <|call|>."""
    return {
        "bos_token_id": tokenizer.STARTOFTEXT,
        "eos_token_id": list(STOP_IDS),
        "pad_token_id": tokenizer.PAD,
        "do_sample": False,
    }


def _layer(student: StudentConfig, layer: int) -> list[Entry]:
    D = student.hidden
    hf, own = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    dense = layer < student.dense_layers
    return [
        Entry(
            name=f"{hf}input_layernorm.weight", shape=(D,), source=f"{own}input_layernorm.weight"
        ),
        *_attention(student, layer, f"{hf}self_attn.", f"{own}self_attention."),
        Entry(
            name=f"{hf}post_attention_layernorm.weight",
            shape=(D,),
            source=f"{own}pre_mlp_layernorm.weight",
        ),
        *(
            _mlp(f"{hf}mlp.", f"{own}mlp.", D, student.ffn)
            if dense
            else _experts(student, f"{hf}mlp.", f"{own}mlp.")
        ),
    ]


def _attention(student: StudentConfig, layer: int, hf: str, own: str) -> list[Entry]:
    D, size, heads = student.hidden, student.head_dim, student.heads
    local = not student.is_global(layer + 1)
    found = (
        _tensor_products(student, hf, f"{own}linear_qkv.")
        if local and student.tpa is not None
        else _fused(student, hf, f"{own}linear_qkv.weight", "weight", (D,))
    )
    found += _fused(student, hf, f"{own}linear_qkv.bias", "bias", ())
    found += [
        Entry(
            name=f"{hf}o_proj.weight", shape=(D, heads * size), source=f"{own}linear_proj.weight"
        ),
        Entry(name=f"{hf}o_proj.bias", shape=(D,), source=f"{own}linear_proj.bias"),
        Entry(name=f"{hf}q_norm.weight", shape=(size,), source=f"{own}q_layernorm.weight"),
        Entry(name=f"{hf}k_norm.weight", shape=(size,), source=f"{own}k_layernorm.weight"),
        Entry(name=f"{hf}sinks", shape=(heads,), source=f"{own}core_attention.sink"),
    ]
    if student.value_residual is not None and layer > 0:
        name = "value_residual_logit"
        found.append(Entry(name=f"{hf}{name}", shape=(1,), source=f"{own}{name}", always_fp32=True))
    return found


def _fused(
    student: StudentConfig, hf: str, source: str, kind: str, tail: tuple[int, ...]
) -> list[Entry]:
    groups, size = student.kv_groups, student.head_dim
    heads: dict[Part, int] = {"query": student.heads, "key": groups, "value": groups}
    return [
        Entry(
            name=f"{hf}{part[0]}_proj.{kind}",
            shape=(count * size, *tail),
            source=source,
            take=partial(part_of_qkv, part=part, groups=groups, size=size),
        )
        for part, count in heads.items()
    ]


def part_of_qkv(fused: torch.Tensor, *, part: Part, groups: int, size: int) -> torch.Tensor:
    """The rows of one part of a fused QKV weight or bias [(H + 2 G) size, ...], as a tensor of its own."""
    grouped = fused.unflatten(0, (groups, -1, size))
    cut = {"query": grouped[:, :-2], "key": grouped[:, -2:-1], "value": grouped[:, -1:]}[part]
    return cut.flatten(0, 2).clone()


def _tensor_products(student: StudentConfig, hf: str, own: str) -> list[Entry]:
    assert student.tpa is not None
    D, size, groups = student.hidden, student.head_dim, student.kv_groups
    ranks = {
        "query": (student.heads, student.tpa.q_rank),
        "key": (groups, student.tpa.kv_rank),
        "value": (groups, student.tpa.kv_rank),
    }
    return [
        Entry(
            name=f"{hf}{part[0]}_proj.{factor}_weight",
            shape=((heads if factor == "a" else size) * rank, D),
            source=f"{own}{factor}_{part}",
        )
        for part, (heads, rank) in ranks.items()
        for factor in ("a", "b")
    ]


def _mlp(hf: str, own: str, hidden: int, inner: int) -> list[Entry]:
    shapes = {"up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return [
        Entry(
            name=f"{hf}{name}.{kind}",
            shape=shape if kind == "weight" else shape[:1],
            source=f"{own}{linear}.{kind}",
        )
        for (name, shape), linear in zip(shapes.items(), ("linear_fc1", "linear_fc2"), strict=True)
        for kind in ("weight", "bias")
    ]


def _experts(student: StudentConfig, hf: str, own: str) -> list[Entry]:
    D, E, F = student.hidden, student.experts, student.expert_width
    batched = {
        "up_weight": ("fc1_weight", (E, F, D)),
        "up_bias": ("fc1_bias", (E, F)),
        "down_weight": ("fc2_weight", (E, D, F)),
        "down_bias": ("fc2_bias", (E, D)),
    }
    return [
        Entry(name=f"{hf}router.weight", shape=(E, D), source=f"{own}router.weight"),
        Entry(name=f"{hf}router.bias", shape=(E,), source=f"{own}router.bias"),
        Entry(
            name=f"{hf}router.expert_bias",
            shape=(E,),
            source=f"{own}router.expert_bias",
            always_fp32=True,
        ),
        *(
            Entry(name=f"{hf}experts.{name}", shape=shape, source=f"{own}experts.{source}")
            for name, (source, shape) in batched.items()
        ),
        *_mlp(f"{hf}shared_expert.", f"{own}shared_experts.", D, student.shared_width),
    ]
