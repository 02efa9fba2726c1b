"""A tiny student, its batches and a trainer in this process, for tests that run in processes of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from tests.trainer.packed import random_row
from trainer.batch import Batch, make_batch
from trainer.config import KDConfig

VOCAB, SEQ_LEN = 300, 48
STUDENT: dict[str, Any] = {
    "layers": 4,
    "hidden": 32,
    "heads": 4,
    "kv_groups": 2,
    "head_dim": 8,
    "ffn": 48,
    "experts": 8,
    "experts_per_token": 2,
    "expert_width": 16,
    "shared_width": 24,
    "router": {"groups": 4, "group_topk": 2, "aux_loss": 1e-2},
    "window": 6,
    "init_std": 0.1,
    "vocab_size": VOCAB,
    "tpa": {"q_rank": 3, "kv_rank": 2},
    "grape_m": {"log_scale": 4.0},
    "value_residual": {"init": 0.7},
}


def tiny_config(**changes: Any) -> KDConfig:
    """A KD config of the tiny student on CPU; keyword arguments replace top-level keys."""
    values = {
        "run": "unused",
        "dataset": "unused",
        "teacher": "tiny",
        "student": STUDENT,
        "device": "cpu",
        "transformer_impl": "local",
        "core_attention": "dense",
        "expert_compute": "loop",
        "precision": "fp32",
        "deterministic": True,
        "steps": 20,
        "batch": {"global_batch_size": 8, "micro_batch_size": 2},
        "loss": {"kd_weight": 0.6, "chunk_tokens": 16},
        "optimizer": {"lr": 1e-2, "clip": 1e6, "normuon": {"lr": 2e-2}},
        "schedule": {"kind": "constant"},
        "checkpoint": {"every": 10},
    }
    return KDConfig.model_validate(values | changes)


def tiny_rows(count: int, seed: int = 0) -> list[tuple[Any, Any]]:
    """Rows of one to three documents with their targets; every third row is not scored."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        shapes = [tuple(rng.integers(1, 6, 3)) for _ in range(1 + number % 3)]
        row, documents = random_row(rng, shapes, SEQ_LEN, VOCAB)
        rows.append((row, None if number % 3 == 2 else documents))
    return rows


def micro_batches(rows: list[tuple[Any, Any]], size: int) -> list[Batch]:
    """The rows in order, `size` at a time."""
    groups = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [
        in_vocabulary(make_batch([r for r, _ in group], [d for _, d in group])) for group in groups
    ]


def own_micro_batches(rows: list[tuple[Any, Any]], size: int, topology: Any) -> list[Batch]:
    """`micro_batches` of this data-parallel rank's part of a step's rows, a multiple of the ranks in number."""
    share = len(rows) // topology.dp_size
    return micro_batches(rows[topology.dp_rank * share :][:share], size)


def in_vocabulary(batch: Batch) -> Batch:
    """The batch with the ids of padding and document ends (199999) folded into the tiny vocabulary."""
    return dataclasses.replace(
        batch, tokens_BT=batch.tokens_BT % VOCAB, labels_BT=batch.labels_BT % VOCAB
    )


def step(trainer: Any, batches: list[Batch], rate: float) -> Any:
    """One training step on the batches."""
    from trainer.megatron.step import Clock

    clock = Clock(torch.device("cpu"))
    clock.mark("data")
    return trainer.step(batches, rate, clock)


def main_gradients(trainer: Any) -> dict[str, np.ndarray]:
    """The gradient of every parameter after a step, as the optimizer of this rank saw it."""
    from trainer.megatron.expert_shards import shard_of

    return {
        name: shard_of(p).main_grad.double().numpy()
        for name, p in trainer.student.named_parameters()
    }


def built_student(student: dict[str, Any], **runtime: Any) -> Any:
    """A student whose biases, norms and sinks are not at their start, where mistakes in them would not show."""
    from trainer.megatron.student import build_student

    config = tiny_config(student=student, **runtime)
    torch.manual_seed(3)
    model = build_student(config.student, config, config.parallel, SEQ_LEN)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer += 0.2 * torch.randn_like(buffer)
    return model
