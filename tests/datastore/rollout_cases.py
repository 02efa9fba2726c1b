"""Rollouts made by hand, with the targets of a made-up teacher: every verdict, every size tiny."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import END, PAD
from datastore.harmony_grammar import spans, verdict
from datastore.rollout import Rollout
from datastore.rollouts import RolloutBuffer
from datastore.types import SparseTarget
from tests.datastore import conftest as made

SEQ_LEN, SLUG = 256, "tiny"
IDENTITY = {"student": {"run": "kd-1", "step": 700}, "sampling": {"slots": 4}, "prompts": "ab" * 32}
TEACHER = {"teacher": SLUG, "threshold": made.THRESHOLD, "temperature": 1.0, "system": None}


def whole(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and valid continuation of made document `number`: int32 each, no <|endoftext|>."""
    tokens_T = made.document(number).tokens_T[:-1]
    first = int(np.flatnonzero(made.document(number).spans_T)[0])
    assert tokens_T[first - 1] == END
    return tokens_T[:first], tokens_T[first:]


def rollout(
    number: int,
    *,
    sample: int = 0,
    keep: int | None = None,
    break_at: int | None = None,
    version: int = 0,
) -> Rollout:
    """A rollout of prompt `number`: the valid one, its first `keep` tokens, or broken by a control id at `break_at`."""
    prompt_T, sampled_S = whole(number % 7)
    sampled_S = sampled_S[:keep].copy()
    if break_at is not None:
        sampled_S = np.append(sampled_S[: min(break_at, len(sampled_S) - 1)], np.int32(PAD))
    rng = np.random.default_rng([number, sample])
    return Rollout(
        prompt=number,
        sample=sample,
        doc_id=hashlib.blake2b(f"prompt-{number % 7}".encode(), digest_size=16).digest(),
        language="en",
        exercise="日本語" if number % 2 else "",
        tokens_T=np.concatenate([prompt_T, sampled_S]),
        spans_T=np.concatenate([np.zeros(len(prompt_T), np.uint8), spans(sampled_S)]),
        logprobs_S=-rng.exponential(1.0, len(sampled_S)).astype(np.float32),
        policy_version=version,
        reasoning=("low", "medium", "high")[number % 3],
        verdict=verdict(sampled_S).value,
    )


def shard_of(number: int, size: int = 5) -> list[Rollout]:
    """The rollouts of micro-shard `number`: valid, cut in either span and malformed ones, two of the first prompt."""
    first = number * size
    forms: list[dict[str, Any]] = [{}, {"keep": 9}, {"keep": 24}, {"break_at": 12}, {}]
    made_ = [
        rollout(first + n, version=max(0, number - 1), **forms[n % len(forms)]) for n in range(size)
    ]
    return [rollout(first, sample=1, keep=15, version=max(0, number - 1)), *made_]


def held_out(size: int = 4) -> list[Rollout]:
    """Rollouts of prompts that no shard has."""
    return [dataclasses.replace(rollout(n, version=9), doc_id=bytes([n]) * 16) for n in range(size)]


def targets_of(buffer: RolloutBuffer, shard: int) -> list[SparseTarget]:
    """What the teacher answers for a shard."""
    return [
        made.varied_target(document.tokens_T, document.spans_T).target
        for document in buffer.score_documents(shard)
    ]


def targets_for(rollouts: Sequence[Rollout]) -> list[SparseTarget]:
    """What the teacher answers for these rollouts."""
    from datastore.rollouts import score_document

    documents = [score_document(one) for one in rollouts]
    return [made.varied_target(one.tokens_T, one.spans_T).target for one in documents]


def open_buffer(folder: Path, **changes: Any) -> RolloutBuffer:
    """The buffer of these tests."""
    values = {"seq_len": SEQ_LEN, "slug": SLUG, "threshold": made.THRESHOLD} | changes
    identity = values.pop("identity", IDENTITY)
    return RolloutBuffer.open(folder, identity, **values)


def filled(folder: Path, shards: int = 3) -> RolloutBuffer:
    """A buffer with `shards` scored shards, still open."""
    buffer = open_buffer(folder)
    for number in range(shards):
        buffer.append(shard_of(number))
        buffer.add_targets(number, targets_of(buffer, number))
    return buffer


def content(folder: Path) -> dict[str, bytes]:
    """Every file by its name but the lock's."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != ".work"
    }
