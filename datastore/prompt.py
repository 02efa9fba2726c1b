"""What the teacher is shown of a document: its own tokens, or the same with another constant prefix. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.config import parse_config
from common.errors import AlignmentError, ConfigError
from datastore.harmony import RenderConfig, Renderer
from datastore.manifest import DatasetManifest
from datastore.target import content_key, target_positions
from datastore.teacher import TeacherConfig


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoreRequest:
    """One document as the teacher sees it.

    prompt_T: int32 ids shown to the teacher. positions_P: int32, ascending, the scored positions of the document.
    shift: position in the document minus position in the prompt. content_key: of the document's own tokens.
    """

    prompt_T: np.ndarray
    positions_P: np.ndarray
    shift: int
    content_key: int


@dataclass(frozen=True)
class Prefix:
    """The constant tokens that open a document, as stored and as the teacher is shown them; none are swapped if equal.

    Positions of the document are those of the prompt plus `shift`.
    """

    stored_T: np.ndarray
    shown_T: np.ndarray
    system_text: str | None
    reasoning: str | None

    @classmethod
    def swapped(cls, stored: RenderConfig, shown: RenderConfig) -> Prefix:
        """The constant opening that `stored` wrote, in whose place the teacher is shown that of `shown`."""
        return cls(
            Renderer(stored).prefix_T,
            Renderer(shown).prefix_T,
            shown.system_text(),
            shown.reasoning,
        )

    @classmethod
    def none(cls, reasoning: str | None = None) -> Prefix:
        """Nothing is swapped: the teacher reads the document's own tokens."""
        empty_T = np.empty(0, np.int32)
        return cls(empty_T, empty_T, None, reasoning)

    @property
    def shift(self) -> int:
        return len(self.stored_T) - len(self.shown_T)

    def request(self, tokens_T: np.ndarray, spans_T: np.ndarray) -> ScoreRequest:
        """The request of one document. Raises AlignmentError when it does not open with the stored prefix."""
        size = len(self.stored_T)
        if not np.array_equal(tokens_T[:size], self.stored_T):
            raise AlignmentError(
                "a document does not open with the prefix of its dataset's render config",
                remedy="score it with `system: null`",
            )
        return ScoreRequest(
            prompt_T=np.concatenate([self.shown_T, tokens_T[size:]]),
            positions_P=target_positions(tokens_T, spans_T),
            shift=self.shift,
            content_key=content_key(tokens_T),
        )


def document_prefix(manifest: DatasetManifest, teacher: TeacherConfig) -> Prefix:
    """What opens each document, and what the teacher is shown in its place."""
    if teacher.system is None:
        return Prefix.none(manifest.config.get("render", {}).get("reasoning"))
    stored = parse_config(RenderConfig, manifest.config["render"], "the dataset's render config")
    return Prefix.swapped(stored, teacher.system.applied_to(stored))


def require_fitting(manifest: DatasetManifest, teacher: TeacherConfig, prefix: Prefix) -> None:
    """ConfigError when the teacher could be shown more tokens than the engine takes."""
    longest = min(manifest.seq_len, manifest.config.get("max_doc_tokens", manifest.seq_len))
    longest -= prefix.shift
    if longest > teacher.engine.max_model_len:
        raise ConfigError(
            f"teacher {teacher.name} is shown documents of up to {longest} tokens",
            got=f"engine.max_model_len {teacher.engine.max_model_len}",
            expected=f"at least {longest}",
            remedy=f"give engine.max_model_len={longest}",
        )
