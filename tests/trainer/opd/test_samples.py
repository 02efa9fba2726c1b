"""Rollouts as text: what a record says, and that each stays one line that parses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.tokenizer import VOCAB_SIZE, encoding
from datastore.rollout import Rollout, ScoredTokens
from datastore.types import SPAN_FINAL, SPAN_REASONING
from tests.datastore.conftest import document
from trainer.opd.samples import PROMPT_CHARS, SampleLog, json_line, sample_markdown, sample_record
from trainer.run import RunLog


def rollout_of(tokens_T: np.ndarray, spans_T: np.ndarray, verdict: str = "valid") -> Rollout:
    return Rollout(
        prompt=12,
        sample=1,
        doc_id=bytes(range(16)),
        language="en",
        exercise="",
        tokens_T=tokens_T,
        spans_T=spans_T,
        logprobs_S=np.full(int((spans_T != 0).sum()), -2.0, np.float32),
        policy_version=41,
        reasoning="low",
        verdict=verdict,
    )


def whole() -> Rollout:
    """A document of the renderer, without the <|endoftext|> that closes its row."""
    made = document(7)
    return rollout_of(made.tokens_T[:-1], made.spans_T[:-1])


def scored(rollout: Rollout, reasoning: float = -1.0, final: float = -4.0) -> ScoredTokens:
    spans_S = rollout.spans_T[rollout.spans_T != 0]
    return ScoredTokens(
        sampling_logprob_S=rollout.logprobs_S,
        teacher_logprob_S=np.where(spans_S == SPAN_REASONING, reasoning, final).astype(np.float32),
    )


def test_a_record_tells_the_rollout() -> None:
    rollout = whole()
    record = sample_record(50, rollout, scored(rollout))
    assert record["text"]["reasoning"] == (
        "<|start|>assistant<|channel|>analysis<|message|>7 + 1 is 8.<|end|>"
    )
    assert record["text"]["final"] == (
        "<|start|>assistant<|channel|>final<|message|>It is 8. 日本語 שלום<|return|>"
    )
    assert record["text"]["prompt"].endswith("<|start|>user<|message|>What is 7 + 1? 🙂<|end|>")
    assert record["advantage"] == {"reasoning": 1.0, "final": -2.0}
    assert sum(record["tokens"].values()) == len(rollout.tokens_T)
    assert record["tokens"]["final"] == int((rollout.spans_T == SPAN_FINAL).sum())
    facts = {key: record[key] for key in ("step", "policy_version", "mode", "verdict", "doc_id")}
    assert facts == {
        "step": 50,
        "policy_version": 41,
        "mode": "low",
        "verdict": "valid",
        "doc_id": "000102030405060708090a0b0c0d0e0f",
    }


def test_a_rollout_that_was_cut_inside_a_character_shows_it() -> None:
    tokens = encoding().encode_ordinary("ab 𒀀")
    part = np.array([1000, *tokens[:-1]], np.int32)
    spans = np.array([0] + [SPAN_REASONING] * (len(tokens) - 1), np.uint8)
    rollout = rollout_of(part, spans, "cut_reasoning")
    record = sample_record(1, rollout, scored(rollout))
    assert record["text"]["reasoning"].startswith("ab") and "\ufffd" in record["text"]["reasoning"]
    assert record["text"]["final"] == "" and record["advantage"]["final"] is None
    assert "final 0 tokens\n" in sample_markdown(record)


def test_the_prompt_is_shown_by_its_end() -> None:
    long = np.array(encoding().encode_ordinary("word " * 1000 + "the end"), np.int32)
    rollout = rollout_of(np.append(long, 1000), np.append(np.zeros(len(long), np.uint8), 1))
    text = sample_record(1, rollout, scored(rollout))["text"]["prompt"]
    assert len(text) == PROMPT_CHARS and text.endswith("word the end")


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30))
def test_any_tokens_make_one_safe_line(tokens: list[int]) -> None:
    spans = np.array([0] + [SPAN_FINAL] * (len(tokens) - 1), np.uint8)
    rollout = rollout_of(np.array(tokens, np.int32), spans)
    record = sample_record(1, rollout, scored(rollout))
    line = json_line(record)
    assert line.splitlines() == [line[:-1]]
    assert json.loads(line) == record
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in line[:-1])


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x9b31m", "\n", "\x1b[2J"])
def test_separators_stay_inside_a_line(separator: str) -> None:
    tokens = encoding().encode_ordinary(f"a{separator}b")
    rollout = rollout_of(np.array([1, *tokens], np.int32), np.array([0] + [1] * len(tokens)))
    record = sample_record(1, rollout, scored(rollout))
    line = json_line(record)
    assert record["text"]["reasoning"] == f"a{separator}b" == json.loads(line)["text"]["reasoning"]
    assert separator not in line[:-1] and line.splitlines() == [line[:-1]]


def write(folder: Path, resumed_step: int, steps: range) -> None:
    log = RunLog(folder, 0, resumed_step=resumed_step)
    samples = SampleLog(folder, log, resumed_step=resumed_step)
    rollout = whole()
    for step in steps:
        samples.write(step, [(rollout, scored(rollout))] * 2)
    log.close()


def test_a_resumed_run_has_no_record_twice(tmp_path) -> None:
    write(tmp_path, 0, range(1, 7))
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write('{"step": 7, "text": "日'.encode()[:-1])
    write(tmp_path, 4, range(5, 7))
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [n for n in range(1, 7) for _ in "ab"]


def test_tensorboard_has_the_texts(tmp_path) -> None:
    write(tmp_path, 0, range(1, 3))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (name, other) = sorted(events.Tags()["tensors"])
    assert name.startswith("rollout/0") and other.startswith("rollout/1")
    shown = events.Tensors(name)[-1]
    assert shown.step == 2
    text = shown.tensor_proto.string_val[0].decode()
    assert (
        "**valid** | effort low | prompt 12 sample 1" in text and "teacher - student +1.000" in text
    )
    assert "\n    <|start|>assistant<|channel|>final<|message|>It is 8." in text
