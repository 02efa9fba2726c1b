"""The config of a dataset: what `vpmoe-data build` makes, and what the manifest of every dataset keeps."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from common.config import Config
from datastore.harmony import RenderConfig
from datastore.packing import PackConfig
from datastore.source import SourceConfig
from datastore.split import SplitConfig


class ShardConfig(Config):
    """source_rows: rows of the input that make one train shard. valid_rows: packed rows of one valid shard."""

    source_rows: int = Field(default=65_536, ge=1)
    valid_rows: int = Field(default=16_384, ge=1)


class DataConfig(Config):
    """How a dataset is made. max_doc_tokens is seq_len unless given; out is the dataset's folder."""

    source: SourceConfig
    render: RenderConfig = RenderConfig()
    split: SplitConfig = SplitConfig()
    pack: PackConfig = PackConfig()
    shard: ShardConfig = ShardConfig()
    seq_len: int = Field(default=2048, ge=2)
    max_doc_tokens: int = Field(ge=2)
    out: str

    @model_validator(mode="before")
    @classmethod
    def _documents_fill_rows(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("max_doc_tokens") is None:
            return {
                **raw,
                "max_doc_tokens": raw.get("seq_len", cls.model_fields["seq_len"].default),
            }
        return raw

    @model_validator(mode="after")
    def _documents_fit_rows(self) -> DataConfig:
        if self.max_doc_tokens > self.seq_len:
            raise ValueError(
                f"max_doc_tokens {self.max_doc_tokens} is more than seq_len {self.seq_len}: "
                "a document is never split across rows"
            )
        return self
