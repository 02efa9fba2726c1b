"""A run of a few steps with every feature on, exported by the program; what Megatron says of some documents."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.tokenizer import VOCAB_SIZE
from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import (
    SEQ_LEN,
    STUDENT,
    micro_batches,
    step,
    tiny_config,
    tiny_rows,
)
from tests.trainer.packed import pack, random_document
from trainer.batch import make_batch

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = Path(sys.executable).parent
SHAPES = [
    (6, 9, 5),
    (2, 3, 4),
    (5, 4, 3),
]  # prompt, reasoning, final tokens; longer than the window of 6
STEPS = 3


@dataclass(frozen=True)
class Exported:
    """The folder of the run and of its export, documents, and their logits [T, V] by Megatron."""

    run: Path
    folder: Path
    documents: list[np.ndarray]
    logits: list[np.ndarray]


def exported(folder: Path, dataset: Path, **student: Any) -> Exported:
    """Train, export. student: keys that replace those of the tiny student."""
    rng = np.random.default_rng(5)
    documents = [random_document(rng, *shape, vocab=300) for shape in SHAPES]
    run = folder / "run"
    (logits,) = run_gloo(_trained, 1, run, dataset, documents, student)
    program("vpmoe-train", "export", str(run), "--out", str(folder / "hf"))
    return Exported(run, folder / "hf", [tokens for tokens, _ in documents], logits)


def program(*command: str, expect: int = 0, **environment: str) -> str:
    """Run a program of the venv from the root; its output."""
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == expect, f"{' '.join(command)}\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout + done.stderr


def _trained(_rank: int, run: Path, dataset: Path, documents: list, student: dict) -> list[Any]:
    from trainer.megatron.step import Trainer
    from trainer.megatron.topology import distributed

    config = tiny_config(
        run=str(run),
        dataset=str(dataset),
        student=STUDENT | {"vocab_size": VOCAB_SIZE} | student,
    )
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        trainer = Trainer(config, topology, SEQ_LEN)
        for number in range(STEPS):
            step(trainer, micro_batches(tiny_rows(8, seed=number), 4), 1e-2)
        _disturb(trainer.student)
        _save(run, dataset, config, trainer)
        trainer.model.eval()
        batch = make_batch([pack([document], SEQ_LEN) for document in documents])
        with torch.no_grad():
            hidden_BTD = trainer._hidden(trainer.model, batch)
            logits_BTV = hidden_BTD @ trainer.student.output_layer.weight.T
        return [x[: len(d[0])].numpy() for x, d in zip(logits_BTV, documents, strict=True)]


def _disturb(student: torch.nn.Module) -> None:
    """Move what starts at zero or one, or hardly moves in a few steps, so that a wrong place for it shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.ndim == 1 and "log_frequency" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name.startswith("embedding"):
                parameter.mul_(
                    8
                )  # else the biases drown the tokens and every continuation is one token
            if name.endswith("value_residual_logit"):
                parameter.zero_().add_(torch.randn(1, generator=generator))
        for name, buffer in student.named_buffers():
            if name.endswith("expert_bias"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


def _save(run: Path, dataset: Path, config: Any, trainer: Any) -> None:
    from datastore.manifest import load_dataset_manifest
    from trainer.checkpoints import Progress
    from trainer.megatron.checkpoint_write import CheckpointWriter
    from trainer.provenance import provenance

    data = {"dataset": load_dataset_manifest(dataset).fingerprint, "tokenizer": "", "targets": None}
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    progress = Progress(step=STEPS, stream={}, provenance=provenance(config, data))
    CheckpointWriter(checkpoints, trainer, keep=1, asynchronous=False).save(progress)
