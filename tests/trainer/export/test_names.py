"""Names, cuts and files of the weights, without Megatron: every number once, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from common.config import CONFIG_ROOT, load_config
from common.errors import FormatError
from trainer import export
from trainer.config import KDConfig
from trainer.export import plan_shards, require_same_export, write_weights
from trainer.export_names import entries, hf_config, part_of_qkv, require_complete
from trainer.hf.configuration_vpmoe import VpMoEConfig
from trainer.hf.modeling_vpmoe import VpMoEForCausalLM
from trainer.parameters import parameter_counts
from trainer.student_config import StudentConfig


@pytest.fixture(scope="module")
def student() -> StudentConfig:
    """The student of the demonstration with a small vocabulary."""
    config = load_config(KDConfig, CONFIG_ROOT / "demo.yaml", ["student.vocab_size=64"])
    return config.student


@pytest.fixture(scope="module")
def weights(student: StudentConfig) -> dict[str, torch.Tensor]:
    """Random tensors under the student's names; a fused one holds its parts one after the other."""
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[torch.Tensor]] = {}
    for entry in entries(student):
        parts.setdefault(entry.source, []).append(torch.randn(entry.shape, generator=generator))
    return {name: torch.cat(tensors) for name, tensors in parts.items()}


def test_the_locked_student_is_exported_whole() -> None:
    locked = load_config(KDConfig, CONFIG_ROOT / "base.yaml").student
    numbers = sum(torch.Size(entry.shape).numel() for entry in entries(locked))
    biases = (locked.layers - locked.dense_layers) * locked.experts
    assert numbers - biases == parameter_counts(locked)["total"]


def test_entries_are_the_tensors_of_the_model(student: StudentConfig) -> None:
    with torch.device("meta"):
        model = VpMoEForCausalLM(VpMoEConfig(**hf_config(student, seq_len=8, dtype="fp32")))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {entry.name: entry.shape for entry in entries(student)} == shapes


def test_parts_of_a_fused_projection() -> None:
    groups, per_group, size = 2, 3, 4
    rows = [
        (part, group, head, channel)
        for group in range(groups)
        for part, heads in (("query", per_group), ("key", 1), ("value", 1))
        for head in range(heads)
        for channel in range(size)
    ]
    fused = torch.arange(len(rows))
    for part in ("query", "key", "value"):
        expected = [number for number, row in enumerate(rows) if row[0] == part]
        taken = part_of_qkv(fused[:, None], part=part, groups=groups, size=size)
        assert taken.flatten().tolist() == expected


def test_what_is_unknown_missing_or_of_another_size_is_named(
    student: StudentConfig, weights: dict[str, torch.Tensor]
) -> None:
    found = entries(student)
    require_complete(found, weights)
    sink = "decoder.layers.0.self_attention.core_attention.sink"
    for changed, fault in [
        (weights | {"mtp.weight": torch.zeros(1)}, "mtp.weight is unknown to the export"),
        ({n: t for n, t in weights.items() if n != sink}, f"{sink} is missing"),
        (weights | {sink: torch.zeros(5)}, f"{sink} has 5 numbers, the export 4 of it"),
    ]:
        with pytest.raises(FormatError, match=fault):
            require_complete(found, changed)
    with pytest.raises(FormatError, match="exported twice"):
        require_complete([*found, found[0]], weights)
    norm = next(entry for entry in found if entry.name == "model.norm.weight")
    with pytest.raises(
        FormatError, match=r"model.norm.weight; got shape \(8, 8\); expected \(64,\)"
    ):
        norm.tensor({norm.source: torch.zeros(8, 8)}, torch.float32)


@pytest.mark.parametrize("limit", [1, 5_000, 40_000, 10**9])
def test_no_weight_file_exceeds_the_limit(
    student: StudentConfig,
    weights: dict[str, torch.Tensor],
    limit: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", limit)
    found = entries(student)
    write_weights(tmp_path, found, weights, torch.bfloat16)
    files = sorted(tmp_path.glob("*.safetensors"))
    shards = plan_shards(found, torch.bfloat16, limit)
    assert [entry for shard in shards for entry in shard] == found
    assert len(files) == len(shards) == (len(found) if limit == 1 else len(shards))
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in files} == {(tmp_path / "plain").stat().st_mode}
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for entry in found:
        wide = torch.float32 if entry.always_fp32 else torch.bfloat16
        assert read[entry.name].dtype == wide
    for shard in shards:
        assert len(shard) == 1 or sum(e.size_bytes(torch.bfloat16) for e in shard) <= limit
    if len(files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == read.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in read.values())
    else:
        assert [file.name for file in files] == ["model.safetensors"]
    bias = next(entry for entry in found if entry.name.endswith("q_proj.bias"))
    group = weights[bias.source].reshape(student.kv_groups, -1, student.head_dim)
    expected = group[:, : student.heads // student.kv_groups].bfloat16().float().flatten()
    np.testing.assert_array_equal(read[bias.name].float(), expected)


def test_a_changed_file_is_no_same_export(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"weights")
    source = {"step": 1}
    described = {"a": {"bytes": 7, "sha256": export.sha256_file(tmp_path / "a")}}
    (tmp_path / "export.json").write_text(json.dumps({"source": source, "files": described}))
    require_same_export(tmp_path, source)
    (tmp_path / "a").write_bytes(b"weightz")
    with pytest.raises(export.ResumeError, match="a: not the file that was exported"):
        require_same_export(tmp_path, source)
