"""The automaton against the renderer, the parser of whole documents, and streams written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import tokenizer
from common.errors import FormatError
from datastore import harmony_grammar as grammar
from datastore.harmony import RenderConfig, Renderer, parse
from datastore.harmony_grammar import START, TOKEN_IDS, TokenClass, Verdict
from datastore.types import SPAN_FINAL, SPAN_REASONING

NAMES = {
    TokenClass.ASSISTANT: ["assistant"],
    TokenClass.OTHER_ROLE: ["system", "developer", "user"],
    TokenClass.ANALYSIS: ["analysis"],
    TokenClass.FINAL: ["final"],
}
HEADER = "<|start|>assistant<|channel|>"
ANALYSIS, FINAL = HEADER + "analysis<|message|>", HEADER + "final<|message|>"
REASONED = ANALYSIS + "Two.<|end|>"
VALID = REASONED + FINAL + "It is 2.<|return|>"


def ids(text: str) -> np.ndarray:
    """Tokens of a text in which control tokens are meant as such."""
    return np.array(tokenizer.encoding().encode(text, allowed_special="all"), dtype=np.int32)


def prompt_of(document) -> int:
    """Where the sampled part of a rendered document begins."""
    return int(np.flatnonzero(document.spans_T)[0])


def test_the_names_are_the_tokens_of_the_tokenizer():
    encode = tokenizer.encoding().encode_ordinary
    for token_class, names in NAMES.items():
        assert [encode(name) for name in names] == [[i] for i in TOKEN_IDS[token_class]]
    assert [encode("commentary")] == [[*TOKEN_IDS[TokenClass.COMMENT], *TOKEN_IDS[TokenClass.ARY]]]
    named = {token for ids in TOKEN_IDS.values() for token in ids}
    assert sum(map(len, TOKEN_IDS.values())) == len(named)
    classes_V = grammar.token_class_V
    assert classes_V.shape == (tokenizer.VOCAB_SIZE,)
    others = set(range(tokenizer.FIRST_CONTROL_ID, tokenizer.VOCAB_SIZE)) - named
    assert others == set(np.flatnonzero(classes_V == TokenClass.OTHER_CONTROL).tolist())
    is_ordinary = classes_V >= TokenClass.TEXT
    assert is_ordinary[: tokenizer.FIRST_CONTROL_ID].all()
    assert not is_ordinary[tokenizer.FIRST_CONTROL_ID :].any()


def test_the_tables_fit_together():
    states = len(grammar.verdict_S)
    assert grammar.next_state_SC.shape == (states, len(TokenClass))
    assert grammar.next_state_SC.max() < states <= 255
    for table in (grammar.span_S, grammar.ended_S, grammar.next_span_S):
        assert table.shape == (states,)
    for state in range(states):
        following = set(grammar.next_state_SC[state].tolist())
        if grammar.ended_S[state]:
            assert following == {state}
        else:
            assert state not in following or grammar.verdict_S[state].startswith("cut")
            assert {int(grammar.span_S[s]) for s in following} == {int(grammar.next_span_S[state])}
    cut = {Verdict.CUT_REASONING, Verdict.CUT_FINAL}
    assert {v for v, e in zip(grammar.verdict_S, grammar.ended_S, strict=True) if not e} == cut
    assert set(grammar.verdict_S) == set(Verdict) - {Verdict.AFTER_RETURN}
    assert grammar.span_S[START] == 0
    assert set(np.delete(grammar.span_S, START).tolist()) == {SPAN_REASONING, SPAN_FINAL}


@pytest.mark.parametrize("number", [0, 7, 123_456])
def test_rendered_documents_are_valid_with_the_spans_of_the_renderer(handmade, number):
    document = handmade.document(number, answer="<|end|><|return|> analysis")
    first = prompt_of(document)
    sampled_S = document.tokens_T[first:-1]
    assert grammar.verdict(sampled_S) == Verdict.VALID
    np.testing.assert_array_equal(grammar.spans(sampled_S), document.spans_T[first:-1])
    assert grammar.ended_S[grammar.walk(sampled_S)].tolist() == [False] * (len(sampled_S) - 1) + [
        True
    ]


def test_every_truncation_is_cut_in_the_span_that_it_lacks(handmade):
    document = handmade.document(41)
    first = prompt_of(document)
    sampled_S, spans_S = document.tokens_T[first:-1], document.spans_T[first:-1]
    for length in range(len(sampled_S)):
        cut = Verdict.CUT_REASONING if spans_S[length] == SPAN_REASONING else Verdict.CUT_FINAL
        assert grammar.verdict(sampled_S[:length]) == cut
        np.testing.assert_array_equal(grammar.spans(sampled_S[:length]), spans_S[:length])


MALFORMED = [
    # fault, stream up to its first fault, does the fault stand in the final span
    (Verdict.MISSING_START, "assistant", False),
    (Verdict.MISSING_START, "<|channel|>", False),
    (Verdict.MISSING_START, "<|end|>", False),
    (Verdict.MISSING_START, REASONED + "It", True),
    (Verdict.MISSING_START, REASONED + "<|end|>", True),
    (Verdict.WRONG_ROLE, "<|start|>user", False),
    (Verdict.WRONG_ROLE, "<|start|>system", False),
    (Verdict.WRONG_ROLE, REASONED + "<|start|>developer", True),
    (Verdict.MISSING_CHANNEL, "<|start|>assistant<|message|>", False),
    (Verdict.MISSING_CHANNEL, HEADER + "<|message|>", False),
    (Verdict.MISSING_CHANNEL, REASONED + "<|start|>assistant<|message|>", True),
    (Verdict.WRONG_CHANNEL_ORDER, HEADER + "final", False),
    (Verdict.WRONG_CHANNEL_ORDER, REASONED + HEADER + "analysis", True),
    (Verdict.COMMENTARY, HEADER + "commentary", False),
    (Verdict.COMMENTARY, REASONED + HEADER + "commentary", True),
    (Verdict.UNKNOWN_HEADER, "<|start|>tool", False),
    (Verdict.UNKNOWN_HEADER, "<|start|><|start|>", False),
    (Verdict.UNKNOWN_HEADER, "<|start|>analysis", False),
    (Verdict.UNKNOWN_HEADER, "<|start|>assistant to", False),
    (Verdict.UNKNOWN_HEADER, "<|start|>assistant<|end|>", False),
    (Verdict.UNKNOWN_HEADER, HEADER + "thought", False),
    (Verdict.UNKNOWN_HEADER, HEADER + "comment<|message|>", False),
    (Verdict.UNKNOWN_HEADER, HEADER + "analysis<|constrain|>", False),
    (Verdict.UNKNOWN_HEADER, HEADER + "analysis json", False),
    (Verdict.UNKNOWN_HEADER, REASONED + HEADER + "final<|end|>", True),
    (Verdict.EMPTY_REASONING, ANALYSIS + "<|end|>", False),
    (Verdict.EMPTY_FINAL, REASONED + FINAL + "<|return|>", True),
    (Verdict.EMPTY_FINAL, REASONED + FINAL + "<|end|>", True),
    (Verdict.CONTROL_IN_CONTENT, ANALYSIS + "<|start|>", False),
    (Verdict.CONTROL_IN_CONTENT, ANALYSIS + "Two<|channel|>", False),
    (Verdict.CONTROL_IN_CONTENT, ANALYSIS + "Two<|reserved_200100|>", False),
    (Verdict.CONTROL_IN_CONTENT, REASONED + FINAL + "It<|message|>", True),
    (Verdict.CONTROL_IN_CONTENT, REASONED + FINAL + "It<|startoftext|>", True),
    (Verdict.EXTRA_MESSAGE, REASONED + FINAL + "It is 2.<|end|>", True),
    (Verdict.CALL, ANALYSIS + "Two<|call|>", False),
    (Verdict.CALL, "<|start|><|call|>", False),
    (Verdict.CALL, REASONED + FINAL + "It<|call|>", True),
    (Verdict.EARLY_RETURN, "<|return|>", False),
    (Verdict.EARLY_RETURN, ANALYSIS + "<|return|>", False),
    (Verdict.EARLY_RETURN, ANALYSIS + "Two<|return|>", False),
    (Verdict.EARLY_RETURN, REASONED + "<|return|>", True),
    (Verdict.END_OF_TEXT, "<|endoftext|>", False),
    (Verdict.END_OF_TEXT, ANALYSIS + "Two<|endoftext|>", False),
    (Verdict.END_OF_TEXT, REASONED + FINAL + "It is 2.<|endoftext|>", True),
]


def test_the_malformed_streams_have_every_fault():
    sound = {Verdict.VALID, Verdict.CUT_REASONING, Verdict.CUT_FINAL, Verdict.AFTER_RETURN}
    assert {fault for fault, _, _ in MALFORMED} == set(Verdict) - sound


@pytest.mark.parametrize(("fault", "text", "in_final"), MALFORMED)
def test_each_fault_ends_the_stream_where_it_stands(fault, text, in_final):
    stream_S = ids(text)
    assert grammar.verdict(stream_S[:-1]).startswith("cut")
    assert grammar.verdict(stream_S) == fault
    assert grammar.verdict(np.concatenate([stream_S, ids(VALID)])) == fault
    reasoned = len(ids(REASONED)) if in_final else len(stream_S)
    expected = [SPAN_REASONING] * reasoned + [SPAN_FINAL] * (len(stream_S) - reasoned)
    assert grammar.spans(stream_S).tolist() == expected


def test_names_are_content_in_a_content():
    text = VALID.replace("Two", "user assistant analysis final commentary")
    assert grammar.verdict(ids(text)) == Verdict.VALID


def test_a_valid_stream_is_not_valid_with_more_behind_it():
    for more in ("<|endoftext|>", "It", VALID, "<|return|>"):
        assert grammar.verdict(ids(VALID + more)) == Verdict.AFTER_RETURN


@pytest.mark.parametrize("token", [-1, 201_088])
def test_an_id_outside_the_vocabulary_is_refused(token):
    with pytest.raises(FormatError, match="outside the vocabulary"):
        grammar.walk(np.array([5, token]))


def parses_as_valid(stream_S: np.ndarray) -> bool:
    """Whether the parser of whole documents reads the stream behind a prompt as analysis, then final, both written."""
    prompt = [*Renderer(RenderConfig()).prefix_T, *ids("<|start|>user<|message|>1 + 1?<|end|>")]
    try:
        messages = parse(np.array([*prompt, *stream_S, tokenizer.ENDOFTEXT]))[3:]
    except FormatError:
        return False
    found = [(m.role, m.channel, m.terminator, len(m.tokens_T) > 0) for m in messages]
    return found == [
        ("assistant", "analysis", tokenizer.END, True),
        ("assistant", "final", tokenizer.RETURN, True),
    ]


ANY_TOKEN = st.sampled_from(
    sorted({i for token_ids in TOKEN_IDS.values() for i in token_ids})
) | st.integers(0, tokenizer.VOCAB_SIZE - 1)
PIECES = st.sampled_from(
    [ANALYSIS, FINAL, HEADER, REASONED, VALID, "<|end|>", "<|return|>", "Two.", "<|call|>"]
)


@st.composite
def near_valid(draw) -> np.ndarray:
    """A valid stream with up to two tokens changed, dropped or put in."""
    stream = ids(VALID).tolist()
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(stream) - 1))
        stream[place : place + draw(st.integers(0, 1))] = draw(st.lists(ANY_TOKEN, max_size=1))
    return np.array(stream, dtype=np.int32)


STREAMS = (
    st.lists(ANY_TOKEN, max_size=30).map(lambda tokens: np.array(tokens, dtype=np.int32))
    | st.lists(PIECES, max_size=5).map(lambda pieces: ids("".join(pieces)))
    | near_valid()
)


@given(STREAMS)
@settings(max_examples=400, deadline=None)
def test_valid_is_what_the_parser_reads_as_one_analysis_and_one_final(stream_S):
    assert (grammar.verdict(stream_S) == Verdict.VALID) == parses_as_valid(stream_S)


@given(STREAMS)
@settings(max_examples=200, deadline=None)
def test_token_by_token_is_all_at_once(stream_S):
    state, states = START, []
    for token in stream_S:
        state = int(grammar.next_state_SC[state, grammar.token_class_V[token]])
        states.append(state)
    assert grammar.walk(stream_S).tolist() == states
    half = len(stream_S) // 2
    state = int(grammar.walk(stream_S[:half])[-1]) if half else START
    assert grammar.walk(stream_S[half:], state).tolist() == states[half:]
    assert set(grammar.spans(stream_S).tolist()) <= {SPAN_REASONING, SPAN_FINAL}
    assert isinstance(grammar.verdict(stream_S), Verdict)
