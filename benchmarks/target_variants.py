"""Would another way of sampling, rounding or weighing the stored target be better? Measured at one threshold.

    python -m benchmarks.target_variants

All variants start from threshold 1/25 (benchmarks/target_fidelity.py has the teacher, the students and the figures):
- the order of ids in which the tail is sampled: random as in this benchmark's ids, the model's own, by frequency;
- golden: the uniform number of position p is frac(u + p * golden ratio), one u a document, instead of one a position;
- temporal: each id is sampled by itself along the positions of its document, so that its errors cancel;
- priced: an id's threshold grows with the square root of the bits that it costs;
- head logprobs rounded to coarser steps; weights renormalised to 1; the gradient sum(T) q - T instead of q - T;
- difference: T = a q + (weight - a q / inclusion probability) at the stored ids, q the student's own distribution.
Writes benchmarks/results/target_variants.json.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.smollm import Teacher, load_teacher, spread_ids
from benchmarks.target_bytes import coded_bytes, id_order
from benchmarks.target_fidelity import chunks, spread
from benchmarks.target_schemes import SEEDS, Chunk, Entries, entries_at, grid_points
from benchmarks.target_students import STUDENTS, Reference, Student, judge, kl_errors, reference

RESULT = Path(__file__).parent / "results" / "target_variants.json"
THRESHOLD = 1 / 25
GOLDEN = (5**0.5 - 1) / 2
HEAD_STEPS = (64, 16, 8, 4)
SHARES_OF_Q = (0.25, 0.5)
CHUNK = 256
AS_STORED = "as stored"


class Sampler:
    """Draws every variant of one chunk after another; temporal sampling carries `credit_SV` from chunk to chunk."""

    def __init__(self, teacher: Teacher) -> None:
        ranks_V = id_order(teacher).ranks_V[teacher.ids_V]
        self.by_frequency_V = torch.from_numpy(np.argsort(ranks_V))
        self.by_model_V = torch.from_numpy(np.searchsorted(teacher.ids_V, spread_ids()))
        # about what an id costs in the codec: most of the bits of its rank, and of a draw's place in its set
        bits_V = torch.from_numpy(0.85 * np.log2(ranks_V + 2.0) + 1.5)
        self.priced_V = THRESHOLD * (bits_V / 7.2).sqrt()
        self.flat_V = torch.full_like(self.priced_V, THRESHOLD)

    def open_document(self, number: int, chunk: Chunk) -> None:
        """Before the first chunk of a document: fresh credits, and the one uniform number that `golden` uses."""
        generator = torch.Generator().manual_seed(number)
        shape = (SEEDS, len(self.flat_V))
        self.credit_SV = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.start_S1 = torch.stack([chunk.uniforms(seed)[:1] for seed in range(SEEDS)])

    def draw(self, chunk: Chunk) -> dict[str, list[Entries]]:
        """Every variant's entries, one a seed."""
        uniforms_SC = torch.stack([chunk.uniforms(seed) for seed in range(SEEDS)])
        golden_SC = (self.start_S1 + GOLDEN * torch.from_numpy(chunk.positions_C).double()) % 1
        as_is_V = torch.arange(len(self.flat_V))
        return {
            AS_STORED: _systematic(chunk, uniforms_SC, self.flat_V, as_is_V),
            "golden": _systematic(chunk, golden_SC, self.flat_V, as_is_V),
            "model's own order": _systematic(chunk, uniforms_SC, self.flat_V, self.by_model_V),
            "frequency order": _systematic(chunk, uniforms_SC, self.flat_V, self.by_frequency_V),
            "priced": _systematic(chunk, uniforms_SC, self.priced_V, as_is_V),
            "temporal": self._temporal(chunk),
        }

    def _temporal(self, chunk: Chunk) -> list[Entries]:
        """Each id is drawn where its credit, a uniform number and its p / t up to here, passes a whole number."""
        in_head_CV = chunk.probs_CV >= THRESHOLD
        spent_CV = torch.where(in_head_CV, 0.0, chunk.probs_CV / THRESHOLD).cumsum_(dim=0)
        drawn = []
        for seed, credit_V in enumerate(self.credit_SV):
            whole_CV = (spent_CV + credit_V).floor_()
            is_drawn_CV = whole_CV.diff(dim=0, prepend=torch.zeros_like(whole_CV[:1])) > 0
            drawn.append(
                _joined(chunk, in_head_CV, *is_drawn_CV.nonzero(as_tuple=True), self.flat_V)
            )
            self.credit_SV[seed] = (spent_CV[-1] + credit_V) % 1
        return drawn


def _systematic(
    chunk: Chunk, uniforms_SC: torch.Tensor, thresholds_V: torch.Tensor, order_V: torch.Tensor
) -> list[Entries]:
    """Ids at or above their threshold, and systematic draws of the others in the given order."""
    in_head_CV = chunk.probs_CV >= thresholds_V
    shares_CV = torch.where(in_head_CV, 0.0, chunk.probs_CV / thresholds_V)
    cumulative_CV = shares_CV[:, order_V].cumsum_(dim=1)
    drawn = []
    for uniforms_C in uniforms_SC:
        points_CJ = grid_points(uniforms_C, THRESHOLD) / THRESHOLD
        columns_CJ = torch.searchsorted(cumulative_CV, points_CJ, right=True)
        rows, points = (points_CJ < cumulative_CV[:, -1:]).nonzero(as_tuple=True)
        columns = order_V[columns_CJ[rows, points]]
        drawn.append(_joined(chunk, in_head_CV, rows, columns, thresholds_V))
    return drawn


def _joined(chunk: Chunk, in_head_CV, rows, columns, thresholds_V: torch.Tensor) -> Entries:
    head_rows, head_columns = in_head_CV.nonzero(as_tuple=True)
    head_probs = chunk.probs_CV[head_rows, head_columns]
    is_draw_E = torch.arange(len(head_rows) + len(rows)) >= len(head_rows)
    return entries_at(
        chunk,
        torch.cat([head_rows, rows]),
        torch.cat([head_columns, columns]),
        torch.cat([head_probs, thresholds_V[columns]]),
        is_draw_E,
    )


@torch.inference_mode()
def draw_all(teacher: Teacher) -> dict[str, list[Entries]]:
    """Entries of each variant, one a seed."""
    sampler = Sampler(teacher)
    parts: dict[tuple[str, int], list[tuple[int, Entries]]] = defaultdict(list)
    opened = -1
    for number, first, chunk in tqdm(chunks(teacher), desc="variants"):
        if number != opened:
            opened = number
            sampler.open_document(number, chunk)
        for name, seeds in sampler.draw(chunk).items():
            for seed, entries in enumerate(seeds):
                parts[name, seed].append((first, entries))
    names = dict.fromkeys(name for name, _ in parts)
    return {name: [Entries.joined(parts[name, seed]) for seed in range(SEEDS)] for name in names}


def reweighted(entries: Entries, num_positions: int) -> dict[str, Entries]:
    """The same entries with other weights: head logprobs rounded to steps of 1/n nat, all renormalised."""
    variants = {}
    for steps in HEAD_STEPS:
        rounded_E = ((entries.weights_E.log() * steps).round() / steps).exp()
        weights_E = torch.where(entries.counts_E == 0, rounded_E, entries.weights_E)
        variants[f"head steps of 1/{steps}"] = replace(entries, weights_E=weights_E)
    weights_E = entries.weights_E / weight_sums(entries, num_positions)[entries.rows_E]
    return {**variants, "renormalised": replace(entries, weights_E=weights_E)}


def weight_sums(entries: Entries, num_positions: int) -> torch.Tensor:
    return torch.zeros(num_positions).index_add_(0, entries.rows_E, entries.weights_E)


class Products:
    """Per student, what several variants need: its weights, and logits at entries."""

    def __init__(self, student: Student, teacher: Teacher) -> None:
        self.exact: Reference = reference(student, teacher)
        self.hidden_PD, self.head_VD = student.weights(teacher)

    def judge(self, entries: Entries) -> dict[str, float]:
        figures = judge(entries, self.exact, self.hidden_PD, self.head_VD)
        return {name: value for name, value in figures.items() if name != "angle"}

    def logits_E(self, entries: Entries) -> torch.Tensor:
        pairs = zip(entries.rows_E.split(1 << 15), entries.columns_E.split(1 << 15), strict=True)
        return torch.cat([(self.hidden_PD[r] * self.head_VD[c]).sum(dim=1) for r, c in pairs])

    def sparse_sum(self, entries: Entries, weights_E: torch.Tensor) -> torch.Tensor:
        """sum over positions of (weights) h^T: float32 [V, D]."""
        places_2E = torch.stack([entries.columns_E, entries.rows_E])
        shape = (len(self.head_VD), len(self.hidden_PD))
        weights_VP = torch.sparse_coo_tensor(places_2E, weights_E, shape, check_invariants=False)
        return torch.sparse.mm(weights_VP, self.hidden_PD)

    def difference(self, entries: Entries, share: float) -> dict[str, float]:
        """T = a q + (weight - a q / inclusion): unbiased for any a; the inclusion probability is p / weight."""
        q_E = (self.logits_E(entries) - self.exact.lse_P[entries.rows_E]).exp()
        weights_E = entries.weights_E - share * q_E * entries.weights_E / entries.probs_E
        exact = self.exact
        sum_q_VD = exact.grad_VD + exact.teacher_VD
        target_VD = share * sum_q_VD + self.sparse_sum(entries, weights_E)
        return {"error": float((target_VD - exact.teacher_VD).norm() / exact.grad_VD.norm())}

    @torch.inference_mode()
    def total(self, all_entries: list[Entries]) -> list[dict[str, float]]:
        """The form (sum T) lse - sum T z, whose gradient is sum(T) q - T: errors of each seed."""
        num_positions = len(self.hidden_PD)
        excess_SP = torch.stack([weight_sums(e, num_positions) - 1 for e in all_entries])
        excess_SVD = torch.zeros(len(all_entries), *self.head_VD.shape)
        for start in range(0, num_positions, CHUNK):
            at = slice(start, start + CHUNK)
            h_CD = self.hidden_PD[at]
            q_CV = (h_CD @ self.head_VD.T - self.exact.lse_P[at, None]).exp_()
            for seed, excess_P in enumerate(excess_SP):
                excess_SVD[seed].addmm_(q_CV.T, h_CD * excess_P[at, None])
        return [
            self._total_figures(entries, excess_P, excess_VD)
            for entries, excess_P, excess_VD in zip(all_entries, excess_SP, excess_SVD, strict=True)
        ]

    def _total_figures(
        self, entries: Entries, excess_P: torch.Tensor, excess_VD: torch.Tensor
    ) -> dict[str, float]:
        exact = self.exact
        target_VD = self.sparse_sum(entries, entries.weights_E)
        error = (target_VD - exact.teacher_VD - excess_VD).norm() / exact.grad_VD.norm()
        scores_E = entries.weights_E * self.logits_E(entries)
        scored_P = torch.zeros_like(exact.lse_P).index_add_(0, entries.rows_E, scores_E)
        kl_P = (1 + excess_P) * exact.lse_P - scored_P - exact.entropy_P
        return {"error": float(error), **kl_errors(kl_P, exact.kl_P)}


def judge_student(
    student: Student, teacher: Teacher, drawn: dict[str, list[Entries]]
) -> dict[str, Any]:
    products = Products(student, teacher)
    stored, num_positions = drawn[AS_STORED], len(teacher.hidden_PD)
    figures = {name: [products.judge(one) for one in seeds] for name, seeds in drawn.items()}
    weighed = [reweighted(entries, num_positions) for entries in stored]
    for name in weighed[0]:
        figures[name] = [products.judge(variants[name]) for variants in weighed]
    for share in SHARES_OF_Q:
        figures[f"difference, a = {share}"] = [products.difference(e, share) for e in stored]
    figures["gradient sum(T) q - T"] = products.total(stored)
    return {name: spread(one) for name, one in figures.items()}


def main() -> None:
    teacher = load_teacher()
    drawn = draw_all(teacher)
    num_positions, order = len(teacher.hidden_PD), id_order(teacher)
    sizes = {
        name: {
            "entries": len(seeds[0].rows_E) / num_positions,
            "coded_bytes": coded_bytes("", seeds[0], teacher.ids_V, order, num_positions),
            "spread_of_sum": float(weight_sums(seeds[0], num_positions).std()),
        }
        for name, seeds in drawn.items()
    }
    students = {student.name: judge_student(student, teacher, drawn) for student in STUDENTS}
    report = {"threshold": THRESHOLD, "seeds": SEEDS, "sizes": sizes, "students": students}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    for name, size in sizes.items():
        print(name, {key: round(value, 3) for key, value in size.items()})
    for student, variants in students.items():
        for name, table in variants.items():
            means = {key: f"{v['mean']:.4f}+-{v['spread']:.4f}" for key, v in table.items()}
            print(f"{student:7} {name:24} {means}")


if __name__ == "__main__":
    main()
