"""`vpmoe-data audit`: how well the teacher likes the text that it was shown, from its stored targets alone.

Cross entropy trains towards the text, KD towards the teacher. Per target, the text costs the teacher -log p(text), its
own words would cost it its entropy; the difference (`excess`) is 0 in the mean for text that the teacher wrote itself.
Means are over targets; their standard errors take each document as one draw.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from datastore.audit_report import AuditGroup, AuditReport, LowWindows, WorstDocument, verdict
from datastore.estimate import Moments
from datastore.reader import Dataset, TargetStore
from datastore.scored import ScoredJob, scored_jobs, scored_rows
from datastore.show import run_text
from datastore.target import class_masks, head_mask
from datastore.types import DocTarget, PackedRow, SparseTarget, Split
from datastore.workers import run_jobs

# A window of targets is low below this mean logprob: the teacher gives each of its tokens 5 %.
WINDOW, LOW_LOGPROB = 32, -3.0
# First position (of the token, from the document's start) of each bucket; the last has no end.
POSITION_STARTS = (0, 128, 256, 512, 1024, 2048)
TENTHS = 10
QUANTITIES = (
    "targets",
    "realised",
    "entropy",
    "outside_head",
    "below_1_percent",
    "below_01_percent",
)
CLASSES = ("all", "reasoning", "final", "control")


@dataclass
class Tally:
    """What a shard adds up, or several; bounded by the number of labels and of worst documents kept."""

    keep: int
    rows: int = 0
    documents: int = 0
    windows: int = 0
    low: int = 0
    groups: dict[tuple[str, str], Moments] = field(default_factory=dict)
    worst: list[tuple[float, Split, int, int]] = field(default_factory=list)

    def add(self, kind: str, name: str, values_NK: np.ndarray) -> None:
        """Documents of one group; those without a target in it do not count."""
        values_NK = values_NK[values_NK[:, 0] > 0]
        if len(values_NK):
            self.groups.setdefault((kind, name), Moments(QUANTITIES)).add(values_NK)

    def see(self, worst: tuple[float, Split, int, int]) -> None:
        """Remember a document if it is among the worst."""
        self.worst = sorted([*self.worst, worst])[: self.keep]

    def merge(self, other: Tally) -> None:
        self.rows += other.rows
        self.documents += other.documents
        self.windows += other.windows
        self.low += other.low
        self.worst = sorted([*self.worst, *other.worst])[: self.keep]
        for name, moments in other.groups.items():
            self.groups.setdefault(name, Moments(QUANTITIES)).merge(moments)


@dataclass(frozen=True)
class AuditJob:
    """A shard's rows and how many of its worst documents to keep."""

    scored: ScoredJob
    keep: int


def audit_targets(
    dataset: Path,
    slug: str,
    *,
    splits: tuple[Split, ...],
    max_rows: int | None,
    worst: int,
    workers: int,
) -> AuditReport:
    """Audit the targets of the teacher `slug`; the same report for any number of workers.

    max_rows: scored rows to read, evenly over the splits; all when None. Raises FormatError, AlignmentError.
    """
    store = TargetStore.open(Dataset.open(dataset), slug)
    jobs = [AuditJob(job, worst) for job in scored_jobs(store, splits, max_rows)]
    tallies = dict(run_jobs(_audit_shard, jobs, workers=workers))
    total = Tally(worst)
    for job in jobs:
        total.merge(tallies[job.scored.split, job.scored.shard])
    return _report(store, total)


def _audit_shard(job: AuditJob) -> tuple[tuple[Split, int], Tally]:
    tally = Tally(job.keep)
    for scored in scored_rows(job.scored):
        tally.rows += 1
        _add_row(tally, job.scored.split, scored.index, scored.row, scored.documents)
    return (job.scored.split, job.scored.shard), tally


def _add_row(
    tally: Tally, split: Split, index: int, row: PackedRow, documents: list[DocTarget | None]
) -> None:
    for number, (document, where) in enumerate(zip(documents, row.documents(), strict=True)):
        if document is None:
            continue
        tally.documents += 1
        tokens_T, spans_T = row.tokens_T[where], row.spans_T[where]
        values_PK = _position_values(tokens_T, document.target)
        classes = _class_values(tokens_T, spans_T, document, values_PK)
        for name, values_K in classes.items():
            tally.add("classes", name, values_K[None])
        tally.add("languages", row.languages[number], classes["all"][None])
        tally.add("exercises", row.exercises[number], classes["all"][None])
        _add_positions(tally, document.target.positions_P, values_PK)
        means_W = window_means(document.target.realised_logprob_P)
        tally.windows += len(means_W)
        tally.low += int((means_W < LOW_LOGPROB).sum())
        if len(means_W):
            tally.see((float(values_PK[:, 1].mean()), split, index, number))


def _position_values(tokens_T: np.ndarray, target: SparseTarget) -> np.ndarray:
    """QUANTITIES of each position, float64 [P, K]; the entropy is not stored by position and stays 0."""
    labels_P = tokens_T[target.positions_P + 1]
    counts_P = np.diff(target.offsets_P1)
    rows_E = np.repeat(np.arange(len(labels_P)), counts_P)
    in_head_E = head_mask(target.num_head_P, counts_P - target.num_head_P)
    hit_E = in_head_E & (target.ids_E == labels_P[rows_E])
    is_outside_P = np.bincount(rows_E[hit_E], minlength=len(labels_P)) == 0
    realised_P = target.realised_logprob_P.astype(np.float64)
    columns = (
        *(np.ones(len(labels_P)), realised_P, np.zeros(len(labels_P)), is_outside_P),
        *(realised_P < math.log(0.01), realised_P < math.log(0.001)),
    )
    return np.stack(columns, axis=1).astype(np.float64)


def _class_values(
    tokens_T: np.ndarray, spans_T: np.ndarray, document: DocTarget, values_PK: np.ndarray
) -> dict[str, np.ndarray]:
    """QUANTITIES of a document summed over each of CLASSES: float64 [K]."""
    masks = class_masks(tokens_T, spans_T, document.target.positions_P)
    values = {name: values_PK[mask_P].sum(axis=0) for name, mask_P in masks.items()}
    entropy = QUANTITIES.index("entropy")
    for name, values_K in values.items():
        values_K[entropy] = getattr(document.entropy_sums, name)
    return {"all": values["reasoning"] + values["final"], **values}


def _add_positions(tally: Tally, positions_P: np.ndarray, values_PK: np.ndarray) -> None:
    """By the place of the predicted token in the document, and by tenths of the document's targets."""
    buckets_P = np.searchsorted(POSITION_STARTS, positions_P + 1, side="right") - 1
    tenths_P = np.arange(len(positions_P)) * TENTHS // max(len(positions_P), 1)
    for bucket in np.unique(buckets_P).tolist():
        tally.add("positions", str(bucket), values_PK[buckets_P == bucket].sum(axis=0)[None])
    for tenth in np.unique(tenths_P).tolist():
        tally.add("tenths", str(tenth), values_PK[tenths_P == tenth].sum(axis=0)[None])


def window_means(realised_P: np.ndarray) -> np.ndarray:
    """Mean logprob of each whole window of WINDOW targets: float64 [W]; what is left at the end is not judged."""
    whole = len(realised_P) // WINDOW * WINDOW
    return realised_P[:whole].astype(np.float64).reshape(-1, WINDOW).mean(axis=1)


def _report(store: TargetStore, total: Tally) -> AuditReport:
    manifest = store.manifest
    classes = _ordered(total, "classes", {name: name for name in CLASSES})
    starts = [*POSITION_STARTS, None]
    ranges = {
        str(i): f"{start}..{end - 1}" if end else f"{start}.."
        for i, (start, end) in enumerate(itertools.pairwise(starts))
    }
    tenths = {str(i): f"{i * 10}..{i * 10 + 10} %" for i in range(TENTHS)}
    return AuditReport(
        fingerprint=store.dataset.manifest.fingerprint,
        teacher=manifest.slug,
        target_id=manifest.target_id,
        threshold=manifest.threshold,
        rows=total.rows,
        documents=total.documents,
        classes=classes,
        languages=_labelled(total, "languages"),
        exercises=_labelled(total, "exercises"),
        positions=_ordered(total, "positions", ranges),
        tenths=_ordered(total, "tenths", tenths),
        windows=LowWindows(size=WINDOW, level=LOW_LOGPROB, windows=total.windows, low=total.low),
        worst=tuple(_worst_document(store, *found) for found in total.worst),
        verdict=verdict(classes["all"]),
    )


def _ordered(total: Tally, kind: str, titles: dict[str, str]) -> dict[str, AuditGroup]:
    return {
        title: _group(total.groups[kind, name], kind)
        for name, title in titles.items()
        if (kind, name) in total.groups
    }


def _labelled(total: Tally, kind: str) -> dict[str, AuditGroup]:
    """Groups of a label, the largest first."""
    names = [name for found, name in total.groups if found == kind]
    groups = {name: _group(total.groups[kind, name], kind) for name in names}
    ordered = sorted(groups.items(), key=lambda item: (-item[1].targets, item[0]))
    return dict(ordered)


def _group(moments: Moments, kind: str) -> AuditGroup:
    logprob = moments.ratio(["realised"], "targets")
    cost = moments.ratio(["realised", "entropy"], "targets")  # its negative is the excess
    has_entropy = kind not in ("positions", "tenths")
    return AuditGroup(
        documents=moments.clusters,
        targets=round(moments.sum("targets")),
        logprob=logprob.value,
        logprob_error=_known(logprob.standard_error),
        perplexity=math.exp(min(-logprob.value, 700.0)),  # a float64 ends there
        entropy=cost.value - logprob.value if has_entropy else None,
        excess=-cost.value if has_entropy else None,
        excess_error=_known(cost.standard_error) if has_entropy else None,
        **{share: moments.ratio([share], "targets").value for share in QUANTITIES[3:]},
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _worst_document(
    store: TargetStore, logprob: float, split: Split, index: int, number: int
) -> WorstDocument:
    row = store.dataset.row(split, index)
    document = (store.documents(split, index, row) or [])[number]
    assert document is not None, "only scored documents are among the worst"
    target = document.target
    first = int(window_means(target.realised_logprob_P).argmin()) * WINDOW
    positions_W = target.positions_P[first : first + WINDOW]
    return WorstDocument(
        split=split,
        row=index,
        document=number,
        doc_id=row.doc_ids[number].hex(),
        language=row.languages[number],
        exercise=row.exercises[number],
        targets=len(target.positions_P),
        logprob=logprob,
        text=run_text(row.tokens_T[row.documents()[number]][positions_W + 1]).plain,
    )
