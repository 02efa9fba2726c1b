"""The engine in torch: its targets are the reduction of transformers' own distribution, whatever shares a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.torch_teacher import TorchScorer
from common.config import load_config, named_config
from common.tokenizer import VOCAB_SIZE
from datastore.packed import unpack
from datastore.prompt import ScoreRequest
from datastore.target import content_key, position_uniforms, reduce_logprobs
from datastore.teacher import TeacherConfig
from demo.tiny_teacher import Shape, gpt_oss, initialise, one_batch

SHAPE = Shape(hidden=32, heads=2, kv_heads=1, head_dim=16)
LENGTHS = (40, 150, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = gpt_oss(SHAPE, VOCAB_SIZE)
    initialise(model, SHAPE)
    with torch.no_grad():
        model.lm_head.weight *= 3  # some ids above the threshold
    model.save_pretrained(path := tmp_path_factory.mktemp("teacher"))
    return path


def requests() -> list[ScoreRequest]:
    random = np.random.default_rng(0)
    made = []
    for length in LENGTHS:
        tokens_T = random.integers(0, VOCAB_SIZE, length).astype(np.int32)
        positions_P = np.sort(random.choice(length - 1, 4, replace=False)).astype(np.int32)
        key = content_key(tokens_T)
        made.append(
            ScoreRequest(prompt_T=tokens_T, positions_P=positions_P, shift=0, content_key=key)
        )
    empty_P = np.empty(0, np.int32)
    made.append(ScoreRequest(prompt_T=tokens_T, positions_P=empty_P, shift=0, content_key=key))
    return made


@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_targets_are_those_of_the_network(folder: Path, batch_tokens: int) -> None:
    from transformers import AutoModelForCausalLM

    overrides = (f"model={folder}", f"engine.max_num_batched_tokens={batch_tokens}")
    teacher = load_config(TeacherConfig, named_config("teacher", "tiny"), overrides)
    scorer = TorchScorer(teacher, folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    asked = requests()
    for packed_PC, request in zip(scorer.score_packed(asked), asked, strict=True):
        target = unpack(packed_PC, request.positions_P, teacher.threshold)
        if not len(request.positions_P):
            assert len(packed_PC) == 0
            continue
        tokens_T = request.prompt_T.astype(np.int64)
        with torch.no_grad():
            logits_TV = network(input_ids=torch.from_numpy(tokens_T)[None]).logits[0]
        exact = reduce_logprobs(
            logits_TV[request.positions_P].double().log_softmax(-1).numpy(),
            tokens_T[request.positions_P + 1],
            request.positions_P,
            position_uniforms(request.content_key, request.positions_P),
            teacher.threshold,
        )
        assert target.num_head_P.sum() > 0
        np.testing.assert_array_equal(target.num_head_P, exact.num_head_P)
        np.testing.assert_allclose(target.realised_logprob_P, exact.realised_logprob_P, atol=1e-4)
        np.testing.assert_allclose(target.entropy_P, exact.entropy_P, atol=1e-4)
        heads = [
            (ids[:count], weights[:count])
            for t in (target, exact)
            for ids, weights, count in zip(
                np.split(t.ids_E, t.offsets_P1[1:-1]),
                np.split(t.weights_E, t.offsets_P1[1:-1]),
                t.num_head_P,
                strict=True,
            )
        ]
        half = len(heads) // 2
        for (ids, weights), (wanted_ids, wanted) in zip(heads[:half], heads[half:], strict=True):
            np.testing.assert_array_equal(ids, wanted_ids)
            np.testing.assert_allclose(weights, wanted, atol=1e-5)


def test_an_id_that_was_never_seen_takes_the_class_of_the_others() -> None:
    seen_ids = np.array([3, 5, 9])
    tokens_T, spans_T = np.array([5, 9, 4, 11, 3], np.int32), np.array([0, 1, 1, 0, 2], np.uint8)
    tokens_BT, target_BT = one_batch([(tokens_T, spans_T), (tokens_T[:2], spans_T[:2])], seen_ids)
    assert tokens_BT.tolist() == [[1, 2, 3, 3, 0], [1, 2, 0, 0, 0]]
    assert target_BT.tolist() == [[2, 3, -1, 0, -1], [2, -1, -1, -1, -1]]
