from __future__ import annotations

import collections
import os
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import tokenizer
from common.errors import FormatError
from datastore.harmony import Message, Reject, RenderConfig, Renderer, parse
from datastore.source import COLUMNS
from datastore.types import RenderedDoc, SourceRow

UNLIMITED = 1 << 20
# Any text a parquet file can hold, and text made of what the grammar itself is made of.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.strip())
GRAMMAR = st.lists(
    st.sampled_from(
        [*list(tokenizer.CONTROL_TOKENS)[:30], "assistant", "final", " ", "\n", "é", "🙂"]
    ),
    min_size=1,
).map(lambda parts: "".join(parts) + ".")
FIELD = TEXT | GRAMMAR


def a_row(**changes: str | None) -> SourceRow:
    values: dict[str, str | None] = {
        "synth_id": "row-1",
        "query": "What is 2 + 2?",
        "synthetic_reasoning": "2 + 2 = 4.",
        "synthetic_answer": "It is 4.",
        "exercise": None,
        "constraints": None,
        "language": "en",
    }
    return SourceRow(**(values | changes))


def render(row: SourceRow, max_doc_tokens: int = UNLIMITED, **config: object) -> RenderedDoc:
    document = Renderer(RenderConfig(**config)).render(row, max_doc_tokens)
    assert isinstance(document, RenderedDoc)
    return document


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory):
    """The official Harmony library, reading the project's own ranks file instead of the network."""
    import openai_harmony as oh

    folder = tmp_path_factory.mktemp("ranks")
    (folder / "o200k_base.tiktoken").write_bytes(tokenizer.ranks_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TIKTOKEN_ENCODINGS_BASE", str(folder))
        encoding = oh.load_harmony_encoding(oh.HarmonyEncodingName.HARMONY_GPT_OSS)

    def tokens(config: RenderConfig, query: str, reasoning: str, answer: str) -> list[int]:
        system = (
            oh.SystemContent.new()
            .with_model_identity(config.identity)
            .with_reasoning_effort(oh.ReasoningEffort(config.reasoning.capitalize()))
            .with_conversation_start_date(config.date)
            .with_knowledge_cutoff(config.knowledge_cutoff)
            .with_required_channels(list(config.valid_channels))
        )
        developer = oh.DeveloperContent.new().with_instructions(config.developer)
        said = oh.Message.from_role_and_content
        messages = [
            said(oh.Role.SYSTEM, system),
            said(oh.Role.DEVELOPER, developer),
            said(oh.Role.USER, query),
            said(oh.Role.ASSISTANT, reasoning).with_channel("analysis"),
            said(oh.Role.ASSISTANT, answer).with_channel("final"),
        ]
        return encoding.render_conversation_for_training(
            oh.Conversation.from_messages(messages),
            config=oh.RenderConversationConfig(auto_drop_analysis=False),
        )

    return tokens


def test_sample_rows_have_the_official_tokens(official, sample_parquet):
    config, compared = RenderConfig(), 0
    renderer = Renderer(config)
    for path in sample_parquet:
        for values in pq.read_table(path, columns=list(COLUMNS)).to_pylist():
            row = SourceRow(**values)
            document = renderer.render(row, UNLIMITED)
            if isinstance(document, Reject) or row.exercise == "rag":
                continue
            texts = (row.query, row.synthetic_reasoning, row.synthetic_answer)
            assert document.tokens_T.tolist() == [*official(config, *texts), tokenizer.ENDOFTEXT]
            compared += 1
    assert compared > 200


@given(FIELD, FIELD, FIELD, st.sampled_from(["low", "medium", "high"]))
@settings(max_examples=60, deadline=None)
def test_any_text_has_the_official_tokens(official, query, reasoning, answer, effort):
    config = RenderConfig(reasoning=effort, identity="Someone else.", date="2031-12-24")
    row = a_row(query=query, synthetic_reasoning=reasoning, synthetic_answer=answer)
    document = Renderer(config).render(row, UNLIMITED)
    expected = [*official(config, query, reasoning, answer), tokenizer.ENDOFTEXT]
    assert document.tokens_T.tolist() == expected


def test_real_rows_have_the_reference_tokens(synth_folder, synth_rows):
    with np.load(synth_folder / "reference_tokens.npz") as reference:
        expected = np.split(reference["tokens"], np.cumsum(reference["lengths"])[:-1])
    text = tokenizer.encoding().decode(expected[0].tolist())
    identity = re.match(r"<\|start\|>system<\|message\|>(.*?)\nKnowledge", text).group(1)
    developer = re.search(r"# Instructions\n\n(.*?)<\|end\|>", text, re.DOTALL).group(1)
    assert developer == RenderConfig().developer
    renderer = Renderer(RenderConfig(identity=identity))
    for row, tokens_T in zip(synth_rows, expected, strict=True):
        np.testing.assert_array_equal(renderer.render(row, UNLIMITED).tokens_T, tokens_T)


def test_the_default_prefix_word_for_word():
    assert tokenizer.encoding().decode(Renderer(RenderConfig()).prefix_T.tolist()) == (
        "<|start|>system<|message|>You are vpMoE, a large language model.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-01-01\n\nReasoning: high\n\n"
        "# Valid channels: analysis, commentary, final. "
        "Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\n"
        "Follow the user's request. When you provide an answer, produce both:\n"
        "- reasoning in the analysis channel\n"
        "- the user-facing answer in the final channel<|end|>"
    )


def as_tuples(messages: list[Message]) -> list[tuple[str, str | None, str, int]]:
    return [(m.role, m.channel, m.text, m.terminator) for m in messages]


@given(FIELD, FIELD, FIELD)
@settings(max_examples=60, deadline=None)
def test_parse_gives_back_what_was_rendered(query, reasoning, answer):
    config = RenderConfig()
    row = a_row(query=query, synthetic_reasoning=reasoning, synthetic_answer=answer)
    end, close = 200_007, 200_002
    assert as_tuples(parse(render(row).tokens_T)) == [
        ("system", None, config.system_text(), end),
        ("developer", None, config.developer_text(), end),
        ("user", None, query, end),
        ("assistant", "analysis", reasoning, end),
        ("assistant", "final", answer, close),
    ]


def test_control_text_in_a_row_never_becomes_a_control_token():
    plain = render(a_row())
    hostile = "".join(tokenizer.CONTROL_TOKENS)
    fields = ("query", "synthetic_reasoning", "synthetic_answer")
    document = render(a_row(**dict.fromkeys(fields, hostile)))
    control = [t for t in document.tokens_T.tolist() if t >= 199_998]
    assert control == [t for t in plain.tokens_T.tolist() if t >= 199_998]
    assert [message.text for message in parse(document.tokens_T)[2:]] == [hostile] * 3


def test_spans_cover_the_assistant_messages_with_their_wrappers():
    document = render(a_row())
    decode = tokenizer.encoding().decode
    by_span = {s: decode(document.tokens_T[document.spans_T == s].tolist()) for s in (1, 2)}
    assert by_span == {
        1: "<|start|>assistant<|channel|>analysis<|message|>2 + 2 = 4.<|end|>",
        2: "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
    }
    assert document.tokens_T[-1] == tokenizer.ENDOFTEXT
    assert document.spans_T[-1] == 0


def test_parse_refuses_a_document_without_any_one_control_token_or_with_a_cut():
    tokens_T = render(a_row()).tokens_T
    for position in np.flatnonzero(tokens_T >= tokenizer.FIRST_CONTROL_ID):
        with pytest.raises(FormatError):
            parse(np.delete(tokens_T, position))
    for length in range(len(tokens_T)):
        with pytest.raises(FormatError):
            parse(tokens_T[:length])
    with pytest.raises(FormatError):
        parse(np.concatenate([tokens_T, tokens_T]))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 20), st.integers(90, 260))
@settings(max_examples=80, deadline=None)
def test_truncation_spares_the_final_message_then_cuts_from_the_left(q, r, a, limit):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [" ".join(words[i % 10] for i in range(n + 1)) for n in (q, r, a)]
    row = a_row(query=texts[0], synthetic_reasoning=texts[1], synthetic_answer=texts[2])
    whole = render(row).tokens_T
    user, analysis, final = (m.tokens_T.tolist() for m in parse(whole)[2:])
    document = Renderer(RenderConfig()).render(row, limit)
    if len(whole) - len(user) - len(analysis) > limit:
        assert document == Reject("final_too_long")
        return
    kept_user, kept_analysis, kept_final = (
        m.tokens_T.tolist() for m in parse(document.tokens_T)[2:]
    )
    assert len(document.tokens_T) == min(len(whole), limit)
    assert kept_final == final
    assert analysis[len(analysis) - len(kept_analysis) :] == kept_analysis
    assert user[len(user) - len(kept_user) :] == kept_user
    assert kept_user == user or kept_analysis == []
    assert document.analysis_cut == len(analysis) - len(kept_analysis)
    assert document.user_cut == len(user) - len(kept_user)


def test_rag_sources_come_before_the_query():
    constraints = (
        "Cite.\n<source_1>First [see <source_2>].</source_1>\n\n<source_2>Second\nline</source_2> "
        "<source_10>Never closed <b>"
    )
    row = a_row(exercise="rag", constraints=constraints, query="Which?")
    assert parse(render(row).tokens_T)[2].text == (
        "<source_1>First [see <source_2>].</source_1>\n\n<source_2>Second\nline</source_2>\n\n"
        "<source_10>Never closed <b>\n\nWhich?"
    )
    other = a_row(exercise="editing", constraints=constraints, query="Which?")
    assert parse(render(other).tokens_T)[2].text == "Which?"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"synth_id": None}, "missing_id"),
        ({"synth_id": ""}, "missing_id"),
        ({"query": None}, "empty_query"),
        ({"query": " \n\t"}, "empty_query"),
        ({"synthetic_reasoning": ""}, "empty_reasoning"),
        ({"synthetic_answer": None}, "empty_answer"),
        ({"exercise": "rag", "constraints": None}, "rag_without_sources"),
        ({"exercise": "rag", "constraints": "source 1"}, "rag_without_sources"),
        ({"query": "half a pair \ud83d"}, "invalid_text"),
        ({"synth_id": "\udcff"}, "invalid_text"),
        ({"language": "\udcff"}, "invalid_text"),
        ({"exercise": "\udcff"}, "invalid_text"),
        ({"synthetic_reasoning": " " * 1_000_000 + "x"}, "untokenizable"),
    ],
)
def test_rows_are_rejected_with_their_reason(changes, reason):
    assert Renderer(RenderConfig()).render(a_row(**changes), UNLIMITED) == Reject(reason)


def test_labels_are_those_of_the_row_and_change_no_token():
    plain = render(a_row(language=None, exercise=None))
    labelled = render(a_row(language="日本語", exercise="memorization"))
    assert (plain.language, plain.exercise) == ("", "")
    assert (labelled.language, labelled.exercise) == ("日本語", "memorization")
    assert np.array_equal(plain.tokens_T, labelled.tokens_T)


def test_the_sample_meets_every_kind_of_rejection_it_is_made_for(sample_parquet):
    renderer, reasons = Renderer(RenderConfig()), collections.Counter()
    for path in sample_parquet:
        for values in pq.read_table(path, columns=list(COLUMNS)).to_pylist():
            found = renderer.render(SourceRow(**values), 512)
            reasons[found.reason if isinstance(found, Reject) else "rendered"] += 1
    assert reasons.keys() == {
        *("rendered", "missing_id", "empty_query", "empty_reasoning", "empty_answer"),
        *("rag_without_sources", "final_too_long"),
    }
