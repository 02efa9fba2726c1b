"""What differs between values that were stored and those that a run would go on with, as a table for people."""

from __future__ import annotations

from typing import Any

Differences = dict[str, tuple[Any, Any]]
_WIDEST = 40


def differences(stored: Any, wanted: Any, prefix: str = "") -> Differences:
    """The leaves that differ, by dotted key: (stored, wanted). A key that one lacks counts as null."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        found: Differences = {}
        for key in stored.keys() | wanted.keys():
            found |= differences(stored.get(key), wanted.get(key), f"{prefix}{key}.")
        return found
    return {} if stored == wanted else {prefix.rstrip("."): (stored, wanted)}


def difference_table(groups: dict[str, Differences], stored: str) -> str:
    """Lines for people: each group, under it its keys with both values. stored: heading of the first of them."""
    rows = [("", stored, "this run")]
    for group, found in groups.items():
        if found:
            rows.append((group, "", ""))
            rows += [
                (f"  {key}", _shown(was), _shown(now)) for key, (was, now) in sorted(found.items())
            ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        f"  {key:<{widths[0]}}  {was:<{widths[1]}}  {now}".rstrip() for key, was, now in rows
    )


def _shown(value: Any) -> str:
    """As in a config file; a hash by its start."""
    plain = {None: "null", True: "true", False: "false"}
    text = plain[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
