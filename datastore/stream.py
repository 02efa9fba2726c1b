"""The stream of global batches: which rows a step sees, as a pure function of (seed, consumed).

Ranks, micro-batches and workers cut a global batch that is already fixed; they never decide what is in it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import ConfigError, ResumeError
from datastore.order import ORDER_VERSION, endless_order, in_share, plain_seed, share_before
from datastore.row_set import RowSet


class RowStream:
    """Global batches of row indices, without end. Global batch b is the positions [b * B, (b + 1) * B).

    A share `kd_share` of the positions uses targets. Where every row is scored, or no position uses targets, there is
    one order: position p is row `feistel(seed, p // n, p % n)` of n rows. Where only some rows are, the k-th position
    that uses targets takes its row from the order of the scored rows, and the k-th of the others from the order of
    the plain rows (docs/order.md). `consumed` counts positions.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        fingerprint: str,
        seed: int,
        global_batch_size: int,
        kd_share: float = 0.0,
        scored: RowSet | None = None,
    ) -> None:
        """scored: the rows with targets, of the same `num_rows`; not looked at when kd_share is 0."""
        if num_rows < 1:
            raise ConfigError("a stream over no rows", remedy="use a split that has rows")
        if global_batch_size < 1:
            raise ConfigError("global_batch_size", got=global_batch_size, expected="at least 1")
        if not 0 <= kd_share <= 1:
            raise ConfigError("kd_share", got=kd_share, expected="0 to 1")
        if kd_share and not (scored and scored.size):
            raise ConfigError(
                f"kd_share={kd_share} of the rows are to use targets",
                got="no row with targets in this split",
                remedy="score some with `vpmoe-data score`, or set kd_share=0",
            )
        self.num_rows, self.fingerprint, self.seed = num_rows, fingerprint, seed
        self.global_batch_size, self.kd_share, self.consumed = global_batch_size, kd_share, 0
        self.scored = scored if kd_share else None
        self._pools: tuple[RowSet, RowSet] | None = None
        if self.scored is not None and self.scored.size < num_rows:
            self._pools = self.scored, self.scored.complement()

    def next_batch(self) -> np.ndarray:
        """The row indices of the next global batch, int64 [B], and step forward."""
        indices_B = self.peek(self.consumed // self.global_batch_size)
        self.consumed += self.global_batch_size
        return indices_B

    def peek(self, batch: int) -> np.ndarray:
        """The row indices of global batch `batch` (counted from the start of the run), int64 [B]; no step."""
        positions_B = self._positions(batch)
        if self._pools is None:
            return endless_order(positions_B, self.num_rows, self.seed)
        uses_B = in_share(positions_B, self.kd_share)
        earlier_B = share_before(positions_B, self.kd_share)
        scored, plain = self._pools
        rows_B = np.empty_like(positions_B)
        rows_B[uses_B] = scored.select(endless_order(earlier_B[uses_B], scored.size, self.seed))
        others = (positions_B - earlier_B)[~uses_B]
        rows_B[~uses_B] = plain.select(endless_order(others, plain.size, plain_seed(self.seed)))
        return rows_B

    def uses_targets(self, batch: int) -> np.ndarray:
        """Which positions of global batch `batch` train on their targets: bool [B]."""
        return in_share(self._positions(batch), self.kd_share)

    def state(self) -> dict[str, Any]:
        """All that a resume needs, plain JSON values (under 1 KB)."""
        return {
            "version": ORDER_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "consumed": self.consumed,
            "global_batch_size": self.global_batch_size,
            "kd_share": self.kd_share,
            "scored_rows": self.scored.size if self.scored else 0,
            "scored_sha256": self.scored.sha256 if self.scored else None,
        }

    def resumed(self, state: Mapping[str, Any]) -> RowStream:
        """This stream at the place of `state`, which must be of the very same stream.

        Raises ResumeError listing every key in which they differ: another dataset, seed, batch size, share or set of
        scored rows is another order, so none is taken over silently.
        """
        consumed = state.get("consumed")
        wanted = self.state() | {"consumed": consumed}
        differences = [
            f"{key}: checkpoint {state.get(key, '(absent)')!r}, this run {wanted.get(key, '(unknown key)')!r}"
            for key in sorted(wanted.keys() | state.keys())
            if key not in state or key not in wanted or not _same(state[key], wanted[key])
        ]
        if not isinstance(consumed, int) or isinstance(consumed, bool):
            differences.append(f"consumed: checkpoint {consumed!r}, expected an integer")
        elif consumed < 0 or consumed % self.global_batch_size:
            differences.append(
                f"consumed: checkpoint {consumed}, expected a multiple of {self.global_batch_size}"
            )
        if differences:
            raise ResumeError(
                "the checkpoint's data stream is not that of this run: " + "; ".join(differences),
                remedy="resume with the config, dataset and targets of the checkpoint, or start a new run",
            )
        stream = copy.copy(self)
        stream.consumed = state["consumed"]
        return stream

    def _positions(self, batch: int) -> np.ndarray:
        first = batch * self.global_batch_size
        return np.arange(first, first + self.global_batch_size, dtype=np.int64)


def rank_micro_batches(
    indices_B: np.ndarray, *, dp_rank: int, dp_size: int, micro_batch_size: int
) -> list[np.ndarray]:
    """The micro-batches of one data-parallel rank: its contiguous slice of the global batch, cut in order.

    Concatenated over ranks they are the global batch. Returns int64 [m] arrays. Raises ConfigError when the sizes
    do not divide.
    """
    size = dp_size * micro_batch_size
    if not 0 <= dp_rank < dp_size or micro_batch_size < 1 or len(indices_B) % size:
        raise ConfigError(
            f"a global batch of {len(indices_B)} rows cannot be cut",
            got=f"dp_rank={dp_rank} of dp_size={dp_size}, micro_batch_size={micro_batch_size}",
            expected="global_batch_size to be a multiple of dp_size * micro_batch_size",
        )
    own = indices_B.reshape(dp_size, -1)[dp_rank]
    return list(own.reshape(-1, micro_batch_size))


def _same(stored: object, wanted: object) -> bool:
    return type(stored) is type(wanted) and stored == wanted
