"""The picture of docs/numerics.md: error of the lm_head gradient against bytes a position, a line a scheme."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.target_schemes import GHOST, IID, POLYNOMIAL, SYSTEMATIC, THRESHOLD, TOP_K
from common.config import PROJECT_ROOT

PICTURE = PROJECT_ROOT / "docs" / "img" / "target_fidelity.png"
# Okabe and Ito's colours, told apart by every kind of sight; markers differ as well.
_LOOKS = {
    THRESHOLD: ("#0072B2", "o"),
    SYSTEMATIC: ("#009E73", "s"),
    IID: ("#E69F00", "^"),
    GHOST: ("#CC79A7", "D"),
    TOP_K: ("#D55E00", "v"),
    POLYNOMIAL: ("#000000", "X"),
}


def plot(rows: list[dict[str, Any]], students: dict[str, Any]) -> None:
    """One panel a student: filled marks are bytes by each scheme's own format, hollow ones by an ideal coder."""
    figure, panels = plt.subplots(1, len(students), figsize=(12, 5.4), dpi=100, sharey=True)
    for panel, (name, student) in zip(panels, students.items(), strict=True):
        for family, (colour, marker) in _LOOKS.items():
            curve = sorted((r for r in rows if r["family"] == family), key=lambda r: r["bytes"])
            _draw(panel, curve, name, family, colour, marker)
        panel.set(xscale="log", yscale="log", xlabel="bytes a position")
        panel.set_title(f"{name} student, KL {student['kl']:.2f} nats", fontsize=11)
        panel.set_xticks([10, 20, 36, 60, 100, 200], ["10", "20", "36", "60", "100", "200"])
        panel.set_xticks([], minor=True)
        panel.grid(which="both", color="#dddddd", linewidth=0.6)
    panels[0].set_ylabel("error of the lm_head gradient, relative to full KD")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    note = "Hollow, dotted: the same entries by an ideal coder without overhead. Ours: files as they are."
    figure.text(0.5, 0.065, note, ha="center", fontsize=9)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE)


def _draw(panel, curve, student: str, family: str, colour: str, marker: str) -> None:
    errors = [row["students"][student]["error"]["mean"] for row in curve]
    own = [row["bytes"] for row in curve]
    width = 2.4 if family == THRESHOLD else 1.4
    panel.plot(own, errors, marker=marker, color=colour, linewidth=width, label=family)
    if family != THRESHOLD:
        coded = [row["coded_bytes"] for row in curve]
        panel.plot(coded, errors, marker=marker, color=colour, mfc="white", ls=":", linewidth=1)
