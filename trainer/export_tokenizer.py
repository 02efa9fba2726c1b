"""The tokenizer of an export: o200k_harmony as `tokenizers` reads it, its settings, the chat template. No network.

Source of the merges: a rank is one token, so every cut of it into two tokens is a merge of that priority; a piece
that is a token needs none (ignore_merges), as in tiktoken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from common import tokenizer
from datastore.harmony import RenderConfig

_TEMPLATE = Path(__file__).parent / "hf" / "chat_template.jinja"
_INSTRUCTIONS = "# Instructions\n\n"


def fast_tokenizer() -> Tokenizer:
    """Byte-level BPE of the same ids as common.tokenizer, control tokens included. About 5 s."""
    ranks = tokenizer.ranks()
    names = {token: _visible(token) for token in ranks}
    merges = [
        (names[left], names[right])
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _cuts(token, ranks)
    ]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    fast = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(tokenizer.PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    in_order = sorted(tokenizer.CONTROL_TOKENS, key=tokenizer.CONTROL_TOKENS.__getitem__)
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in in_order])
    return fast


def tokenizer_config(seq_len: int) -> dict[str, Any]:
    """tokenizer_config.json. No token is added to a text: documents begin with <|start|>."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }


def chat_template(render: RenderConfig) -> str:
    """chat_template.jinja: conversations to the documents that `render` writes; a prompt ends <|start|>assistant."""
    developer = render.developer_text().removeprefix(_INSTRUCTIONS)
    template = _TEMPLATE.read_text(encoding="utf-8")
    for slot, text in (("SYSTEM_TEXT", render.system_text()), ("DEVELOPER_TEXT", developer)):
        template = template.replace(slot, json.dumps(text, ensure_ascii=False), 1)
    return template


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The ways to make `token` of two tokens, the lower ranks first."""
    cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
    known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
    return sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))


def _visible(token: bytes) -> str:
    return "".join(_BYTE_NAMES[byte] for byte in token)


def _byte_names() -> dict[int, str]:
    """GPT-2's names of bytes: printable Latin-1 stands for itself, the others follow from code point 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


_BYTE_NAMES = _byte_names()
