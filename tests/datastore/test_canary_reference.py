"""The reference of an MXFP4 checkpoint is that of its weights written out by a plain reading of the format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpt_oss_shape import write_random_model
from common.config import load_config, named_config
from common.errors import EngineError
from common.files import write_json
from datastore.canary import CanaryReference
from datastore.canary_reference import make_reference
from datastore.prompt import ScoreRequest
from datastore.target import content_key
from datastore.teacher import TeacherConfig

# OCP Microscaling Formats 1.0: E2M1 codes without their sign bit; 32 of them share a power of two.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def written_out(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks: uint8 [experts, rows, groups, 16], the low half of a byte first. Returns [experts, columns, rows]."""
    signed = torch.tensor([*E2M1, *(-value for value in E2M1)])
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    values = signed[codes] * 2.0 ** (scales.float()[..., None] - 127)
    return values.flatten(-2).transpose(1, 2).contiguous()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(
        tmp_path_factory.mktemp("mxfp4") / "model", layers=2, experts=4, width=64
    )


@pytest.fixture(scope="module")
def plain(quantised: Path) -> Path:
    """The same model without quantisation."""
    folder = quantised.parent / "plain"
    folder.mkdir()
    config = json.loads((quantised / "config.json").read_bytes())
    del config["quantization_config"]
    write_json(folder / "config.json", config)
    tensors = load_file(quantised / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        tensors[stem] = written_out(tensors.pop(name), tensors.pop(f"{stem}_scales"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def reference(model: Path) -> CanaryReference:
    config = load_config(TeacherConfig, named_config("teacher", "tiny"), (f"model={model}",))
    tokens_T = np.random.default_rng(0).integers(0, 200_000, 160).astype(np.int32)
    request = ScoreRequest(
        prompt_T=tokens_T,
        positions_P=np.arange(40, 159, dtype=np.int32),
        shift=0,
        content_key=content_key(tokens_T),
    )
    return make_reference(config, model, [request])


@pytest.mark.slow
def test_experts_are_expanded_exactly(quantised: Path, plain: Path) -> None:
    (found,), (expected,) = reference(quantised).documents, reference(plain).documents
    assert found.tokens == expected.tokens
    for name in ("realised_logprobs", "top_logprobs", "entropies"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-4)
    assert np.std(expected.realised_logprobs) > 1  # the experts and positions matter


@pytest.mark.slow
def test_a_checkpoint_that_lacks_a_tensor_is_refused(plain: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.self_attn.sinks"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"lacks model\.layers\.1\.self_attn\.sinks"):
        reference(broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="transformers cannot run"):
        reference(broken)
