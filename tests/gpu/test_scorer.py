"""The vLLM scorer on CUDA with MXFP4 experts: against transformers in float32, without the prefix cache, on two GPUs.

The teacher has gpt-oss-120b's width, heads and vocabulary, few layers and experts, and random weights whose logits
spread. Its body runs in bf16, so bounds are those of a bf16 body, not of the reduction (test_reduce.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpt_oss_shape import write_random_model
from common.config import load_config, named_config
from datastore.prompt import ScoreRequest
from datastore.target import content_key, require_valid
from datastore.teacher import TeacherConfig
from datastore.types import SparseTarget
from datastore.vllm_scorer import VllmScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
]
PREFIX, FIRST_TARGET, COMPARED = 101, 140, 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("teacher"), layers=2, experts=8)


@pytest.fixture(scope="module")
def requests() -> list[ScoreRequest]:
    """48 documents of 200 to 1500 tokens with one constant prefix."""
    random = np.random.default_rng(0)
    prefix = random.integers(0, 199_000, PREFIX)
    bodies = [random.integers(0, 199_000, n - PREFIX) for n in random.integers(200, 1500, 48)]
    documents = [np.concatenate([prefix, body]).astype(np.int32) for body in bodies]
    return [
        ScoreRequest(
            prompt_T=tokens_T,
            positions_P=np.arange(FIRST_TARGET, len(tokens_T) - 1, dtype=np.int32),
            shift=0,
            content_key=content_key(tokens_T),
        )
        for tokens_T in documents
    ]


def config(model: Path, ranks: int = 1) -> TeacherConfig:
    changes = (
        *(f"model={model}", "revision=null", f"engine.tensor_parallel_size={ranks}"),
        *("engine.gpu_memory_utilization=0.3", "engine.max_num_batched_tokens=4096"),
    )
    return load_config(TeacherConfig, named_config("teacher", "gpt-oss-120b"), changes)


@pytest.fixture(scope="module")
def scorer(model: Path) -> Iterator[VllmScorer]:
    with VllmScorer(config(model), model) as engine:
        yield engine


@pytest.fixture(scope="module")
def targets(scorer: VllmScorer, requests: list[ScoreRequest]) -> list[SparseTarget]:
    return scorer.score(requests)


def realised(targets: list[SparseTarget]) -> np.ndarray:
    return np.concatenate([target.realised_logprob_P for target in targets])


def top(targets: list[SparseTarget]) -> np.ndarray:
    """The most probable id of each position, -1 where none reaches the threshold."""
    ids = []
    for target in targets:
        first = target.ids_E[np.minimum(target.offsets_P1[:-1], len(target.ids_E) - 1)]
        ids.append(np.where(target.num_head_P > 0, first, -1))
    return np.concatenate(ids)


@pytest.fixture(scope="module")
def noise(scorer: VllmScorer, requests, targets) -> float:
    """Mean difference between two scorings of the same documents: together, and three at a time."""
    order = np.random.default_rng(1).permutation(len(requests)).tolist()
    other = {}
    for first in range(0, len(order), 3):
        some = order[first : first + 3]
        other |= zip(some, scorer.score([requests[i] for i in some]), strict=True)
    again = [other[i] for i in range(len(requests))]
    return float(np.abs(realised(again) - realised(targets)).mean())


def test_targets_are_reductions_of_spread_distributions(targets: list[SparseTarget]) -> None:
    for target in targets:
        require_valid(target)
    heads_P = np.concatenate([target.num_head_P for target in targets])
    assert set(heads_P.tolist()) >= {0, 1, 2, 3}


@pytest.fixture(scope="module")
def exact(model: Path, requests: list[ScoreRequest]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Realised logprobs and most probable ids of the first documents, by transformers in float32."""
    from transformers import GptOssForCausalLM, Mxfp4Config

    network = GptOssForCausalLM.from_pretrained(
        model,
        attn_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32,
        device_map={"": "cuda"},
    ).eval()
    values = []
    for request in requests[:COMPARED]:
        ids = torch.from_numpy(request.prompt_T.astype(np.int64))[None].cuda()
        positions = request.positions_P.tolist()
        with torch.no_grad():
            exact_PV = network(input_ids=ids).logits[0, positions].double().log_softmax(-1)
        realised_P = exact_PV.gather(1, ids[0, 1:][positions][:, None])[:, 0]
        values.append((realised_P.cpu().numpy(), exact_PV.argmax(-1).cpu().numpy()))
    return values


def errors(targets: list[SparseTarget], exact) -> tuple[float, float]:
    """Mean error of the realised logprob, and share of positions with a head whose first id is right."""
    off, agreed = [], []
    for target, (realised_P, top_P) in zip(targets[:COMPARED], exact, strict=True):
        off.append(np.abs(target.realised_logprob_P - realised_P))
        agreed.append((top([target]) == top_P)[target.num_head_P > 0])
    return float(np.concatenate(off).mean()), float(np.concatenate(agreed).mean())


def test_equals_transformers_within_bf16(targets, exact) -> None:
    off, agreed = errors(targets, exact)
    print(f"\nagainst transformers: {off:.4f} mean, top id agrees at {agreed:.2%}")
    assert off < 0.08
    assert agreed > 0.95


def test_prefix_cache_changes_nothing_beyond_the_noise(scorer, requests, targets, noise) -> None:
    plain = scorer._encode(requests, read_cache=False)
    found = np.concatenate([rows[:, 2].copy().view(np.float32) for rows in plain])
    off = np.abs(found - realised(targets)).mean()
    print(f"\nprefix reused against not: {off:.2e} mean; other batches: {noise:.2e}")
    assert off <= 1.5 * noise + 1e-6


def test_a_repeated_document_is_scored_whole(scorer, requests, targets) -> None:
    """All of the second is in the cache, its scored positions too; so it is computed again."""
    twice = scorer.score([requests[0], requests[0]])
    assert [len(t.positions_P) for t in twice] == [len(targets[0].positions_P)] * 2
    np.testing.assert_allclose(realised(twice[:1]), realised(twice[1:]), atol=0.5)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_give_the_targets_of_one(model, requests, targets, exact, noise) -> None:
    """Partial products of a layer are rounded to bf16 before they are added: the noise of bf16, not more."""
    with VllmScorer(config(model, ranks=2), model) as engine:
        together = engine.score(requests)
    for target in together:
        require_valid(target)
    off = float(np.abs(realised(together) - realised(targets)).mean())
    (one, agreed_one), (two, agreed_two) = errors(targets, exact), errors(together, exact)
    print(f"\ntwo GPUs against one: {off:.4f} mean; one GPU in other batches: {noise:.4f}")
    print(
        f"against float32: one GPU {one:.4f} ({agreed_one:.2%}), two {two:.4f} ({agreed_two:.2%})"
    )
    assert two < 1.2 * one
    assert off < 1.2 * one
    assert agreed_two > agreed_one - 0.01
