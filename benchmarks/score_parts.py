"""What benchmarks/score.py measures apart from engines: documents like those of SYNTH, the vocabulary, the host."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import VOCAB_SIZE
from datastore.prompt import ScoreRequest
from datastore.target import content_key, position_uniforms
from datastore.teacher import TeacherConfig

# SYNTH (docs/format.md): 856 tokens a document on average, 20 % above 1024: a log-normal with mean 856 and
# sigma 0.25; 101 tokens of constant prefix; 83 % of all tokens are targets.
MEAN_TOKENS, SIGMA, PREFIX_TOKENS, TARGET_SHARE = 856, 0.25, 101, 0.83
# Of the logits that the encoders' rows come from: about 13 stored ids a position at threshold 1/50.
SPREAD = 7.0


@dataclass(frozen=True, eq=False)
class Sample:
    """Documents of random ids, as the work does not depend on which, and where each one's targets start."""

    documents: list[np.ndarray]
    first_targets: list[int]

    @classmethod
    def make(cls, count: int, mean: int) -> Sample:
        """`count` documents of `mean` tokens on average."""
        random = np.random.default_rng(0)
        scale = mean / MEAN_TOKENS
        lengths = np.exp(random.normal(np.log(mean) - SIGMA**2 / 2, SIGMA, count)).astype(int) + 2
        prefix = random.integers(0, 199_000, int(PREFIX_TOKENS * scale))
        bodies = [random.integers(0, 199_000, max(n - len(prefix), 2)) for n in lengths]
        documents = [np.concatenate([prefix, body]).astype(np.int32) for body in bodies]
        return cls(
            documents,
            [max(len(prefix), int((1 - TARGET_SHARE) * len(d))) for d in documents],
        )

    @property
    def tokens(self) -> int:
        return sum(map(len, self.documents))

    def requests(self, *, every_position: bool) -> list[ScoreRequest]:
        """All positions, or those whose next token is a target."""
        return [
            ScoreRequest(
                prompt_T=tokens_T,
                positions_P=np.arange(
                    0 if every_position else first - 1, len(tokens_T) - 1, dtype=np.int32
                ),
                shift=0,
                content_key=content_key(tokens_T),
            )
            for tokens_T, first in zip(self.documents, self.first_targets, strict=True)
        ]


def vocabulary_parts(teacher: TeacherConfig, hidden: int) -> dict[str, float]:
    """Microseconds a position of the lm_head product alone and of the whole reduction, at the config's chunk."""
    import torch

    from datastore.reduce import _head_logits

    engine = teacher.engine
    rows = 4 * engine.vocab_chunk_tokens
    hidden_ND, head_VD = _random_operands(teacher, rows, hidden)
    ids_N = np.random.default_rng(0).integers(0, VOCAB_SIZE, rows)
    device = hidden_ND.device
    out_NV = torch.empty(engine.vocab_chunk_tokens, VOCAB_SIZE, device=device)

    def product() -> None:
        for chunk_ND in hidden_ND.split(engine.vocab_chunk_tokens):
            _head_logits(chunk_ND, head_VD, out_NV=out_NV)

    def best(run: Callable[[], object]) -> float:
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:]) / rows * 1e6

    return {
        "lm_head_us": best(product),
        "lm_head_and_reduction_us": best(
            lambda: _reduced(teacher, hidden_ND, head_VD, ids_N, np.full(rows, 0.5))
        ),
    }


def _random_operands(teacher: TeacherConfig, rows: int, hidden: int) -> tuple[Any, Any]:
    """Hidden states [rows, D] and lm_head [V, D] whose logits have standard deviation SPREAD, on the device."""
    import torch

    device, dtype = torch.device(teacher.engine.device), getattr(torch, teacher.dtype)
    torch.manual_seed(0)
    hidden_ND = torch.randn(rows, hidden, device=device).to(dtype)
    head_VD = torch.randn(VOCAB_SIZE, hidden, device=device).mul_(SPREAD * hidden**-0.5)
    return hidden_ND, head_VD.to(dtype)


def _reduced(
    teacher: TeacherConfig,
    hidden_ND: Any,
    head_VD: Any,
    ids_N: np.ndarray,
    uniforms_N: np.ndarray,
) -> Any:
    """Packed rows int32 [N, C] on the device."""
    import torch

    from datastore.reduce import VocabShard, reduce_hidden

    return reduce_hidden(
        *(hidden_ND, head_VD, torch.from_numpy(ids_N).to(hidden_ND.device)),
        torch.from_numpy(uniforms_N).to(hidden_ND.device),
        threshold=teacher.threshold,
        chunk=teacher.engine.vocab_chunk_tokens,
        shard=VocabShard(),
    )


def spread_rows(teacher: TeacherConfig, hidden: int, sample: Sample) -> list[np.ndarray]:
    """Packed rows of the sample's targets from logits that spread, as dummy weights give flat ones."""
    requests = sample.requests(every_position=False)
    hidden_ND, head_VD = _random_operands(
        teacher, max(len(r.positions_P) for r in requests), hidden
    )
    packed = []
    for request in requests:
        ids_N = request.prompt_T[request.positions_P + 1].astype(np.int64)
        uniforms_N = position_uniforms(request.content_key, request.positions_P)
        rows = _reduced(teacher, hidden_ND[: len(ids_N)], head_VD, ids_N, uniforms_N)
        packed.append(rows.cpu().numpy())
    return packed


def encode_documents(job: tuple[list[np.ndarray], list[int], list[np.ndarray], float]) -> int:
    """What an encoder does to each document: unpack, encode, read back, check, budget. Returns bytes."""
    from datastore.id_order import IdOrder
    from datastore.score_encode import encode_row
    from datastore.types import PackedRow

    documents, first_targets, packed, threshold = job
    order, size = IdOrder.identity(), 0
    for tokens_T, first, packed_PC in zip(documents, first_targets, packed, strict=True):
        spans_T = np.zeros(len(tokens_T), np.uint8)
        spans_T[first:] = 2
        row = PackedRow(
            tokens_T=tokens_T,
            spans_T=spans_T,
            doc_ends_D=np.array([len(tokens_T)], np.int32),
            doc_ids=(bytes(16),),
            row_hash=0,
            languages=("",),
            exercises=("",),
        )
        blob, _, _ = encode_row(row, [packed_PC], threshold=threshold, order=order)
        size += len(blob or b"")
    return size


def host_rate(sample: Sample, packed: Path, threshold: float) -> dict[str, float]:
    """Tokens a second of the encoders of one engine, all at work."""
    from datastore.score_encode import ENCODERS

    with np.load(packed) as arrays:
        rows = [arrays[name] for name in arrays.files]
    jobs = [
        (sample.documents[i::ENCODERS], sample.first_targets[i::ENCODERS], rows[i::ENCODERS])
        for i in range(ENCODERS)
    ]
    with ProcessPoolExecutor(ENCODERS, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(encode_documents, [([], [], [], threshold)] * ENCODERS))  # start and import
        start = time.perf_counter()
        size = sum(pool.map(encode_documents, [(*job, threshold) for job in jobs]))
        seconds = time.perf_counter() - start
    entries = np.concatenate([rows_PC[:, 0] + rows_PC[:, 1] for rows_PC in rows])
    return {
        "processes": ENCODERS,
        "tokens_per_sec": sample.tokens / seconds,
        "entries_per_target": float(entries.mean()),
        "bytes_per_target": size / len(entries),
    }
