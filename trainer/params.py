"""`vpmoe-train params`: the parameters of a student by component, and what a token of training costs."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from common.errors import EngineError
from trainer.flops import flops_per_token, forward_flops
from trainer.parameters import parameter_counts, parameter_table
from trainer.student_config import StudentConfig


def print_parameters(student: StudentConfig, seq_len: int, console: Console) -> None:
    """The table, its totals, and the FLOPs of a token in a row of `seq_len`."""
    counts, components = parameter_counts(student), parameter_table(student)
    table = _table("component", "copies x parameters each", "parameters", "share", "active")
    for part in components:
        each = f"{part.copies:,} x {part.each:,}"
        share = f"{part.total / counts['total']:.2%}"
        table.add_row(part.name, each, f"{part.total:,}", share, f"{part.active:,}")
    table.add_section()
    table.add_row("total", "", f"{counts['total']:,}", "", f"{counts['active']:,}")
    table.add_row("without embedding and lm_head", "", "", "", f"{counts['active_inner']:,}")
    console.print(table)
    flops = _table("FLOPs a token (forward)", "10^6", "share")
    parts = forward_flops(student, seq_len)
    for name, value in parts.items():
        flops.add_row(name, f"{value / 1e6:,.1f}", f"{value / sum(parts.values()):.2%}")
    console.print(flops)
    cost = flops_per_token(student, seq_len) / 1e9
    console.print(
        f"{cost:.3f} GFLOPs a token, forward and backward, rows of {seq_len}", markup=False
    )


def require_equal(student: StudentConfig, built: dict[str, int]) -> None:
    """Raises EngineError unless the built modules hold exactly the table's parameters."""
    expected = {part.name: part.total for part in parameter_table(student)}
    unlike = {
        name: (built.get(name), expected.get(name))
        for name in sorted(built.keys() | expected.keys())
        if built.get(name) != expected.get(name)
    }
    if unlike:
        raise EngineError(
            "the modules and the parameter table disagree",
            got=", ".join(f"{name} {count}" for name, (count, _) in unlike.items()),
            expected=", ".join(f"{name} {count}" for name, (_, count) in unlike.items()),
            remedy="trainer/parameters.py or trainer/megatron/student.py is wrong",
        )


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table
