"""The canary against made-up teachers: agreement passes, garbage is refused, figures equal plain loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from common.config import load_config, named_config
from common.errors import ConfigError, EngineError, FormatError
from common.files import write_json
from datastore.canary import (
    CanaryDocument,
    CanaryReference,
    canary_path,
    compare,
    measure_self_noise,
    read_canary,
    require_canary,
    write_canary,
)
from datastore.canary_reference import write_reference
from datastore.cli import main
from datastore.prompt import ScoreRequest
from datastore.target import content_key, position_uniforms, reduce_logprobs
from datastore.teacher import TeacherConfig, weights_identity
from datastore.types import SparseTarget
from demo.tiny_teacher import train_tiny_teacher

VOCAB, LENGTH, DOCUMENTS, THRESHOLD = 300, 61, 4, 0.02
SEQ_LEN = 512
Alter = Callable[[np.ndarray], np.ndarray]


def logits_of(tokens_T: np.ndarray) -> np.ndarray:
    """Made-up logits [T, V] that follow the tokens, peaked as a teacher's are."""
    rng = np.random.default_rng(content_key(tokens_T))
    logits_TV = rng.normal(0, 3, (len(tokens_T), VOCAB))
    logits_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]] += 4
    return logits_TV


def logprobs_of(logits_TV: np.ndarray) -> np.ndarray:
    return logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))


class MadeUpEngine:
    """Scores requests with the made-up logits, altered as a broken engine would; `alter` also sees the batch size."""

    def __init__(self, alter: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self.alter = alter

    def score(self, requests: list[ScoreRequest]) -> list[SparseTarget]:
        return [self._score(request, len(requests)) for request in requests]

    def _score(self, request: ScoreRequest, batch: int) -> SparseTarget:
        tokens_T, positions_P = request.prompt_T, request.positions_P
        logprobs_TV = logprobs_of(self.alter(logits_of(tokens_T), batch))
        uniforms_P = position_uniforms(request.content_key, positions_P)
        realised_P = tokens_T[positions_P + 1]
        return reduce_logprobs(
            logprobs_TV[positions_P], realised_P, positions_P, uniforms_P, THRESHOLD
        )


def engine(alter: Alter = lambda logits_TV: logits_TV) -> MadeUpEngine:
    return MadeUpEngine(lambda logits_TV, _: alter(logits_TV))


def reference_document(tokens_T: np.ndarray) -> CanaryDocument:
    positions = tuple(range(10, len(tokens_T) - 1))
    rows = [logprobs_of(logits_of(tokens_T))[position] for position in positions]
    return CanaryDocument(
        tokens=tuple(tokens_T.tolist()),
        positions=positions,
        realised_logprobs=tuple(
            float(row[tokens_T[p + 1]]) for row, p in zip(rows, positions, strict=True)
        ),
        top_ids=tuple(int(row.argmax()) for row in rows),
        top_logprobs=tuple(float(row.max()) for row in rows),
        entropies=tuple(float(-(np.exp(row) * row).sum()) for row in rows),
    )


@pytest.fixture(scope="module")
def documents() -> list[CanaryDocument]:
    rng = np.random.default_rng(0)
    return [
        reference_document(rng.integers(0, VOCAB, LENGTH).astype(np.int32))
        for _ in range(DOCUMENTS)
    ]


@pytest.fixture
def model(tmp_path: Path, documents: list[CanaryDocument]) -> Path:
    """A model folder as far as its identity goes, with the canary in it."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_json(folder / "config.json", {"hidden_size": 8})
    (folder / "model-00001.safetensors").write_bytes(b"weights")
    reference = CanaryReference(
        teacher="tiny",
        weights=weights_identity(teacher(folder), folder),
        made_by={"program": "a test"},
        documents=tuple(documents),
    )
    write_canary(canary_path(teacher(folder), folder), reference)
    return folder


def teacher(model: Path, *overrides: str) -> TeacherConfig:
    path = named_config("teacher", "tiny")
    return load_config(TeacherConfig, path, (f"model={model}", *overrides))


def on_gpu(model: Path) -> TeacherConfig:
    """The same teacher with a bfloat16 body."""
    return teacher(
        model,
        "dtype=bfloat16",
        "engine.device=cuda",
        "engine.gpu_memory_utilization=0.5",
        "engine.kv_cache_gib=null",
    )


def test_an_engine_that_agrees_is_let_in(model: Path) -> None:
    figures = require_canary(engine(), teacher(model), model)
    assert figures["documents"] == DOCUMENTS
    assert figures["positions"] == DOCUMENTS * (LENGTH - 11)
    assert figures["max_realised"] < 1e-6
    assert figures["top1"] == 0
    assert figures["made_by"] == {"program": "a test"}


@pytest.mark.parametrize(
    "alter",
    [
        pytest.param(lambda x: np.roll(x, 1, axis=0), id="one position late"),
        pytest.param(lambda x: np.roll(x, 1, axis=1), id="other ids"),
        pytest.param(lambda x: x / 0.8, id="temperature"),
        pytest.param(lambda x: np.zeros_like(x), id="uniform"),
        pytest.param(lambda x: np.where(x > 6, -x, x), id="lost peaks"),
    ],
)
def test_an_engine_that_computes_something_else_is_refused(model: Path, alter: Alter) -> None:
    for config in (teacher(model), on_gpu(model)):
        with pytest.raises(EngineError, match=r"mean_realised .*limit.*moe_backend"):
            require_canary(engine(alter), config, model)


def test_noise_of_bfloat16_is_let_in_where_bfloat16_was_asked_for(model: Path) -> None:
    """0.02 nats in the mean, as two bfloat16 bodies differ."""
    rng = np.random.default_rng(1)
    noisy = engine(lambda x: x + rng.normal(0, 0.03, x.shape))
    figures = require_canary(noisy, on_gpu(model), model)
    assert 0.015 < figures["mean_realised"] < 0.03
    with pytest.raises(EngineError, match="noise of float32"):
        require_canary(noisy, teacher(model), model)


def test_the_figures_are_those_of_a_plain_loop(documents: list[CanaryDocument], tmp_path) -> None:
    reference = CanaryReference(teacher="tiny", weights={}, made_by={}, documents=tuple(documents))
    rng = np.random.default_rng(2)
    noise = {d.tokens: rng.normal(0, 0.5, (LENGTH, VOCAB)) for d in documents}
    noisy = engine()
    realised, entropy, other, judged = [], [], 0, 0
    targets = []
    for document in documents:
        noisy = engine(lambda x, n=noise[document.tokens]: x + n)
        targets += noisy.score([document.request()])
        tokens_T = np.array(document.tokens, np.int32)
        exact_TV = logprobs_of(logits_of(tokens_T))
        found_TV = logprobs_of(logits_of(tokens_T) + noise[document.tokens])
        for t in document.positions:
            token = document.tokens[t + 1]
            realised.append(abs(exact_TV[t, token] - found_TV[t, token]))
            entropies = [-(np.exp(row) * row).sum() for row in (exact_TV[t], found_TV[t])]
            entropy.append(abs(entropies[0] - entropies[1]))
            if math.exp(exact_TV[t].max()) >= 2 * THRESHOLD:
                judged += 1
                other += exact_TV[t].argmax() != found_TV[t].argmax()
    figures = compare(reference, targets, teacher(tmp_path))
    assert 0 < other < judged < len(realised) + 1
    assert figures["mean_realised"] == pytest.approx(np.mean(realised), rel=1e-5)
    assert figures["max_realised"] == pytest.approx(np.max(realised), rel=1e-5)
    assert figures["mean_entropy"] == pytest.approx(np.mean(entropy), rel=1e-5)
    assert figures["top1"] == pytest.approx(other / judged)
    assert figures["top1_positions"] == judged


def test_a_reference_of_other_weights_is_refused(model: Path) -> None:
    (model / "model-00001.safetensors").write_bytes(b"other weights")
    with pytest.raises(EngineError, match=r"other weights.*model-00001\.safetensors"):
        require_canary(engine(), teacher(model), model)
    write_json(model / "config.json", {"hidden_size": 16})
    with pytest.raises(EngineError, match=r"another config\.json"):
        require_canary(engine(), teacher(model), model)


def test_a_teacher_without_a_reference_is_refused_with_the_command(model: Path) -> None:
    (model / "canary.json").unlink()
    with pytest.raises(EngineError, match="vpmoe-data canary DATASET --teacher tiny --write"):
        require_canary(engine(), teacher(model), model)
    hub = teacher(model, "model=some/teacher", f"revision={'a' * 40}")
    with pytest.raises(EngineError, match="canary=PATH"):
        require_canary(engine(), hub, model)


def test_the_command_refuses_before_an_engine_starts(model: Path) -> None:
    (model / "canary.json").unlink()
    result = CliRunner().invoke(main, ["canary", "--teacher", "tiny", f"model={model}"])
    assert result.exit_code == 1
    assert "has no canary" in result.output


def test_random_weights_have_no_canary(model: Path) -> None:
    (model / "canary.json").unlink()
    dummy = teacher(model, "engine.load_format=dummy")
    assert require_canary(engine(), dummy, model) == {"skipped": "random weights"}


def test_a_damaged_reference_is_refused(model: Path) -> None:
    path = model / "canary.json"
    content = path.read_bytes()
    for damaged in (content[:-1], content.replace(b'"top_ids":[', b'"top_ids":[7,', 1), b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"canary\.json"):
            require_canary(engine(), teacher(model), model)
    path.write_bytes(content)
    assert canonical(read_canary(path)) == canonical(json.loads(content))


def canonical(reference: CanaryReference | dict) -> dict:
    return reference if isinstance(reference, dict) else reference.resolved()


def test_too_few_positions_prove_nothing(documents: list[CanaryDocument]) -> None:
    with pytest.raises(ValueError, match="at least 100"):
        CanaryReference(teacher="tiny", weights={}, made_by={}, documents=tuple(documents[:1]))


def test_an_engine_that_repeats_itself_has_no_noise(documents: list[CanaryDocument]) -> None:
    noise = measure_self_noise(engine(), [d.request() for d in documents])
    assert noise["positions"] == DOCUMENTS * (LENGTH - 11)
    for figure in ("mean_realised", "max_realised", "other_heads", "other_draws", "mean_kl"):
        assert noise[figure] == 0


def test_self_noise_is_that_of_a_plain_loop(documents: list[CanaryDocument]) -> None:
    """An engine whose logits depend on the batch: scaled by 0.2 % when it scores a document alone."""

    def alter(logits_TV: np.ndarray, batch: int) -> np.ndarray:
        return logits_TV * (1.002 if batch == 1 else 1.0)

    noise = measure_self_noise(MadeUpEngine(alter), [d.request() for d in documents])
    realised, kl, other, other_draws = [], 0.0, 0, 0
    for document in documents:
        tokens_T = np.array(document.tokens, np.int32)
        logits_TV = logits_of(tokens_T)
        targets = [
            MadeUpEngine(lambda x, _, b=b: alter(x, b)).score([document.request()])[0]
            for b in (DOCUMENTS, 1)
        ]
        p_TV, q_TV = (np.exp(logprobs_of(alter(logits_TV, batch))) for batch in (DOCUMENTS, 1))
        for entry, t in enumerate(document.positions):
            other_draws += draws(targets[0], entry) != draws(targets[1], entry)
            token = tokens_T[t + 1]
            realised.append(abs(math.log(p_TV[t, token] / q_TV[t, token])))
            heads = [set(np.flatnonzero(row >= THRESHOLD).tolist()) for row in (p_TV[t], q_TV[t])]
            other += heads[0] != heads[1]
            both = sorted(heads[0] & heads[1])
            p, q = p_TV[t, both], q_TV[t, both]
            kl += (p * np.log(p / q)).sum()
            kl += (1 - p.sum()) * math.log((1 - p.sum()) / (1 - q.sum()))
    assert other > 0
    assert noise["mean_realised"] == pytest.approx(np.mean(realised), rel=1e-4)
    assert noise["max_realised"] == pytest.approx(np.max(realised), rel=1e-4)
    assert noise["other_heads"] == pytest.approx(other / len(realised))
    assert noise["mean_kl"] == pytest.approx(kl / len(realised), rel=1e-3)
    assert noise["other_draws"] == pytest.approx(other_draws / len(realised))


def draws(target: SparseTarget, entry: int) -> list[int]:
    start, end = target.offsets_P1[entry : entry + 2].tolist()
    return target.ids_E[start + int(target.num_head_P[entry]) : end].tolist()


@pytest.mark.slow
def test_vllm_gives_the_reference_values_of_transformers(tmp_path: Path, handmade) -> None:
    """The tiny teacher writes its canary when it is made, the command another; its engine passes both."""
    from datastore.vllm_scorer import VllmScorer

    documents = [handmade.document(i) for i in range(16)]
    pairs = [(d.tokens_T, d.spans_T) for d in documents]
    folder = train_tiny_teacher(tmp_path / "tiny", pairs, seed=3, steps=40, source="test")
    rows = [handmade.pack(documents[i : i + 2], SEQ_LEN) for i in range(0, 16, 2)]
    dataset = tmp_path / "dataset"
    handmade.write_dataset(dataset, {"train": [rows[:4]], "valid": [rows[4:]]}, seq_len=SEQ_LEN)
    own, other = teacher(folder), teacher(folder, f"canary={tmp_path / 'other.json'}")
    assert write_reference(dataset, other, 6) == tmp_path / "other.json"
    with pytest.raises(ConfigError, match="8 rows"):
        write_reference(dataset, other, 9)
    with VllmScorer(own, folder) as scorer:
        figures = require_canary(scorer, own, folder)
        assert require_canary(scorer, other, folder)["documents"] == 6
        noise = measure_self_noise(
            scorer, [d.request() for d in read_canary(folder / "canary.json").documents]
        )
    assert figures["positions"] >= 400
    assert figures["made_by"]["program"] == "transformers"
    assert noise["mean_realised"] < 1e-4
