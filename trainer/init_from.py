"""Which weights a student takes from a checkpoint, which are new, which are dropped: decided by names and shapes alone.

Names are those of the checkpoint (docs/architecture.md); patterns are shell patterns over them. Whatever lies in only
one of the two, or differs in shape, must be named by a pattern: nothing is left out unseen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from common.errors import ConfigError

Shape = tuple[int, ...]
_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """Global shapes by name. taken: from the checkpoint. new: initialised. dropped: only in the checkpoint."""

    taken: dict[str, Shape]
    new: dict[str, Shape]
    dropped: dict[str, Shape]

    def table(self) -> dict[str, list[dict[str, Any]]]:
        """Rows by what happens, layers collapsed: name, tensors, parameters (all of them), shape of one."""
        return {kind: _rows(getattr(self, kind)) for kind in ("taken", "new", "dropped")}

    def text(self) -> str:
        """The table as people read it."""
        lines = []
        for kind, rows in self.table().items():
            tensors, parameters = (
                sum(row[key] for row in rows) for key in ("tensors", "parameters")
            )
            lines.append(f"{kind}: {tensors} tensors, {parameters:,} numbers")
            lines += [
                f"  {row['name']}  {row['shape']} x {row['tensors']} = {row['parameters']:,}"
                for row in rows
            ]
        return "\n".join(lines)


def plan_weights(
    stored: Mapping[str, Shape],
    student: Mapping[str, Shape],
    *,
    new: Iterable[str] = (),
    drop: Iterable[str] = (),
) -> WeightPlan:
    """Match a checkpoint with a student. Raises ConfigError with every name that no pattern accounts for.

    A name whose shape differs counts as one only the student has and one only the checkpoint has: it starts anew when
    both `new` and `drop` name it. A pattern over a name that both have alike matches nothing there.
    """
    alike = {name for name, shape in student.items() if stored.get(name) == shape}
    only_student = {name: shape for name, shape in student.items() if name not in alike}
    only_stored = {name: shape for name, shape in stored.items() if name not in alike}
    problems = []
    for only, patterns, key, where in (
        (only_student, tuple(new), "new", "only in the student"),
        (only_stored, tuple(drop), "drop", "only in the checkpoint"),
    ):
        unnamed = {
            name: shape
            for name, shape in only.items()
            if not any(fnmatchcase(name, pattern) for pattern in patterns)
        }
        differing = {
            name: shape for name, shape in unnamed.items() if name in stored and name in student
        }
        alone = {name: shape for name, shape in unnamed.items() if name not in differing}
        problems += [f"{where}, not in init_from.{key}: {line}" for line in collapsed(alone)]
        problems += [
            f"of another shape (student {student[name]}, checkpoint {stored[name]}), not in init_from.{key}: {name}"
            for name in differing
        ]
        problems += [
            f"init_from.{key} names nothing that is {where}: {pattern}"
            for pattern in patterns
            if not any(fnmatchcase(name, pattern) for name in only)
        ]
    if problems:
        raise ConfigError(
            "the checkpoint's weights and the student's differ:\n  " + "\n  ".join(problems) + "\n",
            remedy="name what starts anew in init_from.new and what is left behind in init_from.drop, "
            "or use the student of the checkpoint",
        )
    return WeightPlan(
        taken={name: student[name] for name in student if name in alike},
        new=only_student,
        dropped=only_stored,
    )


def collapsed(shapes: Mapping[str, Shape]) -> list[str]:
    """One line for each parameter of a kind: its layers folded, its shape, how many."""
    return [f"{row['name']} {row['shape']} x {row['tensors']}" for row in _rows(shapes)]


def _rows(shapes: Mapping[str, Shape]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in shapes.items():
        groups.setdefault((_NUMBER.sub("{}", name), tuple(shape)), []).append(name)
    return [
        {
            "name": _folded(pattern, names),
            "shape": list(shape),
            "tensors": len(names),
            "parameters": len(names) * math.prod(shape),
        }
        for (pattern, shape), names in groups.items()
    ]


def _folded(pattern: str, names: list[str]) -> str:
    """decoder.layers.{0..2,4}.x for the layers of `names`; the name itself when it has no layer."""
    numbers = sorted(int(found[0]) for name in names if (found := _NUMBER.search(name)))
    if not numbers:
        return pattern
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = ",".join(f"{first}" if first == last else f"{first}..{last}" for first, last in runs)
    return pattern.replace("{}", "{" + parts + "}" if len(numbers) > 1 else parts)
