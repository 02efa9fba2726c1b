"""Measures of rollouts against plain loops over single tokens."""

from __future__ import annotations

import dataclasses
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.tokenizer import END, MESSAGE, RETURN
from datastore.rollout import Rollout, ScoredTokens
from tests.datastore.rollout_cases import rollout, shard_of
from trainer.opd.measures import reverse_kl_values, rollout_values

SHARDS = st.lists(
    st.builds(
        rollout,
        st.integers(0, 30),
        sample=st.integers(0, 3),
        keep=st.one_of(st.none(), st.integers(1, 28)),
        break_at=st.one_of(st.none(), st.integers(0, 20)),
    ),
    min_size=1,
    max_size=9,
)


def scored(one: Rollout, seed: int = 0) -> ScoredTokens:
    rng = np.random.default_rng([seed, one.prompt, one.sample])
    teacher_S = -rng.exponential(1.5, len(one.logprobs_S)).astype(np.float32)
    return ScoredTokens(sampling_logprob_S=one.logprobs_S, teacher_logprob_S=teacher_S)


@given(SHARDS)
def test_shares_and_lengths_are_those_of_a_count_by_hand(rollouts: list[Rollout]) -> None:
    values = rollout_values(rollouts, "here")
    wanted = {"here/valid": statistics.mean(one.verdict == "valid" for one in rollouts)}
    for verdict in {one.verdict for one in rollouts}:
        wanted[f"here/verdict/{verdict}"] = statistics.mean(r.verdict == verdict for r in rollouts)
    for mode in {one.reasoning for one in rollouts}:
        of_mode = [one for one in rollouts if one.reasoning == mode]
        wanted[f"here/mode/{mode}"] = len(of_mode)
        wanted[f"here/length/{mode}"] = statistics.mean(
            sum(span != 0 for span in one.spans_T.tolist()) for one in of_mode
        )
    for number, name in ((1, "reasoning"), (2, "final")):
        wanted[f"here/length/{name}"] = statistics.mean(
            one.spans_T.tolist().count(number) for one in rollouts
        )
    assert values == pytest.approx(wanted)
    shares = [value for name, value in values.items() if "/verdict/" in name]
    assert sum(shares) == pytest.approx(1)


@given(SHARDS)
def test_the_reverse_kl_is_the_mean_gap_of_the_tokens_of_a_class(rollouts: list[Rollout]) -> None:
    pairs = [(one, scored(one)) for one in rollouts]
    gaps: dict[str, list[float]] = {}
    for one, both in pairs:
        sampled = zip(one.tokens_T.tolist(), one.spans_T.tolist(), strict=True)
        logprobs = zip(
            both.sampling_logprob_S.tolist(), both.teacher_logprob_S.tolist(), strict=True
        )
        of_span = [(token, span) for token, span in sampled if span]
        for (token, span), (student, teacher) in zip(of_span, logprobs, strict=True):
            classes = ["total", {1: "reasoning", 2: "final"}[span]]
            classes += ["control"] * (199_998 <= token < 201_088)
            for name in classes:
                gaps.setdefault(name, []).append(student - teacher)
    values = reverse_kl_values(pairs, "here")
    found = {
        name.rpartition("/")[2]: value
        for name, value in values.items()
        if name.startswith("here/reverse_kl/")
    }
    assert found == pytest.approx({name: math.fsum(gap) / len(gap) for name, gap in gaps.items()})
    gap = values["here/student_logprob/total"] - values["here/teacher_logprob/total"]
    assert gap == pytest.approx(found["total"])


def test_where_both_agree_it_is_zero_and_a_class_without_tokens_has_no_value() -> None:
    cut = rollout(1, keep=9)
    equal = ScoredTokens(sampling_logprob_S=cut.logprobs_S, teacher_logprob_S=cut.logprobs_S)
    values = reverse_kl_values([(cut, equal)], "eval")
    assert values["eval/reverse_kl/total"] == values["eval/reverse_kl/reasoning"] == 0
    assert "eval/reverse_kl/final" not in values


def test_the_estimate_is_the_exact_reverse_kl_in_the_mean() -> None:
    """Tokens drawn from a known student, scored by a known teacher, against the sum over the vocabulary."""
    rng = np.random.default_rng(0)
    ids = np.array([17, 400, 9000, MESSAGE, END, RETURN], np.int32)
    student_V, teacher_V = (rng.dirichlet(np.ones(len(ids))) for _ in range(2))
    exact = sum(p * math.log(p / q) for p, q in zip(student_V, teacher_V, strict=True))
    drawn = rng.choice(len(ids), 40_000, p=student_V)
    base = shard_of(0)[0]
    one = dataclasses.replace(
        base,
        tokens_T=np.concatenate([ids[:1], ids[drawn]]),
        spans_T=np.concatenate([np.zeros(1, np.uint8), np.full(len(drawn), 1, np.uint8)]),
        logprobs_S=np.log(student_V[drawn]).astype(np.float32),
    )
    both = ScoredTokens(
        sampling_logprob_S=one.logprobs_S,
        teacher_logprob_S=np.log(teacher_V[drawn]).astype(np.float32),
    )
    deviation = float(np.std(np.log(student_V / teacher_V)[drawn])) / math.sqrt(len(drawn))
    found = reverse_kl_values([(one, both)], "x")["x/reverse_kl/total"]
    assert abs(found - exact) < 5 * deviation
