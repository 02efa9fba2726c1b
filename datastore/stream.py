"""The stream of global batches: which rows a step sees, as a pure function of (seed, consumed).

Ranks, micro-batches and workers cut a global batch that is already fixed; they never decide what is in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.errors import ConfigError, ResumeError
from datastore.order import ORDER_VERSION, feistel_permutation


class RowStream:
    """Global batches of row indices, without end: position p is row `feistel(seed, p // n, p % n)` of n rows.

    Global batch b is the positions [b * B, (b + 1) * B); it may cross the border of an epoch. `consumed` counts
    positions. Every row comes once an epoch.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        fingerprint: str,
        seed: int,
        global_batch_size: int,
        consumed: int = 0,
    ) -> None:
        if num_rows < 1:
            raise ConfigError("a stream over no rows", remedy="use a split that has rows")
        if global_batch_size < 1:
            raise ConfigError("global_batch_size", got=global_batch_size, expected="at least 1")
        if consumed < 0 or consumed % global_batch_size:
            raise ResumeError(
                "the stream stopped inside a global batch",
                got=f"consumed={consumed}",
                expected=f"a multiple of global_batch_size={global_batch_size}",
            )
        self.num_rows, self.fingerprint, self.seed = num_rows, fingerprint, seed
        self.global_batch_size, self.consumed = global_batch_size, consumed

    def next_batch(self) -> np.ndarray:
        """The row indices of the next global batch, int64 [B], and step forward."""
        indices_B = self.peek(self.consumed // self.global_batch_size)
        self.consumed += self.global_batch_size
        return indices_B

    def peek(self, batch: int) -> np.ndarray:
        """The row indices of global batch `batch` (counted from the start of the run), int64 [B]; no step."""
        first = batch * self.global_batch_size
        positions_B = np.arange(first, first + self.global_batch_size, dtype=np.int64)
        epochs_B, indices_B = np.divmod(positions_B, self.num_rows)
        rows_B = np.empty_like(indices_B)
        for epoch in range(int(epochs_B[0]), int(epochs_B[-1]) + 1):
            within = epochs_B == epoch
            rows_B[within] = feistel_permutation(
                indices_B[within], self.num_rows, seed=self.seed, epoch=epoch
            )
        return rows_B

    def state(self) -> dict[str, Any]:
        """All that a resume needs, plain JSON values (under 1 KB)."""
        return {
            "version": ORDER_VERSION,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "consumed": self.consumed,
            "global_batch_size": self.global_batch_size,
        }

    @classmethod
    def restore(
        cls,
        state: Mapping[str, Any],
        *,
        num_rows: int,
        fingerprint: str,
        seed: int,
        global_batch_size: int,
    ) -> RowStream:
        """The stream of `state`, for the run described by the other arguments.

        Raises ResumeError listing every key in which they differ: another dataset, seed or batch size is another
        order, so none is taken over silently.
        """
        stream = cls(
            num_rows, fingerprint=fingerprint, seed=seed, global_batch_size=global_batch_size
        )
        wanted = stream.state() | {"consumed": state.get("consumed")}
        differences = [
            f"{key}: checkpoint {state.get(key, '(absent)')!r}, this run {wanted.get(key, '(unknown key)')!r}"
            for key in sorted(wanted.keys() | state.keys())
            if key not in state or key not in wanted or not _same(state[key], wanted[key])
        ]
        if not isinstance(wanted["consumed"], int) or isinstance(wanted["consumed"], bool):
            differences.append(f"consumed: checkpoint {wanted['consumed']!r}, expected an integer")
        if differences:
            raise ResumeError(
                "the checkpoint's data stream is not that of this run: " + "; ".join(differences),
                remedy="resume with the config and dataset of the checkpoint, or start a new run",
            )
        return cls(
            num_rows,
            fingerprint=fingerprint,
            seed=seed,
            global_batch_size=global_batch_size,
            consumed=state["consumed"],
        )


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
