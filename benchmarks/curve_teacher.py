"""The teacher of benchmarks/kd_curve.py: gpt-oss architecture, trained on a dataset's train split, stopped at its best.

Larger than demo/tiny_teacher.py's and built of the same pieces: a compact model over the ids of the train split plus
one class for all others, spread over the 201,088 ids at the end. A few hundred documents are learnt by heart soon, so
it has dropout on every residual branch, weight decay, and keeps the weights of its best valid loss.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.tokenizer import VOCAB_SIZE
from datastore.reader import Dataset
from demo.tiny_teacher import (
    Document,
    Shape,
    batches,
    compact_logprobs,
    compact_loss,
    documents_of,
    gpt_oss,
    initialise,
    one_batch,
    save_teacher,
    spread,
)
from trainer.normuon import NorMuon

# Endings of the names of what NorMuon updates. An expert's bias [E, out] has two axes too, but is no matrix.
MATRICES = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    *("router.weight", "experts.gate_up_proj", "experts.down_proj"),
)


@dataclass(frozen=True)
class TeacherPlan:
    """How the teacher is trained.

    normuon_lr: of the layers' matrices; lr: of all else (AdamW). dropout: on each branch before it joins the residual
    stream. patience: evaluations without a better one after which it stops. max_sec: of training by one plan; the
    rates fall linearly over `steps`.
    """

    shape: Shape
    steps: int
    device: str
    batch_documents: int = 16
    lr: float = 1e-3
    normuon_lr: float = 1e-2
    weight_decay: float = 0.1
    dropout: float = 0.2
    every: int = 10
    patience: int = 4
    max_sec: float = 45.0
    seed: int = 0


@dataclass
class _Best:
    """The best evaluation so far and all of them."""

    loss: float = math.inf
    step: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    worse: int = 0

    def note(self, step: int, seconds: float, train: float, valid: float, model: Any) -> None:
        self.curve.append({"step": step, "seconds": seconds, "train_ce": train, "valid_ce": valid})
        if valid < self.loss:
            self.loss, self.step, self.worse = valid, step, 0
            self.weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        else:
            self.worse += 1


def train_curve_teacher(folder: Path, dataset: Path, plans: list[TeacherPlan]) -> dict[str, Any]:
    """Train by each plan; write the best one's model folder (with canary.json, provenance.json). Returns provenance.

    The plans share one shape. valid_ce there: mean cross entropy in nats over all targets of the valid split, over the
    whole vocabulary. The valid split chose plan and step, so it is a little optimistic for the teacher.
    """
    opened = Dataset.open(dataset)
    train, valid = documents_of(opened, "train"), documents_of(opened, "valid")
    seen_ids = np.unique(np.concatenate([tokens for tokens, _ in train]))
    found = [(plan, _trained(train, valid, seen_ids, plan)) for plan in plans]
    plan, best = min(found, key=lambda pair: pair[1].loss)
    compact = gpt_oss(plan.shape, len(seen_ids) + 1)
    compact.load_state_dict(best.weights)
    torch.manual_seed(plan.seed)
    model = spread(compact, plan.shape, seen_ids)
    body = sum(p.numel() for p in compact.model.layers.parameters())
    provenance = {
        "source": opened.manifest.fingerprint,
        "plan": asdict(plan),
        "best_step": best.step,
        "valid_ce": best.loss,
        "curve": best.curve,
        "others": [
            {"plan": asdict(p), "best_step": b.step, "valid_ce": b.loss}
            for p, b in found
            if p is not plan
        ],
        "train_tokens": int(sum(len(tokens) for tokens, _ in train)),
        "seen_ids": len(seen_ids),
        "parameters": {"total": sum(p.numel() for p in model.parameters()), "layers": body},
    }
    save_teacher(folder, model, train, provenance)
    return provenance


def _trained(
    train: list[Document], valid: list[Document], seen_ids: np.ndarray, plan: TeacherPlan
) -> _Best:
    torch.manual_seed(plan.seed)
    compact = gpt_oss(plan.shape, len(seen_ids) + 1)
    initialise(compact, plan.shape)
    _rescale(compact, plan.shape)
    return _train(compact.to(plan.device), train, valid, seen_ids, plan)


def _rescale(model: Any, shape: Shape) -> None:
    """Start values for this width, as GPT-2 has them; the tiny teacher's are for 64.

    Embeddings and lm_head of 0.02, which a rate of 1e-3 can still move where an id is rare; what joins the residual
    stream smaller by sqrt(2 layers); routers whose logits do not grow with the width.
    """
    factors = {
        "embed_tokens.weight": 0.02 / 0.5,
        "lm_head.weight": 0.02 * math.sqrt(shape.hidden),
        "o_proj.weight": 1 / math.sqrt(2 * shape.layers),
        "down_proj": 1 / math.sqrt(2 * shape.layers),
        "router.weight": math.sqrt(64 / shape.hidden),
    }
    with torch.no_grad():
        for name, weight in model.named_parameters():
            for ending, factor in factors.items():
                if name.endswith(ending):
                    weight *= factor


def _train(
    model: Any,
    train: list[Document],
    valid: list[Document],
    seen_ids: np.ndarray,
    plan: TeacherPlan,
) -> _Best:
    optimisers = _optimisers(model, plan)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: min(1, (step + 1) / 20) * (1 - 0.95 * step / plan.steps)
        )
        for optimiser in optimisers
    ]
    _add_dropout(model, plan.dropout)
    stream = batches(train, seen_ids, plan.seed, plan.batch_documents)
    best, losses, began = _Best(), [], time.monotonic()
    for step in range(1, plan.steps + 1):
        loss = _loss(model, next(stream), plan)
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimisers, *schedules):
            part.step()
        losses.append(loss.detach())
        if step % plan.every and step < plan.steps:
            continue
        seconds = time.monotonic() - began
        mean = float(torch.stack(losses).mean())
        best.note(step, seconds, mean, _valid_loss(model, valid, seen_ids, plan), model)
        losses.clear()
        name, now = f"teacher (dropout {plan.dropout:g})", best.curve[-1]["valid_ce"]
        print(f"{name} step {step}: train {mean:.3f} valid {now:.3f} {seconds:.0f} s", flush=True)
        if best.worse >= plan.patience or seconds > plan.max_sec:
            break
    return best


def _optimisers(model: Any, plan: TeacherPlan) -> tuple[NorMuon, torch.optim.AdamW]:
    """NorMuon for the layers' matrices, experts' [E, in, out] as they lie; AdamW for embeddings, lm_head, vectors."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if name.endswith(MATRICES) else others).append(weight)
    polar = torch.bfloat16 if plan.device == "cuda" else torch.float32
    decay = {"weight_decay": plan.weight_decay}
    return (
        NorMuon(matrices, plan.normuon_lr, polar_dtype=polar, **decay),
        torch.optim.AdamW(others, lr=plan.lr, betas=(0.9, 0.95), **decay),
    )


def _loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor], plan: TeacherPlan) -> torch.Tensor:
    tokens_BT, target_BT = (part.to(plan.device) for part in batch)
    model.train()
    with torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"):
        logprobs_NV = compact_logprobs(model, tokens_BT, target_BT)
    return compact_loss(logprobs_NV, target_BT)


@torch.no_grad()
def _valid_loss(
    model: Any, documents: list[Document], seen_ids: np.ndarray, plan: TeacherPlan
) -> float:
    """Mean CE of all targets; an id that was never seen has an equal part of the probability of its class."""
    model.eval()
    total = count = 0.0
    others = math.log(VOCAB_SIZE - len(seen_ids))
    ordered = sorted(documents, key=lambda document: len(document[0]))
    for start in range(0, len(ordered), plan.batch_documents):
        batch = one_batch(ordered[start : start + plan.batch_documents], seen_ids)
        tokens_BT, target_BT = (part.to(plan.device) for part in batch)
        with torch.autocast(plan.device, torch.bfloat16, enabled=plan.device == "cuda"):
            logprobs_NV = compact_logprobs(model, tokens_BT, target_BT)
        target_N = target_BT[target_BT >= 0]
        realised_N = logprobs_NV.gather(1, target_N[:, None])[:, 0].double()
        total -= float((realised_N - others * (target_N == len(seen_ids))).sum())
        count += len(target_N)
    return total / count


def _add_dropout(model: Any, share: float) -> None:
    """On what attention and experts add to the residual stream, and on the embeddings; only in training mode."""

    def drop(module: Any, _: Any, output: Any) -> Any:
        if not module.training:
            return output
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = torch.nn.functional.dropout(first, share)
        return (first, *rest) if isinstance(output, tuple) else first

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)
