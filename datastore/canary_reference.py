"""Makes a canary's reference: the teacher in transformers on the CPU, no kernel of vLLM in it (decision 0013)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, EngineError
from common.provenance import package_versions
from datastore.canary import (
    CanaryDocument,
    CanaryReference,
    canary_path,
    write_canary,
)
from datastore.prompt import ScoreRequest, document_prefix
from datastore.reader import Dataset
from datastore.teacher import TeacherConfig, local_model, weights_identity

# Positions whose logits exist at a time: 64 x 201,088 x 4 bytes, a few times over.
CHUNK = 64


def write_reference(dataset: Path, teacher: TeacherConfig, documents: int) -> Path:
    """Make the reference from `documents` documents of a dataset, one a row, as the teacher is shown them."""
    opened = Dataset.open(dataset)
    prefix = document_prefix(opened.manifest, teacher)
    requests = [
        prefix.request(row.tokens_T[where], row.spans_T[where])
        for row in itertools.islice(opened.rows(), documents)
        for where in row.documents()[:1]
    ]
    if len(requests) < documents:
        raise ConfigError(
            f"{dataset} has {len(requests)} rows", expected=f"{documents}, one a document"
        )
    model = local_model(teacher)
    path = canary_path(teacher, model)
    write_canary(path, make_reference(teacher, model, requests))
    return path


def make_reference(
    teacher: TeacherConfig, model: Path, requests: list[ScoreRequest]
) -> CanaryReference:
    """Score `requests` with transformers: the teacher's dtype in the body, eager attention, the lm_head in float32.

    On the CPU, an MXFP4 checkpoint expanded to that dtype: neither kernels nor device are those of the engine. Raises
    EngineError when transformers cannot load or run the model.
    """
    try:
        network = load_network(teacher, model)
        documents = tuple(_document(network, request) for request in requests)
    except Exception as error:
        raise EngineError(
            f"transformers cannot run {model}: {error}",
            remedy="see docs/runbook.md, Canary, for the memory that it takes",
        ) from error
    return CanaryReference(
        teacher=teacher.name,
        weights=weights_identity(teacher, model),
        made_by={
            "program": "transformers",
            "attention": "eager",
            "dtype": teacher.dtype,
            "device": "cpu",
            "versions": package_versions(("transformers", "torch")),
        },
        documents=documents,
    )


def load_network(teacher: TeacherConfig, model: Path) -> Any:
    """The teacher in transformers, on the CPU, in its dtype. Raises EngineError when the checkpoint lacks a weight."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config

    arguments: dict[str, Any] = {
        "dtype": getattr(torch, teacher.dtype),
        "attn_implementation": "eager",
        "experts_implementation": "eager",
    }
    quantised = getattr(AutoConfig.from_pretrained(model), "quantization_config", None) or {}
    if quantised.get("quant_method") == "mxfp4":
        arguments["quantization_config"] = Mxfp4Config(dequantize=True)
    network, report = AutoModelForCausalLM.from_pretrained(
        model, **arguments, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise EngineError(f"the checkpoint lacks {', '.join(missing[:3])}")
    # Expanded experts come in bfloat16, whatever dtype was asked for.
    return network.eval().to(arguments["dtype"])


def _document(network: Any, request: ScoreRequest) -> CanaryDocument:
    import torch

    prompt_T = torch.from_numpy(request.prompt_T.astype(np.int64))
    with torch.inference_mode():
        hidden_TD = network.base_model(prompt_T[None], use_cache=False).last_hidden_state[0]
        positions_P = request.positions_P.astype(np.int64) - request.shift
        columns = list(_values(network, hidden_TD, prompt_T, positions_P))
    realised_P, ids_P, top_P, entropy_P = (
        torch.cat(parts).tolist() for parts in zip(*columns, strict=True)
    )
    return CanaryDocument(
        tokens=tuple(request.prompt_T.tolist()),
        positions=tuple(positions_P.tolist()),
        realised_logprobs=tuple(realised_P),
        top_ids=tuple(ids_P),
        top_logprobs=tuple(top_P),
        entropies=tuple(entropy_P),
    )


def _values(network: Any, hidden_TD: Any, prompt_T: Any, positions_P: np.ndarray) -> Iterator[Any]:
    """Realised logprob, first id, its logprob and entropy of each position, chunk by chunk; float32."""
    import torch

    weight_VD = network.get_output_embeddings().weight.float()
    for start in range(0, len(positions_P), CHUNK):
        here = torch.from_numpy(positions_P[start : start + CHUNK])
        logprobs_PV = (hidden_TD[here].float() @ weight_VD.T).log_softmax(dim=-1)
        top_P, ids_P = logprobs_PV.max(dim=-1)
        realised_P = logprobs_PV.gather(1, prompt_T[here + 1][:, None])[:, 0]
        entropy_P = -(logprobs_PV.exp() * logprobs_PV).sum(dim=-1)
        yield realised_P, ids_P, top_P, entropy_P
