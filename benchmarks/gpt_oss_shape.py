"""Model folders of gpt-oss shapes without released weights: a config alone, or random MXFP4 weights that spread.

vLLM's `load_format: dummy` fills every weight with about 0, so every distribution is flat: right for throughput,
useless for numerics. `write_random_model` makes real files in the released layout (MXFP4 experts, bf16 rest) whose
logits have a chosen spread, so that engines can be compared with each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.files import write_json
from common.tokenizer import VOCAB_SIZE

SHAPES = {
    "gpt-oss-120b": {"num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": {"num_hidden_layers": 24, "num_local_experts": 32},
}
_SKIPPED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]
_MXFP4_BLOCK = 32  # weights that share a scale
_RMS_OF_E2M1 = 2.86  # of the 16 codes 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, each as likely


def shaped_model(folder: Path, shape: str) -> Path:
    """A folder with the config.json of a released gpt-oss model and no weights."""
    _write_config(folder, SHAPES[shape])
    return folder


def write_random_model(
    folder: Path,
    *,
    layers: int,
    experts: int,
    width: int = 2880,
    spread: float = 3.5,
    seed: int = 0,
) -> Path:
    """A gpt-oss of `layers` layers with random weights: MXFP4 experts, logits of standard deviation `spread`.

    width: hidden and expert width, a multiple of 64. Made on the CUDA device when there is one; about 1.1 GB for
    embeddings and head each at width 2880, 0.4 GB a layer at 32 experts.
    """
    from safetensors.torch import save_file

    config = {"num_hidden_layers": layers, "num_local_experts": experts}
    values = _write_config(folder, config | {"hidden_size": width, "intermediate_size": width})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = _Draw(torch.Generator(device).manual_seed(seed), device)
    tensors = {
        "model.embed_tokens.weight": draw.normal(1.0, VOCAB_SIZE, width),
        "lm_head.weight": draw.normal(spread * width**-0.5, VOCAB_SIZE, width),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.{name}": tensor for name, tensor in _layer(values, draw, experts).items()
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _write_config(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    from transformers import GptOssConfig

    config = GptOssConfig(**values, vocab_size=VOCAB_SIZE).to_dict()
    config |= {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": _SKIPPED},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    return config


class _Draw:
    """Random tensors on a device, returned to host memory."""

    def __init__(self, generator: torch.Generator, device: str) -> None:
        self._generator, self._device = generator, device

    def normal(self, std: float, *shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self._generator, device=self._device)
        return drawn.mul_(std).bfloat16().cpu()

    def blocks(self, *shape: int) -> torch.Tensor:
        options = {"generator": self._generator, "device": self._device, "dtype": torch.uint8}
        return torch.randint(0, 256, shape, **options).cpu()


def _layer(config: dict[str, Any], draw: _Draw, experts: int) -> dict[str, torch.Tensor]:
    width, head_dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    std = width**-0.5
    tensors = {
        "input_layernorm.weight": torch.ones(width, dtype=torch.bfloat16),
        "post_attention_layernorm.weight": torch.ones(width, dtype=torch.bfloat16),
        "self_attn.sinks": draw.normal(1.0, heads),
        "mlp.router.weight": draw.normal(std, experts, width),
        "mlp.router.bias": draw.normal(0.1, experts),
    }
    for name, rows, columns in (
        ("q", heads * head_dim, width),
        ("k", kv_heads * head_dim, width),
        ("v", kv_heads * head_dim, width),
        ("o", width, heads * head_dim),
    ):
        tensors[f"self_attn.{name}_proj.weight"] = draw.normal(columns**-0.5, rows, columns)
        tensors[f"self_attn.{name}_proj.bias"] = draw.normal(0.02, rows)
    # Scales are powers of two with bias 127: the one nearest to a standard deviation of `std`.
    exponent = round(127 + torch.tensor(std / _RMS_OF_E2M1).log2().item())
    for name, rows in (("gate_up_proj", 2 * width), ("down_proj", width)):
        groups = width // _MXFP4_BLOCK
        tensors[f"mlp.experts.{name}_blocks"] = draw.blocks(experts, rows, groups, 16)
        tensors[f"mlp.experts.{name}_scales"] = torch.full(
            (experts, rows, groups), exponent, dtype=torch.uint8
        )
        tensors[f"mlp.experts.{name}_bias"] = draw.normal(0.02, experts, rows)
    return tensors
