"""The `tiny` teacher: gpt-oss architecture with the real vocabulary, small enough to train in a minute on a CPU.

Only ids seen in training need trained rows. A compact model learns those ids plus one class that stands for all
the others (its logit carries log(number of others)); then its embedding and head are spread over the 201,088 ids,
the others sharing that class's row. This is the softmax over the whole vocabulary, at 1/50 of the cost.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from common import logs
from common.config import load_config, named_config
from common.files import write_json
from common.tokenizer import FIRST_CONTROL_ID, VOCAB_SIZE
from datastore.canary import canary_path, write_canary
from datastore.canary_reference import make_reference
from datastore.prompt import Prefix, ScoreRequest
from datastore.reader import Dataset
from datastore.teacher import TeacherConfig
from datastore.types import SPAN_IGNORED, Split

BATCH_DOCUMENTS = 8
LEARNING_RATE = 4e-3
# Share of the label mass given to the class of unseen ids, so that the teacher has a tail like a real one.
UNSEEN_MASS = 0.003
# One: the operations are small, and two threads wait for each other ten times longer on a busy machine.
THREADS = 1
# Share of the text ids before a target that are exchanged at random in training, so that the teacher still knows how a
# message goes on after text that no teacher would write: a student's own, in on-policy distillation.
CORRUPTED = 0.2
# Targets of the canary: nine documents of the demo.
CANARY_TARGETS = 400

Document = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """The size of a teacher of gpt-oss architecture; experts are as wide as the model."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 4
    experts_per_token: int = 2


TINY = Shape()


def make_tiny_teacher(folder: Path, dataset: Path, *, seed: int = 0, steps: int = 400) -> Path:
    """Train the tiny teacher on the train split of a built dataset; see `train_tiny_teacher`."""
    opened = Dataset.open(dataset)
    return train_tiny_teacher(
        folder,
        documents_of(opened, "train"),
        seed=seed,
        steps=steps,
        source=opened.manifest.fingerprint,
    )


def documents_of(dataset: Dataset, split: Split) -> list[Document]:
    """Every document of a split, in order."""
    return [
        (row.tokens_T[where].copy(), row.spans_T[where].copy())
        for index in range(dataset.num_rows(split))
        for row in [dataset.row(split, index)]
        for where in row.documents()
    ]


def train_tiny_teacher(
    folder: Path, documents: list[Document], *, seed: int, steps: int, source: str
) -> Path:
    """Write a gpt-oss model folder (config.json, model.safetensors fp32, canary.json) trained on `documents`.

    documents: (tokens_T int32, spans_T uint8) each. `source` names where they came from. The same arguments give
    the same weights on the same machine: seeds are fixed and the number of threads is set.
    """
    seen_ids = np.unique(np.concatenate([tokens for tokens, _ in documents]))
    with torch.random.fork_rng(devices=[]), _threads(THREADS):
        torch.manual_seed(seed)
        compact = gpt_oss(TINY, len(seen_ids) + 1)
        initialise(compact, TINY)
        last_loss = _train(compact, documents, seen_ids, seed=seed, steps=steps)
        model = spread(compact, TINY, seen_ids)
    provenance = {"source": source, "seed": seed, "steps": steps, "last_loss": last_loss}
    return save_teacher(Path(folder), model, documents, provenance)


def save_teacher(
    folder: Path, model: Any, documents: list[Document], provenance: dict[str, Any]
) -> Path:
    """Write the model folder of a whole model on the CPU, with its provenance and its canary over `documents`."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    write_json(folder / "provenance.json", provenance)
    _write_canary(folder, documents)
    return folder


def _write_canary(folder: Path, documents: list[Document]) -> None:
    """The reference values that an engine must give before it may score, from the saved weights."""
    whole = Prefix(np.empty(0, np.int32), np.empty(0, np.int32), None, None)
    requests: list[ScoreRequest] = []
    for tokens_T, spans_T in documents:
        if sum(len(request.positions_P) for request in requests) >= CANARY_TARGETS:
            break
        requests.append(whole.request(tokens_T, spans_T))
    teacher = load_config(TeacherConfig, named_config("teacher", "tiny"), (f"model={folder}",))
    write_canary(canary_path(teacher, folder), make_reference(teacher, folder, requests))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def gpt_oss(shape: Shape, vocab_size: int) -> Any:
    """A GptOssForCausalLM in float32 with transformers' own start values."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=shape.layers,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        vocab_size=vocab_size,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        sliding_window=128,
        max_position_embeddings=131072,
        dtype="float32",
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return GptOssForCausalLM(config).to(torch.float32)


def initialise(model: Any, shape: Shape) -> None:
    """Random start values, drawn from torch's generator."""
    # transformers starts the router and sinks at zero or unset; random values make experts and sinks matter.
    for name, weight in model.named_parameters():
        if name.endswith(("sinks", "router.weight")):
            torch.nn.init.normal_(weight, std=0.3)
        elif weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5 if "embed" in name else shape.hidden**-0.5)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(weight)


def _train(
    model, documents: list[Document], seen_ids: np.ndarray, *, seed: int, steps: int
) -> float:
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 10) * (1 - 0.9 * step / max(steps, 1))
    )
    loss = torch.tensor(float("nan"))
    stream = batches(documents, seen_ids, seed)
    with logs.progress("tiny teacher", steps, "steps") as bar:
        for _ in range(steps):
            tokens_BT, target_BT = next(stream)
            read_BT = corrupted(tokens_BT, target_BT, seen_ids)
            loss = compact_loss(compact_logprobs(model, read_BT, target_BT), target_BT)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            bar.advance(1)
    return float(loss.detach())


def corrupted(
    tokens_BT: torch.Tensor, target_BT: torch.Tensor, seen_ids: np.ndarray
) -> torch.Tensor:
    """Compact ids with CORRUPTED of the text ids before a target exchanged for others, drawn from torch's generator."""
    num_text = int(np.searchsorted(seen_ids, FIRST_CONTROL_ID))
    is_text_BT = (target_BT >= 0) & (tokens_BT < num_text)
    exchange_BT = is_text_BT & (torch.rand(tokens_BT.shape) < CORRUPTED)
    return torch.where(exchange_BT, torch.randint(num_text, tokens_BT.shape), tokens_BT)


def compact_logprobs(model: Any, tokens_BT: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """Logprobs fp32 [N, seen + 1] at the N places of target_BT that are not -1; the last class is all unseen ids."""
    hidden_BTD = model.model(input_ids=tokens_BT).last_hidden_state
    logits_NV = model.lm_head(hidden_BTD[target_BT >= 0]).float()
    others = VOCAB_SIZE - logits_NV.shape[1] + 1
    logits_NV[:, -1] += math.log(others)
    return logits_NV.log_softmax(dim=-1)


def compact_loss(logprobs_NV: torch.Tensor, target_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy with the label, UNSEEN_MASS of which goes to the class of unseen ids."""
    realised_N1 = logprobs_NV.gather(1, target_BT[target_BT >= 0][:, None])
    return -(1 - UNSEEN_MASS) * realised_N1.mean() - UNSEEN_MASS * logprobs_NV[:, -1].mean()


def batches(
    documents: list[Document],
    seen_ids: np.ndarray,
    seed: int,
    size: int = BATCH_DOCUMENTS,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless right-padded batches: compact ids [B, T] and the compact id to predict at t (-1: none) [B, T].

    Documents of like length go together: a batch padded to its longest is a third of the work of a mixed one.
    """
    random = np.random.default_rng(seed)
    lengths = np.array([len(tokens) for tokens, _ in documents])
    while True:
        order = random.permutation(len(documents))
        order = order[np.argsort(lengths[order], kind="stable")]
        for start in random.permutation(np.arange(0, len(order), size)):
            yield one_batch([documents[i] for i in order[start : start + size]], seen_ids)


def one_batch(documents: list[Document], seen_ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact ids [B, T] and the compact id to predict at t (-1: none) [B, T]; len(seen_ids) stands for the others."""
    length = max(len(tokens) for tokens, _ in documents)
    tokens_BT = np.zeros((len(documents), length), dtype=np.int64)
    target_BT = np.full((len(documents), length), -1, dtype=np.int64)
    for row, (tokens, spans) in enumerate(documents):
        compact_T = np.searchsorted(seen_ids, tokens)
        is_seen_T = seen_ids[np.minimum(compact_T, len(seen_ids) - 1)] == tokens
        compact_T = np.where(is_seen_T, compact_T, len(seen_ids))
        tokens_BT[row, : len(tokens)] = compact_T
        is_target_T = spans[1:] != SPAN_IGNORED
        target_BT[row, : len(tokens) - 1] = np.where(is_target_T, compact_T[1:], -1)
    return torch.from_numpy(tokens_BT), torch.from_numpy(target_BT)


def spread(compact: Any, shape: Shape, seen_ids: np.ndarray) -> Any:
    """The model over the whole vocabulary; ids never seen get the shared row plus noise of 1 % of its scale."""
    model = gpt_oss(shape, VOCAB_SIZE)
    state = compact.state_dict()
    seen = torch.from_numpy(seen_ids.astype(np.int64))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shared_D, trained_SD = state[name][-1], state[name][:-1]
        noise_VD = torch.randn(VOCAB_SIZE, shape.hidden) * 0.01
        full_VD = shared_D + noise_VD
        full_VD[seen] = trained_SD
        state[name] = full_VD
    model.load_state_dict(state)
    return model.eval()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--dataset", type=click.Path(path_type=Path), required=True, help="A built dataset.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model folder.")
@click.option("--steps", type=click.IntRange(min=1), default=400, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(dataset: Path, out: Path, steps: int, seed: int) -> None:
    """Make the tiny teacher from a built dataset."""
    logs.setup()
    make_tiny_teacher(out, dataset, seed=seed, steps=steps)


if __name__ == "__main__":
    main()
