"""What a teacher says of itself (`/identity`, docs/serve.md), held against what a run needs. Pure."""

from __future__ import annotations

from typing import Any, get_args

from common.errors import AlignmentError, ConfigError
from datastore.harmony import Reasoning, RenderConfig, Renderer
from datastore.manifest import TokenizerInfo
from trainer.opd.config import TeacherServerConfig

# What a teacher is. The other keys of /identity say how it is served: versions and limits may change under way.
STABLE_KEYS = (
    "teacher",
    "teacher_id",
    "weights",
    "tokenizer",
    "threshold",
    "temperature",
    "dtype",
    "system",
)
SERVED_KEYS = ("model", "revision", "engine", "vpmoe", "codec_version", "canary")
_CANARY_FIGURES = ("positions", "mean_realised", "top1", "mean_entropy")


def require_teacher(config: TeacherServerConfig, identity: dict[str, Any]) -> None:
    """ConfigError with everything that keeps who answers from teaching this run."""
    absent = [key for key in STABLE_KEYS if key not in identity]
    if absent:
        raise ConfigError(
            f"{config.url} does not say its {', '.join(absent)}",
            remedy="run server and trainer from the same version",
        )
    tokenizer, ours = identity["tokenizer"], TokenizerInfo().resolved()
    checks = [
        ("teacher", identity["teacher"], config.name),
        *((f"tokenizer.{key}", tokenizer.get(key), value) for key, value in ours.items()),
        ("temperature", identity["temperature"], 1.0),
    ]
    canary = identity.get("canary") or {}
    if not all(key in canary for key in _CANARY_FIGURES):
        checks.append(("canary", canary or None, "figures of a passed one"))
    wrong = [(name, found, wanted) for name, found, wanted in checks if found != wanted]
    if wrong:
        raise ConfigError(
            f"{config.url} cannot teach this run",
            got=", ".join(f"{name} {shown(found)}" for name, found, _ in wrong),
            expected=", ".join(f"{name} {wanted}" for name, _, wanted in wrong),
            remedy="start the server with the teacher of this run, or give teacher.name and teacher.url",
        )


def require_same(url: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """AlignmentError with every stable key that differs."""
    wrong = [key for key in STABLE_KEYS if found.get(key) != expected.get(key)]
    if wrong:
        raise AlignmentError(
            f"{url} is another teacher than the one that this run began with",
            got=", ".join(f"{key} {shown(found.get(key))}" for key in wrong),
            expected=", ".join(f"{key} {shown(expected.get(key))}" for key in wrong),
            remedy="start the server with that teacher",
        )


def shown(value: object) -> str:
    """A value in a message, cut where it is long: a teacher has many weight files."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def longest_shown(render: RenderConfig, system: dict[str, Any] | None, seq_len: int) -> int:
    """Tokens that the teacher is shown of a document of seq_len, under its own system text and any effort."""
    own = {key: value for key, value in (system or {}).items() if value is not None}
    prefixes = [
        Renderer(render.model_copy(update=own | {"reasoning": effort})).prefix_T
        for effort in get_args(Reasoning)
    ]
    longest = max(len(prefix_T) for prefix_T in prefixes)
    return seq_len + max(0, longest - len(Renderer(render).prefix_T))
