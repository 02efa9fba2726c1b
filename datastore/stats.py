"""`vpmoe-data stats`: what a dataset and its targets hold, as tables and a histogram."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import FormatError
from datastore.budget import Budget, ClassBudget
from datastore.manifest import SampledCounts, TargetManifest, load_target_manifest
from datastore.reader import Dataset
from datastore.summary import print_summary
from datastore.types import SPLITS, Split
from datastore.verify import target_slugs

# Rows whose document lengths are read, evenly over the dataset: about a second.
SAMPLE_ROWS = 20_000
_BINS = 16
_BAR = 50
_FIGURES = tuple(ClassBudget.model_fields)


def print_stats(folder: Path, console: Console) -> None:
    """Counts of the manifest, a histogram of document lengths, and the error budget of every teacher's targets."""
    dataset = Dataset.open(folder)
    print_summary(folder, dataset.manifest)
    lengths, rows = document_lengths(dataset, SAMPLE_ROWS)
    total = sum(dataset.num_rows(split) for split in SPLITS)
    title = f"tokens a document ({len(lengths):,} documents of {rows:,} of {total:,} rows)"
    if len(lengths):
        console.print(_histogram_table(lengths, title))
    documents = sum(counts.documents for counts in dataset.manifest.counts.values())
    if dataset.manifest.rollouts is not None:
        for split, sampled in dataset.manifest.rollouts.counts.items():
            console.print(rollouts_line(split, sampled), markup=False, soft_wrap=True)
    for slug in target_slugs(folder):
        manifest = load_target_manifest(folder, slug)
        console.print(_budget_table(manifest))
        console.print(scored_line(manifest, documents), markup=False, soft_wrap=True)


def rollouts_line(split: Split, counts: SampledCounts) -> str:
    """What the student sampled: how often it kept to the format, the teacher's modes, the weights that sampled."""
    verdicts = sorted(counts.verdicts.items(), key=lambda item: (-item[1], item[0]))
    shares = [f"{name} {count / counts.rollouts:.1%}" for name, count in verdicts]
    modes = [f"{name} {count / counts.rollouts:.1%}" for name, count in counts.modes.items()]
    versions = f"policy versions {counts.first_version:,} to {counts.last_version:,}"
    parts = [f"{split}: {counts.rollouts:,} rollouts", ", ".join(shares)]
    return "; ".join([*parts, "teacher's mode " + ", ".join(modes), versions])


def scored_line(manifest: TargetManifest, documents: int) -> str:
    """How many of a dataset's documents are scored, by which selection, and how many no engine could score."""
    scored = sum(counts["documents"] for counts in manifest.counts.values())
    share = scored / documents if documents else 0.0
    chosen = [f"{key} {value}" for key, value in manifest.selection.items() if value]
    parts = [f"scored: {scored:,} of {documents:,} documents ({share:.1%})", *chosen]
    if manifest.quarantine:
        parts.append(f"quarantined: {len(manifest.quarantine):,}")
    return "; ".join(parts)


def document_lengths(dataset: Dataset, max_rows: int) -> tuple[np.ndarray, int]:
    """Lengths of the documents in at most `max_rows` rows, evenly over both splits, and the number of rows read."""
    places = [
        (split, index) for split in SPLITS for index in _spread(dataset.num_rows(split), max_rows)
    ]
    lengths = [np.diff(dataset.row(*place).doc_ends_D, prepend=0) for place in places]
    return np.concatenate(lengths) if lengths else np.empty(0, np.int32), len(places)


def histogram(lengths: np.ndarray, bins: int = _BINS) -> list[tuple[int, int, int]]:
    """(first length, last length, documents) of equal ranges from the shortest to the longest document."""
    first, last = int(lengths.min()), int(lengths.max())
    width = -(-(last - first + 1) // bins)
    counts = np.bincount((lengths - first) // width)
    return [
        (first + i * width, first + (i + 1) * width - 1, count)
        for i, count in enumerate(counts.tolist())
    ]


def _spread(num_rows: int, max_rows: int) -> list[int]:
    count = min(num_rows, max_rows)
    return [i * num_rows // count for i in range(count)]


def _histogram_table(lengths: np.ndarray, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("tokens", "documents", "share"):
        table.add_column(heading, justify="right")
    table.add_column("")
    ranges = histogram(lengths)
    longest = max(count for _, _, count in ranges)
    for first, last, count in ranges:
        bar = "█" * round(_BAR * count / longest) or ("▏" if count else "")
        table.add_row(f"{first}..{last}", f"{count:,}", f"{count / len(lengths):.1%}", bar)
    mean, median = lengths.mean(), np.median(lengths)
    table.add_row("", "", "", Text(f"mean {mean:.1f}, median {median:.0f}", "dim"))
    return table


def _budget_table(manifest: TargetManifest) -> Table:
    try:
        budget = Budget.model_validate(manifest.budget)
    except ValueError as error:
        raise FormatError(f"the error budget of targets {manifest.slug}: {error}") from None
    title = (
        f"targets of {manifest.slug}: {budget.positions:,} positions, "
        f"{budget.bytes_per_token:.1f} bytes each, threshold {manifest.threshold:.4g}"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("class")
    for figure in _FIGURES:
        table.add_column(figure, justify="right")
    for name in ("reasoning", "final", "control"):
        values = getattr(budget, name)
        cells = [f"{getattr(values, f):,.4g}" for f in _FIGURES] if values else ["no positions"]
        table.add_row(name, *cells)
    return table
