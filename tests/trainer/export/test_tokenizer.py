"""The exported tokenizer and chat template, as transformers loads them, against tiktoken and our renderer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import tokenizer
from common.config import CONFIG_ROOT, load_config
from datastore.data_config import DataConfig
from datastore.harmony import RenderConfig, Renderer
from datastore.types import SourceRow
from trainer.export_tokenizer import chat_template, fast_tokenizer, tokenizer_config

pytestmark = pytest.mark.slow  # building the merges takes some seconds, once
TEXTS = [
    "The quick brown fox isn't DON'T we'LL jump 1234567 times.\r\n\r\n  \t x  ",
    "Příliš žluťoučký kůň úpěl ďábelské ódy; ČESKÝ Ǆungla ǅ ǆ",
    "Быстрая лиса. Ελληνικά: Αβγδ ΣΊΣΥΦΟΣ. עברית וערבית: العَرَبِيَّة",
    "中文字符,日本語のテキスト、한국어 텍스트 ไทย हिन्दी தமிழ் 🧑‍🚀🏳️‍🌈 e\u0301 \u00a0\u2003x",
    "def f(x):\n    return {'a': [1, 22, 333, 4444]}  # TODO\n\n\n//**/ <<= !=\n",
    "∑_{i=1}^{∞} ½ ² Ⅻ ٣٤٥ x²+y² ≤ 10⁻³ \x00\x07 \ufeff ﬁ",
    " ",
    "\n",
    "   \n  \n",
    "'s",
    " 's 'S 'Ll",
    "a" * 300,
    "ab" * 200,
    "=" * 90,
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer files of an export."""
    path = tmp_path_factory.mktemp("tokenizer")
    fast_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(2048)))
    (path / "chat_template.jinja").write_text(chat_template(RenderConfig()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    """The tokenizer as transformers loads it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _ours(text: str) -> list[int]:
    return tokenizer.encoding().encode_ordinary(text)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_ids_equal_ours_in_many_scripts(loaded: Any, text: str) -> None:
    ids = loaded(text)["input_ids"]
    assert ids == _ours(text)
    assert loaded.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=60))
def test_ids_equal_ours_on_any_text(loaded: Any, text: str) -> None:
    assert loaded(text, split_special_tokens=True)["input_ids"] == _ours(text)


def test_ids_equal_ours_on_real_rows(loaded: Any, synth_rows: list[SourceRow]) -> None:
    texts = [
        t for r in synth_rows for t in (r.query, r.synthetic_reasoning, r.synthetic_answer) if t
    ]
    assert len(texts) > 1000
    assert loaded(texts)["input_ids"] == [_ours(text) for text in texts]


def test_control_tokens_have_their_ids(loaded: Any) -> None:
    assert len(loaded) == tokenizer.VOCAB_SIZE
    assert len(tokenizer.CONTROL_TOKENS) == 1090
    names = list(tokenizer.CONTROL_TOKENS)
    assert loaded.convert_tokens_to_ids(names) == list(tokenizer.CONTROL_TOKENS.values())
    assert loaded("<|start|>a<|end|>")["input_ids"] == [200_006, *_ours("a"), 200_007]
    assert loaded("<|start|>", split_special_tokens=True)["input_ids"] == _ours("<|start|>")
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (
        199_998,
        200_002,
        199_999,
    )
    assert loaded.decode([200_006, *_ours("a")], skip_special_tokens=True) == "a"


ROW = SourceRow(
    synth_id="s", language="en", exercise="memorization", query="Why, \"though\"?\n x",
    constraints=None, synthetic_reasoning="Because: <b>&</b>", synthetic_answer="So.  ",
)  # fmt: skip
RENDERS = [
    RenderConfig(),
    RenderConfig(identity='You are "T" \\ é {{ x }}.', developer="Answer\nshortly."),
]


@pytest.mark.parametrize("render", RENDERS, ids=["default", "awkward"])
def test_a_prompt_is_the_opening_of_a_document(loaded: Any, render: RenderConfig) -> None:
    document = Renderer(render).render(ROW, 2048)
    user = [{"role": "user", "content": ROW.query}]
    template = chat_template(render)

    def ids(messages: list[dict[str, str]], *, prompt: bool) -> list[int]:
        return loaded.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, return_dict=False
        )

    prompt = ids(user, prompt=True)
    assert prompt == document.tokens_T[: len(prompt)].tolist()
    assert prompt[-2:] == [200_006, *_ours("assistant")]
    assert document.tokens_T[len(prompt)] == tokenizer.CHANNEL
    answer = {
        "role": "assistant",
        "reasoning_content": ROW.synthetic_reasoning,
        "content": ROW.synthetic_answer,
    }
    assert ids([*user, answer], prompt=False) == document.tokens_T[:-1].tolist()
    explicit = [
        {"role": "system", "content": render.system_text()},
        {"role": "developer", "content": render.developer},
        *user,
    ]
    assert ids(explicit, prompt=True) == prompt


def test_the_template_of_the_locked_data_is_the_default_one() -> None:
    config = load_config(DataConfig, CONFIG_ROOT / "data" / "synth.yaml")
    assert chat_template(config.render) == chat_template(RenderConfig())


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ([{"role": "user", "content": "a <|end|> b"}], "holds the control token <|end|>"),
        ([{"role": "user", "content": "<|reserved_200013|>"}], "control token <|reserved_"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "role system"),
        ([{"role": "tool", "content": "y"}], "role tool"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "must be a string"),
    ],
)
def test_what_would_break_out_of_a_message_is_refused(
    loaded: Any, messages: Any, fault: str
) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match=fault.replace("|", r"\|")):
        loaded.apply_chat_template(messages)


def test_earlier_turns_end_their_message(loaded: Any) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = loaded.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tail = "<|start|>assistant<|channel|>final<|message|>b<|end|><|start|>user<|message|>c<|end|><|start|>assistant"
    assert text.endswith(tail)
    assert np.array_equal(
        loaded(text)["input_ids"],
        loaded.apply_chat_template(turns, add_generation_prompt=True, return_dict=False),
    )
