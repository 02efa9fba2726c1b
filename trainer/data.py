"""Micro-batches of a run: a dataset, its targets and the row stream, read ahead while a step is computed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import torch

from common.errors import ConfigError, VpmoeError
from datastore.alignment import (
    MIN_POSITIONS,
    alignment_report,
    require_aligned,
    require_same_source,
)
from datastore.budget import require_budget
from datastore.reader import Dataset, TargetStore
from datastore.stream import RowStream, rank_micro_batches
from datastore.target import row_target
from datastore.types import SPLITS, SparseTarget, Split
from trainer.batch import Batch
from trainer.config import KDConfig
from trainer.readers import ReaderProcesses, RowReader

GATE_ROWS = 8
# Reader processes of a rank. One reads ten times as fast as a rank trains (docs/numerics.md); the second reads on where
# the first waits for its storage. On a CPU a thread reads: what trains there is small, and cores are few.
READERS = {"cuda": 2, "cpu": 0}
_LOG = logging.getLogger(__name__)


class RunData(RowReader):
    """The dataset of a run with its targets, checked against each other and the config when opened.

    scored: the rows with targets by split. A train row uses them where the stream says so, a valid row always.
    """

    def __init__(self, dataset: Dataset, targets: TargetStore | None) -> None:
        super().__init__(dataset, targets)
        self.scored = {} if targets is None else {s: targets.scored_rows(s) for s in SPLITS}

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
        for split in SPLITS:
            if not dataset.num_rows(split):
                raise ConfigError(
                    f"{config.dataset} has no {split} rows", remedy="build it with more documents"
                )
        targets = None if config.teacher is None else TargetStore.open(dataset, config.teacher)
        if targets is not None:
            manifest = targets.manifest
            require_same_source(manifest, dataset.manifest)
            require_budget(manifest.budget, config.budget, manifest.shard_budgets)
        data = cls(dataset, targets)
        data.stream(config)  # refuses a share that no row can fill
        if targets is not None:
            require_aligned(alignment_report(_gate_pairs(data)))
        return data

    def provenance(self) -> dict[str, str | None]:
        """What identifies the data: fingerprints and tokenizer."""
        manifest = self.dataset.manifest
        return {
            "dataset": manifest.fingerprint,
            "tokenizer": manifest.tokenizer.ranks_sha256,
            "targets": None if self.targets is None else self.targets.manifest.target_id,
        }

    def stream(self, config: KDConfig) -> RowStream:
        """The stream of the run from its first row; without a teacher no row uses targets."""
        return RowStream(
            self.dataset.num_rows("train"),
            fingerprint=self.dataset.manifest.fingerprint,
            seed=config.seed,
            global_batch_size=config.batch.global_batch_size,
            kd_share=0.0 if self.targets is None else config.kd_share,
            scored=self.scored.get("train"),
        )


class StopsAlike(Protocol):
    """Of trainer/megatron/watch.py: raises RunStopped on every rank when one has a problem."""

    def agree(self, problem: str | None = None) -> None: ...


class Loader:
    """This rank's micro-batches, step after step; the next step's are read while one is computed.

    A thread reads them, or, with reader processes, collects what those have read (trainer/readers.py). The stream
    advances when a step is finished, so its state counts what was trained on and nothing that was only read.
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
        readers: int | None = None,
    ) -> None:
        """readers: reader processes; None for what suits the device, `READERS`."""
        self._data, self.stream, self._device = data, stream, device
        self._cut = {
            "dp_rank": dp_rank,
            "dp_size": dp_size,
            "micro_batch_size": config.batch.micro_batch_size,
        }
        self._wait_sec = config.watch.data_sec
        self._row = 0  # the one being read
        count = READERS[device.type] if readers is None else readers
        self._readers = ReaderProcesses(data.dataset, data.targets, count=count) if count else None
        self._ahead = self._start(self._number())

    def ready(self, watch: StopsAlike) -> None:
        """Wait until the rows of the next step are there; every rank stops alike when one's do not come."""
        watch.agree(self.problem(self._wait_sec))

    def state(self) -> dict[str, Any]:
        """The place of the stream after the last finished step."""
        return self.stream.state()

    def positions(self) -> int:
        """Positions of a global batch."""
        return self.stream.global_batch_size * self._data.dataset.manifest.seq_len

    def values(self) -> dict[str, float]:
        """Nothing beside the losses."""
        return {}

    def close(self) -> None:
        """End the reader processes; a thread that reads is a daemon and ends with this process."""
        if self._readers is not None:
            self._readers.close()

    def problem(self, wait_sec: float) -> str | None:
        """Wait for the rows of the next step; why they cannot be had, None when they are there."""
        try:
            error = self._ahead.exception(timeout=wait_sec)
        except TimeoutError:
            return f"has waited {wait_sec:g} s for {self._place()}"
        if error is None:
            return None
        if not isinstance(error, (VpmoeError, OSError)):
            _LOG.error("the reader failed", exc_info=error)
        why = str(error).rstrip(".") if isinstance(error, VpmoeError) else repr(error)
        return f"cannot read {self._place()}: {why}"

    def next(self) -> list[Batch]:
        """The micro-batches of the next step on the device."""
        batches = self._ahead.result()
        self._ahead = self._start(self._number() + 1)
        return [batch.to(self._device) for batch in batches]

    def finished(self) -> None:
        """The step of the micro-batches that `next` gave is done."""
        self.stream.next_batch()

    def _place(self) -> str:
        dataset = self._data.dataset
        index = self._row if self._readers is None else self._readers.row()
        shard, row = dataset.locate("train", index)
        name = dataset.manifest.entries("train")[shard].name
        return f"train row {index} (row {row} of {name}) of step {self._number() + 1}"

    def _begin(self, row: int) -> None:
        self._row = row

    def _number(self) -> int:
        return self.stream.consumed // self.stream.global_batch_size

    def _start(self, number: int) -> Future[list[Batch]]:
        """Read in a daemon thread: one that the disk holds for ever must not keep the process from ending."""
        ahead: Future[list[Batch]] = Future()
        threading.Thread(
            target=self._fulfil, args=(ahead, number), name="reader", daemon=True
        ).start()
        return ahead

    def _fulfil(self, ahead: Future[list[Batch]], number: int) -> None:
        try:
            ahead.set_result(self._read(number))
        except BaseException as error:
            ahead.set_exception(error)

    def _read(self, number: int) -> list[Batch]:
        rows_B, uses_B = self.stream.peek(number), self.stream.uses_targets(number)
        jobs = list(
            zip(
                rank_micro_batches(rows_B, **self._cut),
                rank_micro_batches(uses_B, **self._cut),
                strict=True,
            )
        )
        pin = self._device.type == "cuda"
        if self._readers is not None:
            return self._readers.read(jobs, pin=pin)
        batches = [self._data.batch("train", *job, self._begin) for job in jobs]
        return [batch.pin_memory() for batch in batches] if pin else batches


def valid_batches(
    data: RunData, *, rows: int | None, dp_rank: int, dp_size: int, micro_batch_size: int
) -> Iterator[Batch]:
    """This rank's share of the first `rows` valid rows, with the targets they have; every rank gets as many batches.

    All are of one size: ranks that share experts exchange equal numbers of tokens.
    """
    total = data.dataset.num_rows("valid")
    num_rows = total if rows is None else min(rows, total)
    has_targets_R = data.scored["valid"].mask() if data.targets else np.zeros(total, dtype=bool)
    groups = [
        range(num_rows)[first : first + micro_batch_size]
        for first in range(0, num_rows, micro_batch_size)
    ]
    for first in range(0, len(groups), dp_size):
        mine = first + dp_rank
        rows = groups[mine] if mine < len(groups) else range(0)
        yield data.batch("valid", rows, has_targets_R[rows], size=micro_batch_size)


def _gate_pairs(data: RunData) -> Iterator[tuple[np.ndarray, SparseTarget]]:
    """The first scored rows with their targets: `GATE_ROWS`, more where they hold too few targets to judge."""
    rows = positions = 0
    for split, index in _scored_rows(data):
        row = data.dataset.row(split, index)
        target = row_target(data.documents(split, index, row), row)
        rows, positions = rows + 1, positions + len(target.positions_P)
        yield row.tokens_T, target
        if rows >= GATE_ROWS and positions >= 2 * MIN_POSITIONS:
            return


def _scored_rows(data: RunData) -> Iterator[tuple[Split, int]]:
    for split, scored in data.scored.items():
        for number in range(scored.size):
            yield split, int(scored.select(np.array([number]))[0])
