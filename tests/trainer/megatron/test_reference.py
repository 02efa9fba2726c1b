"""The student with everything on against tests/reference/student.py: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.gloo import run_gloo
from tests.reference import student as reference
from tests.trainer.megatron.tiny import (
    SEQ_LEN,
    STUDENT,
    built_student,
    micro_batches,
    tiny_config,
    tiny_rows,
)

FUSED = {"tpa": None, "grape_m": None, "value_residual": None}


def _in_process(_rank: int) -> dict[str, Any]:
    from trainer.megatron.topology import distributed

    config = tiny_config()
    with distributed("cpu", config.parallel, seed=1):
        return {
            "whole": against_reference(STUDENT),
            "without parts": against_reference(STUDENT | FUSED),
            "compiled": against_reference(STUDENT, compiled=True),
            "compiled without parts": against_reference(STUDENT | FUSED, compiled=True),
            "bf16": _in_bf16(),
            "names": [n for n, _ in built_student(STUDENT | {"layers": 8}).named_parameters()],
            "no first value": _no_first_value(),
        }


def against_reference(
    student: dict[str, Any], device: str = "cpu", *, compiled: bool = False
) -> dict[str, Any]:
    """Hidden states and gradients of two packed rows, the module's on `device` in fp64 and the reference's.

    compiled: by the function that `transformer_impl: compiled` compiles, here as it is.
    """
    from trainer.megatron.attention import PackedRows

    (batch,) = micro_batches(tiny_rows(2, seed=4), 2)
    model = built_student(student, device=device, deterministic=False).double()
    there = batch.to(torch.device(device))
    if compiled:
        _as_compiled(model)
    hidden_SBD = model(
        there.tokens_BT,
        None,
        None,
        packed_seq_params=PackedRows(document_BS=there.doc_ids_BT),
        padding_mask=there.doc_ids_BT < 0,
    )
    weigh_BTD = torch.randn(2, SEQ_LEN, 32, generator=torch.Generator().manual_seed(5)).double()
    got = hidden_SBD.transpose(0, 1).cpu()
    names = [name for name, _ in model.named_parameters() if name != "output_layer.weight"]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad((got * weigh_BTD).sum(), [parameters[n] for n in names])
    buffers = {n: b for n, b in model.named_buffers() if n.endswith("expert_bias")}
    state = {
        n: t.detach().cpu().double().clone().requires_grad_(n in names)
        for n, t in (parameters | buffers).items()
    }
    want, loss = _expected(state, student, batch, weigh_BTD)
    expected = torch.autograd.grad(loss, [state[n] for n in names])
    pairs = zip(names, gradients, expected, strict=True)
    return {
        "hidden": (got.detach().numpy(), want.detach().numpy()),
        "gradients": {n: (g.cpu().double().numpy(), e.numpy()) for n, g, e in pairs},
    }


def _as_compiled(model: Any) -> None:
    from trainer.megatron.fused_layer import CompiledLayer

    model.takes_table = True
    for layer in model.decoder.layers:
        layer.__class__ = CompiledLayer


def _expected(
    state: dict[str, torch.Tensor], student: dict[str, Any], batch: Any, weigh_BTD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = tiny_config(student=student).student.model_dump()
    rows, loss = [], torch.zeros((), dtype=torch.float64)
    for b in range(2):
        documents = batch.doc_ids_BT[b].tolist()
        row_TD, routed = reference.final_hidden(
            state, shape, batch.tokens_BT[b].tolist(), documents
        )
        real = [t for t, document in enumerate(documents) if document >= 0]
        aux = sum(reference.balance_loss([layer[t] for t in real], shape) for layer in routed)
        loss = loss + (row_TD * weigh_BTD[b]).sum() + aux / 2
        rows.append(row_TD)
    return torch.stack(rows), loss


def _in_bf16() -> dict[str, Any]:
    from megatron.core.transformer.module import Float16Module

    config = tiny_config(precision="bf16")
    from trainer.megatron.student import build_student

    model = build_student(config.student, config, config.parallel, SEQ_LEN)
    before = {
        n: p.detach().clone() for n, p in model.named_parameters() if p.dtype == torch.float32
    }
    Float16Module(model.config, model)
    after = dict(model.named_parameters())
    return {
        "fp32": sorted(n for n, p in after.items() if p.dtype == torch.float32),
        "same": all(torch.equal(after[n], p) for n, p in before.items()),
    }


def _no_first_value() -> str:
    from common.errors import EngineError

    attention = built_student(STUDENT).decoder.layers[1].self_attention
    try:
        attention.get_query_key_value_tensors(torch.zeros(4, 1, 32))
    except EngineError as error:
        return str(error)
    return "no error"


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_gloo(_in_process, 1)[0]


@pytest.mark.parametrize("which", ["whole", "without parts", "compiled", "compiled without parts"])
def test_hidden_states_equal_the_reference(seen, which) -> None:
    got, expected = seen[which]["hidden"]
    np.testing.assert_allclose(got, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("which", ["whole", "without parts", "compiled", "compiled without parts"])
def test_every_gradient_equals_the_reference(seen, which) -> None:
    """Angles and lam are fp32 in the student, so 1e-5 and not 1e-12; the balance loss is part of it."""
    for name, (got, expected) in seen[which]["gradients"].items():
        assert np.abs(expected).max() > 0, name
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 1e-5, (name, error)


def test_a_bf16_student_keeps_frequencies_and_lambdas_in_fp32(seen) -> None:
    logits = [f"decoder.layers.{i}.self_attention.value_residual_logit" for i in (1, 2, 3)]
    assert seen["bf16"] == {"fp32": [*logits, "rotary_pos_emb.log_frequency"], "same": True}


def test_every_fourth_layer_is_global_and_all_but_the_first_mix_its_values(seen) -> None:
    def layers(leaf: str) -> set[int]:
        return {int(n.split(".")[2]) + 1 for n in seen["names"] if n.endswith(f"attention.{leaf}")}

    assert layers("linear_qkv.a_query") == layers("linear_qkv.b_value") == {1, 2, 3, 5, 6, 7}
    assert layers("linear_qkv.weight") == {4, 8}
    assert layers("value_residual_logit") == {2, 3, 4, 5, 6, 7, 8}


def test_a_layer_without_the_first_values_refuses(seen) -> None:
    assert "layer 2 mixes in the values of layer 1 and got none" in seen["no first value"]
