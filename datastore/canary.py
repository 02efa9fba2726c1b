"""The canary: an engine proves on a few documents that it computes this teacher, before it may score.

The reference values come from another implementation (datastore/canary_reference.py), so an engine whose kernels
return plausible numbers of another model is refused; some MXFP4 backends do that without an error
(flashinfer issue 3334).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import model_validator

from common.config import Config, parse_config
from common.errors import ConfigError, EngineError, FormatError
from common.files import canonical_json, write_bytes
from common.tokenizer import VOCAB_SIZE
from datastore.prompt import ScoreRequest
from datastore.target import content_key, head_mask
from datastore.teacher import TeacherConfig, weights_identity
from datastore.types import SparseTarget

CANARY_NAME = "canary.json"
# Fewer positions say little about a mean.
MIN_POSITIONS = 100


class CanaryLimits(Config):
    """What an engine may differ by: means over the positions, nats; top1: share of positions with another first id."""

    mean_realised: float
    top1: float
    mean_entropy: float


# float32: vLLM and transformers were measured 9e-5 nats apart in the mean on the tiny teacher (6e-4 at most).
# bfloat16: a language model of 135M parameters on SYNTH differs from its float32 self by 0.030 nats in the mean (0.039
# in the worst block of 500 targets), by 0.031 in entropy (0.036), and in 1.6 % of first ids (2.2 %), by
# benchmarks/limits.py. Engine and reference both round: 1.4 times that. Kernels that return garbage differ by nats.
LIMITS = {
    "float32": CanaryLimits(mean_realised=1e-3, top1=0.01, mean_entropy=1e-3),
    "bfloat16": CanaryLimits(mean_realised=0.1, top1=0.1, mean_entropy=0.1),
}


class CanaryDocument(Config):
    """Reference values of one document; positions are those of `tokens`, the prompt as the teacher is shown it.

    One value a position: realised_logprobs of the next token, the first id with its logprob, and the entropy; nats.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    realised_logprobs: tuple[float, ...]
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]
    entropies: tuple[float, ...]

    @model_validator(mode="after")
    def _one_value_a_position(self) -> CanaryDocument:
        columns = (self.realised_logprobs, self.top_ids, self.top_logprobs, self.entropies)
        if any(len(column) != len(self.positions) for column in columns):
            raise ValueError("a document needs one value of each kind at each position")
        steps = np.diff([-1, *self.positions, len(self.tokens) - 1])
        if not self.positions or not np.all(steps > 0):
            raise ValueError("positions must ascend and each have a next token")
        return self

    def request(self) -> ScoreRequest:
        """The document as a scorer takes it."""
        tokens_T = np.array(self.tokens, np.int32)
        return ScoreRequest(
            prompt_T=tokens_T,
            positions_P=np.array(self.positions, np.int32),
            shift=0,
            content_key=content_key(tokens_T),
        )


class CanaryReference(Config):
    """What a teacher gives on a few documents. weights: `weights_identity`. made_by: program, versions, dtype."""

    teacher: str
    weights: dict[str, Any]
    made_by: dict[str, Any]
    documents: tuple[CanaryDocument, ...]

    @model_validator(mode="after")
    def _enough_positions(self) -> CanaryReference:
        positions = sum(len(document.positions) for document in self.documents)
        if positions < MIN_POSITIONS:
            raise ValueError(f"{positions} positions in all, at least {MIN_POSITIONS} are needed")
        return self


class Scorer(Protocol):
    """Anything that scores documents: `VllmScorer`, or stored targets."""

    def score(self, requests: list[ScoreRequest]) -> list[SparseTarget]: ...


def canary_path(teacher: TeacherConfig, model: Path) -> Path:
    """Where the reference of a teacher lies: its key `canary`, else canary.json in its local model folder."""
    if teacher.canary is not None:
        return Path(teacher.canary)
    if teacher.revision is None:
        return Path(model) / CANARY_NAME
    raise EngineError(
        f"teacher {teacher.name} comes from a hub and names no canary",
        remedy=f"give canary=PATH or set it in the teacher's config; {_make(teacher)} writes it",
    )


def write_canary(path: Path, reference: CanaryReference) -> None:
    """Write a reference as one line of JSON, atomically."""
    write_bytes(path, canonical_json(reference.resolved()))


def read_canary(path: Path) -> CanaryReference:
    """Read a reference. Raises FormatError when it is damaged."""
    remedy = "make it again with `vpmoe-data canary DATASET --teacher NAME --write`"
    try:
        return parse_config(CanaryReference, json.loads(path.read_bytes()), str(path))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}", remedy=remedy) from None
    except ConfigError as error:
        raise FormatError(str(error), remedy=remedy) from None


def reference_of(teacher: TeacherConfig, model: Path) -> CanaryReference | None:
    """The reference of a teacher, None with random weights, which have none. Raises EngineError when it is absent."""
    if teacher.engine.load_format == "dummy":
        return None
    path = canary_path(teacher, model)
    if not path.is_file():
        raise EngineError(
            f"teacher {teacher.name} has no canary: {path} does not exist",
            remedy=f"make it once with {_make(teacher)}",
        )
    return read_canary(path)


def require_canary(
    scorer: Scorer,
    teacher: TeacherConfig,
    model: Path,
    *,
    weights: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The figures of an engine against its teacher's reference, for the manifest; EngineError when they disagree.

    weights: `weights_identity` where the caller has it already; else the weight files are hashed here. Random weights
    have no reference: {"skipped": "random weights"}.
    """
    reference = reference_of(teacher, model)
    if reference is None:
        return {"skipped": "random weights"}
    found = weights or weights_identity(teacher, model)
    if reference.weights != found:
        raise EngineError(
            f"the canary of teacher {teacher.name} was made for other weights than those in {model}",
            got=_difference(found, reference.weights),
            remedy=f"check the model; if it was changed on purpose, {_make(teacher)} makes it again",
        )
    figures = compare(reference, scorer.score([d.request() for d in reference.documents]), teacher)
    _require_within(figures, LIMITS[teacher.dtype], teacher)
    return {**figures, "made_by": reference.made_by}


def compare(
    reference: CanaryReference, targets: list[SparseTarget], teacher: TeacherConfig
) -> dict[str, Any]:
    """Figures of scored targets against a reference: differences in nats, shares of positions.

    First ids are compared where the reference gives its own at least twice the threshold: with less, rounding decides
    whether a position has a head at all.
    """
    realised_P = _column(reference, "realised_logprobs") - _joined(targets, "realised_logprob_P")
    entropy_P = _column(reference, "entropies") - _joined(targets, "entropy_P")
    judged_P = np.exp(_column(reference, "top_logprobs")) >= 2 * teacher.threshold
    first_P = np.concatenate([_first_ids(target) for target in targets])
    other_P = judged_P & (first_P != _column(reference, "top_ids"))
    return {
        "documents": len(targets),
        "positions": len(realised_P),
        "mean_realised": float(np.abs(realised_P).mean()),
        "max_realised": float(np.abs(realised_P).max()),
        "mean_entropy": float(np.abs(entropy_P).mean()),
        "top1": float(other_P.sum() / max(judged_P.sum(), 1)),
        "top1_positions": int(judged_P.sum()),
    }


def measure_self_noise(scorer: Scorer, requests: list[ScoreRequest]) -> dict[str, Any]:
    """How far the engine differs from itself when its batches differ: all requests together, then one by one reversed.

    mean/max_realised: of |difference of realised logprobs|, nats. other_heads, other_draws: shares of positions with
    another set of head ids, of drawn ids. mean_kl: between the two heads, see `_head_kl`; nats.
    """
    together = scorer.score(requests)
    alone = [scorer.score([request])[0] for request in reversed(requests)][::-1]
    realised_P = _joined(together, "realised_logprob_P") - _joined(alone, "realised_logprob_P")
    pairs = list(zip(together, alone, strict=True))
    positions = len(realised_P)
    if not positions:
        raise EngineError("no position to measure the noise on", expected="documents with targets")
    return {
        "documents": len(requests),
        "positions": positions,
        "mean_realised": float(np.abs(realised_P).mean()),
        "max_realised": float(np.abs(realised_P).max()),
        "other_heads": sum(_other_sets(a, b, heads=True) for a, b in pairs) / positions,
        "other_draws": sum(_other_sets(a, b, heads=False) for a, b in pairs) / positions,
        "mean_kl": float(sum(_head_kl(a, b) for a, b in pairs) / positions),
    }


def _column(reference: CanaryReference, name: str) -> np.ndarray:
    return np.concatenate([np.array(getattr(d, name)) for d in reference.documents])


def _joined(targets: list[SparseTarget], name: str) -> np.ndarray:
    return np.concatenate([getattr(target, name).astype(np.float64) for target in targets])


def _first_ids(target: SparseTarget) -> np.ndarray:
    """The most probable id of each position, -1 where none reaches the threshold: int64 [P]."""
    padded_E = np.append(target.ids_E.astype(np.int64), -1)
    return np.where(target.num_head_P > 0, padded_E[target.offsets_P1[:-1]], -1)


def _keys(target: SparseTarget, *, heads: bool) -> tuple[np.ndarray, np.ndarray]:
    """position * V + id of the entries that are heads (or draws), int64, and their weights, float64."""
    counts_P = np.diff(target.offsets_P1)
    chosen_E = head_mask(target.num_head_P, counts_P - target.num_head_P) == heads
    rows_E = np.repeat(np.arange(len(counts_P)), counts_P)
    keys_E = rows_E * VOCAB_SIZE + target.ids_E
    return keys_E[chosen_E], target.weights_E[chosen_E].astype(np.float64)


def _other_sets(first: SparseTarget, second: SparseTarget, *, heads: bool) -> int:
    """Positions whose two sets of ids differ."""
    differing = np.setxor1d(_keys(first, heads=heads)[0], _keys(second, heads=heads)[0])
    return len(np.unique(differing // VOCAB_SIZE))


def _head_kl(first: SparseTarget, second: SparseTarget) -> float:
    """Sum over the positions of KL(first | second) on the ids that both heads hold and one class of all others.

    What the two distributions do inside that class is unseen, so it is a lower bound of their KL; nats.
    """
    keys_1, weights_1 = _keys(first, heads=True)
    keys_2, weights_2 = _keys(second, heads=True)
    both, at_1, at_2 = np.intersect1d(keys_1, keys_2, assume_unique=True, return_indices=True)
    p_E, q_E = weights_1[at_1], weights_2[at_2]
    rows_E, positions = both // VOCAB_SIZE, len(first.positions_P)
    # 1 - mass cancels below 1e-7: what float32 weights leave of it is no difference.
    p_P = np.maximum(1 - np.bincount(rows_E, p_E, minlength=positions), 1e-7)
    q_P = np.maximum(1 - np.bincount(rows_E, q_E, minlength=positions), 1e-7)
    return float((p_E * np.log(p_E / q_E)).sum() + (p_P * np.log(p_P / q_P)).sum())


def _require_within(figures: dict[str, Any], limits: CanaryLimits, teacher: TeacherConfig) -> None:
    faults = [
        f"{name} {figures[name]:.3g} (limit {limit:g})"
        for name, limit in limits
        if not figures[name] <= limit
    ]
    if faults:
        engine = teacher.engine
        raise EngineError(
            f"the engine does not give the reference values of teacher {teacher.name}",
            got=f"{', '.join(faults)} over {figures['positions']} positions",
            expected=f"the noise of {teacher.dtype}",
            remedy="its kernels compute another model: try another engine.moe_backend (now "
            f"{engine.moe_backend or 'auto'}; some MXFP4 backends return garbage without an error) or "
            f"engine.attention_backend (now {engine.attention_backend or 'auto'}), then run "
            f"`vpmoe-data canary --teacher {teacher.name}`",
        )


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    if found.get("config_sha256") != expected.get("config_sha256"):
        return "another config.json"
    known = {file["name"]: file for file in expected.get("weights", [])}
    files = {file["name"]: file for file in found["weights"]}
    names = [name for name in sorted(files | known) if files.get(name) != known.get(name)]
    return f"other {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"


def _make(teacher: TeacherConfig) -> str:
    return f"`vpmoe-data canary DATASET --teacher {teacher.name} --write`"
