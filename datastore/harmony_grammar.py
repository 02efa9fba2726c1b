"""The Harmony grammar of what the student writes after the user's `<|end|>`, as a finite automaton. Pure.

Valid is exactly what the renderer writes there (docs/format.md) with content in both messages:

    <|start|>assistant<|channel|>analysis<|message|>TEXT<|end|><|start|>assistant<|channel|>final<|message|>TEXT<|return|>

TEXT is one or more ids below 199998. The first token that cannot belong to it ends the stream, in an absorbing state
that says what was wrong, as `<|return|>` ends a valid one. So a batch of B sequences advances by two gathers:

    state_B = next_state_SC[state_B, token_class_V[token_B]]

Legend: V vocabulary, C token classes, S states in the tables and sampled tokens in the functions.

Spans: a sampled token is reasoning up to and including the first `<|end|>` that closes an analysis message with
content, and final after it. So is the token that breaks the grammar: reasoning where it stands before that `<|end|>`.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum

import numpy as np

from common import tokenizer
from common.errors import FormatError
from datastore.types import SPAN_FINAL, SPAN_IGNORED, SPAN_REASONING


class Verdict(StrEnum):
    """What became of a sampled stream. Of a malformed one: its first fault."""

    VALID = "valid"
    CUT_REASONING = "cut_reasoning"
    """It stops before the `<|end|>` of the analysis message; no fault so far."""
    CUT_FINAL = "cut_final"
    """It stops after that `<|end|>` and before `<|return|>`; no fault so far."""
    MISSING_START = "missing_start"
    """Something else than `<|start|>` opens a message."""
    WRONG_ROLE = "wrong_role"
    """A message of the system, the developer or the user."""
    MISSING_CHANNEL = "missing_channel"
    """`<|message|>` with no channel before it."""
    WRONG_CHANNEL_ORDER = "wrong_channel_order"
    """A final message first, or a second analysis message."""
    COMMENTARY = "commentary"
    """A message in the commentary channel."""
    UNKNOWN_HEADER = "unknown_header"
    """Anything else in a header."""
    EMPTY_REASONING = "empty_reasoning"
    EMPTY_FINAL = "empty_final"
    CONTROL_IN_CONTENT = "control_in_content"
    """A control id in a content that neither closes it nor is named by another verdict."""
    EXTRA_MESSAGE = "extra_message"
    """The final message is closed by `<|end|>`, as if another were to come."""
    CALL = "call"
    """`<|call|>` anywhere."""
    EARLY_RETURN = "early_return"
    """`<|return|>` anywhere before the content of the final message."""
    END_OF_TEXT = "end_of_text"
    """`<|endoftext|>` anywhere."""
    AFTER_RETURN = "after_return"
    """Tokens after a valid stream; of whole streams alone, as sampling has ended there."""


class TokenClass(IntEnum):
    """What the grammar tells apart. From TEXT on: ids below 199998, all of them content in a content."""

    START = 0
    CHANNEL = 1
    MESSAGE = 2
    END = 3
    RETURN = 4
    CALL = 5
    END_OF_TEXT = 6
    OTHER_CONTROL = 7
    TEXT = 8
    ASSISTANT = 9
    OTHER_ROLE = 10
    ANALYSIS = 11
    FINAL = 12
    COMMENT = 13
    ARY = 14


TOKEN_IDS: dict[TokenClass, tuple[int, ...]] = {
    TokenClass.START: (tokenizer.START,),
    TokenClass.CHANNEL: (tokenizer.CHANNEL,),
    TokenClass.MESSAGE: (tokenizer.MESSAGE,),
    TokenClass.END: (tokenizer.END,),
    TokenClass.RETURN: (tokenizer.RETURN,),
    TokenClass.CALL: (tokenizer.CALL,),
    TokenClass.END_OF_TEXT: (tokenizer.ENDOFTEXT,),
    TokenClass.ASSISTANT: (173_781,),
    TokenClass.OTHER_ROLE: (17_360, 77_944, 1_428),  # system, developer, user
    TokenClass.ANALYSIS: (35_644,),
    TokenClass.FINAL: (17_196,),
    TokenClass.COMMENT: (12_606,),  # "commentary" is two tokens
    TokenClass.ARY: (815,),
}
"""The ids of each class but TEXT and OTHER_CONTROL, which hold all others. A test holds the names to the tokenizer."""


class _Place(IntEnum):
    """Where in a message the stream stands: what was written last."""

    BEGIN = 0  # nothing of the message
    START = 1
    ROLE = 2
    CHANNEL = 3
    COMMENT = 4  # the first half of "commentary"
    NAME = 5
    MESSAGE = 6
    TEXT = 7


_SPANS = (SPAN_REASONING, SPAN_FINAL)
_FAULTS = tuple(Verdict)[list(Verdict).index(Verdict.MISSING_START) : -1]
_ON_WAY: dict[_Place, tuple[TokenClass, _Place]] = {
    _Place.BEGIN: (TokenClass.START, _Place.START),
    _Place.START: (TokenClass.ASSISTANT, _Place.ROLE),
    _Place.ROLE: (TokenClass.CHANNEL, _Place.CHANNEL),
    _Place.NAME: (TokenClass.MESSAGE, _Place.MESSAGE),
}
_ANYWHERE = {
    TokenClass.END_OF_TEXT: Verdict.END_OF_TEXT,
    TokenClass.CALL: Verdict.CALL,
    TokenClass.RETURN: Verdict.EARLY_RETURN,
}
_THERE = {
    (_Place.START, TokenClass.OTHER_ROLE): Verdict.WRONG_ROLE,
    (_Place.ROLE, TokenClass.MESSAGE): Verdict.MISSING_CHANNEL,
    (_Place.CHANNEL, TokenClass.MESSAGE): Verdict.MISSING_CHANNEL,
    (_Place.CHANNEL, TokenClass.ANALYSIS): Verdict.WRONG_CHANNEL_ORDER,
    (_Place.CHANNEL, TokenClass.FINAL): Verdict.WRONG_CHANNEL_ORDER,
    (_Place.COMMENT, TokenClass.ARY): Verdict.COMMENTARY,
}
_OTHERWISE = {
    _Place.BEGIN: Verdict.MISSING_START,
    _Place.MESSAGE: Verdict.CONTROL_IN_CONTENT,
    _Place.TEXT: Verdict.CONTROL_IN_CONTENT,
}


def _state(place: _Place, span: int) -> int:
    return len(_Place) * _SPANS.index(span) + place


START: int = _state(_Place.BEGIN, SPAN_REASONING)
"""The state just after the prompt."""
RETURNED: int = len(_SPANS) * len(_Place)
"""The state of a valid stream."""


def _fault_state(fault: Verdict, span: int) -> int:
    return RETURNED + 1 + 2 * _FAULTS.index(fault) + _SPANS.index(span)


NUM_STATES = RETURNED + 1 + 2 * len(_FAULTS)


def _step(place: _Place, span: int, token: TokenClass) -> int:
    """The state after `token`."""
    reasoning = span == SPAN_REASONING
    expected, following = _ON_WAY.get(place, (None, place))
    if token == expected:
        return _state(following, span)
    if place == _Place.CHANNEL:
        if token == (TokenClass.ANALYSIS if reasoning else TokenClass.FINAL):
            return _state(_Place.NAME, span)
        if token == TokenClass.COMMENT:
            return _state(_Place.COMMENT, span)
    if place in (_Place.MESSAGE, _Place.TEXT) and token >= TokenClass.TEXT:
        return _state(_Place.TEXT, span)
    if place == _Place.TEXT and reasoning and token == TokenClass.END:
        return _state(_Place.BEGIN, SPAN_FINAL)
    if place == _Place.TEXT and not reasoning and token == TokenClass.RETURN:
        return RETURNED
    return _fault_state(_fault(place, reasoning, token), span)


def _fault(place: _Place, reasoning: bool, token: TokenClass) -> Verdict:
    """What is wrong with `token` there."""
    if place == _Place.MESSAGE and token == TokenClass.END:
        return Verdict.EMPTY_REASONING if reasoning else Verdict.EMPTY_FINAL
    if place == _Place.MESSAGE and token == TokenClass.RETURN and not reasoning:
        return Verdict.EMPTY_FINAL
    if place == _Place.TEXT and token == TokenClass.END:
        return Verdict.EXTRA_MESSAGE
    if token in _ANYWHERE:
        return _ANYWHERE[token]
    otherwise = _OTHERWISE.get(place, Verdict.UNKNOWN_HEADER)
    return _THERE.get((place, token), otherwise)


def _token_classes() -> np.ndarray:
    classes_V = np.full(tokenizer.VOCAB_SIZE, TokenClass.TEXT, dtype=np.uint8)
    classes_V[tokenizer.FIRST_CONTROL_ID :] = TokenClass.OTHER_CONTROL
    for token_class, ids in TOKEN_IDS.items():
        classes_V[list(ids)] = token_class
    return _constant(classes_V)


def _next_states() -> np.ndarray:
    """Every state leads to itself but those on the way of a valid stream: an ended one is absorbing."""
    states_S1 = np.arange(NUM_STATES, dtype=np.uint8)[:, None]
    next_SC = np.repeat(states_S1, len(TokenClass), axis=1)
    for span in _SPANS:
        for place in _Place:
            next_SC[_state(place, span)] = [_step(place, span, token) for token in TokenClass]
    return _constant(next_SC)


def _spans() -> np.ndarray:
    spans_S = np.full(NUM_STATES, SPAN_FINAL, dtype=np.uint8)
    for span in _SPANS:
        spans_S[[_state(place, span) for place in _Place]] = span
        spans_S[[_fault_state(fault, span) for fault in _FAULTS]] = span
    # What begins the final message is the <|end|> of the analysis; START is entered by the prompt.
    spans_S[_state(_Place.BEGIN, SPAN_FINAL)] = SPAN_REASONING
    spans_S[START] = SPAN_IGNORED
    return _constant(spans_S)


def _verdicts() -> tuple[Verdict, ...]:
    cut = {SPAN_REASONING: Verdict.CUT_REASONING, SPAN_FINAL: Verdict.CUT_FINAL}
    on_way = [cut[span] for span in _SPANS for _ in _Place]
    return (*on_way, Verdict.VALID, *(fault for fault in _FAULTS for _ in _SPANS))


def _constant(table: np.ndarray) -> np.ndarray:
    table.flags.writeable = False
    return table


token_class_V: np.ndarray = _token_classes()
"""uint8 [201088]: the class of each id."""
next_state_SC: np.ndarray = _next_states()
"""uint8 [S, C]: the state after a token of each class. Every ended state leads to itself."""
span_S: np.ndarray = _spans()
"""uint8 [S]: the span of the token that led into the state; 0 for START alone."""
ended_S: np.ndarray = _constant(np.arange(NUM_STATES) >= RETURNED)
"""bool [S]: the stream is over, valid or not; sampling stops."""
next_span_S: np.ndarray = _constant(
    np.where(np.arange(NUM_STATES) < len(_Place), SPAN_REASONING, SPAN_FINAL).astype(np.uint8)
)
"""uint8 [S]: the span that the next token will have, whatever it is; of no meaning in an ended state."""
verdict_S: tuple[Verdict, ...] = _verdicts()
"""The verdict of a stream that stops in the state."""


def walk(tokens_S: np.ndarray, state: int = START) -> np.ndarray:
    """The state after each token, uint8 [S], from `state` on. Raises FormatError for an id outside the vocabulary."""
    ids = np.asarray(tokens_S, dtype=np.int64)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.VOCAB_SIZE:
        raise FormatError(
            "a sampled token outside the vocabulary",
            got=f"ids {ids.min()}..{ids.max()}",
            expected=f"0..{tokenizer.VOCAB_SIZE - 1}",
            remedy="sample from the tokenizer's ids alone, without the padding of the output layer",
        )
    table, states = next_state_SC.tolist(), []
    for token_class in token_class_V[ids].tolist():
        state = table[state][token_class]
        states.append(state)
    return np.array(states, dtype=np.uint8)


def verdict(tokens_S: np.ndarray) -> Verdict:
    """What became of the stream `tokens_S`, which begins after the prompt. A stream that is not ended is cut."""
    states_S = walk(tokens_S)
    if np.count_nonzero(states_S == RETURNED) > 1:
        return Verdict.AFTER_RETURN
    return verdict_S[states_S[-1] if len(states_S) else START]


def spans(tokens_S: np.ndarray) -> np.ndarray:
    """The span of each sampled token, uint8 [S], 1 or 2. Tokens after the end have that of the token that ended it."""
    return span_S[walk(tokens_S)]
