"""The vLLM scorer against transformers in float32 on a tiny teacher. Engine starts are few: one, and one at TP=2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import load_config, named_config
from datastore import vllm_scorer
from datastore.harmony import RenderConfig, Renderer
from datastore.prompt import Prefix, ScoreRequest
from datastore.target import content_key, position_uniforms, reduce_logprobs, require_valid
from datastore.teacher import SystemText, TeacherConfig
from datastore.types import RenderedDoc, SparseTarget
from datastore.vllm_scorer import VllmScorer
from demo.tiny_teacher import train_tiny_teacher

pytestmark = pytest.mark.slow
WHOLE = Prefix(np.empty(0, np.int32), np.empty(0, np.int32), None, None)


@pytest.fixture(scope="module")
def documents(handmade) -> list[RenderedDoc]:
    long = " ".join(f"{i} plus one is {i + 1}." for i in range(12))
    return [handmade.document(i, answer=long if i % 4 == 0 else "") for i in range(8)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, documents: list[RenderedDoc]) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    pairs = [(d.tokens_T, d.spans_T) for d in documents]
    return train_tiny_teacher(folder, pairs, seed=3, steps=40, source="test")


def teacher_config(model: Path, *overrides: str) -> TeacherConfig:
    path = named_config("teacher", "tiny")
    return load_config(TeacherConfig, path, (f"model={model}", *overrides))


@pytest.fixture(scope="module")
def scorer(model: Path) -> Iterator[VllmScorer]:
    """Steps of at most 96 tokens: every document is cut over two steps or more, and steps mix documents."""
    with VllmScorer(teacher_config(model, "engine.max_num_batched_tokens=96"), model) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(model: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Exact log probabilities [T, V] by transformers: float32 weights, softmax in float64."""
    from transformers import GptOssForCausalLM

    network = GptOssForCausalLM.from_pretrained(
        model, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()

    @torch.no_grad()
    def logprobs(tokens_T: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(tokens_T.astype(np.int64))[None]
        return network(input_ids=ids).logits[0].double().log_softmax(-1).numpy()

    return logprobs


@pytest.fixture(scope="module")
def targets(scorer: VllmScorer, documents: list[RenderedDoc]) -> list[SparseTarget]:
    return scorer.score([WHOLE.request(d.tokens_T, d.spans_T) for d in documents])


def assert_equals(
    target: SparseTarget, request: ScoreRequest, logprobs_TV: np.ndarray, threshold: float = 0.02
) -> None:
    prompt_P = request.positions_P - request.shift
    uniforms_P = position_uniforms(request.content_key, request.positions_P)
    expected = reduce_logprobs(
        logprobs_TV[prompt_P],
        request.prompt_T[prompt_P + 1],
        request.positions_P,
        uniforms_P,
        threshold,
    )
    require_valid(target)
    np.testing.assert_array_equal(target.positions_P, expected.positions_P)
    np.testing.assert_allclose(target.realised_logprob_P, expected.realised_logprob_P, atol=1e-4)
    np.testing.assert_array_equal(target.num_head_P, expected.num_head_P)
    np.testing.assert_allclose(target.entropy_P, expected.entropy_P, atol=1e-3)
    assert heads(target) == heads(expected)
    np.testing.assert_array_equal(target.offsets_P1, expected.offsets_P1)
    assert_draws_fit(target, logprobs_TV[prompt_P], uniforms_P)


def assert_draws_fit(target: SparseTarget, logprobs_PV: np.ndarray, uniforms_P: np.ndarray) -> None:
    """Draw number j holds the point (j + u) t in its interval of the tail's exact cumulative mass, to rounding.

    Logprobs are off by up to 1e-5, so a point may fall on a neighbour of the exact id in a flat tail.
    """
    for row, probs_V in enumerate(np.exp(logprobs_PV)):
        ids = target.ids_E[target.offsets_P1[row] : target.offsets_P1[row + 1]]
        head, draws = np.split(ids, [target.num_head_P[row]])
        tail_V = probs_V.copy()
        tail_V[head] = 0
        ends_V = tail_V.cumsum()
        points = (np.arange(len(draws)) + uniforms_P[row]) * target.threshold
        assert (ends_V[draws] - tail_V[draws] <= points + 2e-5).all()
        assert (points < ends_V[draws] + 2e-5).all()


def heads(target: SparseTarget) -> list[list[int]]:
    starts = target.offsets_P1[:-1]
    ends = starts + target.num_head_P
    return [target.ids_E[a:b].tolist() for a, b in zip(starts, ends, strict=True)]


def test_equals_transformers(documents, targets, reference) -> None:
    for document, target in zip(documents, targets, strict=True):
        request = WHOLE.request(document.tokens_T, document.spans_T)
        assert_equals(target, request, reference(document.tokens_T))


def test_teacher_is_neither_flat_nor_certain(targets: list[SparseTarget]) -> None:
    """Else the other tests would prove little: heads of several sizes, tails that are drawn from."""
    num_head_P = np.concatenate([t.num_head_P for t in targets])
    draws = sum(len(t.ids_E) - t.num_head_P.sum() for t in targets)
    assert set(num_head_P.tolist()) >= {1, 2, 3, 4}
    assert draws > 100


def test_other_batches_give_the_same_targets(scorer, documents, targets) -> None:
    chosen = [7, 0, 3]
    requests = [WHOLE.request(documents[i].tokens_T, documents[i].spans_T) for i in chosen]
    for i, target in zip(chosen, scorer.score(requests), strict=True):
        assert heads(target) == heads(targets[i])
        np.testing.assert_allclose(
            target.realised_logprob_P, targets[i].realised_logprob_P, atol=1e-5
        )


def test_a_repeated_document_is_scored_whole(scorer, documents, targets) -> None:
    """All of the second is in the prefix cache, its scored positions too; so it is computed again."""
    request = WHOLE.request(documents[0].tokens_T, documents[0].spans_T)
    for target in scorer.score([request, request]):
        assert heads(target) == heads(targets[0])
        np.testing.assert_allclose(
            target.realised_logprob_P, targets[0].realised_logprob_P, atol=1e-5
        )


def test_any_positions_of_a_document(scorer, documents, reference) -> None:
    tokens_T = documents[0].tokens_T
    for positions in ([5], [0, 1, 90, 91, 97, len(tokens_T) - 2], []):
        request = ScoreRequest(
            prompt_T=tokens_T,
            positions_P=np.array(positions, np.int32),
            shift=0,
            content_key=content_key(tokens_T),
        )
        target = scorer.score([request])[0]
        if positions:
            assert_equals(target, request, reference(tokens_T))
        else:
            assert len(target.positions_P) == 0 and len(target.ids_E) == 0


@pytest.mark.parametrize(
    "identity", ["You are a careful and patient teacher of many, many children.", "Hi."]
)
def test_a_teacher_with_its_own_system_text(scorer, documents, reference, identity: str) -> None:
    """The prefix is swapped; entry t still scores the document's token t+1, token by token."""
    stored = RenderConfig()
    shown = SystemText(identity=identity, reasoning="low").applied_to(stored)
    prefix = Prefix(Renderer(stored).prefix_T, Renderer(shown).prefix_T, shown.system_text(), "low")
    document = documents[1]
    request = prefix.request(document.tokens_T, document.spans_T)
    text = RenderConfig(identity=identity, reasoning="low").system_text()
    swapped_T = np.concatenate(
        [Renderer(shown).prefix_T, document.tokens_T[len(prefix.stored_T) :]]
    )
    assert text == prefix.system_text
    assert prefix.shift != 0
    logprobs_TV = reference(swapped_T)
    target = scorer.score([request])[0]
    assert_equals(target, request, logprobs_TV)
    for position, logprob in zip(target.positions_P, target.realised_logprob_P, strict=True):
        exact = logprobs_TV[position - prefix.shift, document.tokens_T[position + 1]]
        assert logprob == pytest.approx(exact, abs=1e-4)


def test_two_ranks_equal_transformers(model, documents, reference) -> None:
    """Tensor parallelism 2 inside vLLM: each worker holds half of the vocabulary."""
    requests = [WHOLE.request(d.tokens_T, d.spans_T) for d in documents]
    with VllmScorer(teacher_config(model, "engine.tensor_parallel_size=2"), model) as parallel:
        for request, target in zip(requests, parallel.score(requests), strict=True):
            assert_equals(target, request, reference(request.prompt_T))


def test_preempted_documents_are_scored_whole(model, documents, targets, monkeypatch) -> None:
    """Memory for some 480 tokens and steps of 32 of a document: some are stopped half way and begun again.

    The last test here, as the end of a second engine in one process takes down the groups of the first.
    """
    arguments = vllm_scorer._engine_arguments
    tight = {"num_gpu_blocks_override": 30, "block_size": 16, "long_prefill_token_threshold": 32}
    monkeypatch.setattr(vllm_scorer, "_engine_arguments", lambda *given: arguments(*given) | tight)
    config = teacher_config(model, "engine.max_num_batched_tokens=128", "engine.max_model_len=400")
    preempted = []
    with VllmScorer(config, model) as engine:
        scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request
        monkeypatch.setattr(
            scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), preempt(*a, **k))
        )
        found = engine.score([WHOLE.request(d.tokens_T, d.spans_T) for d in documents])
    assert preempted
    for target, expected in zip(found, targets, strict=True):
        assert heads(target) == heads(expected)
        np.testing.assert_allclose(
            target.realised_logprob_P, expected.realised_logprob_P, atol=1e-5
        )
