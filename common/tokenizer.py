"""The locked tokenizer: o200k_harmony, 201,088 ids, from the ranks file shipped in common/data.

Ids 0..199997 are byte-pair ranks; 199998..201087 are control tokens (most of them reserved).
Sources: tiktoken's o200k_base pattern (tiktoken_ext/openai_public.py) and the Harmony control ids
(openai/harmony, docs/format.md). Text of users is always encoded with `encode_ordinary`, never with specials.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
from pathlib import Path

import tiktoken

from common.errors import FormatError

NAME = "o200k_harmony"
VOCAB_SIZE = 201_088
FIRST_CONTROL_ID = 199_998
RANKS_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
RANKS_PATH = Path(__file__).parent / "data" / "o200k_base.tiktoken.gz"

STARTOFTEXT, ENDOFTEXT = 199_998, 199_999
RETURN, CONSTRAIN, CHANNEL = 200_002, 200_003, 200_005
START, END, MESSAGE, CALL = 200_006, 200_007, 200_008, 200_012
PAD = ENDOFTEXT

_NAMED = {
    "<|startoftext|>": STARTOFTEXT,
    "<|endoftext|>": ENDOFTEXT,
    "<|return|>": RETURN,
    "<|constrain|>": CONSTRAIN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
}
CONTROL_TOKENS = {
    **_NAMED,
    **{
        f"<|reserved_{i}|>": i
        for i in range(FIRST_CONTROL_ID, VOCAB_SIZE)
        if i not in _NAMED.values()
    },
}
PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def ranks_bytes() -> bytes:
    """The uncompressed ranks file, checked against its sha256. Raises FormatError."""
    content = gzip.decompress(RANKS_PATH.read_bytes())
    found = hashlib.sha256(content).hexdigest()
    if found != RANKS_SHA256:
        raise FormatError(
            f"tokenizer ranks {RANKS_PATH.name}",
            got=f"sha256 {found}",
            expected=RANKS_SHA256,
            remedy="restore the file from the repository",
        )
    return content


def ranks() -> dict[bytes, int]:
    """Byte strings of ids 0..199997 by their rank, which is their id."""
    pairs = (line.split() for line in ranks_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


@functools.cache
def encoding() -> tiktoken.Encoding:
    """The tiktoken encoding, built once per process (about 0.3 s)."""
    return tiktoken.Encoding(
        name=NAME, pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=CONTROL_TOKENS
    )
