"""The sampler against the training path, and what may not change a rollout."""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import ConfigError, EngineError, FormatError
from datastore.harmony_grammar import Verdict
from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.sampling import (
    CLOSING,
    RETURNING,
    forced,
    grammar,
    opd_config,
    prompts,
    student_of,
)
from tests.trainer.megatron.tiny import (
    SEQ_LEN,
    STUDENT,
    VOCAB,
    micro_batches,
    step,
    tiny_config,
    tiny_rows,
)
from trainer.opd.slots import SamplePrompt

# More prompts than slots, shorter and longer than the window of 6, one of a single token, one that fills its row.
LENGTHS = [1, 3, 12, 6, 7, 20, 2, 45, 9, 30]
PLAIN = {"tpa": None, "grape_m": None, "value_residual": None}


def _in_process(_rank: int) -> dict[str, Any]:
    from trainer.megatron.topology import distributed

    config = tiny_config()
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.sampler import Sampler
        from trainer.megatron.step import Trainer

        def fresh(student: dict[str, Any] = STUDENT, **changes: Any) -> Trainer:
            torch.manual_seed(1)
            trainer = Trainer(tiny_config(student=student, **changes), topology, SEQ_LEN)
            student_of(trainer)
            return trainer

        def sampler(trainer: Trainer, **changes: Any) -> Sampler:
            config = opd_config(**changes)
            return Sampler(trainer.student, config, topology, SEQ_LEN, grammar())

        return {
            "against training": {
                "everything on": _against_training(fresh(), sampler),
                "plain": _against_training(fresh(STUDENT | PLAIN), sampler),
                "whole rows": _against_training(fresh(), sampler, caps=(50, 50)),
                "recompute": _against_training(fresh(recompute=True), sampler),
            },
            "bf16": _against_training(fresh(precision="bf16"), sampler),
            "orders": _orders(fresh(), sampler),
            "again": _again(fresh(), sampler),
            "frequencies": _frequencies(fresh(), sampler),
            "purity": _purity(fresh, sampler, "fp32") | _purity(fresh, sampler, "bf16"),
            "errors": _errors(fresh(), sampler),
        }


def _against_training(trainer: Any, sampler: Any, **changes: Any) -> dict[str, Any]:
    asked = prompts(LENGTHS)
    one = sampler(trainer, **changes)
    told: list[int] = []
    samples = one.sample(asked, told.append)
    pairs = list(zip(asked, samples, strict=True))
    return {
        "samples": samples,
        "packed": forced(trainer, pairs, per_row=3),
        "alone": forced(trainer, pairs, per_row=1),
        "report": one.report,
        "told": told,
    }


def _orders(trainer: Any, sampler: Any) -> dict[str, list[Any]]:
    """The same prompts in other company."""
    asked = prompts(LENGTHS)
    backwards = sampler(trainer, slots=4).sample(asked[::-1])[::-1]
    one, coarse = sampler(trainer, slots=2), sampler(trainer, slots=4)
    coarse.row_len, coarse.steps_between_looks = SEQ_LEN, 8
    return {
        "all": sampler(trainer, slots=10).sample(asked),
        "backwards": backwards,
        "one by one": [one.sample([prompt])[0] for prompt in asked],
        "as on cuda": coarse.sample(asked),
        "after others": (one.sample(prompts([11, 13], seed=5)), one.sample(asked))[1],
    }


def _again(trainer: Any, sampler: Any) -> tuple[list[Any], list[Any]]:
    """Fewer prompts than slots, as the first call and after one that has filled them all."""
    one, few = sampler(trainer, slots=6), prompts(LENGTHS[:3])
    first = one.sample(few)
    one.sample(prompts(LENGTHS, seed=5))
    return first, one.sample(few)


def _frequencies(trainer: Any, sampler: Any) -> tuple[np.ndarray, np.ndarray]:
    """First tokens under many keys, and their distribution by the training path."""
    (prompt,) = prompts([9])
    many = [SamplePrompt(tokens_T=prompt.tokens_T, key=key) for key in range(3000)]
    samples = sampler(trainer, slots=500, caps=(1, 1)).sample(many)
    every = [prompt] * VOCAB
    tokens = [type(samples[0])(**_as_sample(token)) for token in range(VOCAB)]
    logprobs = forced(trainer, list(zip(every, tokens, strict=True)), per_row=4)
    counts_V = np.bincount([int(s.tokens_S[0]) for s in samples], minlength=VOCAB)
    return counts_V, np.exp(np.concatenate(logprobs).astype(np.float64))


def _as_sample(token: int) -> dict[str, Any]:
    return {
        "tokens_S": np.array([token], dtype=np.int32),
        "logprobs_S": np.zeros(1, dtype=np.float32),
        "spans_S": np.ones(1, dtype=np.uint8),
        "verdict": Verdict.VALID,
    }


def _purity(fresh: Any, sampler: Any, precision: str) -> dict[str, Any]:
    """Two trainers take the same two steps; one samples before, between and after."""
    batches = micro_batches(tiny_rows(8), 2)
    ends = []
    for samples in (False, True):
        trainer = fresh(precision=precision)
        kept = True
        for _ in range(2):
            if samples:
                before = _state(trainer)
                sampler(trainer, precision=precision).sample(prompts([4, 9, 2, 7]))
                kept = kept and _same(before, _state(trainer))
            step(trainer, batches, 1e-2)
        ends.append(_state(trainer))
    return {f"kept {precision}": kept, f"next step {precision}": _same(*ends)}


def _state(trainer: Any) -> dict[str, torch.Tensor]:
    student = trainer.student
    state = dict(student.named_parameters()) | dict(student.named_buffers())
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    state |= {f"aux {n}": r.aux_loss_sum.clone() for n, r in enumerate(trainer.routers)}
    state["random"] = torch.get_rng_state()
    state["training"] = torch.tensor([module.training for module in student.modules()])
    return state


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n].to(one[n])) for n in one)


def _errors(trainer: Any, sampler: Any) -> dict[str, str]:
    one, found = sampler(trainer), {}
    for name, lengths in {"empty": [3, 0], "too long": [SEQ_LEN - 1]}.items():
        with pytest.raises(FormatError) as caught:
            one.sample(prompts(lengths))
        found[name] = str(caught.value)
    with pytest.raises(ConfigError) as refused:
        sampler(trainer, parallel={"tensor": 2, "expert": 2, "sequence_parallel": True})
    found["tensor"] = str(refused.value)
    with pytest.raises(ConfigError) as no_graph:
        sampler(
            trainer, sampling={"slots": 2, "max_reasoning": 8, "max_final": 8, "cuda_graph": True}
        )
    found["graph"] = str(no_graph.value)
    after_error = one.sample(prompts([3]))[0].tokens_S
    with torch.no_grad():
        trainer.student.output_layer.weight[5] = float("nan")
    with pytest.raises(EngineError) as caught_nan:
        one.sample(prompts([3]))
    return found | {"nan": str(caught_nan.value), "after error": str(len(after_error))}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_gloo(_in_process, 1)[0]


def _worst(samples: list[Any], logprobs: list[np.ndarray]) -> float:
    gaps = [
        np.abs(s.logprobs_S - expected).max() for s, expected in zip(samples, logprobs, strict=True)
    ]
    return float(max(gaps))


@pytest.mark.parametrize("case", ["everything on", "plain", "whole rows", "recompute"])
@pytest.mark.parametrize("rows", ["packed", "alone"])
def test_logprobs_are_those_of_training(seen, case, rows) -> None:
    """fp32; the logits of the tiny student are of size 1, a position deep in a row turns by angles of up to 47."""
    result = seen["against training"][case]
    assert _worst(result["samples"], result[rows]) < 2e-5
    assert max(len(s.tokens_S) for s in result["samples"]) > STUDENT["window"]


def test_bf16_stays_within_its_noise(seen) -> None:
    """The noise: what training's own log-probabilities differ by between packed and lone rows. Single tokens differ by
    up to 1 there, where a rounding chooses another expert; so means are compared.
    """
    result = seen["bf16"]
    sampled, packed, alone = (
        np.concatenate(rows)
        for rows in ([s.logprobs_S for s in result["samples"]], result["packed"], result["alone"])
    )
    noise = np.abs(packed - alone)
    for training in (packed, alone):
        gap = sampled - training
        print(
            "bf16",
            np.abs(gap).mean(),
            np.median(np.abs(gap)),
            noise.mean(),
            np.median(noise),
            gap.mean(),
        )
        assert np.abs(gap).mean() < 1.5 * noise.mean() < 0.1
        assert np.median(np.abs(gap)) < 1.5 * np.median(noise) < 0.02


@pytest.mark.parametrize("company", ["backwards", "one by one", "as on cuda", "after others"])
def test_a_rollout_is_the_same_in_any_company(seen, company) -> None:
    for one, other in zip(seen["orders"]["all"], seen["orders"][company], strict=True):
        assert one.tokens_S.tolist() == other.tokens_S.tolist()
        assert one.spans_S.tolist() == other.spans_S.tolist() and one.verdict == other.verdict
        np.testing.assert_allclose(one.logprobs_S, other.logprobs_S, atol=1e-5, rtol=0)


def test_first_tokens_are_distributed_as_training_says(seen) -> None:
    """Chi-square over the 300 tokens: mean 299, deviation 24.5; 420 is five deviations out."""
    counts_V, probability_V = seen["frequencies"]
    expected_V = counts_V.sum() * probability_V
    assert counts_V.sum() == 3000 and probability_V.sum() == pytest.approx(1, abs=1e-5)
    assert ((counts_V - expected_V) ** 2 / expected_V).sum() < 420


def test_rollouts_end_by_the_grammar_or_are_cut(seen) -> None:
    """Each ends with the first token that ends it, or at a cap of 18 a span, or where its row is full."""
    samples = seen["against training"]["everything on"]["samples"]
    for length, sample in zip(LENGTHS, samples, strict=True):
        tokens = sample.tokens_S.tolist()
        closed = next((n + 1 for n, t in enumerate(tokens) if t in CLOSING), len(tokens))
        assert sample.spans_S.tolist() == [1] * closed + [2] * (len(tokens) - closed)
        ends = [n for n, t in enumerate(tokens) if t in RETURNING]
        assert ends in ([], [len(tokens) - 1])
        if ends:
            valid = closed < len(tokens)
            assert sample.verdict == (Verdict.VALID if valid else Verdict.EARLY_RETURN)
        else:
            full = length + len(tokens) + 1 == SEQ_LEN
            assert full or 18 in (closed, len(tokens) - closed)
            in_reasoning = tokens[-1] not in CLOSING and closed == len(tokens)
            assert sample.verdict == (Verdict.CUT_REASONING if in_reasoning else Verdict.CUT_FINAL)


def test_a_free_slot_is_filled_at_once(seen) -> None:
    """Steps are those of a queue before three counters, each taken by the next as soon as it is free."""
    result = seen["against training"]["everything on"]
    free_at = [0, 0, 0]
    for sample in result["samples"]:
        heapq.heapreplace(free_at, free_at[0] + len(sample.tokens_S))
    report, tokens = result["report"], sum(len(s.tokens_S) for s in result["samples"])
    assert report.steps == max(free_at) and report.tokens == tokens == result["told"][-1]
    assert result["told"] == sorted(result["told"])
    assert report.occupied == pytest.approx(tokens / (3 * report.steps))
    assert report.prefill_sec > 0 and report.decode_sec > 0


def test_a_call_repeats_bit_by_bit_whatever_was_sampled_before(seen) -> None:
    """A run that goes on after a stop has sampled less before: slots without a rollout must not remember it."""
    for first, again in zip(*seen["again"], strict=True):
        assert np.array_equal(first.tokens_S, again.tokens_S)
        assert np.array_equal(first.logprobs_S, again.logprobs_S)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sampling_leaves_no_trace(seen, precision) -> None:
    """Parameters, buffers, balance losses, modes and generators, bit by bit; and the steps around it."""
    assert seen["purity"][f"kept {precision}"]
    assert seen["purity"][f"next step {precision}"]


def test_what_cannot_be_sampled_is_refused(seen) -> None:
    errors = seen["errors"]
    assert "prompt 1 " in errors["empty"] and "got 0 tokens" in errors["empty"]
    assert (
        "prompt 0 " in errors["too long"] and "got 47 tokens; expected 1..46" in errors["too long"]
    )
    assert "parallel.tensor=2" in errors["tensor"] and "parallel.expert" in errors["tensor"]
    assert "expert_compute: loop" in errors["graph"]
    assert "sample 0 are not finite" in errors["nan"]
    assert int(errors["after error"]) > 0


def _on_two(rank: int) -> list[list[list[int]]]:
    """The rollouts of this rank, with the experts whole and spread over both ranks."""
    return [_spread(rank, expert) for expert in (1, 2)]


def _spread(rank: int, expert: int) -> list[list[int]]:
    from trainer.megatron.topology import distributed

    parallel = {"expert": expert}
    config = tiny_config(parallel=parallel)
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.sampler import Sampler
        from trainer.megatron.student import build_student

        torch.manual_seed(1)
        student = build_student(config.student, config, config.parallel, SEQ_LEN)
        opd = opd_config(parallel=parallel, caps=(6, 6))
        sampler = Sampler(student, opd, topology, SEQ_LEN, grammar())
        found = []
        for lengths in (LENGTHS[:5], LENGTHS[2:3], []):
            # The first rank has most of the prompts, the second one or none.
            asked = prompts(lengths)
            own = asked[4:] if rank else asked[:4]
            found += [sample.tokens_S.tolist() for sample in sampler.sample(own)]
        return found


def test_expert_parallelism_changes_no_token() -> None:
    found = run_gloo(_on_two, 2)
    for whole, spread in found:
        assert whole == spread
    assert [len(whole) for whole, _ in found] == [5, 1]
