"""Bytes a token by stream, and speed, of the target codec: on a real language model and on synthetic teachers.

    python -m benchmarks.codec

- smollm: the distributions of SmolLM2-135M-Instruct on SYNTH (benchmarks/smollm.py), two packed rows; hard, as the
  model is small. The id order is counted on other documents.
- zipf: logprobs of a Zipf law with log-normal noise and a sharpness that varies by position; flatter than any teacher.
- peaked: 60 % of positions hold one near-certain id, the others a Zipf law of mixed sharpness; as a large model does.
The synthetic teachers have one row of 2048 targets over the real vocabulary, their realised tokens drawn from them, and
an id order by the mean probability at other positions. Bytes count whole blobs. Seconds are of CPU time, the best of
REPEATS runs on one thread; where other programs share the caches the speeds are lower than on a core of one's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.report import header
from benchmarks.smollm import SEQ_LEN, Teacher, load_teacher, logprob_chunks
from common.tokenizer import VOCAB_SIZE
from datastore.codec import compress_streams, decode_blob, encode_blob
from datastore.codec_masses import Shape
from datastore.codec_target import Scored, encode_target
from datastore.id_order import IdOrder
from datastore.packing import PackConfig, pack_documents
from datastore.target import (
    concatenate_targets,
    content_key,
    position_uniforms,
    reduce_logprobs,
    require_valid,
    target_positions,
)
from datastore.types import DocTarget, PackedRow, SparseTarget, TargetSums

RESULT = Path(__file__).parent / "results" / "codec.json"
ROW_TARGETS, SMOLLM_ROWS, CHUNK, REPEATS = 2048, 2, 64, 200
THRESHOLDS = (1 / 12, 1 / 25, 1 / 50, 1 / 100)
STREAMS = (
    *("head_counts", "draw_counts", "realised_places", "second_head_steps", "later_head_steps"),
    *("tail_steps", "head_cells", "draw_cells", "realised_nats"),
)
NO_SUMS = TargetSums(reasoning=0.0, final=0.0, control=0.0)
Row = tuple[PackedRow, list[DocTarget]]


def synthetic_chunks(name: str, positions: int, seed: int) -> Iterator[np.ndarray]:
    """Normalised logprobs of a synthetic teacher, float64 [CHUNK, V] each; all seeds share its frequencies."""
    rng = np.random.default_rng(seed)
    ranks_V = np.random.default_rng(0).permutation(VOCAB_SIZE)
    low, high = {"zipf": (0.8, 1.6), "peaked": (0.9, 2.2)}[name]
    for _ in range(0, positions, CHUNK):
        noise_NV = rng.normal(size=(CHUNK, VOCAB_SIZE)) * 2.5
        logits_NV = (noise_NV - np.log(ranks_V + 2)) * rng.uniform(low, high, size=(CHUNK, 1))
        if name == "peaked":
            certain = np.flatnonzero(rng.random(CHUNK) < 0.6)
            tops = logits_NV[certain].max(axis=1) + rng.uniform(5, 12, len(certain))
            logits_NV[certain, rng.integers(0, VOCAB_SIZE, len(certain))] = tops
        top_N1 = logits_NV.max(axis=1, keepdims=True)
        yield logits_NV - top_N1 - np.log(np.exp(logits_NV - top_N1).sum(axis=1, keepdims=True))


def synthetic_rows(name: str) -> tuple[IdOrder, dict[float, list[Row]]]:
    """The order, and one row at each threshold, all of the same distributions."""
    frequency_V = sum(np.exp(chunk).sum(axis=0) for chunk in synthetic_chunks(name, 256, seed=2))
    rng = np.random.default_rng(3)
    realised_N = np.concatenate(
        [
            (chunk + rng.gumbel(size=chunk.shape)).argmax(axis=1)
            for chunk in synthetic_chunks(name, ROW_TARGETS, seed=1)
        ]
    )
    row = PackedRow(
        tokens_T=np.append(0, realised_N).astype(np.int32),
        spans_T=np.append(0, np.ones(ROW_TARGETS)).astype(np.uint8),
        doc_ends_D=np.array([ROW_TARGETS + 1], np.int32),
        doc_ids=(bytes(16),),
        row_hash=0,
        languages=("",),
        exercises=("",),
    )
    key = content_key(row.tokens_T)
    parts: dict[float, list[SparseTarget]] = {threshold: [] for threshold in THRESHOLDS}
    for number, chunk in enumerate(synthetic_chunks(name, ROW_TARGETS, seed=1)):
        at = np.arange(number * CHUNK, (number + 1) * CHUNK, dtype=np.int32)
        uniforms = position_uniforms(key, at)
        for threshold in THRESHOLDS:
            parts[threshold].append(reduce_logprobs(chunk, realised_N[at], at, uniforms, threshold))
    return IdOrder.of(np.argsort(-frequency_V, kind="stable")), {
        threshold: [(row, [_document(key, _joined(targets))])]
        for threshold, targets in parts.items()
    }


def smollm_rows() -> tuple[IdOrder, dict[float, list[Row]]]:
    """The order, and the first packed rows of the language model's documents at each threshold."""
    teacher = load_teacher()
    order = IdOrder.of(np.argsort(-teacher.counts_W, kind="stable"))
    rows = list(pack_documents(teacher.documents, seq_len=SEQ_LEN, config=PackConfig()))
    numbers = {document.doc_id: number for number, document in enumerate(teacher.documents)}
    chosen = rows[:SMOLLM_ROWS]
    made = {
        number: _reduced_document(teacher, number)
        for number in (numbers[doc_id] for row in chosen for doc_id in row.doc_ids)
    }
    return order, {
        threshold: [(row, [made[numbers[d]][threshold] for d in row.doc_ids]) for row in chosen]
        for threshold in THRESHOLDS
    }


def _reduced_document(teacher: Teacher, number: int) -> dict[float, DocTarget]:
    document = teacher.documents[number]
    starts = np.cumsum([0, *(len(positions_P) for positions_P in teacher.positions())])
    positions_P = target_positions(document.tokens_T, document.spans_T)
    realised_P = np.searchsorted(teacher.ids_V, document.tokens_T[positions_P + 1])
    key = content_key(document.tokens_T)
    hidden_PD = teacher.hidden_PD[starts[number] : starts[number + 1]]
    parts: dict[float, list[SparseTarget]] = {threshold: [] for threshold in THRESHOLDS}
    for where, logprobs_CV in logprob_chunks(hidden_PD, teacher.head_VD):
        at = positions_P[where]
        uniforms = position_uniforms(key, at)
        for threshold in THRESHOLDS:
            part = reduce_logprobs(logprobs_CV, realised_P[where], at, uniforms, threshold)
            parts[threshold].append(part)
    return {
        threshold: _document(key, _joined(targets, teacher.ids_V))
        for threshold, targets in parts.items()
    }


def _joined(parts: list[SparseTarget], ids_V: np.ndarray | None = None) -> SparseTarget:
    target = concatenate_targets(parts, [part.positions_P for part in parts])
    return target if ids_V is None else replace(target, ids_E=ids_V[target.ids_E])


def _document(key: int, target: SparseTarget) -> DocTarget:
    return DocTarget(content_key=key, target=target, entropy_sums=NO_SUMS)


def best_seconds(work: Callable[[], object]) -> float:
    """The least CPU time of REPEATS runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def stream_bytes(row: PackedRow, documents: list[DocTarget], order: IdOrder) -> dict[str, float]:
    """Bytes of each stream of a blob: what a frame grows by when it is added, and the raw bits by what they say."""
    scored = Scored.of(row, list(range(len(documents))), order)
    targets = [document.target for document in documents]
    joined = concatenate_targets(targets, scored.positions)
    in_head_E = np.concatenate([require_valid(target) for target in targets])
    shape = Shape.of(
        joined.num_head_P,
        np.diff(joined.offsets_P1) - joined.num_head_P,
        scored.uniforms_P([document.content_key for document in documents]),
        joined.threshold,
    )
    streams, raw = encode_target(joined, in_head_E, scored, shape)
    sizes = [len(compress_streams(streams[:count])) for count in range(len(streams) + 1)]
    found: dict[str, float] = dict(zip(STREAMS, np.diff(sizes).tolist(), strict=True))
    place_P = np.zeros(len(shape.num_head_P), np.int64)
    place_P[shape.num_head_P > 0] = np.frombuffer(streams[2], np.uint8)
    masses = (shape.tail_widths().sum() + shape.realised_widths(place_P).sum()).item() / 8
    found |= {"raw_masses": masses, "raw_ids": len(raw) - masses}
    found["header_and_documents"] = len(encode_blob(documents, row, order)) - sum(found.values())
    return found


def measure(rows: list[Row], order: IdOrder) -> dict[str, object]:
    """Figures over rows: bytes of all of them, speed of the first."""
    blobs = [encode_blob(documents, row, order) for row, documents in rows]
    targets = [document.target for _, documents in rows for document in documents]
    positions, num_bytes = sum(len(t.positions_P) for t in targets), sum(map(len, blobs))
    row, documents = rows[0]
    row_positions = sum(len(document.target.positions_P) for document in documents)
    streams = [stream_bytes(row, documents, order) for row, documents in rows]
    tails = np.concatenate([t.log_tail_mass_P for t in targets]).astype(np.float64)
    encode_sec = best_seconds(lambda: encode_blob(documents, row, order))
    decode_sec = best_seconds(lambda: decode_blob(blobs[0], row, order))
    return {
        "positions": positions,
        "entries_per_token": sum(len(t.ids_E) for t in targets) / positions,
        "head_entries_per_token": sum(int(t.num_head_P.sum()) for t in targets) / positions,
        "head_mass": float(1 - np.exp(tails).mean()),
        "bytes_per_token": num_bytes / positions,
        "bytes_per_token_by_stream": {
            name: sum(part[name] for part in streams) / positions for name in streams[0]
        },
        "encode_tokens_per_sec": row_positions / encode_sec,
        "decode_tokens_per_sec": row_positions / decode_sec,
    }


def main() -> None:
    results: dict[str, dict[str, object]] = {}
    for name in ("smollm", "peaked", "zipf"):
        order, cases = smollm_rows() if name == "smollm" else synthetic_rows(name)
        entropies = [
            document.target.entropy_P
            for _, documents in cases[THRESHOLDS[0]]
            for document in documents
        ]
        results[name] = {"mean_entropy_nats": float(np.concatenate(entropies).mean())}
        for threshold, rows in cases.items():
            figures = measure(rows, order)
            results[name][f"1/{round(1 / threshold)}"] = figures
            print(
                f"{name:7} t=1/{round(1 / threshold):<4}{figures['entries_per_token']:6.1f} entries "
                f"{figures['bytes_per_token']:6.2f} B/token  encode "
                f"{figures['encode_tokens_per_sec'] / 1e6:5.2f}  decode "
                f"{figures['decode_tokens_per_sec'] / 1e6:5.2f} M tokens/s"
            )
    RESULT.parent.mkdir(exist_ok=True)
    report = header(("numpy", "zstandard")) | {"threads": 1, "results": results}
    RESULT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
