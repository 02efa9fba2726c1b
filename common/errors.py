"""The project's errors. A message says what, got, expected, and what to do.

Exit codes of both programs: 0 done, 1 the data or the run is at fault, 2 the command line or a config is.
"""

from __future__ import annotations

_UNSET = object()


class VpmoeError(Exception):
    """Base of every error that a user can cause or repair."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object = _UNSET,
        expected: object = _UNSET,
        remedy: str | None = None,
    ) -> None:
        self.what, self.remedy = what, remedy
        parts = [what.rstrip(".")]
        if got is not _UNSET:
            parts.append(f"got {got}")
        if expected is not _UNSET:
            parts.append(f"expected {expected}")
        if remedy:
            parts.append(remedy.rstrip("."))
        message = "; ".join(parts)
        super().__init__(message if message.endswith("?") else message + ".")


class ConfigError(VpmoeError):
    """A config file, an override or a command line is wrong."""

    exit_code = 2


class SourceError(VpmoeError):
    """The raw input (parquet files, hub revision) cannot be used."""


class FormatError(VpmoeError):
    """A file of a dataset, target store or checkpoint is damaged, missing, foreign or of another version."""


class AlignmentError(VpmoeError):
    """Teacher targets do not belong to the tokens they stand beside."""


class ResumeError(VpmoeError):
    """A run or a stage cannot go on from what lies on disk."""


class EngineError(VpmoeError):
    """An engine (vLLM, Megatron-Core) cannot run what was asked, or died."""
