"""What `vpmoe-data verify` reports: the first fault of each kind, and the check of a listed file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from common.files import sha256_file
from datastore.shard import FileEntry


@dataclass(frozen=True)
class Fault:
    """The first fault of a kind. file: relative to the dataset. row: within that file. count: of this kind in all."""

    kind: str
    file: str
    row: int | None
    message: str
    count: int = 1

    def __str__(self) -> str:
        where = self.file if self.row is None else f"{self.file} row {self.row}"
        more = f" (and {self.count - 1:,} more of this kind)" if self.count > 1 else ""
        return f"{self.kind}: {where}: {self.message}{more}"


class Faults:
    """Keeps the first fault of each kind and counts the rest."""

    def __init__(self) -> None:
        self._first: dict[str, Fault] = {}
        self._counts: dict[str, int] = {}

    def add(self, kind: str, file: str, row: int | None, message: str, count: int = 1) -> None:
        self._first.setdefault(kind, Fault(kind, file, row, message))
        self._counts[kind] = self._counts.get(kind, 0) + count

    def merge(self, other: Faults) -> None:
        for fault in other.found():
            self.add(fault.kind, fault.file, fault.row, fault.message, fault.count)

    def found(self) -> list[Fault]:
        return [
            Fault(kind, fault.file, fault.row, fault.message, self._counts[kind])
            for kind, fault in self._first.items()
        ]


def verify_file(folder: Path, entry: FileEntry, prefix: str, faults: Faults) -> None:
    """Presence, size and sha256 of a listed file; `prefix` leads its name in a fault."""
    path, name = folder / entry.name, prefix + entry.name
    if not path.is_file():
        faults.add("missing file", name, None, "it is listed and absent")
    elif (size := path.stat().st_size) != entry.bytes:
        faults.add("file size", name, None, f"{size} bytes, the manifest lists {entry.bytes}")
    elif (found := sha256_file(path)) != entry.sha256:
        faults.add("file sha256", name, None, f"{found}, the manifest lists {entry.sha256}")
