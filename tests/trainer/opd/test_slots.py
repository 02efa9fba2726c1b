"""Where rollouts end: the grammar, the caps of spans, the room of the document. Logits that leave no choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common import tokenizer
from datastore import harmony_grammar
from datastore.harmony_grammar import Verdict
from tests.trainer.megatron.sampling import CLOSING, RETURNING, grammar
from tests.trainer.megatron.tiny import VOCAB
from trainer.opd.slots import HARMONY, Grammar, SamplePrompt, Slots

TOY = grammar()
TEXT, CLOSE, RETURN = 100, CLOSING[3], RETURNING[2]
PROMPT = SamplePrompt(tokens_T=np.array([5, 6, 7], dtype=np.int32), key=2**64 - 1)


def _sample(
    streams: list[list[int]], caps: tuple[int, int], limit: int = 40, tables: Grammar = TOY
) -> list:
    """Rollouts in all but the first of the slots that are offered these streams, one token a step."""
    slots = Slots(
        tables, len(streams) + 1, 40, dict(zip((1, 2), caps, strict=True)), torch.device("cpu")
    )
    places = range(1, len(streams) + 1)
    slots.occupy([(place, PROMPT) for place in places], [limit] * len(streams))
    for step in range(max(map(len, streams))):
        logits_BV = torch.full((len(streams) + 1, len(tables.token_class_V)), float("-inf"))
        logits_BV[0, 0] = 0
        for place, stream in zip(places, streams, strict=True):
            logits_BV[place, stream[min(step, len(stream) - 1)]] = 0
        slots.advance(logits_BV)
    assert not slots.active_B.any()
    samples = slots.read(list(places))
    assert int(slots.taken) == sum(len(sample.tokens_S) for sample in samples)
    return samples


@pytest.mark.parametrize(
    ("stream", "caps", "length", "verdict"),
    [
        ([TEXT, TEXT, CLOSE, TEXT, RETURN], (9, 9), 5, Verdict.VALID),
        ([TEXT, RETURN], (9, 9), 2, Verdict.EARLY_RETURN),
        ([TEXT] * 9, (4, 9), 4, Verdict.CUT_REASONING),
        # The reasoning is closed by the last token of its cap.
        ([TEXT, TEXT, TEXT, CLOSE, TEXT, RETURN], (4, 9), 6, Verdict.VALID),
        ([TEXT, TEXT, TEXT, TEXT, CLOSE], (4, 9), 4, Verdict.CUT_REASONING),
        ([CLOSE] + [TEXT] * 9, (4, 3), 4, Verdict.CUT_FINAL),
        ([CLOSE, TEXT, TEXT, RETURN], (4, 3), 4, Verdict.VALID),
    ],
)
def test_a_rollout_ends_where_it_should(stream, caps, length, verdict) -> None:
    other = [TEXT, CLOSE, TEXT, RETURN]
    first, second = _sample([stream, other], caps)
    assert first.tokens_S.tolist() == stream[:length] and first.verdict == verdict
    assert second.tokens_S.tolist() == other and second.verdict == Verdict.VALID
    closed = stream.index(CLOSE) + 1 if CLOSE in stream[:length] else length
    assert first.spans_S.tolist() == [1] * closed + [2] * (length - closed)
    assert first.logprobs_S.tolist() == [0.0] * length
    assert (first.tokens_S.dtype, first.spans_S.dtype) == (np.int32, np.uint8)


@pytest.mark.parametrize(
    ("stream", "limit", "verdict"),
    [
        ([TEXT] * 9, 5, Verdict.CUT_REASONING),
        ([TEXT, CLOSE, TEXT, TEXT, TEXT], 4, Verdict.CUT_FINAL),
        ([TEXT, CLOSE, TEXT, RETURN], 4, Verdict.VALID),
    ],
)
def test_a_full_document_cuts(stream, limit, verdict) -> None:
    (sample,) = _sample([stream], (20, 20), limit)
    assert sample.tokens_S.tolist() == stream[:limit] and sample.verdict == verdict


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_harmony_decides_by_default(cut) -> None:
    """The tables advanced token by token say what the grammar says of the whole stream."""
    header = [tokenizer.START, 173_781, tokenizer.CHANNEL]
    stream = [*header, 35_644, tokenizer.MESSAGE, 5, 6, tokenizer.END]
    stream += [*header, 17_196, tokenizer.MESSAGE, 7, tokenizer.RETURN]
    stream = stream[: len(stream) - cut] + [tokenizer.CALL] * (cut == 3)
    (sample,) = _sample([stream], (20, 20), limit=len(stream), tables=HARMONY)
    assert sample.tokens_S.tolist() == stream
    assert sample.verdict == harmony_grammar.verdict(np.array(stream))
    assert sample.spans_S.tolist() == harmony_grammar.spans(np.array(stream)).tolist()


def test_the_next_token_goes_in_behind_the_last() -> None:
    slots = Slots(grammar(), 2, 40, {1: 9, 2: 9}, torch.device("cpu"))
    slots.occupy([(1, PROMPT)], [40])
    assert (int(slots.token_B[1]), int(slots.position_B[1])) == (7, 2)
    logits_BV = torch.full((2, VOCAB), float("-inf"))
    logits_BV[:, TEXT] = 0
    slots.advance(logits_BV)
    assert (int(slots.token_B[1]), int(slots.position_B[1])) == (TEXT, 3)
    assert slots.token_B[0] == 0 and slots.position_B[0] == 0 and slots.length_B[0] == 0


def test_the_default_grammar_says_the_span_of_the_next_token() -> None:
    """Caps rest on it: whatever the class, a token after state s has span next_span_S[s]."""
    for state in np.flatnonzero(~HARMONY.ended_S):
        following = HARMONY.span_S[HARMONY.next_state_SC[state]]
        assert (following == HARMONY.next_span_S[state]).all()
