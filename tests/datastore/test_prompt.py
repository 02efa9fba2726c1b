"""What the teacher is shown: the document itself, or token by token the same conversation under its own system text."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import load_config, named_config
from common.errors import AlignmentError, ConfigError
from common.tokenizer import encoding
from datastore.harmony import RenderConfig, Renderer
from datastore.manifest import DatasetManifest
from datastore.prompt import document_prefix, require_fitting
from datastore.target import content_key
from datastore.teacher import SystemText, TeacherConfig
from datastore.types import RenderedDoc, SourceRow

EFFORTS = ("low", "medium", "high")
IDENTITIES = (None, "Hi.", "You are a careful and patient teacher of many, many children.")
ROWS = [
    SourceRow(
        synth_id=f"row-{number}",
        query="Why is the sky blue? 🙂" * number,
        synthetic_reasoning="Light scatters. <|start|>" * number,
        synthetic_answer="Rayleigh scattering. 日本語" * (3 - number),
        exercise=None,
        constraints=None,
        language="en",
    )
    for number in (1, 2)
]


@pytest.fixture(scope="module")
def made(tmp_path_factory, handmade) -> DatasetManifest:
    rows = [handmade.pack([handmade.document(0)], 192)]
    folder = tmp_path_factory.mktemp("dataset")
    return handmade.write_dataset(folder, {"train": [rows]}, seq_len=192)


def dataset(made: DatasetManifest, render: RenderConfig, **config) -> DatasetManifest:
    return made.model_copy(update={"config": {"render": render.resolved(), **config}})


def teacher(system: SystemText | None, *overrides: str) -> TeacherConfig:
    config = load_config(TeacherConfig, named_config("teacher", "tiny"), overrides)
    return config.model_copy(update={"system": system})


def rendered(render: RenderConfig, row: SourceRow, max_doc_tokens: int = 4096) -> RenderedDoc:
    document = Renderer(render).render(row, max_doc_tokens)
    assert isinstance(document, RenderedDoc)
    return document


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("identity", IDENTITIES)
@pytest.mark.parametrize("shown_effort", EFFORTS)
@pytest.mark.parametrize("stored_effort", EFFORTS)
def test_the_teacher_is_shown_the_conversation_under_its_own_system_text(
    made, stored_effort, shown_effort, identity, row
) -> None:
    """The reference is the row rendered anew, from its text, under the teacher's config."""
    stored = RenderConfig(reasoning=stored_effort)
    prefix = document_prefix(
        dataset(made, stored), teacher(SystemText(identity=identity, reasoning=shown_effort))
    )
    own = {} if identity is None else {"identity": identity}
    shown = RenderConfig(reasoning=shown_effort, **own)
    document, expected = rendered(stored, row), rendered(shown, row)
    request = prefix.request(document.tokens_T, document.spans_T)

    assert request.prompt_T.tolist() == expected.tokens_T.tolist()
    assert request.prompt_T.dtype == np.int32
    assert request.content_key == content_key(document.tokens_T)
    assert request.shift == prefix.shift == len(document.tokens_T) - len(expected.tokens_T)
    assert (prefix.system_text, prefix.reasoning) == (shown.system_text(), shown_effort)
    assert f"Reasoning: {shown_effort}" in encoding().decode(request.prompt_T.tolist())
    # Entry t of the document scores its token t + 1, and in the prompt the same token under the same continuation.
    targets = [t for t in range(len(document.tokens_T) - 1) if document.spans_T[t + 1]]
    in_prompt = [t for t in range(len(expected.tokens_T) - 1) if expected.spans_T[t + 1]]
    assert request.positions_P.tolist() == targets
    assert (request.positions_P - request.shift).tolist() == in_prompt
    for position in targets:
        at = position - request.shift
        assert request.prompt_T[at + 1] == document.tokens_T[position + 1]
        assert request.prompt_T[at:].tolist() == document.tokens_T[position:].tolist()


def test_efforts_are_told_apart_by_the_prompt_alone(made) -> None:
    document = rendered(RenderConfig(), ROWS[0])
    prompts = set()
    for effort in EFFORTS:
        prefix = document_prefix(
            dataset(made, RenderConfig()), teacher(SystemText(reasoning=effort))
        )
        request = prefix.request(document.tokens_T, document.spans_T)
        assert request.content_key == content_key(document.tokens_T)
        prompts.add(request.prompt_T.tobytes())
    assert len(prompts) == 3


@pytest.mark.parametrize("effort", EFFORTS)
def test_without_a_system_text_of_its_own_it_is_shown_the_document(made, effort) -> None:
    stored = RenderConfig(reasoning=effort)
    prefix = document_prefix(dataset(made, stored), teacher(None))
    document = rendered(stored, ROWS[1])
    request = prefix.request(document.tokens_T, document.spans_T)
    assert request.prompt_T.tolist() == document.tokens_T.tolist()
    assert (request.shift, prefix.system_text, prefix.reasoning) == (0, None, effort)


def test_a_cut_document_keeps_its_own_continuation(made) -> None:
    """Its analysis lost tokens on the left under the dataset's limit; a longer prefix must not cut it further."""
    stored = RenderConfig()
    whole = rendered(stored, ROWS[1])
    document = rendered(stored, ROWS[1], len(whole.tokens_T) - 5)
    assert document.analysis_cut == 5
    prefix = document_prefix(
        dataset(made, stored), teacher(SystemText(identity=IDENTITIES[2], reasoning="high"))
    )
    request = prefix.request(document.tokens_T, document.spans_T)
    shown_T = Renderer(RenderConfig(identity=IDENTITIES[2], reasoning="high")).prefix_T
    own_T = document.tokens_T[len(Renderer(stored).prefix_T) :]
    assert request.prompt_T.tolist() == [*shown_T.tolist(), *own_T.tolist()]


def test_a_document_of_another_prefix_is_refused(made) -> None:
    prefix = document_prefix(
        dataset(made, RenderConfig(reasoning="low")), teacher(SystemText(reasoning="high"))
    )
    document = rendered(RenderConfig(reasoning="medium"), ROWS[0])
    with pytest.raises(AlignmentError, match="prefix"):
        prefix.request(document.tokens_T, document.spans_T)
    for length in (0, 3, len(prefix.stored_T) - 1):
        with pytest.raises(AlignmentError, match="prefix"):
            prefix.request(prefix.stored_T[:length], np.zeros(length, np.uint8))


def test_documents_must_fit_with_the_prefix_that_is_shown(made) -> None:
    """A prefix longer by n tokens needs n more; one shorter needs fewer."""
    manifest = dataset(made, RenderConfig(), max_doc_tokens=150)
    for identity in IDENTITIES[1:]:
        system = SystemText(identity=identity)
        prefix = document_prefix(manifest, teacher(system))
        needed = 150 - prefix.shift
        require_fitting(manifest, teacher(system, f"engine.max_model_len={needed}"), prefix)
        with pytest.raises(ConfigError, match=f"max_model_len={needed}"):
            require_fitting(manifest, teacher(system, f"engine.max_model_len={needed - 1}"), prefix)
