"""The rollout buffer: a dataset that grows one micro-shard at a time, and is read while it grows.

    buffer = RolloutBuffer.open(folder, identity, seq_len=4096, slug="gpt-oss-120b", threshold=1 / 50)
    shard = buffer.append(rollouts)                        # durable on return
    targets = client.score(buffer.score_documents(shard))  # the teacher
    buffer.add_targets(shard, targets)                     # durable on return; `encoder` does it beside the caller
    buffer.rows(shard)                                     # what the trainer takes, in any process: `open_reader`
    buffer.seal(teacher, prompts, held_out, its_targets)   # now `vpmoe-train kd dataset=FOLDER` reads it

A shard is there when its record is (datastore/rollout_records.py). What a killed writer left of an unfinished one is
swept when the buffer is opened again; nothing else is ever changed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.differences import difference_table, differences
from common.errors import FormatError, ResumeError
from common.files import canonical_json, exclusive_lock, full_disk_told, sweep_temporaries
from datastore.container import FileEntry
from datastore.manifest import (
    MANIFEST_NAME,
    DatasetManifest,
    SampledCounts,
    TargetManifest,
    buffer_path,
    load_dataset_manifest,
    load_target_manifest,
)
from datastore.rollout import Rollout
from datastore.rollout_reader import RolloutReader, ScoredRow
from datastore.rollout_records import (
    BufferPlace,
    BufferRecord,
    read_record,
    write_record,
)
from datastore.rollout_targets import (
    AGAIN,
    TargetEncoder,
    add_targets,
    require_open,
    write_targets,
)
from datastore.rollout_write import score_document, write_sampled
from datastore.rollouts_seal import sealed
from datastore.target import require_threshold
from datastore.types import SPLITS, SparseTarget, Split

__all__ = [
    "RolloutBuffer",
    "RolloutReader",
    "SampledCounts",
    "ScoredRow",
    "TargetEncoder",
    "score_document",
]

# A killed writer, and its encoder, hold the lock until the kernel has taken their memory back.
_LOCK_WAIT_SEC = 2.0


class RolloutBuffer(RolloutReader):
    """The one writer of a rollout buffer; holds its lock until `close`, or as a context manager."""

    def __init__(self, folder: Path, buffer: BufferRecord, lock: int) -> None:
        """lock: descriptor of the buffer's lock file, held."""
        super().__init__(folder, buffer)
        self._lock, self._held = lock, contextlib.ExitStack()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        identity: dict[str, Any],
        *,
        seq_len: int,
        slug: str,
        threshold: float,
    ) -> RolloutBuffer:
        """Create a buffer, or take it up again.

        identity: JSON values, all that the rollouts and their targets depend on (student run, prompts, sampling,
        teacher). slug: name of the teacher. threshold: of its targets.
        Raises ResumeError when the folder belongs to another identity, is no buffer, or is being written; FormatError
        when files of finished shards are absent or damaged.
        """
        require_threshold(threshold)
        plain = json.loads(canonical_json(identity))
        buffer = BufferRecord(identity=plain, seq_len=seq_len, slug=slug, threshold=threshold)
        place = BufferPlace(Path(folder), slug)
        with full_disk_told(place.folder, AGAIN), contextlib.ExitStack() as stack:
            path = place.work / "lock"
            lock = stack.enter_context(exclusive_lock(path, "rollouts", wait_sec=_LOCK_WAIT_SEC))
            _require_same_buffer(place.folder, buffer)
            opened = cls(place.folder, buffer, lock)
            opened._take_up()
            opened._held = stack.pop_all()
        return opened

    def append(self, rollouts: Sequence[Rollout]) -> int:
        """Write rollouts as the next shard and give its number; durable on return.

        Raises FormatError for what is no rollout or longer than a row, VpmoeError when the disk is full (nothing is
        lost: append them again), ResumeError when the buffer is sealed.
        """
        require_open(self)
        shard = self.num_sampled
        with full_disk_told(self.folder, AGAIN):
            write_sampled(self.place, self.buffer, "train", shard, rollouts)
        return shard

    def add_targets(self, shard: int, targets: Sequence[SparseTarget]) -> None:
        """Write the targets of a sampled shard, one a rollout in the order of `score_documents`; durable on return.

        Targets in the coordinates of those documents, with entropies, as ScoringClient gives them. A shard that has
        targets is left as it is. Raises AlignmentError when they are not those of the shard's tokens, FormatError,
        and VpmoeError and ResumeError as `append`.
        """
        add_targets(self, shard, targets)

    def encoder(self) -> TargetEncoder:
        """A process that does `add_targets` beside this one, until `close`."""
        encoder = TargetEncoder(self.folder, self._lock)
        self._held.callback(encoder.close)
        return encoder

    def seal(
        self,
        teacher: dict[str, Any],
        prompts: DatasetManifest,
        held_out: Sequence[Rollout] = (),
        held_out_targets: Sequence[SparseTarget] = (),
    ) -> tuple[DatasetManifest, TargetManifest]:
        """Make the buffer a finished dataset with targets; a sealed one is left as it is.

        teacher: identity of the server (`/identity`). prompts: manifest of the dataset that gave the prompts.
        held_out: the valid split, with its targets in order; without it the dataset has no valid rows, which
        `vpmoe-train kd` wants. Raises ResumeError when a sampled shard has no targets or nothing is sampled,
        AlignmentError from the gate.
        """
        if self.is_sealed:
            return (
                load_dataset_manifest(self.folder),
                load_target_manifest(self.folder, self.buffer.slug),
            )
        self._require_scored()
        with full_disk_told(self.folder, AGAIN):
            if held_out:
                write_sampled(self.place, self.buffer, "valid", 0, held_out)
                write_targets(self, "valid", 0, held_out_targets)
            return sealed(self, teacher, prompts, ("train", "valid") if held_out else ("train",))

    def close(self) -> None:
        """End the encoder, once what it has in hand is durable, and give up the lock."""
        self._held.close()

    def __enter__(self) -> RolloutBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_up(self) -> None:
        """Sweep what a killed writer left, and look at the presence and size of every file that a record lists."""
        splits = SPLITS if self.is_sealed else ("train",)
        listed: set[Path] = set()
        for split in splits:
            listed |= self._listed(split)
        for split in SPLITS:
            for folder, records in self.place.shard_folders(split).items():
                for path in (folder, records, self.folder, self.place.rollouts, self.place.targets):
                    sweep_temporaries(path)
                for path in sorted({*folder.glob("*.arrow"), *records.glob("*.json")} - listed):
                    path.unlink(missing_ok=True)

    def _listed(self, split: Split) -> set[Path]:
        """Every file of the split that is to stay. Raises FormatError: a gap, a missing file, one of another size."""
        place, listed = self.place, set[Path]()
        numbers = _numbers(place.rollouts / split)
        # A target's record is written after that of its shard, so it can be the last one that is there.
        last = max([*numbers, *_numbers(place.logprobs / split)], default=-1)
        if len(numbers) <= last:
            raise FormatError(
                f"{place.rollouts / split} lacks the record of a finished shard",
                got=f"{len(numbers)} records",
                expected=f"{last + 1}",
                remedy="restore the file",
            )
        for shard in numbers:
            record = self.sampled_record(split, shard)
            listed |= {
                place.sampled(split, shard),
                _present(place.folder, record.entry),
                _present(place.rollouts, record.rollouts),
            }
            if place.scored(split, shard).exists():
                scored = self.scored_record(split, shard)
                listed |= {
                    place.scored(split, shard),
                    _present(place.targets, scored.entry),
                    _present(place.logprobs, scored.logprobs),
                }
        return listed

    def _require_scored(self) -> None:
        missing = [n for n in range(self.num_sampled) if not self.is_scored(n)]
        if missing or not self.num_sampled:
            shown = ", ".join(map(str, missing[:8])) + ", ..." * (len(missing) > 8)
            raise ResumeError(
                f"{self.folder} cannot be sealed",
                got=f"no targets of {len(missing)} shards ({shown})" if missing else "no shard",
                remedy="score every sampled shard first",
            )


def _require_same_buffer(folder: Path, buffer: BufferRecord) -> None:
    """Begin a buffer in an empty folder; ResumeError unless the one that is there is the same."""
    path = buffer_path(folder)
    if not path.exists():
        strangers = [name for name in (MANIFEST_NAME, "train", "valid") if (folder / name).exists()]
        if strangers:
            raise ResumeError(
                f"{folder} holds {strangers[0]} and is no buffer of rollouts",
                remedy="choose another folder",
            )
        write_record(path, buffer)
        return
    found = differences(read_record(BufferRecord, path).resolved(), buffer.resolved())
    if found:
        groups = {
            "identity": {key: v for key, v in found.items() if key.startswith("identity")},
            "buffer": {key: v for key, v in found.items() if not key.startswith("identity")},
        }
        raise ResumeError(
            f"{folder} holds rollouts of another run:\n\n{difference_table(groups, 'stored')}\n\n",
            remedy="go on with the stored values, or start another buffer in another folder",
        )


def _present(folder: Path, entry: FileEntry) -> Path:
    path = folder / entry.name
    size = path.stat().st_size if path.exists() else None
    if size != entry.bytes:
        raise FormatError(
            f"{path} of a finished shard is damaged",
            got="no file" if size is None else f"{size} bytes",
            expected=f"{entry.bytes} bytes",
            remedy="restore the file; `vpmoe-data verify` lists every damaged file",
        )
    return path


def _numbers(folder: Path) -> list[int]:
    """Of the shards whose records lie in `folder`."""
    return sorted(int(path.stem.removeprefix("shard-")) for path in folder.glob("shard-*.json"))
