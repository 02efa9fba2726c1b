"""The vLLM scorer on CUDA in bf16 against transformers in float32 on a tiny teacher."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import load_config, named_config
from common.provenance import package_versions
from datastore.prompt import Prefix
from datastore.target import require_valid
from datastore.teacher import TeacherConfig
from demo.tiny_teacher import train_tiny_teacher
from tests.datastore import conftest as made

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.skipif(
        package_versions(("vllm",))["vllm"] == "0.24.0",
        reason="vLLM 0.24.0 cannot load unquantised gpt-oss weights (KeyError experts.w2_weight)",
    ),
]
ON_CUDA = (
    *("engine.device=cuda", "dtype=bfloat16", "engine.kv_cache_gib=null"),
    *("engine.gpu_memory_utilization=0.3", "engine.attention_backend=TRITON_ATTN"),
)


def test_equals_transformers_within_bf16(tmp_path: Path) -> None:
    """The body runs in bf16, so the bound is the error of a bf16 body, not that of the reduction (test_reduce.py)."""
    documents = [made.document(i, answer="one and two " * (8 * (i % 4))) for i in range(24)]
    pairs = [(d.tokens_T, d.spans_T) for d in documents]
    folder = train_tiny_teacher(tmp_path / "tiny", pairs, seed=3, steps=40, source="test")
    teacher = load_config(
        TeacherConfig, named_config("teacher", "tiny"), (f"model={folder}", *ON_CUDA)
    )
    whole = Prefix(np.empty(0, np.int32), np.empty(0, np.int32), None, None)
    from datastore.vllm_scorer import VllmScorer

    with VllmScorer(teacher, folder) as scorer:
        targets = scorer.score([whole.request(*pair) for pair in pairs])
    errors, agreed = [], []
    for (tokens_T, _), target, exact_TV in zip(
        pairs, targets, _exact_logprobs(folder, [tokens_T for tokens_T, _ in pairs]), strict=True
    ):
        require_valid(target)
        exact_PV = exact_TV[target.positions_P]
        realised_P = exact_PV[np.arange(len(exact_PV)), tokens_T[target.positions_P + 1]]
        errors.append(np.abs(target.realised_logprob_P - realised_P))
        has_head_P = target.num_head_P > 0
        top_P = target.ids_E[target.offsets_P1[:-1]]
        agreed.append((top_P == exact_PV.argmax(axis=1))[has_head_P])
    error_P, agreed_P = np.concatenate(errors), np.concatenate(agreed)
    print(f"realised logprob off by {error_P.mean():.4f} mean, {error_P.max():.3f} max; ")
    print(f"top id agrees at {100 * agreed_P.mean():.2f} % of {len(agreed_P)} positions")
    assert len(agreed_P) > 300
    assert error_P.mean() < 0.05
    assert agreed_P.mean() > 0.95


def _exact_logprobs(folder: Path, documents: list[np.ndarray]) -> list[np.ndarray]:
    from transformers import GptOssForCausalLM

    network = GptOssForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        return [
            network(input_ids=torch.from_numpy(tokens_T.astype(np.int64))[None])
            .logits[0]
            .double()
            .log_softmax(-1)
            .numpy()
            for tokens_T in documents
        ]
