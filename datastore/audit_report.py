"""What an audit says: its report as JSON, its tables and its one line for people."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.config import Config
from datastore.types import Split

# Nats of excess below which the text reads as the teacher's own, and above which cross entropy on it fights the
# teacher. A judgement: at 0.5 the teacher finds each token of its own words 1.6 times as likely as one of the text.
SAME, FAR = 0.1, 0.5


class AuditGroup(Config):
    """Means over the targets of one group, nats; *_error: standard errors, null for a single document.

    excess: -logprob - entropy; null where only sums over whole documents are stored (positions). outside_head,
    below_1_percent, below_01_percent: share of targets whose own token the teacher gives less than the threshold,
    1 % and 0.1 %.
    """

    documents: int
    targets: int
    logprob: float
    logprob_error: float | None
    perplexity: float
    entropy: float | None
    excess: float | None
    excess_error: float | None
    outside_head: float
    below_1_percent: float
    below_01_percent: float


class LowWindows(Config):
    """Windows of `size` consecutive targets of a document; low: those with a mean logprob below `level`."""

    size: int
    level: float
    windows: int
    low: int


class WorstDocument(Config):
    """A document of low mean logprob. place: split, row and number in the row. text: its worst window."""

    split: Split
    row: int
    document: int
    doc_id: str
    language: str
    exercise: str
    targets: int
    logprob: float
    text: str = ""


class AuditReport(Config):
    """What an audit found; groups by name, without those that hold no target."""

    fingerprint: str
    teacher: str
    target_id: str
    threshold: float
    rows: int
    documents: int
    classes: dict[str, AuditGroup]
    languages: dict[str, AuditGroup]
    exercises: dict[str, AuditGroup]
    positions: dict[str, AuditGroup]
    tenths: dict[str, AuditGroup]
    windows: LowWindows
    worst: tuple[WorstDocument, ...]
    verdict: str


def verdict(every: AuditGroup) -> str:
    """What the excess over all targets means for `loss.kd_weight`."""
    excess = every.excess or 0.0
    if every.excess_error is None:
        return "One document is too little to say how the teacher likes this text."
    cost = (
        f"The text costs the teacher {-every.logprob:.2f} nats a token, its own words would cost {every.entropy:.2f}: "
        f"excess {excess:+.2f} (standard error {every.excess_error:.2f}). "
    )
    if excess > FAR:
        return cost + (
            "Cross entropy on this text pulls away from the teacher: take loss.kd_weight near 1, or weigh cross "
            "entropy by the teacher's confidence (loss.confidence)."
        )
    if excess > SAME:
        return cost + (
            "Cross entropy and the teacher agree on most tokens: loss.kd_weight from 0.5 up keeps the student near "
            "the teacher; lower values follow the text where the two differ."
        )
    if excess >= -SAME:
        return cost + (
            "The text reads as the teacher's own: cross entropy and KD have one aim, and loss.kd_weight trades noise "
            "only (KD has less)."
        )
    return cost + (
        "The text is more predictable than the teacher's own words: cross entropy makes the student surer than the "
        "teacher, KD with loss.kd_weight near 1 does not."
    )


def print_audit(report: AuditReport, console: Console) -> None:
    """The report as tables, the verdict last."""
    console.print(
        f"audit of {report.teacher}: {report.documents:,} documents in {report.rows:,} rows, "
        f"threshold {report.threshold:.4g}",
        style="bold",
        markup=False,
    )
    for title, groups in (
        ("class", report.classes),
        ("language", report.languages),
        ("exercise", report.exercises),
        ("position in the document", report.positions),
        ("tenth of the document's targets", report.tenths),
    ):
        if groups:
            console.print(_group_table(title, groups))
    windows = report.windows
    share = windows.low / windows.windows if windows.windows else 0.0
    console.print(
        f"windows of {windows.size} targets with a mean logprob below {windows.level:g}: {windows.low:,} of "
        f"{windows.windows:,} ({share:.2%})",
        markup=False,
    )
    if report.worst:
        console.print(_worst_table(report.worst))
    console.print(report.verdict, style="bold", markup=False)


def _group_table(title: str, groups: dict[str, AuditGroup]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(title)
    headings = ("documents", "targets", "logprob", "perplexity", "entropy", "excess")
    for heading in (*headings, "outside head", "below 1 %", "below 0.1 %"):
        table.add_column(heading, justify="right")
    for name, group in groups.items():
        table.add_row(
            Text(name or "(none)"),
            f"{group.documents:,}",
            f"{group.targets:,}",
            _with_error(group.logprob, group.logprob_error),
            f"{group.perplexity:,.2f}",
            "" if group.entropy is None else f"{group.entropy:.3f}",
            "" if group.excess is None else _with_error(group.excess, group.excess_error),
            f"{group.outside_head:.2%}",
            f"{group.below_1_percent:.2%}",
            f"{group.below_01_percent:.2%}",
        )
    return table


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3f} ± {'?' if error is None else f'{error:.3f}'}"


def _worst_table(worst: tuple[WorstDocument, ...]) -> Table:
    table = Table(title="worst documents", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("row", "doc_id", "language", "exercise"):
        table.add_column(heading)
    table.add_column("targets", justify="right")
    table.add_column("logprob", justify="right")
    table.add_column("its worst window", overflow="fold")
    for document in worst:
        table.add_row(
            f"{document.split} {document.row}",
            document.doc_id[:12],
            Text(document.language),
            Text(document.exercise),
            f"{document.targets:,}",
            f"{document.logprob:.3f}",
            Text(" ".join(document.text.split())),
        )
    return table
