"""The error budget of teacher targets: what was kept of the teacher, what storing it cost, per span. Pure.

Sums are merged over rows and shards (in shard order, so that the last bits repeat) and become means once, at the end.
`control` (token t+1 is a control id) is reported beside the spans and counted in them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, ValidationError

from common.config import Config
from common.errors import AlignmentError, FormatError
from datastore.codec import decode_blob
from datastore.id_order import IdOrder
from datastore.target import class_masks, head_mask, require_valid, row_target
from datastore.types import DocTarget, PackedRow, SparseTarget, Split

# A shard is judged alone from here on. A language model of 135M parameters on SYNTH (benchmarks/limits.py), in 168
# blocks of 100 targets: mean logprob -3.0 in all and -4.6 in the lowest block, head mass 0.70 and 0.51. Garbage gives
# -12 and 0.
MIN_SHARD_POSITIONS = 100
CLASSES = ("reasoning", "final", "control")
Losses = dict[str, tuple[float, float]]


class ClassSums(Config):
    """Sums over the positions of one class. kl_max is a maximum; entropy is the teacher's exact one; nats."""

    positions: int = 0
    entries: int = 0
    head_mass: float = 0.0
    tail_mass: float = 0.0
    kl: float = 0.0
    kl_max: float = 0.0
    realised_logprob: float = 0.0
    entropy: float = 0.0

    def merged(self, other: ClassSums) -> ClassSums:
        """The sums of both."""
        mine, theirs = self.model_dump(), other.model_dump()
        merged = {name: mine[name] + theirs[name] for name in mine}
        return ClassSums(**{**merged, "kl_max": max(self.kl_max, other.kl_max)})


class BudgetSums(Config):
    """Sums over rows. positions: of both spans together. blob_bytes: of their blobs."""

    positions: int = 0
    blob_bytes: int = 0
    reasoning: ClassSums = ClassSums()
    final: ClassSums = ClassSums()
    control: ClassSums = ClassSums()

    def merged(self, other: BudgetSums) -> BudgetSums:
        """The sums of both. Addition of floats: merge shards in their order to repeat the last bits."""
        return BudgetSums(
            positions=self.positions + other.positions,
            blob_bytes=self.blob_bytes + other.blob_bytes,
            reasoning=self.reasoning.merged(other.reasoning),
            final=self.final.merged(other.final),
            control=self.control.merged(other.control),
        )

    def budget(self) -> Budget:
        """The means that go to the target manifest."""
        return Budget(
            positions=self.positions,
            bytes_per_token=self.blob_bytes / max(self.positions, 1),
            reasoning=_class_budget(self.reasoning),
            final=_class_budget(self.final),
            control=_class_budget(self.control),
        )


class ClassBudget(Config):
    """Means over the positions of one class.

    head_mass, tail_mass: probability kept exactly, and sampled. kl_mean, kl_max: nats lost by storing, see
    `quantisation_kl`. realised_logprob: of the text's own tokens. entropy: the teacher's. entries: stored ids.
    """

    positions: int
    entries: float
    head_mass: float
    tail_mass: float
    kl_mean: float
    kl_max: float
    realised_logprob: float
    entropy: float


class Budget(Config):
    """The `budget` of a target manifest. A class without positions is null. Bytes count whole blobs."""

    positions: int
    bytes_per_token: float
    reasoning: ClassBudget | None
    final: ClassBudget | None
    control: ClassBudget | None


class BudgetLimits(Config):
    """What a run accepts of its targets, for each span that has positions; control ids are only reported.

    Held by the whole store and by each shard alone: a fault of one worker disappears in the mean of a thousand shards.
    They separate a teacher from garbage; how good a teacher is, `vpmoe-data audit` tells.

    min_head_mass: mean probability kept exactly; the rest is sampled, unbiased but noisy. Flat logits keep 0.
    max_quantisation_kl: worst position, nats. The codec itself costs 4e-5 in the mean and at most 4e-4 at threshold
    1/50 (1.4e-3 at 1/12), so more is a broken store. min_realised_logprob: mean; guessing among 201,088 ids gives
    -12.2, and a model of 135M parameters -3.0, so a lower value is a teacher that does not read this text.
    max_entries: mean stored ids a position, which is memory and time in the loss; t = 1/50 gives at most 51.
    """

    min_head_mass: float = Field(default=0.3, ge=0, le=1)
    max_quantisation_kl: float = Field(default=2e-3, gt=0)
    min_realised_logprob: float = Field(default=-6.0, le=0)
    max_entries: float = Field(default=64.0, gt=0)


def row_budget(
    documents: list[DocTarget | None], blob: bytes, row: PackedRow, order: IdOrder
) -> BudgetSums:
    """The sums of one row: its reductions before storing against what `blob` gives back.

    documents: fresh reductions as encoded into `blob`, with their entropy_P. Raises AlignmentError when they are not
    the row's, FormatError when one is no reduction (masses to 1e-3) or the blob cannot be read or returns other ids.
    """
    exact = row_target(documents, row)
    require_valid(exact)
    stored = row_target(decode_blob(blob, row, order), row)
    if exact.entropy_P is None:
        raise FormatError("targets without their entropies", expected="those of the reduction")
    quantities_P = _quantities(exact) | {
        "kl": quantisation_kl(exact, stored),
        "entropy": exact.entropy_P.astype(np.float64),
    }
    masks = class_masks(row.tokens_T, row.spans_T, exact.positions_P)
    return BudgetSums(
        positions=len(exact.positions_P),
        blob_bytes=len(blob),
        **{name: _class_sums(quantities_P, mask_P) for name, mask_P in masks.items()},
    )


def stored_budget(
    documents: list[DocTarget | None], blob: bytes, row: PackedRow, losses: Losses
) -> BudgetSums:
    """The sums of one row from its stored targets alone, as `repack` carries them.

    What storing cost cannot be seen in them: `losses` states it, (mean KL, worst KL) by class, of the store that the
    documents come from.
    """
    target = row_target(documents, row)
    quantities_P = _quantities(target)
    scored = [document for document in documents if document is not None]
    classes = {}
    for name, mask_P in class_masks(row.tokens_T, row.spans_T, target.positions_P).items():
        positions = int(mask_P.sum())
        mean, worst = losses[name] if positions else (0.0, 0.0)
        classes[name] = ClassSums(
            positions=positions,
            kl=mean * positions,
            kl_max=worst,
            entropy=sum(getattr(document.entropy_sums, name) for document in scored),
            **{key: values_P[mask_P].sum().item() for key, values_P in quantities_P.items()},
        )
    return BudgetSums(positions=len(target.positions_P), blob_bytes=len(blob), **classes)


def stated_losses(budgets: Sequence[Mapping[str, Any]]) -> Losses:
    """(mean KL, worst KL) by class over stores or shards with these budgets. Raises FormatError."""
    parsed = [_parsed(values, "an error budget of the manifest") for values in budgets]
    losses = {}
    for name in CLASSES:
        parts = [part for budget in parsed if (part := getattr(budget, name)) is not None]
        if positions := sum(part.positions for part in parts):
            mean = sum(part.kl_mean * part.positions for part in parts) / positions
            losses[name] = mean, max(part.kl_max for part in parts)
    return losses


def quantisation_kl(exact: SparseTarget, stored: SparseTarget) -> np.ndarray:
    """KL divergence in nats of each position, float64 [P], from the head and tail mass to their stored values.

    Generalised to masses that need not sum to 1 (sum p ln(p/q) - p + q, never negative), as the loss uses the stored
    values as they are. Raises FormatError when the two hold other ids.
    """
    if not _hold_the_same_ids(exact, stored):
        raise FormatError("stored targets hold other ids than their reduction")
    p_E, q_E = exact.weights_E.astype(np.float64), stored.weights_E.astype(np.float64)
    head_P = _head_sums(exact, p_E * np.log(p_E / q_E) - p_E + q_E)
    log_p_P = exact.log_tail_mass_P.astype(np.float64)
    log_q_P = stored.log_tail_mass_P.astype(np.float64)
    p_P, q_P = np.exp(log_p_P), np.exp(log_q_P)
    log_ratio_P = np.zeros(len(p_P))
    np.subtract(log_p_P, log_q_P, out=log_ratio_P, where=p_P > 0)
    return head_P + p_P * log_ratio_P - p_P + q_P


def _hold_the_same_ids(exact: SparseTarget, stored: SparseTarget) -> bool:
    """The same heads in the same order, and the same draws in any order, at every position."""
    if not (
        np.array_equal(exact.num_head_P, stored.num_head_P)
        and np.array_equal(exact.offsets_P1, stored.offsets_P1)
    ):
        return False
    counts_P = np.diff(exact.offsets_P1)
    in_head_E = head_mask(exact.num_head_P, counts_P - exact.num_head_P)
    position_E = np.repeat(np.arange(len(counts_P)) << 32, counts_P)
    return np.array_equal(exact.ids_E[in_head_E], stored.ids_E[in_head_E]) and np.array_equal(
        np.sort(position_E | exact.ids_E), np.sort(position_E | stored.ids_E)
    )


def require_budget(
    manifest_budget: Mapping[str, Any],
    limits: BudgetLimits,
    shard_budgets: Mapping[Split, Sequence[Mapping[str, Any]]],
) -> Budget:
    """The budget of a target manifest, refused with every figure outside `limits`, of the whole or of one shard.

    Raises FormatError when one is not a budget, AlignmentError when one breaks a limit or the whole scores nothing.
    """
    budget = _parsed(manifest_budget, "the manifest's error budget")
    if not budget.positions:
        raise AlignmentError(
            "teacher targets score nothing", got="0 positions", remedy="score the dataset"
        )
    _require_within(budget, limits, "teacher targets are")
    for split, budgets in shard_budgets.items():
        for shard, values in enumerate(budgets):
            name = f"{split} shard {shard}"
            _require_shard(_parsed(values, f"the error budget of {name}"), limits, name)
    return budget


def require_shard_budget(sums: BudgetSums, limits: BudgetLimits, name: str) -> None:
    """AlignmentError with every figure of a shard outside `limits`; `name` says which. Nothing scored is no fault."""
    _require_shard(sums.budget(), limits, name)


def _require_shard(budget: Budget, limits: BudgetLimits, name: str) -> None:
    # The mean of a few positions is no sign of anything; the whole store counts them.
    if budget.positions >= MIN_SHARD_POSITIONS:
        _require_within(budget, limits, f"the targets of {name} are")


def _require_within(budget: Budget, limits: BudgetLimits, what: str) -> None:
    spans = {"reasoning": budget.reasoning, "final": budget.final}
    faults = [
        fault for name, span in spans.items() if span for fault in _faults(name, span, limits)
    ]
    if faults:
        raise AlignmentError(
            f"{what} outside the error budget",
            got="; ".join(faults),
            remedy="score with another threshold or teacher, or change the limits in the config",
        )


def _parsed(values: Mapping[str, Any], what: str) -> Budget:
    try:
        return Budget.model_validate(values)
    except ValidationError as error:
        raise FormatError(f"{what}: {error}") from None


def _faults(name: str, span: ClassBudget, limits: BudgetLimits) -> list[str]:
    checks = [
        (span.head_mass >= limits.min_head_mass, "head mass", span.head_mass, limits.min_head_mass),
        (span.kl_max <= limits.max_quantisation_kl, "KL", span.kl_max, limits.max_quantisation_kl),
        (
            span.realised_logprob >= limits.min_realised_logprob,
            "realised logprob",
            span.realised_logprob,
            limits.min_realised_logprob,
        ),
        (span.entries <= limits.max_entries, "entries", span.entries, limits.max_entries),
    ]
    return [
        f"{name} {what} {found:.4g} (limit {limit:.4g})"
        for within, what, found, limit in checks
        if not within
    ]


def _quantities(target: SparseTarget) -> dict[str, np.ndarray]:
    """What fresh and stored targets both tell of each position, float64 [P] or int [P]."""
    return {
        "entries": np.diff(target.offsets_P1),
        "head_mass": _head_sums(target, target.weights_E.astype(np.float64)),
        "tail_mass": np.exp(target.log_tail_mass_P.astype(np.float64)),
        "realised_logprob": target.realised_logprob_P.astype(np.float64),
    }


def _head_sums(target: SparseTarget, values_E: np.ndarray) -> np.ndarray:
    """Sum over the head of each position: float64 [P]."""
    sums_E1 = np.concatenate([[0.0], np.cumsum(values_E)])
    starts_P = target.offsets_P1[:-1]
    return sums_E1[starts_P + target.num_head_P] - sums_E1[starts_P]


def _class_sums(quantities_P: dict[str, np.ndarray], mask_P: np.ndarray) -> ClassSums:
    sums = {name: values_P[mask_P].sum().item() for name, values_P in quantities_P.items()}
    kl_max = quantities_P["kl"][mask_P].max(initial=0.0).item()
    return ClassSums(positions=int(mask_P.sum()), kl_max=kl_max, **sums)


def _class_budget(sums: ClassSums) -> ClassBudget | None:
    if not sums.positions:
        return None
    return ClassBudget(
        positions=sums.positions,
        entries=sums.entries / sums.positions,
        head_mass=sums.head_mass / sums.positions,
        tail_mass=sums.tail_mass / sums.positions,
        kl_mean=sums.kl / sums.positions,
        kl_max=sums.kl_max,
        realised_logprob=sums.realised_logprob / sums.positions,
        entropy=sums.entropy / sums.positions,
    )
