"""The closing table of a build, for people."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from datastore.manifest import DatasetManifest
from datastore.types import SPLITS

_PIPED_WIDTH = 140


def print_summary(folder: Path, manifest: DatasetManifest) -> None:
    """Rows, documents, tokens by span and fill of each split; then rejects and truncations by reason."""
    title = f"{folder}  fingerprint {manifest.fingerprint[:16]}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("split", "shards", "rows", "documents", "tokens"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for heading in ("ignored", "reasoning", "final", "fill"):
        table.add_column(heading, justify="right")
    for split in SPLITS:
        counts, spans = manifest.counts[split], manifest.counts[split].tokens_by_span
        numbers = (len(manifest.entries(split)), counts.rows, counts.documents, counts.tokens)
        by_span = (spans.ignored, spans.reasoning, spans.final)
        cells = [f"{number:,}" for number in (*numbers, *by_span)]
        table.add_row(split, *cells, f"{counts.fill:.2%}" if counts.rows else "empty")
    source_rows = sum(source.rows for source in manifest.sources)
    lines = [
        f"source: {source_rows:,} rows in {len(manifest.sources):,} files",
        f"rejected: {_listed(manifest.rejects)}",
        f"truncated: {_listed(manifest.truncated)}",
    ]
    console = Console()
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    console.print(Group(table, *(Text(line) for line in lines)))


def _listed(counts: dict[str, int]) -> str:
    shown = [f"{reason} {number:,}" for reason, number in counts.items() if number]
    return ", ".join(shown) or "none"
