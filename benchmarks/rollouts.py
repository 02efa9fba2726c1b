"""Tokens/s of the rollout buffer on one core: append, add_targets, rows, of shards of the selected size.

Then, with all cores, the processor time that storing the targets of a shard takes from the process that trains: at
once, and by the buffer's encoder (`trainer_cpu_sec`, which bounds how long the interpreter is held).

    python -m benchmarks.rollouts --rollouts 256 --tokens 1000 --seq-len 4096

Targets are those of a made-up teacher of 200 ids; their making is not timed. Writes benchmarks/results/rollouts.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import header
from common.files import write_json
from common.tokenizer import CHANNEL, END, MESSAGE, RETURN, START, encoding
from datastore.harmony_grammar import spans, verdict
from datastore.rollout import Rollout
from datastore.rollouts import RolloutBuffer
from datastore.target import position_uniforms, reduce_logprobs
from datastore.types import SparseTarget

RESULTS = Path(__file__).parent / "results"
THRESHOLD = 1 / 50
_IDS = 200


def made_rollouts(shard: int, count: int, tokens: int) -> list[Rollout]:
    """Valid rollouts of about `tokens` tokens, a fifth of them prompt, half of the rest reasoning."""
    rng = np.random.default_rng(shard)
    ids = {name: encoding().encode(name) for name in ("user", "assistant", "analysis", "final")}
    made = []
    for number in range(count):
        length = int(tokens * rng.uniform(0.5, 1.5))
        sizes = [length // 5, 2 * length // 5, 2 * length // 5]
        user, reasoning, final = (rng.integers(0, 199_000, size).tolist() for size in sizes)
        prompt = [START, *ids["user"], MESSAGE, *user, END]
        opening = [START, *ids["assistant"], CHANNEL]
        analysis = [*opening, *ids["analysis"], MESSAGE, *reasoning, END]
        sampled_S = np.array(
            [*analysis, *opening, *ids["final"], MESSAGE, *final, RETURN], np.int32
        )
        made.append(
            Rollout(
                prompt=shard * count + number,
                sample=0,
                doc_id=hashlib.blake2b(bytes([number % 256]), digest_size=16).digest(),
                language="en",
                exercise="",
                tokens_T=np.concatenate([np.array(prompt, np.int32), sampled_S]),
                spans_T=np.concatenate([np.zeros(len(prompt), np.uint8), spans(sampled_S)]),
                logprobs_S=-rng.exponential(1.0, len(sampled_S)).astype(np.float32),
                policy_version=shard,
                reasoning="high",
                verdict=verdict(sampled_S).value,
            )
        )
    return made


def made_targets(buffer: RolloutBuffer, shard: int) -> list[SparseTarget]:
    """Reductions of random distributions over `_IDS` ids in which the realised token is likely."""
    rng = np.random.default_rng(shard)
    targets = []
    for document in buffer.score_documents(shard):
        positions_P = document.positions()
        logits_PK = rng.normal(0, 2, (len(positions_P), _IDS))
        logits_PK[:, 0] = rng.normal(6, 2, len(positions_P))
        logits_PK -= np.log(np.exp(logits_PK).sum(axis=1, keepdims=True))
        uniforms_P = position_uniforms(document.content_key(), positions_P)
        zeros_P = np.zeros(len(positions_P), np.int64)
        target = reduce_logprobs(logits_PK, zeros_P, positions_P, uniforms_P, THRESHOLD)
        targets.append(_renamed(target, document.tokens_T[positions_P + 1]))
    return targets


def _renamed(target: SparseTarget, realised_P: np.ndarray) -> SparseTarget:
    """Id 0 becomes the realised one of its position, the others those behind it in the vocabulary."""
    counts_P = np.diff(target.offsets_P1)
    base_E = np.repeat(realised_P.astype(np.int64), counts_P)
    # The ids of a position stay distinct and its draws ascending, but where they wrap around.
    ids_E = (base_E + target.ids_E) % 201_088
    for start, heads, end in zip(
        target.offsets_P1[:-1], target.num_head_P, target.offsets_P1[1:], strict=True
    ):
        ids_E[start + heads : end].sort()
    return SparseTarget(
        **{name: getattr(target, name) for name in target.__slots__ if name != "ids_E"},
        ids_E=ids_E.astype(np.int32),
    )


def measure(folder: Path, shards: int, rollouts: int, tokens: int, seq_len: int) -> dict[str, Any]:
    """Seconds of each operation, summed over all shards but the first, and what they handled."""
    sec = dict.fromkeys(["append", "add_targets", "rows"], 0.0)
    handled = rows = stored = 0
    identity = {"benchmark": "rollouts"}
    with RolloutBuffer.open(
        folder, identity, seq_len=seq_len, slug="made", threshold=THRESHOLD
    ) as buffer:
        for shard in range(shards):
            sampled = made_rollouts(shard, rollouts, tokens)
            appended = _timed(lambda sampled=sampled: buffer.append(sampled))
            targets = made_targets(buffer, shard)
            added = _timed(lambda shard=shard, made=targets: buffer.add_targets(shard, made))
            read = _timed(lambda shard=shard: buffer.rows(shard))
            if shard:
                for name, value in zip(sec, (appended, added, read), strict=True):
                    sec[name] += value
                handled += sum(len(one.tokens_T) for one in sampled)
                rows += buffer.counts(shard).rows
        stored = sum(path.stat().st_size for path in folder.rglob("*.arrow"))
    return {
        "shards": shards,
        "rollouts": rollouts,
        "seq_len": seq_len,
        "tokens": handled,
        "fill": round(handled / (rows * seq_len), 4),
        "mib_per_shard": round(stored / shards / 2**20, 2),
        "sec_per_shard": {name: round(value / (shards - 1), 3) for name, value in sec.items()},
        "tokens_per_sec": {name: round(handled / value) for name, value in sec.items()},
    }


def measure_encoder(folder: Path, rollouts: int, tokens: int, seq_len: int) -> dict[str, float]:
    """Processor seconds of this process for the targets of one shard, stored at once and by the encoder."""
    with RolloutBuffer.open(
        folder, {}, seq_len=seq_len, slug="made", threshold=THRESHOLD
    ) as buffer:
        found, encoder = {}, buffer.encoder()
        for shard in range(3):
            buffer.append(made_rollouts(shard, rollouts, tokens))
            targets, began = made_targets(buffer, shard), time.process_time()
            if shard == 1:
                buffer.add_targets(shard, targets)
            else:  # the first of them is not counted
                encoder.add_targets(shard, targets).result()
            used = time.process_time() - began
            found["at_once" if shard == 1 else "encoder"] = round(used, 3)
    return found


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=4, help="the first is not counted")
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=RESULTS / "rollouts.json")
    args = parser.parse_args()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder) / "buffer", args.shards, args.rollouts, args.tokens, args.seq_len
        )
        os.sched_setaffinity(0, cores)
        found["trainer_cpu_sec"] = measure_encoder(
            Path(folder) / "beside", args.rollouts, args.tokens, args.seq_len
        )
    packages = ("numpy", "pyarrow", "zstandard")
    result = header(packages) | found
    write_json(args.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
