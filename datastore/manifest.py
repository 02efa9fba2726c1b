"""Manifests: what a dataset and a target store are, in one JSON file each, written last (docs/format.md, "Files").

The file holds the model's keys and `self_sha256`, the hash of the others; so a hand-edited or damaged manifest is
refused before any number in it is believed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import model_validator

from common import tokenizer
from common.config import AnyConfig, Config, parse_config
from common.errors import ConfigError, FormatError
from common.files import canonical_json, sha256_bytes, write_json
from datastore.shard import FORMAT_VERSION, FileEntry, shard_name
from datastore.types import SPLITS, Split

MANIFEST_NAME = "manifest.json"
_SELF_HASH = "self_sha256"
_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")


class TokenizerInfo(Config):
    """The tokenizer that made the ids. ranks_sha256: hex, of the uncompressed ranks file."""

    name: str = tokenizer.NAME
    ranks_sha256: str = tokenizer.RANKS_SHA256
    vocab_size: int = tokenizer.VOCAB_SIZE


class SourceFile(Config):
    """A raw input file. name: without folders. rows: as read, before any reject."""

    name: str
    bytes: int
    sha256: str
    rows: int


class SpanTokens(Config):
    """Tokens by span inside documents; padding is not in `ignored`."""

    ignored: int
    reasoning: int
    final: int


class SplitCounts(Config):
    """What a split holds.

    tokens: inside documents, the sum of tokens_by_span; with padding it makes rows * seq_len.
    control_targets: tokens with a span other than 0 and an id >= 199998.
    fill: tokens / (rows * seq_len), 0 for no rows.
    """

    rows: int
    documents: int
    tokens: int
    tokens_by_span: SpanTokens
    control_targets: int
    padding: int
    fill: float


class SampledCounts(Config):
    """Sums over rollouts and the rows that hold them.

    reasoning, final: sampled tokens by span. verdicts, modes: rollouts by verdict, and by the reasoning effort that the
    teacher is shown. first_version, last_version: lowest and highest policy version.
    """

    rollouts: int
    rows: int
    reasoning: int
    final: int
    verdicts: dict[str, int]
    modes: dict[str, int]
    first_version: int
    last_version: int

    @property
    def tokens(self) -> int:
        """Sampled tokens, which are the training positions."""
        return self.reasoning + self.final

    def merged(self, other: SampledCounts) -> SampledCounts:
        """The sums of both."""
        return SampledCounts(
            rollouts=self.rollouts + other.rollouts,
            rows=self.rows + other.rows,
            reasoning=self.reasoning + other.reasoning,
            final=self.final + other.final,
            verdicts=_added(self.verdicts, other.verdicts),
            modes=_added(self.modes, other.modes),
            first_version=min(self.first_version, other.first_version),
            last_version=max(self.last_version, other.last_version),
        )


class RolloutsInfo(Config):
    """What makes a dataset one of rollouts (docs/format.md, "Rollouts").

    prompts: fingerprint of the dataset that gave the prompts. identity: of the run, as the buffer was opened with it.
    files: the rollouts' own columns by split, relative to the folder rollouts/. counts: of each split.
    """

    prompts: str
    identity: dict[str, Any]
    files: dict[Split, tuple[FileEntry, ...]]
    counts: dict[Split, SampledCounts]

    @model_validator(mode="after")
    def _names_are_canonical(self) -> RolloutsInfo:
        _require_names(self.files)
        return self


class _Manifest(Config):
    format_version: int
    tokenizer: TokenizerInfo
    files: dict[Split, tuple[FileEntry, ...]]

    @model_validator(mode="after")
    def _names_are_canonical(self) -> _Manifest:
        _require_names(self.files)
        return self

    def entries(self, split: Split) -> tuple[FileEntry, ...]:
        """The shards of a split in order; none when the store has no such split."""
        return self.files.get(split, ())


class DatasetManifest(_Manifest):
    """A dataset of packed rows. config: the resolved DataConfig. rejects, truncated: documents by reason.

    origin: the dataset that a repack was made from, null for a build. rollouts: null but for a sealed buffer of
    rollouts, whose config, renderer, sources and split rule are those of the dataset that gave the prompts.
    """

    dataset_id: str
    fingerprint: str
    seq_len: int
    git_sha: str | None
    config: dict[str, Any]
    config_hash: str
    renderer_version: str
    sources: tuple[SourceFile, ...]
    split_rule: dict[str, Any]
    counts: dict[Split, SplitCounts]
    rejects: dict[str, int]
    truncated: dict[str, int]
    origin: dict[str, Any] | None = None
    rollouts: RolloutsInfo | None = None

    @model_validator(mode="after")
    def _rollouts_stand_beside(self) -> DatasetManifest:
        if self.rollouts is not None:
            _require_beside(self.files, self.rollouts.files)
        return self


class QuarantinedDocument(Config):
    """A document that no engine could score, and why. row: within its shard. doc_id: hex."""

    split: Split
    shard: int
    row: int
    document: int
    doc_id: str
    reason: str


class TargetManifest(_Manifest):
    """The targets of one teacher for one dataset. teacher: its resolved config. mode: {system, reasoning}.

    budget: the error budget of datastore/budget.py by span; shard_budgets: the same of each shard, in order.
    alignment: the report of the alignment gate. selection: which documents were to be scored
    (datastore/selection.py); quarantine: those of them that no engine could score. id_order_sha256: of the order of
    ids that the codec uses (datastore/id_order.py). canary, self_noise: what datastore/canary.py measured.
    origin: the dataset and targets that a repack carried over, null for a scoring. logprobs: of rollouts, the shards of
    exact logprobs by split, relative to the folder logprobs/ of the targets; null for other datasets.
    """

    codec_version: int
    target_id: str
    dataset_fingerprint: str
    teacher: dict[str, Any]
    slug: str
    engine: dict[str, Any]
    mode: dict[str, Any]
    temperature: float
    threshold: float
    budget: dict[str, Any]
    alignment: dict[str, Any]
    counts: dict[str, Any]
    id_order_sha256: str
    selection: dict[str, Any]
    shard_budgets: dict[Split, tuple[dict[str, Any], ...]]
    quarantine: tuple[QuarantinedDocument, ...]
    canary: dict[str, Any]
    self_noise: dict[str, Any]
    origin: dict[str, Any] | None = None
    logprobs: dict[Split, tuple[FileEntry, ...]] | None = None

    @model_validator(mode="after")
    def _logprobs_stand_beside(self) -> TargetManifest:
        if self.logprobs is not None:
            _require_names(self.logprobs)
            _require_beside(self.files, self.logprobs)
        return self


AnyManifest = TypeVar("AnyManifest", bound=_Manifest)


def dataset_fingerprint(
    dataset_id: str, seq_len: int, files: Mapping[Split, Sequence[FileEntry]]
) -> str:
    """Hex sha256 of what a dataset holds, and of nothing else (no clock, path, host or worker count)."""
    shards = [
        [entry.name, entry.rows, entry.bytes, entry.sha256]
        for split in SPLITS
        for entry in files.get(split, ())
    ]
    content = {"dataset_id": dataset_id, "seq_len": seq_len, "shards": shards}
    return sha256_bytes(canonical_json(content))


def target_folder(dataset_folder: Path, slug: str) -> Path:
    """Where the targets of the teacher `slug` lie. Raises ConfigError for a name that is no plain folder name."""
    if not _SLUG.fullmatch(slug):
        raise ConfigError("the teacher's name", got=repr(slug), expected="a-z 0-9 . _ -")
    return Path(dataset_folder) / "targets" / slug


def commit_manifest(folder: Path, manifest: DatasetManifest | TargetManifest) -> None:
    """Write folder/manifest.json atomically: the last write of a stage, which makes the store exist."""
    values = self_hashed(manifest)
    values["files"] = values.pop("files")  # the long list last, for the person who opens the file
    write_json(Path(folder) / MANIFEST_NAME, values)


def self_hashed(record: Config) -> dict[str, Any]:
    """The values of a record and `self_sha256`, their hash, as they are written; `read_self_hashed` reads them."""
    values = record.resolved()
    values[_SELF_HASH] = _hash(values)
    return values


def load_dataset_manifest(folder: Path) -> DatasetManifest:
    """The manifest of a dataset. Raises FormatError: absent, damaged, another version, another tokenizer."""
    remedy = "build it with `vpmoe-data build`, or check the path"
    if buffer_path(folder).is_file():
        remedy = "it is a buffer of rollouts: its run seals it after the last step; until then `verify` reads it"
    manifest = _load(DatasetManifest, Path(folder), "dataset", remedy)
    expected = dataset_fingerprint(manifest.dataset_id, manifest.seq_len, manifest.files)
    if manifest.fingerprint != expected:
        raise FormatError(
            f"{Path(folder) / MANIFEST_NAME}: the fingerprint is not that of the listed files",
            got=manifest.fingerprint,
            expected=expected,
            remedy="build the dataset again",
        )
    return manifest


def buffer_path(folder: Path) -> Path:
    """The file that makes a folder a rollout buffer, sealed or not."""
    return Path(folder) / "rollouts" / "buffer.json"


def load_target_manifest(dataset_folder: Path, slug: str) -> TargetManifest:
    """The manifest of a teacher's targets. Raises FormatError: absent, damaged, another version or tokenizer."""
    remedy = f"score it with `vpmoe-data score --teacher {slug}`, or name another teacher"
    return _load(TargetManifest, target_folder(dataset_folder, slug), "target store", remedy)


def read_self_hashed(cls: type[AnyConfig], path: Path) -> AnyConfig:
    """A record that `self_hashed` wrote to `path`. Raises FileNotFoundError; FormatError when it is damaged."""
    raw = _read_object(path)
    if not _is_intact(raw):
        raise _damaged(path, "does not match its own hash")
    try:
        return parse_config(cls, raw, str(path))
    except ConfigError as error:
        raise FormatError(str(error)) from None


def _load(cls: type[AnyManifest], folder: Path, kind: str, remedy: str) -> AnyManifest:
    path = folder / MANIFEST_NAME
    try:
        raw = _read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FormatError(f"{folder} is no {kind}: it has no manifest", remedy=remedy) from None
    if raw.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path} has another format version",
            got=raw.get("format_version"),
            expected=FORMAT_VERSION,
            remedy="use the version of vpMoE that wrote it, or build it again",
        )
    if not _is_intact(raw):
        raise _damaged(path, "does not match its own hash")
    try:
        manifest = parse_config(cls, raw, str(path))
    except ConfigError as error:
        raise FormatError(str(error), remedy=remedy) from None
    if manifest.tokenizer != TokenizerInfo():
        raise FormatError(
            f"{path} was made with another tokenizer",
            got=manifest.tokenizer,
            expected=TokenizerInfo(),
            remedy=remedy,
        )
    return manifest


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except ValueError as error:
        raise _damaged(path, f"is not JSON: {error}") from None
    except RecursionError:
        raise _damaged(path, "is nested too deeply") from None
    if not isinstance(raw, dict):
        raise _damaged(path, "is not a JSON object")
    return raw


def _require_names(files: Mapping[Split, Sequence[FileEntry]]) -> None:
    for split, entries in files.items():
        for shard, entry in enumerate(entries):
            if entry.name != shard_name(split, shard):
                raise ValueError(f"file {shard} of {split} is named {entry.name}")


def _require_beside(
    files: Mapping[Split, Sequence[FileEntry]], others: Mapping[Split, Sequence[FileEntry]]
) -> None:
    if wrong := [split for split in files if len(files[split]) != len(others.get(split, ()))]:
        raise ValueError(f"not every {wrong[0]} shard has its rollouts beside it")


def _added(mine: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
    return {key: mine.get(key, 0) + theirs.get(key, 0) for key in sorted({*mine, *theirs})}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _is_intact(raw: dict[str, Any]) -> bool:
    """Whether the self hash, which is removed from `raw`, is that of the rest."""
    found = raw.pop(_SELF_HASH, None)
    try:
        return found == _hash(raw)
    except UnicodeEncodeError:  # half a surrogate pair, which no writer can have hashed
        return False


def _hash(values: dict[str, Any]) -> str:
    return sha256_bytes(canonical_json(values))


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(
        f"manifest {path} {what}",
        remedy="restore the file or run the stage that wrote it again",
    )
