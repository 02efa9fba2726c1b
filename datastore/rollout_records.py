"""Where the files of a rollout buffer lie, and the small records that say which of its shards are there.

A record is written after the files that it lists: without it they are leftovers. Each holds the hash of itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.config import AnyConfig, Config
from common.errors import FormatError
from common.files import canonical_json, sha256_bytes, write_json
from common.tokenizer import RANKS_SHA256
from datastore.budget import BudgetSums
from datastore.codec import CODEC_VERSION
from datastore.container import FileEntry
from datastore.manifest import (
    QuarantinedDocument,
    SampledCounts,
    read_self_hashed,
    self_hashed,
    target_folder,
)
from datastore.packing import PACKING_VERSION, PackConfig
from datastore.shard import FORMAT_VERSION, shard_name
from datastore.types import Split
from datastore.unit import WORK, RowCounts


class BufferRecord(Config):
    """rollouts/buffer.json: what a buffer was opened with. identity: of the run, as its owner states it."""

    identity: dict[str, Any]
    seq_len: int
    slug: str
    threshold: float

    @property
    def dataset_id(self) -> str:
        """Hex sha256 of all that the rows depend on, which binds them to this buffer."""
        content = {
            "format_version": FORMAT_VERSION,
            "tokenizer": RANKS_SHA256,
            "packing_version": PACKING_VERSION,
            "pack": PackConfig().resolved(),
            "rollouts": self.resolved(),
        }
        return sha256_bytes(canonical_json(content))

    def target_id(self, order_sha256: str) -> str:
        """Hex sha256 of all that the targets depend on."""
        content = {
            "dataset_id": self.dataset_id,
            "codec_version": CODEC_VERSION,
            "id_order_sha256": order_sha256,
        }
        return sha256_bytes(canonical_json(content))


class SampledRecord(Config):
    """A sampled shard. entry: its packed rows; rollouts: their own columns; row_counts: as a manifest counts them."""

    dataset_id: str
    split: Split
    shard: int
    entry: FileEntry
    rollouts: FileEntry
    row_counts: RowCounts
    counts: SampledCounts


class ScoredRecord(Config):
    """The targets of a sampled shard. documents, tokens: scored ones. logprobs: the exact ones."""

    target_id: str
    id_order_sha256: str
    split: Split
    shard: int
    entry: FileEntry
    logprobs: FileEntry
    documents: int
    tokens: int
    sums: BudgetSums
    quarantine: tuple[QuarantinedDocument, ...] = ()


class BufferPlace:
    """The paths of a buffer's folder."""

    def __init__(self, folder: Path, slug: str) -> None:
        self.folder = Path(folder)
        self.rollouts = self.folder / "rollouts"
        self.targets = target_folder(self.folder, slug)
        self.logprobs = self.targets / "logprobs"

    def sampled(self, split: Split, shard: int) -> Path:
        """The record of a sampled shard."""
        return (self.rollouts / shard_name(split, shard)).with_suffix(".json")

    def scored(self, split: Split, shard: int) -> Path:
        """The record of a shard's targets."""
        return (self.logprobs / shard_name(split, shard)).with_suffix(".json")

    def shard_folders(self, split: Split) -> dict[Path, Path]:
        """Each folder with shards of the split -> the folder whose records list them."""
        return {
            self.folder / split: self.rollouts / split,
            self.rollouts / split: self.rollouts / split,
            self.targets / split: self.logprobs / split,
            self.logprobs / split: self.logprobs / split,
        }

    @property
    def work(self) -> Path:
        """Where the lock lies."""
        return self.folder / WORK


def read_record(cls: type[AnyConfig], path: Path) -> AnyConfig:
    """A record of the buffer. Raises FormatError when it is absent or damaged."""
    try:
        return read_self_hashed(cls, path)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing", remedy="restore the file") from None


def write_record(path: Path, record: Config) -> None:
    """Write a record durably: the commit of what it lists."""
    write_json(path, self_hashed(record))
