"""Sums of a step for people and dashboards. Sums add over micro-batches and ranks; means are formed once, at the end.

Legend: C classes (reasoning, final, control; `trainer.batch.CLASSES`), M quantities (`QUANTITIES`), N positions.
Control targets are counted in their span too, so totals are over reasoning and final.
"""

from __future__ import annotations

import torch

from datastore.types import SPAN_FINAL, SPAN_REASONING
from trainer.batch import CLASSES, Batch

QUANTITIES = (
    "positions",
    "scored",
    "ce",
    "kd",
    "entropy",
    "teacher_nll",
    "loss",
    "weight",
    "ranked",
    "label_top1",
    "teacher_headed",
    "teacher_top1",
)


def loss_sums(
    batch: Batch,
    ce_N: torch.Tensor,
    kd_N: torch.Tensor,
    ce_coef_N: torch.Tensor,
    kd_coef_N: torch.Tensor,
    top_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every quantity summed over the batch's targets of each class: float64 [C, M], on the batch's device.

    All given at batch.target_index_N; ce_N, kd_N, top_N as the fused functions return them, top_N in evaluation only.
    """
    index_N = batch.target_index_N
    scored_N = batch.has_target_BT.flatten()[index_N].double()
    teacher_top_N = batch.teacher_top_BT.flatten()[index_N]
    labels_N = batch.labels_BT.flatten()[index_N]
    ranked_N = torch.zeros_like(scored_N) if top_N is None else torch.ones_like(scored_N)
    top_N = torch.full_like(labels_N, -1) if top_N is None else top_N
    columns = {
        "positions": torch.ones_like(scored_N),
        "scored": scored_N,
        "ce": ce_N.double(),
        "kd": kd_N.double() * scored_N,
        "teacher_nll": -batch.teacher_logprob_BT.flatten()[index_N].double(),
        "loss": ce_coef_N.double() * ce_N + kd_coef_N.double() * kd_N,
        "weight": ce_coef_N.double() + kd_coef_N,
        "ranked": ranked_N,
        "label_top1": ranked_N * (top_N == labels_N),
        "teacher_headed": ranked_N * (teacher_top_N >= 0),
        "teacher_top1": ranked_N * ((top_N == teacher_top_N) & (teacher_top_N >= 0)),
        "entropy": torch.zeros_like(scored_N),
    }
    values_NM = torch.stack([columns[name] for name in QUANTITIES], dim=1)
    sums_CM = _class_members(batch) @ values_NM
    sums_CM[:, QUANTITIES.index("entropy")] = batch.entropy_sums_C
    return sums_CM


def _class_members(batch: Batch) -> torch.Tensor:
    spans_N = batch.label_spans_BT.flatten()[batch.target_index_N]
    control_N = batch.is_control_BT.flatten()[batch.target_index_N]
    masks = {
        "reasoning": spans_N == SPAN_REASONING,
        "final": spans_N == SPAN_FINAL,
        "control": control_N,
    }
    return torch.stack([masks[name] for name in CLASSES]).double()


def loss_metrics(sums_CM: torch.Tensor, prefix: str = "loss") -> dict[str, float]:
    """Names and values from the sums of a whole step (or of an evaluation): `loss/ce/reasoning`, `loss/kl/control`.

    positions, scored_share: how many targets, and the share that uses the teacher's. ce: mean over all targets.
    kd, kl, entropy, teacher_nll: means over scored targets, in nats; kl = kd - the teacher's exact entropy, an
    estimate without bias that can fall below 0 by the noise of the draws. weight: the class's share of L's
    coefficients (sum over its targets), weight of the span times its mean confidence weight. label_top1, teacher_top1:
    how often the student's most probable id is the label, or the teacher's (where an id reached the threshold).
    A class without positions has its count, 0, and no mean.
    """
    metrics: dict[str, float] = {}
    for name, row in zip(CLASSES, sums_CM.tolist(), strict=True):
        metrics |= _class_metrics(dict(zip(QUANTITIES, row, strict=True)), prefix, name)
    total, weight, positions, scored = (
        sums_CM[:2, QUANTITIES.index(name)].sum().item()
        for name in ("loss", "weight", "positions", "scored")
    )
    return metrics | {
        f"{prefix}/total": total,
        f"{prefix}/weight/total": weight,
        f"{prefix}/scored_share/total": scored / positions if positions else 0.0,
    }


def _class_metrics(sums: dict[str, float], prefix: str, name: str) -> dict[str, float]:
    metrics = {
        f"{prefix}/positions/{name}": sums["positions"],
        f"{prefix}/weight/{name}": sums["weight"],
    }
    means = {
        "ce": ("ce", "positions"),
        "scored_share": ("scored", "positions"),
        "kd": ("kd", "scored"),
        "entropy": ("entropy", "scored"),
        "teacher_nll": ("teacher_nll", "scored"),
        "label_top1": ("label_top1", "ranked"),
        "teacher_top1": ("teacher_top1", "teacher_headed"),
    }
    for quantity, (total, count) in means.items():
        if sums[count] > 0:
            metrics[f"{prefix}/{quantity}/{name}"] = sums[total] / sums[count]
    if sums["scored"] > 0:
        metrics[f"{prefix}/kl/{name}"] = (sums["kd"] - sums["entropy"]) / sums["scored"]
    return metrics
