"""`vpmoe-data inspect`: one packed row as a person reads it, the teacher's choices beside the text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from common.errors import ConfigError
from common.tokenizer import FIRST_CONTROL_ID, encoding
from datastore.manifest import TargetManifest
from datastore.reader import Dataset, TargetStore
from datastore.rollout_shard import RolloutShard, StoredRollout
from datastore.shard import shard_name
from datastore.target import row_target
from datastore.types import PackedRow, SparseTarget, Split
from datastore.verify import target_slugs

ENTRIES_OF_A_SPAN = 20
TOP_IDS = 5
_PIPED_WIDTH = 140
_SPAN_NAMES = ("prompt", "reasoning", "final")
_SPAN_STYLES = ("dim", "cyan", "green")
_CONTROL_STYLE = "bold magenta"
# An escape sequence in a row must not reach the terminal: control characters are shown by their pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(127, 160), 0xFFFD)


def make_console() -> Console:
    """The terminal, or plain lines of a fixed width when piped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


def print_row(
    folder: Path,
    *,
    split: Split,
    index: int,
    teacher: str | None,
    positions: slice | None,
    console: Console,
) -> None:
    """Print row `index` of a split; with targets, a table of the entries at `positions` (row coordinates).

    teacher: the only one there is when None. positions: the first of each span when None. Control tokens are shown
    as <|start|>, the same letters in ordinary text as <\\|start|>. Raises ConfigError for a row that is not there.
    """
    dataset = Dataset.open(folder)
    if not 0 <= index < dataset.num_rows(split):
        raise ConfigError(
            f"row {index} of split {split}", expected=f"0..{dataset.num_rows(split) - 1}"
        )
    row = dataset.row(split, index)
    shard, number = dataset.locate(split, index)
    title = f"{split} row {index:,} of {dataset.num_rows(split):,}: {shard_name(split, shard)} row {number}"
    console.print(Text(title, style="bold"))
    console.print(_documents_table(row))
    if rollouts := _rollouts(dataset, split, shard, number):
        console.print(_rollouts_table(rollouts))
    for renderable in row_text(row):
        console.print(renderable, soft_wrap=isinstance(renderable, Text))
    slugs = [teacher] if teacher else target_slugs(folder)
    if len(slugs) > 1:
        console.print(f"Targets of {', '.join(slugs)}: choose one with --teacher.", markup=False)
    elif slugs:
        _print_targets(TargetStore.open(dataset, slugs[0]), split, index, row, positions, console)
    else:
        console.print("No targets: `vpmoe-data score` makes them.", markup=False)


def row_text(row: PackedRow) -> Iterator[Rule | Text]:
    """The documents of a row: a rule before each run of one span, then its text with control tokens marked."""
    for number, where in enumerate(row.documents()):
        tokens_T, spans_T = row.tokens_T[where], row.spans_T[where]
        for start, end in _runs(spans_T):
            span = int(spans_T[start])
            name = _SPAN_NAMES[span] if span < len(_SPAN_NAMES) else f"unknown span {span}"
            first = where.start + start
            title = f"document {number}, {name}, positions {first}:{first + end - start}"
            yield Rule(Text(title), align="left", style="dim", characters="-")
            yield run_text(tokens_T[start:end], _SPAN_STYLES[min(span, 2)])


def token_text(token: int) -> str:
    """One token as quoted text; bytes when it is no whole UTF-8; a control token as it is."""
    if token >= FIRST_CONTROL_ID:
        return encoding().decode([token])
    content = encoding().decode_single_token_bytes(token)
    try:
        return repr(content.decode())
    except UnicodeDecodeError:
        return repr(content)


def shown_positions(
    row: PackedRow, target: SparseTarget, positions: slice | None, limit: int = ENTRIES_OF_A_SPAN
) -> np.ndarray:
    """Numbers of the entries to show: those at `positions`, or the first `limit` of each span."""
    if positions is not None:
        first, last, _ = positions.indices(len(row.tokens_T))
        inside = (target.positions_P >= first) & (target.positions_P < last)
        return np.flatnonzero(inside)
    labels_P = row.spans_T[target.positions_P + 1]
    chosen = [np.flatnonzero(labels_P == span)[:limit] for span in np.unique(labels_P)]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)


def run_text(tokens_T: np.ndarray, style: str = "") -> Text:
    """Tokens as text, safe for a terminal: control tokens in their style, control characters as pictures."""
    text, is_control = Text(), tokens_T >= FIRST_CONTROL_ID
    for start, end in _runs(is_control):
        decoded = encoding().decode(tokens_T[start:end].tolist(), errors="replace")
        if is_control[start]:
            text.append(decoded, _CONTROL_STYLE)
        else:
            text.append(decoded.translate(_PICTURES).replace("<|", "<\\|"), style)
    return text


def _runs(values_T: np.ndarray) -> Iterator[tuple[int, int]]:
    """(start, end) of each stretch of equal values."""
    changes = (np.flatnonzero(values_T[1:] != values_T[:-1]) + 1).tolist()
    return itertools.pairwise([0, *changes, len(values_T)])


def _rollouts(dataset: Dataset, split: Split, shard: int, row: int) -> list[StoredRollout]:
    """The rollouts in a row in the order of its documents; none in a dataset of another kind."""
    manifest = dataset.manifest
    if manifest.rollouts is None:
        return []
    entry = manifest.rollouts.files[split][shard]
    place = {"dataset_id": manifest.dataset_id, "split": split, "shard": shard}
    stored = RolloutShard(dataset.path / "rollouts", entry, **place)
    found = (stored.rollout(index)[0] for index in range(stored.num_rows))
    return sorted((one for one in found if one.row == row), key=lambda one: one.document)


def _rollouts_table(rollouts: list[StoredRollout]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("document", "prompt", "sample", "policy version", "mean logprob"):
        table.add_column(heading, justify="left" if heading == "document" else "right")
    table.add_column("teacher's mode")
    table.add_column("verdict")
    for one in rollouts:
        numbers = [f"{number:,}" for number in (one.prompt, one.sample, one.policy_version)]
        logprob = f"{one.logprobs_S.mean():.3f}"
        table.add_row(str(one.document), *numbers, logprob, one.reasoning, one.verdict)
    return table


def _documents_table(row: PackedRow) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("document")
    table.add_column("id")
    for heading in ("positions", "tokens", "prompt", "reasoning", "final"):
        table.add_column(heading, justify="right")
    table.add_column("language")
    table.add_column("exercise")
    for number, (where, doc_id) in enumerate(zip(row.documents(), row.doc_ids, strict=True)):
        counts = np.bincount(row.spans_T[where], minlength=3)[:3].tolist()
        sizes = [f"{count:,}" for count in (where.stop - where.start, *counts)]
        labels = (Text(row.languages[number]), Text(row.exercises[number]))
        table.add_row(str(number), doc_id.hex(), f"{where.start}:{where.stop}", *sizes, *labels)
    end = int(row.doc_ends_D[-1])
    table.add_row("padding", "", f"{end}:{len(row.tokens_T)}", f"{len(row.tokens_T) - end:,}")
    return table


def _print_targets(
    store: TargetStore,
    split: Split,
    index: int,
    row: PackedRow,
    positions: slice | None,
    console: Console,
) -> None:
    documents = store.documents(split, index, row)
    if documents is None:
        console.print(f"Targets of {store.manifest.slug}: not scored.", markup=False)
        return
    target = row_target(documents, row)
    chosen = shown_positions(row, target, positions)
    console.print(_targets_table(store.manifest, row, target, chosen))
    if missing := [number for number, document in enumerate(documents) if document is None]:
        numbers = ", ".join(map(str, missing))
        console.print(f"Not scored: document {numbers} of {len(documents)}.", markup=False)
    console.print(
        f"{len(chosen):,} of {len(target.positions_P):,} entries; entry t scores token t+1. "
        "Choose others with --positions a:b.",
        markup=False,
    )


def _targets_table(
    manifest: TargetManifest, row: PackedRow, target: SparseTarget, chosen: np.ndarray
) -> Table:
    title = f"targets of {manifest.slug}, threshold {target.threshold:.4g}"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("t", "span", "token t+1", "logprob", "teacher's top", "draws", "tail mass"):
        justify = "right" if heading in ("t", "logprob", "draws", "tail mass") else "left"
        table.add_column(heading, justify=justify, overflow="fold")
    for entry in chosen.tolist():
        position = int(target.positions_P[entry])
        span = int(row.spans_T[position + 1])
        start, end = target.offsets_P1[entry : entry + 2].tolist()
        num_head = int(target.num_head_P[entry])
        top = range(start, start + min(num_head, TOP_IDS))
        choices = [f"{token_text(int(target.ids_E[i]))} {target.weights_E[i]:.3f}" for i in top] + (
            ["..."] if num_head > TOP_IDS else []
        )
        table.add_row(
            str(position),
            _SPAN_NAMES[span],
            Text(token_text(int(row.tokens_T[position + 1])), _SPAN_STYLES[span]),
            f"{target.realised_logprob_P[entry]:.3f}",
            Text("  ".join(choices)),
            str(end - start - num_head),
            f"{math.exp(target.log_tail_mass_P[entry]):.4f}",
        )
    return table
