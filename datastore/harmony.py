"""SYNTH rows to Harmony documents and back. Pure: values in, values out.

Layout of a document, spans and truncation: docs/format.md. Grammar: openai/harmony, docs/format.md; the tokens equal
those of the official library with `RenderConversationConfig(auto_drop_analysis=False)`.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common import tokenizer
from common.config import Config
from common.errors import FormatError
from datastore.types import SPAN_FINAL, SPAN_IGNORED, SPAN_REASONING, RenderedDoc, SourceRow

RENDERER_VERSION = "1"
"""Goes into every dataset_id: raise it whenever the same row and config would give other tokens or spans."""

Role = Literal["system", "developer", "user", "assistant"]
Channel = Literal["analysis", "commentary", "final"]
Reasoning = Literal["low", "medium", "high"]
RejectReason = Literal[
    "missing_id",
    "empty_query",
    "empty_reasoning",
    "empty_answer",
    "rag_without_sources",
    "invalid_text",
    "untokenizable",
    "final_too_long",
]
ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant")
CHANNELS: tuple[Channel, ...] = ("analysis", "commentary", "final")

# A block runs to its own closing tag; without one, to the next block or the end of the text.
_SOURCE_BLOCK = re.compile(
    r"<source_(\d+)>(?:.*?</source_\1>|.*?(?=<source_\d+>|\Z))", flags=re.DOTALL
)


class RenderConfig(Config):
    """The constant part of every document. `date` is fixed: a render never depends on the day it runs."""

    identity: str = "You are vpMoE, a large language model."
    knowledge_cutoff: str = "2024-06"
    date: str = "2026-01-01"
    reasoning: Reasoning = "high"
    valid_channels: tuple[Channel, ...] = CHANNELS
    developer: str = (
        "Follow the user's request. When you provide an answer, produce both:\n"
        "- reasoning in the analysis channel\n"
        "- the user-facing answer in the final channel"
    )

    def system_text(self) -> str:
        """Content of the system message, as the official library writes it."""
        return (
            f"{self.identity}\nKnowledge cutoff: {self.knowledge_cutoff}\nCurrent date: {self.date}\n\n"
            f"Reasoning: {self.reasoning}\n\n# Valid channels: {', '.join(self.valid_channels)}. "
            "Channel must be included for every message."
        )

    def developer_text(self) -> str:
        """Content of the developer message, as the official library writes it."""
        return f"# Instructions\n\n{self.developer}"


@dataclass(frozen=True, slots=True)
class Reject:
    """Why a row gives no document."""

    reason: RejectReason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Message:
    """One message of a document. tokens_T: int32, the content alone. terminator: END, RETURN or CALL."""

    role: Role
    channel: Channel | None
    tokens_T: np.ndarray
    terminator: int

    @property
    def text(self) -> str:
        """The content as text; bytes cut apart by truncation show as U+FFFD."""
        return tokenizer.encoding().decode(self.tokens_T.tolist(), errors="replace")


class Renderer:
    """Turns rows into documents under one config. Holds the tokens that every document shares.

    prefix_T: int32, the system and developer messages that open every document.
    """

    def __init__(self, config: RenderConfig) -> None:
        self.config = config
        self.prefix_T = np.concatenate(
            [
                *(_header("system"), _encode(config.system_text()), _ids(tokenizer.END)),
                *(_header("developer"), _encode(config.developer_text()), _ids(tokenizer.END)),
            ]
        )
        self._to_user_T = np.concatenate([self.prefix_T, _header("user")])
        self._to_analysis_T = np.concatenate(
            [_ids(tokenizer.END), _header("assistant", "analysis")]
        )
        self._to_final_T = np.concatenate([_ids(tokenizer.END), _header("assistant", "final")])
        self._close_T = _ids(tokenizer.RETURN, tokenizer.ENDOFTEXT)
        self._fixed_tokens = sum(
            map(len, (self._to_user_T, self._to_analysis_T, self._to_final_T, self._close_T))
        )

    def render(self, row: SourceRow, max_doc_tokens: int) -> RenderedDoc | Reject:
        """The document of `row`, at most `max_doc_tokens` long, or the reason there is none.

        A row of exercise "rag" shows its sources first: user content = source blocks of `constraints`, then the
        query, joined by empty lines. Truncation: the final message stays whole or the row is rejected; then the
        analysis content, then the user content is cut from the left; headers and terminators stay.
        """
        texts = _document_texts(row)
        if isinstance(texts, Reject):
            return texts
        synth_id, user, analysis, final = texts
        language, exercise = row.language or "", row.exercise or ""
        try:
            doc_id = document_id(synth_id)
            user_T, analysis_T, final_T = _encode(user), _encode(analysis), _encode(final)
            _require_utf8(language, exercise)
        except UnicodeEncodeError:  # lone surrogates: bytes that were never valid UTF-8
            return Reject("invalid_text")
        except ValueError:  # the tokenizer's regex gives up, e.g. on a million blanks in a row
            return Reject("untokenizable")
        room = max_doc_tokens - self._fixed_tokens - len(final_T)
        if room < 0:
            return Reject("final_too_long")
        analysis_cut = min(len(analysis_T), max(0, len(user_T) + len(analysis_T) - room))
        user_cut = max(0, len(user_T) + len(analysis_T) - analysis_cut - room)
        tokens_T, spans_T = self._assemble(user_T[user_cut:], analysis_T[analysis_cut:], final_T)
        return RenderedDoc(
            doc_id=doc_id,
            tokens_T=tokens_T,
            spans_T=spans_T,
            language=language,
            exercise=exercise,
            analysis_cut=analysis_cut,
            user_cut=user_cut,
        )

    def _assemble(
        self, user_T: np.ndarray, analysis_T: np.ndarray, final_T: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        parts = (self._to_user_T, user_T, self._to_analysis_T, analysis_T)
        tokens_T = np.concatenate((*parts, self._to_final_T, final_T, self._close_T))
        # The END that closes a message opens the next `_to_...` block but belongs to the message before it.
        analysis_start = len(self._to_user_T) + len(user_T) + 1
        final_start = analysis_start + len(self._to_analysis_T) + len(analysis_T)
        spans_T = np.full(len(tokens_T), SPAN_IGNORED, dtype=np.uint8)
        spans_T[analysis_start:final_start] = SPAN_REASONING
        spans_T[final_start:-1] = SPAN_FINAL
        return tokens_T, spans_T


def document_id(synth_id: str) -> bytes:
    """The 16 bytes that name a document: blake2b-128 of synth_id in UTF-8. Raises UnicodeEncodeError."""
    return hashlib.blake2b(synth_id.encode(), digest_size=16).digest()


def parse(tokens_T: np.ndarray) -> list[Message]:
    """The messages of one whole document, prefix included: the inverse of rendering.

    Accepts exactly: messages `<|start|>role[<|channel|>channel]<|message|>content terminator`, one after the
    other, the last closed by `<|return|>`, then one `<|endoftext|>`. Raises FormatError naming the position.
    """
    ids = np.asarray(tokens_T, dtype=np.int64)
    if len(ids) == 0 or ids[-1] != tokenizer.ENDOFTEXT:
        raise _malformed(len(ids), "the document to end with <|endoftext|>")
    messages, position = [], 0
    while position < len(ids) - 1:
        message, position = _parse_message(ids[:-1], position)
        if message.terminator == tokenizer.RETURN and position != len(ids) - 1:
            raise _malformed(position, "<|endoftext|> after <|return|>")
        messages.append(message)
    if not messages or messages[-1].terminator != tokenizer.RETURN:
        raise _malformed(position, "a last message closed by <|return|>")
    return messages


def _parse_message(ids: np.ndarray, start: int) -> tuple[Message, int]:
    """The message that begins at `start` and the position after its terminator."""
    fitting = (
        (role, channel, start + len(header_T))
        for (role, channel), header_T in _known_headers().items()
        if np.array_equal(ids[start : start + len(header_T)], header_T)
    )
    if (found := next(fitting, None)) is None:
        raise _malformed(start, "the header of a message: a known role, and a channel if assistant")
    role, channel, body = found
    is_control = ids[body:] >= tokenizer.FIRST_CONTROL_ID
    end = body + int(is_control.argmax()) if is_control.any() else len(ids)
    if end == len(ids) or ids[end] not in (tokenizer.END, tokenizer.RETURN, tokenizer.CALL):
        raise _malformed(end, "<|end|>, <|return|> or <|call|> after the content")
    tokens_T = ids[body:end].astype(np.int32)
    message = Message(role=role, channel=channel, tokens_T=tokens_T, terminator=int(ids[end]))
    return message, end + 1


@functools.cache
def _known_headers() -> dict[tuple[Role, Channel | None], np.ndarray]:
    plain = {(role, None): _header(role) for role in ROLES if role != "assistant"}
    return plain | {("assistant", channel): _header("assistant", channel) for channel in CHANNELS}


def _document_texts(row: SourceRow) -> tuple[str, str, str, str] | Reject:
    """The id and the contents of the user, analysis and final messages, or what the row lacks."""
    needed: tuple[tuple[str | None, RejectReason], ...] = (
        (row.synth_id, "missing_id"),
        (row.query, "empty_query"),
        (row.synthetic_reasoning, "empty_reasoning"),
        (row.synthetic_answer, "empty_answer"),
    )
    texts: list[str] = []
    for text, reason in needed:
        if not text or text.isspace():
            return Reject(reason)
        texts.append(text)
    synth_id, user, analysis, final = texts
    if row.exercise == "rag":
        blocks = [match.group().strip() for match in _SOURCE_BLOCK.finditer(row.constraints or "")]
        if not blocks:
            return Reject("rag_without_sources")
        user = "\n\n".join([*blocks, user])
    return synth_id, user, analysis, final


def _header(role: str, channel: str | None = None) -> np.ndarray:
    parts = [_ids(tokenizer.START), _encode(role)]
    if channel is not None:
        parts += [_ids(tokenizer.CHANNEL), _encode(channel)]
    return np.concatenate([*parts, _ids(tokenizer.MESSAGE)])


def _encode(text: str) -> np.ndarray:
    """Ordinary tokens of `text`, int32; control text in it stays ordinary text.

    `encode_to_numpy` and not `encode_ordinary`: no Python list in between (5-10 % of the time), and where the
    regex engine gives up it raises ValueError while the other panics.
    """
    ids = tokenizer.encoding().encode_to_numpy(text, allowed_special=set(), disallowed_special=())
    return ids.view(np.int32)


def _require_utf8(*labels: str) -> None:
    for label in labels:
        label.encode()


def _ids(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def _malformed(position: int, expected: str) -> FormatError:
    return FormatError(
        f"malformed Harmony document at token {position}",
        expected=expected,
        remedy="the tokens were not written by this renderer: run `vpmoe-data verify` on the dataset",
    )
