"""What ranks tell each other while they run, and when one counts as lost. No clock and no process group here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Self

Dead = Callable[["Beat"], bool]


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself now and then.

    number: of the beat, counting up. place: equal on ranks that see each other's pid. node: torchrun's number of the
    machine. step: the last finished one. phase_sec: how long it has been in `phase`. left: None while it runs, ""
    after a clean end, else the error it ended with.
    """

    rank: int
    number: int
    pid: int
    place: str
    node: int
    step: int
    phase: str
    phase_sec: float
    left: str | None = None

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str) -> Self:
        """The beat of `to_json`."""
        return cls(**json.loads(text))

    def name(self) -> str:
        """The rank as people find it."""
        return f"rank {self.rank} (node {self.node}, pid {self.pid})"


class Peers:
    """The other ranks as this one has heard them. Seconds are of a clock that stands still while this process does."""

    def __init__(self, silent_sec: float) -> None:
        self._silent_sec = silent_sec
        self._last: dict[int, tuple[Beat, float]] = {}

    def hear(self, beats: Sequence[Beat], now_sec: float) -> None:
        """Take what the ranks have said last; one that says nothing new is not heard again."""
        for beat in beats:
            known = self._last.get(beat.rank)
            if known is None or known[0].number != beat.number:
                self._last[beat.rank] = beat, now_sec

    def beats(self) -> list[Beat]:
        """The last beat of each, by rank."""
        return [self._last[rank][0] for rank in sorted(self._last)]

    def fault(self, now_sec: float, dead: Dead) -> str | None:
        """What is wrong with whom, None when nothing is. dead: whether the process of a beat is known to be gone."""
        running = [(b, s) for b, s in self._last.values() if b.left is None]
        gone = [beat.name() for beat, _ in running if dead(beat)]
        if gone:
            return f"{_and(gone)} died"
        silent = [(b.name(), now_sec - s) for b, s in running if now_sec - s > self._silent_sec]
        if silent:
            longest = max(seconds for _, seconds in silent)
            names = [name for name, _ in silent]
            return f"{_and(names)} {_have(names)} not been heard for {longest:.0f} s"
        for beat, since in self._last.values():
            if beat.left and now_sec - since > self._silent_sec:
                return f"{beat.name()} ended alone: {beat.left.rstrip('.')}"
        return None

    def running(self, dead: Dead) -> list[int]:
        """Those of these ranks that have not left and are not known to be gone."""
        return [beat.rank for beat in self.beats() if beat.left is None and not dead(beat)]


def places(beats: Sequence[Beat]) -> str:
    """Where each rank stands, in one line; ranks in the same phase together."""
    by_phase: dict[str, list[Beat]] = {}
    for beat in beats:
        by_phase.setdefault(beat.phase, []).append(beat)
    parts = []
    for phase, there in by_phase.items():
        longest = max(beat.phase_sec for beat in there)
        who = "every rank" if len(by_phase) == 1 and len(there) > 1 else _and(_ranks(there))
        parts.append(f"{who}: {phase} for {longest:.0f} s")
    return ", ".join(parts)


def _ranks(beats: Sequence[Beat]) -> list[str]:
    return [f"rank {beat.rank}" for beat in beats]


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
