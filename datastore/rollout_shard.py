"""Shards of what rollouts have beside their tokens: their own columns, and the teacher's exact logprobs.

One row a rollout, in the order of sampling (docs/format.md, "Rollouts"). Hashed and bound to their place as the shards
of datastore/shard.py are: what is damaged, cut or exchanged is a FormatError, never a wrong number.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from common.errors import AlignmentError
from datastore.columns import (
    DOC_ID_BYTES,
    TextViews,
    fixed_bytes,
    require_no_nulls,
    text_views,
)
from datastore.container import FileEntry, MappedShard, as_numpy, write_container
from datastore.shard import grouped, place_bytes, shard_metadata, shard_name
from datastore.types import Split

_REMEDY = "restore the file; `vpmoe-data verify` lists every damaged file"
_NUMBERS = {
    "row": pa.int32(),
    "document": pa.int32(),
    "prompt": pa.int64(),
    "sample": pa.int32(),
    "policy_version": pa.int64(),
    "prompt_tokens": pa.int32(),
    "reasoning_tokens": pa.int32(),
    "final_tokens": pa.int32(),
}
_TEXTS = ("reasoning", "verdict")
_VALUES = struct.Struct("<iiqiqiii")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredRollout:
    """What is stored of a rollout beside its tokens.

    row, document: where its tokens lie in the token shard of the same number; row_hash: of that row.
    prompt_id: 16 bytes, the id of the document that gave the prompt. *_tokens: of each span, <|endoftext|> in none.
    The others are those of `Rollout`.
    """

    row: int
    document: int
    prompt_id: bytes
    prompt: int
    sample: int
    policy_version: int
    reasoning: str
    verdict: str
    prompt_tokens: int
    reasoning_tokens: int
    final_tokens: int
    logprobs_S: np.ndarray
    row_hash: int


def hash_rollout(
    rollout: StoredRollout, *, dataset_id: str, split: Split, shard: int, index: int
) -> int:
    """xxh3_64 of a rollout's columns, of the row of its tokens and of its place."""
    digest = xxhash.xxh3_64(place_bytes(dataset_id, split, shard, index))
    digest.update(struct.pack("<Q", rollout.row_hash))
    digest.update(_VALUES.pack(*(getattr(rollout, name) for name in _NUMBERS)))
    digest.update(rollout.prompt_id)
    for text in (rollout.reasoning, rollout.verdict):
        encoded = text.encode()
        digest.update(_LENGTH.pack(len(encoded)))
        digest.update(encoded)
    digest.update(np.ascontiguousarray(rollout.logprobs_S, "<f4"))
    return digest.intdigest()


def hash_logprobs(
    logprobs_S: np.ndarray,
    rollout_hash: int,
    *,
    target_id: str,
    split: Split,
    shard: int,
    index: int,
) -> int:
    """xxh3_64 of a teacher's logprobs, of the rollout that they score and of their place."""
    digest = xxhash.xxh3_64(place_bytes(target_id, split, shard, index))
    digest.update(struct.pack("<Q", rollout_hash))
    digest.update(np.ascontiguousarray(logprobs_S, "<f4"))
    return digest.intdigest()


def write_rollout_shard(
    folder: Path, rollouts: Sequence[StoredRollout], *, dataset_id: str, split: Split, shard: int
) -> FileEntry:
    """Write folder/<shard_name>, durable and complete or not there at all."""
    schema = _rollout_schema(dataset_id, split, shard)
    place = {"dataset_id": dataset_id, "split": split, "shard": shard}

    def batches() -> Iterator[pa.RecordBatch]:
        for first, group in grouped(rollouts):
            hashes = [hash_rollout(one, **place, index=first + i) for i, one in enumerate(group)]
            columns = {
                name: pa.array([getattr(one, name) for one in group], kind)
                for name, kind in _NUMBERS.items()
            }
            columns["prompt_id"] = pa.array(
                [one.prompt_id for one in group], pa.binary(DOC_ID_BYTES)
            )
            for name in _TEXTS:
                columns[name] = pa.array([getattr(one, name) for one in group], pa.utf8())
            columns["logprobs"] = _float_lists([one.logprobs_S for one in group], schema)
            columns["row_hash"] = pa.array(np.array([one.row_hash for one in group], np.uint64))
            columns["rollout_hash"] = pa.array(np.array(hashes, np.uint64))
            yield pa.record_batch([columns[name] for name in schema.names], schema=schema)

    return write_container(Path(folder), shard_name(split, shard), schema, batches())


def write_logprob_shard(
    folder: Path,
    logprobs: Sequence[tuple[int, np.ndarray]],
    *,
    target_id: str,
    split: Split,
    shard: int,
) -> FileEntry:
    """Write (rollout_hash, float32 [S]) of each rollout into folder/<shard_name>, durable or not there at all."""
    schema = _logprob_schema(target_id, split, shard)
    place = {"target_id": target_id, "split": split, "shard": shard}

    def batches() -> Iterator[pa.RecordBatch]:
        for first, group in grouped(logprobs):
            hashes = [
                hash_logprobs(values_S, of, **place, index=first + i)
                for i, (of, values_S) in enumerate(group)
            ]
            columns = [
                _float_lists([values_S for _, values_S in group], schema),
                pa.array(np.array([of for of, _ in group], np.uint64)),
                pa.array(np.array(hashes, np.uint64)),
            ]
            yield pa.record_batch(columns, schema=schema)

    return write_container(Path(folder), shard_name(split, shard), schema, batches())


@dataclass(frozen=True, slots=True)
class _RolloutViews:
    numbers: dict[str, np.ndarray]
    prompt_ids: memoryview
    texts: dict[str, TextViews]
    logprobs: _FloatLists
    row_hashes: np.ndarray
    rollout_hashes: np.ndarray


class RolloutShard(MappedShard[_RolloutViews]):
    """Reads the rollouts beside one token shard. Raises FormatError unless the file is the one that is asked for."""

    def __init__(
        self, folder: Path, entry: FileEntry, *, dataset_id: str, split: Split, shard: int
    ) -> None:
        self._place = {"dataset_id": dataset_id, "split": split, "shard": shard}
        super().__init__(folder, entry, _rollout_schema(dataset_id, split, shard), _REMEDY)

    def rollout(self, index: int) -> tuple[StoredRollout, int]:
        """Rollout `index`, its hash checked, and that hash. Raises FormatError, IndexError."""
        views, i = self._locate(index)
        try:
            texts = {name: of.of(slice(i, i + 1))[0] for name, of in views.texts.items()}
        except UnicodeDecodeError as error:
            self._fail(f"rollout {index} is damaged: a text is no UTF-8", got=f"'{error}'")
        stored = StoredRollout(
            prompt_id=bytes(views.prompt_ids[i * DOC_ID_BYTES : (i + 1) * DOC_ID_BYTES]),
            logprobs_S=views.logprobs.of(i),
            row_hash=int(views.row_hashes[i]),
            **texts,
            **{name: int(values[i]) for name, values in views.numbers.items()},
        )
        expected = int(views.rollout_hashes[i])
        if (found := hash_rollout(stored, **self._place, index=index)) != expected:
            self._fail(
                f"rollout {index} is damaged: its hash differs",
                got=f"{found:016x}",
                expected=f"{expected:016x}",
            )
        return stored, expected

    def _views_of(self, batch: pa.RecordBatch) -> _RolloutViews:
        require_no_nulls(batch)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        return _RolloutViews(
            numbers={name: as_numpy(columns[name]) for name in _NUMBERS},
            prompt_ids=fixed_bytes(columns["prompt_id"]),
            texts={name: text_views(columns[name]) for name in _TEXTS},
            logprobs=_FloatLists.of_column(columns["logprobs"]),
            row_hashes=as_numpy(columns["row_hash"]),
            rollout_hashes=as_numpy(columns["rollout_hash"]),
        )


@dataclass(frozen=True, slots=True)
class _LogprobViews:
    logprobs: _FloatLists
    rollout_hashes: np.ndarray
    hashes: np.ndarray


class LogprobShard(MappedShard[_LogprobViews]):
    """Reads the exact logprobs beside one target shard. Raises FormatError unless it is the one that is asked for."""

    def __init__(
        self, folder: Path, entry: FileEntry, *, target_id: str, split: Split, shard: int
    ) -> None:
        self._place = {"target_id": target_id, "split": split, "shard": shard}
        super().__init__(folder, entry, _logprob_schema(target_id, split, shard), _REMEDY)

    def logprobs(self, index: int, rollout_hash: int) -> np.ndarray:
        """float32 [S] of rollout `index`, their hash checked. rollout_hash: of the rollout they must score.

        Raises FormatError (damage), AlignmentError (intact logprobs of another rollout), IndexError.
        """
        views, i = self._locate(index)
        values_S, scored = views.logprobs.of(i), int(views.rollout_hashes[i])
        found, expected = (
            hash_logprobs(values_S, scored, **self._place, index=index),
            int(views.hashes[i]),
        )
        if found != expected:
            self._fail(
                f"row {index} is damaged: its hash differs",
                got=f"{found:016x}",
                expected=f"{expected:016x}",
            )
        if scored != rollout_hash:
            raise AlignmentError(
                f"shard {self.path} row {index} holds the logprobs of another rollout",
                got=f"rollout hash {scored:016x}",
                expected=f"{rollout_hash:016x}",
            )
        return values_S

    def _views_of(self, batch: pa.RecordBatch) -> _LogprobViews:
        require_no_nulls(batch)
        logprobs, rollout_hashes, hashes = batch.columns
        return _LogprobViews(
            _FloatLists.of_column(logprobs), as_numpy(rollout_hashes), as_numpy(hashes)
        )


@dataclass(frozen=True, slots=True)
class _FloatLists:
    """Lists of a column that Arrow has validated; slices clamp, so none reaches outside the map."""

    offsets: np.ndarray
    values: np.ndarray

    @classmethod
    def of_column(cls, column: pa.ListArray) -> _FloatLists:
        return cls(as_numpy(column.offsets), as_numpy(column.values))

    def of(self, i: int) -> np.ndarray:
        return self.values[int(self.offsets[i]) : int(self.offsets[i + 1])]


def _float_lists(lists: Sequence[np.ndarray], schema: pa.Schema) -> pa.ListArray:
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(values) for values in lists], out=offsets[1:])
    values = pa.array(np.concatenate(lists).astype(np.float32, copy=False))
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=schema.field("logprobs").type)


def _field(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _rollout_schema(dataset_id: str, split: Split, shard: int) -> pa.Schema:
    kinds = {
        **_NUMBERS,
        "prompt_id": pa.binary(DOC_ID_BYTES),
        **dict.fromkeys(_TEXTS, pa.utf8()),
        "logprobs": pa.list_(_field("item", pa.float32())),
        "row_hash": pa.uint64(),
        "rollout_hash": pa.uint64(),
    }
    metadata = shard_metadata("rollouts", split, shard, dataset_id=dataset_id)
    return pa.schema([_field(name, kind) for name, kind in kinds.items()], metadata)


def _logprob_schema(target_id: str, split: Split, shard: int) -> pa.Schema:
    fields = [
        _field("logprobs", pa.list_(_field("item", pa.float32()))),
        _field("rollout_hash", pa.uint64()),
        _field("hash", pa.uint64()),
    ]
    return pa.schema(fields, shard_metadata("logprobs", split, shard, target_id=target_id))
