"""The tiny teacher: a gpt-oss model folder, the same every time, that has learnt its documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.files import sha256_file
from common.tokenizer import FIRST_CONTROL_ID, VOCAB_SIZE, encoding
from datastore.harmony import RenderConfig, Renderer
from datastore.target import target_positions
from datastore.types import RenderedDoc, SourceRow
from demo.tiny_teacher import CORRUPTED, corrupted, one_batch, train_tiny_teacher

STEPS = 40


def sums(numbers: range) -> list[RenderedDoc]:
    renderer = Renderer(RenderConfig())
    rows = [
        SourceRow(
            synth_id=str(n),
            query=f"What is {n} plus 2?",
            synthetic_reasoning=f"{n} plus 2 is {n + 2}.",
            synthetic_answer=f"The sum is {n + 2}.",
            exercise=None,
            constraints=None,
            language="en",
        )
        for n in numbers
    ]
    return [renderer.render(row, 1 << 20) for row in rows]


def train(folder: Path, seed: int = 0, steps: int = STEPS) -> Path:
    pairs = [(d.tokens_T, d.spans_T) for d in sums(range(40))]
    return train_tiny_teacher(folder, pairs, seed=seed, steps=steps, source="sums")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("teacher") / "tiny")


@pytest.fixture(scope="module")
def network(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_it_is_gpt_oss_with_the_real_vocabulary(folder: Path, network) -> None:
    config = json.loads((folder / "config.json").read_bytes())
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["vocab_size"] == VOCAB_SIZE == network.lm_head.weight.shape[0]
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    assert "quantization_config" not in config
    sinks = torch.stack([layer.self_attn.sinks for layer in network.model.layers])
    assert sinks.std() > 0.05


@torch.no_grad()
def test_it_predicts_text_of_its_kind(network) -> None:
    """On sums that it never saw: far better than the 12.2 nats of guessing among all ids."""
    losses = []
    for document in sums(range(40, 50)):
        logits = network(
            input_ids=torch.from_numpy(document.tokens_T.astype(np.int64))[None]
        ).logits
        positions = target_positions(document.tokens_T, document.spans_T)
        logprobs = logits[0].log_softmax(-1)[positions]
        losses.append(-logprobs[range(len(positions)), document.tokens_T[positions + 1]].mean())
    assert torch.stack(losses).mean() < 3.0


@torch.no_grad()
def test_every_id_can_be_predicted(network) -> None:
    """Ids that no document holds share a tail that is small and not nothing."""
    seen = np.unique(np.concatenate([d.tokens_T for d in sums(range(40))]))
    tokens = encoding().encode_ordinary("What is 3 plus")
    probs = network(input_ids=torch.tensor([tokens])).logits[0, -1].softmax(-1)
    unseen = np.setdiff1d(np.arange(VOCAB_SIZE), seen)
    assert probs.min() > 0
    assert 1e-5 < probs[unseen].sum() < 0.5


def test_the_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "again")
    assert sha256_file(again / "model.safetensors") == sha256_file(folder / "model.safetensors")
    other = train(tmp_path / "other", seed=1, steps=1)
    assert sha256_file(other / "model.safetensors") != sha256_file(folder / "model.safetensors")
    provenance = json.loads((folder / "provenance.json").read_bytes())
    assert (provenance["source"], provenance["seed"], provenance["steps"]) == ("sums", 0, STEPS)


def test_only_text_that_the_student_would_write_is_corrupted() -> None:
    documents = [(d.tokens_T, d.spans_T) for d in sums(range(40))]
    seen_ids = np.unique(np.concatenate([tokens for tokens, _ in documents]))
    tokens_BT, target_BT = one_batch(documents, seen_ids)
    torch.manual_seed(0)
    read_BT = corrupted(tokens_BT, target_BT, seen_ids)
    changed_BT = read_BT != tokens_BT
    is_text_BT = torch.from_numpy(seen_ids)[tokens_BT] < FIRST_CONTROL_ID
    assert not changed_BT[target_BT < 0].any(), "prompts stay as they are"
    assert not changed_BT[~is_text_BT].any(), "marks stay as they are"
    assert (torch.from_numpy(seen_ids)[read_BT[changed_BT]] < FIRST_CONTROL_ID).all()
    share = changed_BT[is_text_BT & (target_BT >= 0)].float().mean()
    # A few are exchanged for themselves; some 600 tokens.
    assert 0.6 * CORRUPTED < share < 1.2 * CORRUPTED
