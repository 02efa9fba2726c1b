"""Micro-batches of a run: a dataset, its targets and the row stream, read ahead in a thread."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from common.errors import ConfigError
from datastore.alignment import alignment_report, require_aligned, require_same_source
from datastore.budget import require_budget
from datastore.reader import Dataset, TargetStore
from datastore.stream import RowStream, rank_micro_batches
from datastore.target import row_target
from datastore.types import Split
from trainer.batch import Batch, make_batch
from trainer.config import KDConfig

GATE_ROWS = 8


class RunData:
    """The dataset of a run with its targets, checked against each other and the config when opened."""

    def __init__(self, dataset: Dataset, targets: TargetStore | None, kd_share: float) -> None:
        self.dataset, self.targets, self.kd_share = dataset, targets, kd_share

    @classmethod
    def open(cls, config: KDConfig) -> RunData:
        """Open and check. Raises ConfigError, FormatError, AlignmentError (foreign, misaligned or too poor targets)."""
        dataset = Dataset.open(config.dataset)
        if dataset.manifest.tokenizer.vocab_size != config.student.vocab_size:
            raise ConfigError(
                "student.vocab_size",
                got=config.student.vocab_size,
                expected=f"{dataset.manifest.tokenizer.vocab_size}, the dataset's",
            )
        for split in ("train", "valid"):
            if not dataset.num_rows(split):
                raise ConfigError(
                    f"{config.dataset} has no {split} rows", remedy="build it with more documents"
                )
        targets = None if config.teacher is None else TargetStore.open(dataset, config.teacher)
        if targets is not None:
            require_same_source(targets.manifest, dataset.manifest)
            require_budget(targets.manifest.budget, config.budget)
            _require_aligned(dataset, targets)
        return cls(dataset, targets, config.kd_share)

    def provenance(self) -> dict[str, str | None]:
        """What identifies the data: fingerprints and tokenizer."""
        manifest = self.dataset.manifest
        return {
            "dataset": manifest.fingerprint,
            "tokenizer": manifest.tokenizer.ranks_sha256,
            "targets": None if self.targets is None else self.targets.manifest.target_id,
        }

    def stream(self, config: KDConfig) -> RowStream:
        """The stream of the run from its first row."""
        return RowStream(
            self.dataset.num_rows("train"),
            fingerprint=self.dataset.manifest.fingerprint,
            seed=config.seed,
            global_batch_size=config.batch.global_batch_size,
        )

    def batch(self, split: Split, rows: Sequence[int], with_targets: Sequence[bool]) -> Batch:
        """The batch of these rows; a row whose flag is off, or that was not scored, has no targets."""
        packed = [self.dataset.row(split, int(index)) for index in rows]
        documents = [
            self.targets.documents(split, int(index), row) if self.targets and wanted else None
            for index, row, wanted in zip(rows, packed, with_targets, strict=True)
        ]
        return make_batch(packed, documents)

    def padding_batch(self, split: Split, rows: int) -> Batch:
        """A batch in which nothing is a target, for ranks that have no row left but must take part."""
        row = self.dataset.row(split, 0)
        return make_batch([dataclasses.replace(row, spans_T=np.zeros_like(row.spans_T))] * rows)


def uses_targets(positions_P: np.ndarray, share: float) -> np.ndarray:
    """Which positions of the stream train on their targets: bool [P], `share` of any run of positions, within one row.

    A pure function of the position, as the order is: (p + 1) * share and p * share lie in other whole numbers.
    """
    return np.floor((positions_P + 1) * share) > np.floor(positions_P * share)


class Loader:
    """This rank's micro-batches, step after step; the next step's are read in a thread while one is computed.

    The stream advances when a step's batches are handed out, so its state never counts rows that were only read ahead.
    """

    def __init__(
        self,
        data: RunData,
        stream: RowStream,
        config: KDConfig,
        *,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
    ) -> None:
        self._data, self.stream, self._device = data, stream, device
        self._cut = {
            "dp_rank": dp_rank,
            "dp_size": dp_size,
            "micro_batch_size": config.batch.micro_batch_size,
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reader")
        self._ahead: Future[list[Batch]] = self._thread.submit(self._read, self._number())

    def next(self) -> list[Batch]:
        """The micro-batches of the next step on the device."""
        batches = self._ahead.result()
        self.stream.next_batch()
        self._ahead = self._thread.submit(self._read, self._number())
        return [batch.to(self._device) for batch in batches]

    def close(self) -> None:
        """Stop reading."""
        self._thread.shutdown(cancel_futures=True)

    def _number(self) -> int:
        return self.stream.consumed // self.stream.global_batch_size

    def _read(self, number: int) -> list[Batch]:
        rows_B = self.stream.peek(number)
        positions_B = number * len(rows_B) + np.arange(len(rows_B))
        scored_B = uses_targets(positions_B, self._data.kd_share)
        batches = [
            self._data.batch("train", rows, scored)
            for rows, scored in zip(
                rank_micro_batches(rows_B, **self._cut),
                rank_micro_batches(scored_B, **self._cut),
                strict=True,
            )
        ]
        return [batch.pin_memory() for batch in batches] if self._device.type == "cuda" else batches


def valid_batches(
    data: RunData, *, rows: int | None, dp_rank: int, dp_size: int, micro_batch_size: int
) -> Iterator[Batch]:
    """This rank's share of the first `rows` valid rows, all with targets; every rank gets as many batches."""
    num_rows = (
        data.dataset.num_rows("valid")
        if rows is None
        else min(rows, data.dataset.num_rows("valid"))
    )
    groups = [
        range(num_rows)[first : first + micro_batch_size]
        for first in range(0, num_rows, micro_batch_size)
    ]
    for first in range(0, len(groups), dp_size):
        mine = first + dp_rank
        if mine < len(groups):
            yield data.batch("valid", groups[mine], [True] * len(groups[mine]))
        else:
            yield data.padding_batch("valid", micro_batch_size)


def _require_aligned(dataset: Dataset, targets: TargetStore) -> None:
    def pairs() -> Iterator[tuple[np.ndarray, object]]:
        for index in range(dataset.num_rows("train")):
            row = dataset.row("train", index)
            documents = targets.documents("train", index, row)
            if documents is not None:
                yield row.tokens_T, row_target(documents, row)

    require_aligned(alignment_report(itertools.islice(pairs(), GATE_ROWS)))
