"""Bytes a token and decode speed of the target codec, on synthetic teachers of stated entropy.

    python -m benchmarks.codec

Two teachers over the real vocabulary, rows of 2048 targets:
- zipf: logprobs of a Zipf law with log-normal noise and a sharpness that varies by position; a flat, hard case.
- peaked: 60 % of positions hold one near-certain id, the others a Zipf law of mixed sharpness; as a large model does.
Decoding runs on one core (numpy and zstd use no threads here). The floor is reading the blob and writing the decoded
arrays: one pass of memcpy over both.
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import numpy as np

from common.provenance import package_versions
from common.tokenizer import VOCAB_SIZE
from datastore.codec import decode_blob, encode_blob
from datastore.target import concatenate_targets, position_uniforms, reduce_logprobs
from datastore.types import DocTarget, SparseTarget, TargetSums

RESULT = Path(__file__).parent / "results" / "codec.json"
ROW_TARGETS, CHUNK, REPEATS = 2048, 64, 60
THRESHOLDS = (1 / 25, 1 / 50, 1 / 100)
_ARRAYS = (
    *("num_head_P", "offsets_P1", "ids_E", "weights_E"),
    *("realised_logprob_P", "log_tail_mass_P"),
)


def zipf_logits(
    rng: np.random.Generator, ranks_V: np.ndarray, sharpness_N1: np.ndarray
) -> np.ndarray:
    """float64 [N, V]: a Zipf law over the ids, each position with its own noise and sharpness."""
    noise_NV = rng.normal(size=(len(sharpness_N1), VOCAB_SIZE)) * 2.5
    return (noise_NV - np.log(ranks_V + 2)) * sharpness_N1


def teacher(name: str, rng: np.random.Generator, ranks_V: np.ndarray) -> np.ndarray:
    """Normalised logprobs of CHUNK positions, float64 [CHUNK, V]."""
    low, high = {"zipf": (0.8, 1.6), "peaked": (0.9, 2.2)}[name]
    logits_NV = zipf_logits(rng, ranks_V, rng.uniform(low, high, size=(CHUNK, 1)))
    if name == "peaked":
        certain = np.flatnonzero(rng.random(CHUNK) < 0.6)
        logits_NV[certain, rng.integers(0, VOCAB_SIZE, len(certain))] = logits_NV[certain].max(
            axis=1
        ) + rng.uniform(5, 12, len(certain))
    top_N1 = logits_NV.max(axis=1, keepdims=True)
    return logits_NV - top_N1 - np.log(np.exp(logits_NV - top_N1).sum(axis=1, keepdims=True))


def row_targets(name: str) -> dict[float, SparseTarget]:
    """One row of targets at every threshold, of the same distributions; realised tokens drawn from them."""
    rng = np.random.default_rng(0)
    ranks_V = rng.permutation(VOCAB_SIZE)
    parts: dict[float, list[SparseTarget]] = {threshold: [] for threshold in THRESHOLDS}
    for start in range(0, ROW_TARGETS, CHUNK):
        logprobs_NV = teacher(name, rng, ranks_V)
        gumbel_NV = rng.gumbel(size=logprobs_NV.shape)
        realised_N = (logprobs_NV + gumbel_NV).argmax(axis=1)
        positions_N = np.arange(start, start + CHUNK, dtype=np.int32)
        uniforms_N = position_uniforms(1, positions_N)
        for threshold in THRESHOLDS:
            parts[threshold].append(
                reduce_logprobs(logprobs_NV, realised_N, positions_N, uniforms_N, threshold)
            )
    return {t: concatenate_targets(p, [one.positions_P for one in p]) for t, p in parts.items()}


def best_seconds(work) -> float:
    """The fastest of REPEATS runs: what the code needs when the core is its own."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(target: SparseTarget) -> dict[str, float]:
    sums = TargetSums(reasoning=0.0, final=0.0, control=0.0)
    document = DocTarget(content_key=1, target=target, entropy_sums=sums)
    blob = encode_blob([document])
    decoded = decode_blob(blob, [target.positions_P])[0].target
    arrays = [getattr(decoded, name) for name in _ARRAYS]
    decode_sec = best_seconds(lambda: decode_blob(blob, [target.positions_P]))
    floor_sec = best_seconds(lambda: (bytearray(blob), [array.copy() for array in arrays]))
    entries = len(target.ids_E)
    return {
        "entries_per_token": entries / ROW_TARGETS,
        "head_entries_per_token": float(target.num_head_P.mean()),
        "head_mass": float(1 - np.exp(target.log_tail_mass_P.astype(np.float64)).mean()),
        "bytes_per_token": len(blob) / ROW_TARGETS,
        "bytes_per_entry": len(blob) / entries,
        "decode_tokens_per_sec": ROW_TARGETS / decode_sec,
        "decode_entries_per_sec": entries / decode_sec,
        "floor_tokens_per_sec": ROW_TARGETS / floor_sec,
        "times_the_floor": decode_sec / floor_sec,
    }


def main() -> None:
    results = {}
    for name in ("zipf", "peaked"):
        targets = row_targets(name)
        entropy = float(targets[THRESHOLDS[0]].entropy_P.mean())
        results[name] = {"mean_entropy_nats": entropy}
        for threshold, target in targets.items():
            figures = measure(target)
            results[name][f"1/{round(1 / threshold)}"] = figures
            print(
                f"{name:7} H={entropy:.2f} nats  t=1/{round(1 / threshold):<4}"
                f"{figures['entries_per_token']:6.1f} entries {figures['bytes_per_token']:7.1f} B/token "
                f"{figures['decode_tokens_per_sec'] / 1e6:6.2f} M tokens/s"
                f"  ({figures['times_the_floor']:.1f}x a copy)"
            )
    machine = {
        "cpu": platform.processor() or platform.machine(),
        **package_versions(("numpy", "zstandard")),
    }
    RESULT.parent.mkdir(exist_ok=True)
    report = {"row_targets": ROW_TARGETS, "cores": 1, "machine": machine, "results": results}
    RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
