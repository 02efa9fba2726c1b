"""The shipped ranks are the locked tokenizer, and a changed file is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from openai_harmony import HarmonyEncodingName, load_harmony_encoding

from common import tokenizer
from common.errors import FormatError

TEXTS = [
    "Hello, world!",
    "naïve café 你好 שלום 👩🏽‍🚀",
    "x = 3.14159\n\n\tdef f():",
    "don't  stop  ",
    "",
]


def test_vocabulary_is_complete_and_padded_to_nothing() -> None:
    encoding = tokenizer.encoding()
    assert encoding.n_vocab == tokenizer.VOCAB_SIZE == 201_088
    assert set(tokenizer.CONTROL_TOKENS.values()) == set(range(199_998, 201_088))


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_and_holds_no_control_token(text: str) -> None:
    ids = tokenizer.encoding().encode_ordinary(text + "<|start|>")
    assert tokenizer.encoding().decode(ids) == text + "<|start|>"
    assert all(i < tokenizer.FIRST_CONTROL_ID for i in ids)


def test_ids_equal_the_official_harmony_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o200k_base.tiktoken").write_bytes(tokenizer.ranks_bytes())
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    official = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)
    for text in TEXTS:
        assert tokenizer.encoding().encode_ordinary(text) == official.encode(text)
    for name in ("start", "end", "message", "channel", "return", "call", "constrain"):
        (expected,) = official.encode(f"<|{name}|>", allowed_special="all")
        assert tokenizer.CONTROL_TOKENS[f"<|{name}|>"] == expected


def test_tampered_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(tokenizer.ranks_bytes())
    content[1000] ^= 1
    tampered = tmp_path / "o200k_base.tiktoken.gz"
    tampered.write_bytes(gzip.compress(bytes(content), compresslevel=1))
    monkeypatch.setattr(tokenizer, "RANKS_PATH", tampered)
    with pytest.raises(FormatError, match=f"expected {tokenizer.RANKS_SHA256}"):
        tokenizer.ranks_bytes()
