"""Sums of a step for people and dashboards. Sums add over micro-batches and ranks; means are formed once, at the end.

Legend: C classes (reasoning, final, control; `trainer.batch.CLASSES`), M quantities (`QUANTITIES`), N positions.
Control targets are counted in their span too, so totals are over reasoning and final.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from datastore.types import SPAN_FINAL, SPAN_REASONING
from trainer.batch import CLASSES, Batch
from trainer.losses.coefficients import Coefficients, Losses, SampledTokens

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
    # Of sampled tokens, which come last: a batch of text has none.
    "sampled",
    "student_logprob",
    "teacher_logprob",
    "advantage",
    "advantage_clipped",
    "ratio",
    "ratio_clipped",
    "headed",
    "coarse_kl",
)
_OF_SAMPLED = (
    "student_logprob",
    "teacher_logprob",
    "advantage",
    "advantage_clipped",
    "ratio",
    "ratio_clipped",
)


def loss_sums(
    batch: Batch, losses: Losses, coefficients: Coefficients, top_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Every quantity summed over the batch's targets of each class: float64 [C, M], on the batch's device.

    All given at batch.target_index_N, as the fused functions take and return them; top_N in evaluation only.
    """
    columns = _target_columns(batch, losses, coefficients, top_N)
    if coefficients.sampled is not None:
        columns |= _sampled_columns(columns["scored"], losses, coefficients.sampled)
        columns["ce"] = columns["ce"] * (1 - columns["sampled"])
    names = QUANTITIES[: len(columns)]
    values_NM = torch.stack([columns[name] for name in names], dim=1)
    sums_CM = _class_members(batch) @ values_NM
    sums_CM[:, QUANTITIES.index("entropy")] = batch.entropy_sums_C
    return functional.pad(sums_CM, (0, len(QUANTITIES) - len(names)))


def _target_columns(
    batch: Batch, losses: Losses, coefficients: Coefficients, top_N: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    index_N = batch.target_index_N
    scored_N = batch.has_target_BT.flatten()[index_N].double()
    teacher_top_N = batch.teacher_top_BT.flatten()[index_N]
    labels_N = batch.labels_BT.flatten()[index_N]
    ranked_N = torch.zeros_like(scored_N) if top_N is None else torch.ones_like(scored_N)
    top_N = torch.full_like(labels_N, -1) if top_N is None else top_N
    return {
        "positions": torch.ones_like(scored_N),
        "scored": scored_N,
        "ce": losses.ce_N.double(),
        "kd": losses.kd_N.double() * scored_N,
        "entropy": torch.zeros_like(scored_N),
        "teacher_nll": -batch.teacher_logprob_BT.flatten()[index_N].double() * scored_N,
        "loss": coefficients.loss(losses),
        "weight": coefficients.weights(),
        "ranked": ranked_N,
        "label_top1": ranked_N * (top_N == labels_N),
        "teacher_headed": ranked_N * (teacher_top_N >= 0),
        "teacher_top1": ranked_N * ((top_N == teacher_top_N) & (teacher_top_N >= 0)),
    }


def _sampled_columns(
    scored_N: torch.Tensor, losses: Losses, sampled: SampledTokens
) -> dict[str, torch.Tensor]:
    sampled_N, ce_N = sampled.sampled_N.double(), losses.ce_N
    ratio_N, advantage_N = sampled.ratio(ce_N), sampled.advantage(ce_N)
    columns = {
        "sampled": torch.ones_like(sampled_N),
        "student_logprob": -ce_N,
        "teacher_logprob": sampled.teacher_logprob_N,
        "advantage": advantage_N,
        "advantage_clipped": advantage_N != sampled.raw_advantage(ce_N),
        "ratio": ratio_N,
        "ratio_clipped": ratio_N != sampled.raw_ratio(ce_N),
        "headed": torch.zeros_like(scored_N) if losses.kl_N is None else scored_N,
        "coarse_kl": torch.zeros_like(scored_N) if losses.kl_N is None else losses.kl_N * scored_N,
    }
    return {name: values_N * sampled_N for name, values_N in columns.items()}


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

    positions, scored_share: how many targets, and the share that has the teacher's. ce: mean over all targets that are
    text, not sampled: on-policy those of the anchor.
    kd, kl, entropy, teacher_nll: means over scored targets, in nats; kl = kd - the teacher's exact entropy, an
    estimate without bias that can fall below 0 by the noise of the draws. weight: the class's share of L's
    coefficients (sum over its targets), weight of the span times its mean confidence weight. label_top1, teacher_top1:
    how often the student's most probable id is the label, or the teacher's (where an id reached the threshold).
    A class without positions has its count, 0, and no mean.

    Of sampled tokens, where a class has any: sampled, their count; student_logprob, teacher_logprob, and reverse_kl,
    the mean of log p_S - log p_T: for fresh samples an estimate of the reverse KL without bias, of any sign.
    advantage, ratio: means after clipping; advantage_clipped, ratio_clipped: the shares that were. coarse_kl: mean
    reverse KL over the teacher's head and one bucket, where it was computed. total is L: with the policy gradient a
    sum of which the gradient is meant, the value says nothing.
    """
    metrics: dict[str, float] = {}
    for name, row in zip(CLASSES, sums_CM.tolist(), strict=True):
        metrics |= _class_metrics(dict(zip(QUANTITIES, row, strict=True)), prefix, name)
    totals = dict(zip(QUANTITIES, sums_CM[:2].sum(dim=0).tolist(), strict=True))
    positions = totals["positions"]
    metrics |= {
        f"{prefix}/total": totals["loss"],
        f"{prefix}/weight/total": totals["weight"],
        f"{prefix}/scored_share/total": totals["scored"] / positions if positions else 0.0,
    }
    if totals["sampled"] > 0:
        metrics[f"{prefix}/reverse_kl/total"] = _reverse_kl(totals)
    return metrics


def _reverse_kl(sums: dict[str, float]) -> float:
    return (sums["student_logprob"] - sums["teacher_logprob"]) / sums["sampled"]


def _class_metrics(sums: dict[str, float], prefix: str, name: str) -> dict[str, float]:
    metrics = {
        f"{prefix}/positions/{name}": sums["positions"],
        f"{prefix}/weight/{name}": sums["weight"],
    }
    means = {
        "ce": ("ce", "text"),
        "scored_share": ("scored", "positions"),
        "kd": ("kd", "scored"),
        "entropy": ("entropy", "scored"),
        "teacher_nll": ("teacher_nll", "scored"),
        "label_top1": ("label_top1", "ranked"),
        "teacher_top1": ("teacher_top1", "teacher_headed"),
        "coarse_kl": ("coarse_kl", "headed"),
    } | {name: (name, "sampled") for name in _OF_SAMPLED}
    sums = sums | {"text": sums["positions"] - sums["sampled"]}
    for quantity, (total, count) in means.items():
        if sums[count] > 0:
            metrics[f"{prefix}/{quantity}/{name}"] = sums[total] / sums[count]
    if sums["scored"] > 0:
        metrics[f"{prefix}/kl/{name}"] = (sums["kd"] - sums["entropy"]) / sums["scored"]
    if sums["sampled"] > 0:
        metrics[f"{prefix}/sampled/{name}"] = sums["sampled"]
        metrics[f"{prefix}/reverse_kl/{name}"] = _reverse_kl(sums)
    return metrics
