"""What the teacher is shown of a served document: its own tokens, or another system text in place of the stored one."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import AlignmentError, FormatError
from common.tokenizer import encoding
from datastore.harmony import RenderConfig
from datastore.prompt import ScoreRequest
from datastore.scoring_protocol import ScoreBatch, ScoreDocument
from datastore.serve_prompt import score_requests
from tests.datastore.line_engine import teacher

STORED = RenderConfig(reasoning="medium", developer="Think.")
OWN = ("system={identity: You are a teacher of few words., reasoning: high}",)


@pytest.fixture
def rendered(handmade):
    """A document whose constant prefix was rendered under STORED, and its tokens after that prefix."""
    plain = handmade.document(3)
    swapped = text_of(plain.tokens_T).replace(prefix_text(RenderConfig()), prefix_text(STORED))
    tokens_T = np.array(encoding().encode(swapped, allowed_special="all"), np.int32)
    start = len(tokens_T) - len(plain.spans_T)
    spans_T = np.concatenate([np.zeros(max(start, 0), np.uint8), plain.spans_T[max(-start, 0) :]])
    return ScoreDocument(tokens_T=tokens_T, spans_T=spans_T)


def text_of(tokens_T: np.ndarray) -> str:
    return encoding().decode(tokens_T.tolist())


def prefix_text(render: RenderConfig) -> str:
    return (
        f"<|start|>system<|message|>{render.system_text()}<|end|>"
        f"<|start|>developer<|message|>{render.developer_text()}<|end|>"
    )


def shown(document: ScoreDocument, *overrides: str, render: RenderConfig | None = STORED):
    batch = ScoreBatch(documents=[document], render=render)
    (request,) = score_requests(batch, teacher(*overrides))
    return request


def assert_continues(
    request: ScoreRequest, document: ScoreDocument, expected: RenderConfig
) -> None:
    """The prompt opens with the expected prefix; every scored position predicts the document's own next token."""
    assert text_of(request.prompt_T).startswith(prefix_text(expected))
    np.testing.assert_array_equal(request.positions_P, document.positions())
    assert request.content_key == document.content_key()
    for position in request.positions_P:
        in_prompt = position - request.shift
        assert request.prompt_T[in_prompt + 1] == document.tokens_T[position + 1]
        assert request.prompt_T[in_prompt] == document.tokens_T[position]


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_an_effort_replaces_the_stored_one(rendered, effort: str) -> None:
    document = ScoreDocument(tokens_T=rendered.tokens_T, spans_T=rendered.spans_T, reasoning=effort)
    expected = STORED.model_copy(update={"reasoning": effort})
    assert_continues(shown(document), document, expected)


def test_without_an_effort_the_document_is_shown_as_it_is(rendered) -> None:
    for render in (STORED, None):
        request = shown(rendered, render=render)
        np.testing.assert_array_equal(request.prompt_T, rendered.tokens_T)
        np.testing.assert_array_equal(request.positions_P, rendered.positions())


def test_the_teachers_own_text_and_then_the_documents_effort(rendered) -> None:
    own = STORED.model_copy(
        update={"identity": "You are a teacher of few words.", "reasoning": "high"}
    )
    assert_continues(shown(rendered, *OWN), rendered, own)
    low = ScoreDocument(tokens_T=rendered.tokens_T, spans_T=rendered.spans_T, reasoning="low")
    assert_continues(shown(low, *OWN), low, own.model_copy(update={"reasoning": "low"}))


def test_a_swap_needs_the_render_config(rendered) -> None:
    low = ScoreDocument(tokens_T=rendered.tokens_T, spans_T=rendered.spans_T, reasoning="low")
    for document, overrides in [(low, ()), (rendered, OWN)]:
        with pytest.raises(FormatError, match="no render config in the request"):
            shown(document, *overrides, render=None)


def test_a_document_of_another_prefix_is_refused(rendered) -> None:
    with pytest.raises(AlignmentError, match="does not open with the prefix"):
        shown(rendered, render=RenderConfig())


def test_positions_inside_the_prefix_are_refused(rendered) -> None:
    prefix = len(encoding().encode(prefix_text(STORED), allowed_special="all"))
    for first, fits in [(prefix - 2, False), (prefix - 1, True)]:
        document = ScoreDocument(
            tokens_T=rendered.tokens_T,
            ranges_R2=np.array([[first, first + 3]], np.int32),
            reasoning="low",
        )
        if fits:
            assert shown(document).positions_P.tolist() == [first, first + 1, first + 2]
        else:
            with pytest.raises(FormatError, match=f"inside the constant prefix; got {first}"):
                shown(document)
