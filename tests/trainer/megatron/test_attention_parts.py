"""TPA, GRAPE-M and the value residual, each alone against its formula: outputs and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.gloo import run_gloo
from tests.reference import student as reference
from tests.trainer.megatron.tiny import STUDENT, built_student, tiny_config

T, FAR = 7, 2048
Pairs = dict[str, tuple[np.ndarray, np.ndarray]]


def _in_process(_rank: int) -> dict[str, Any]:
    from trainer.megatron.topology import distributed

    config = tiny_config()
    with distributed("cpu", config.parallel, seed=1):
        model = built_student(STUDENT).double()
        return {
            "tpa": _tpa(model),
            "grape_m": _grape_m(model),
            "value_residual": _value_residual(model),
            "far": _far_positions(model),
        }


def _shape() -> dict[str, Any]:
    return tiny_config().student.model_dump()


def _random(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).double()


def _compare(got: torch.Tensor, want: torch.Tensor, inputs: dict[str, tuple]) -> Pairs:
    """Outputs, and gradients of the same weighted sum in the inputs: (module's tensor, reference's tensor)."""
    weigh = _random(*got.shape, seed=9)
    ours = torch.autograd.grad((got * weigh).sum(), [one for one, _ in inputs.values()])
    theirs = torch.autograd.grad((want * weigh).sum(), [one for _, one in inputs.values()])
    pairs = {name: (o, t) for name, o, t in zip(inputs, ours, theirs, strict=True)}
    pairs["out"] = (got, want)
    return {n: (o.detach().double().numpy(), t.detach().numpy()) for n, (o, t) in pairs.items()}


def _tpa(model: Any) -> Pairs:
    module = model.decoder.layers[0].self_attention.linear_qkv
    own = {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}
    x, x_T = (_random(T, 32, seed=1).requires_grad_() for _ in range(2))
    mixed_SBX, left = module(x[:, None])
    assert left is None
    queries, keys, values = reference.tpa_projection(own, _shape(), x_T)
    per_group = len(queries) // len(keys)
    order = []
    for g, (key, value) in enumerate(zip(keys, values, strict=True)):
        order += [*queries[g * per_group : (g + 1) * per_group], key, value]
    inputs = {n: (p, own[n]) for n, p in module.named_parameters()} | {"x": (x, x_T)}
    return _compare(mixed_SBX[:, 0], torch.cat(order, dim=-1), inputs)


def _grape_m(model: Any) -> Pairs:
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    phi = model.rotary_pos_emb.log_frequency
    phi_T = phi.detach().double().clone().requires_grad_()
    q, q_T = (_random(T, 8, seed=2).requires_grad_() for _ in range(2))
    turned = apply_rotary_pos_emb(q[:, None, None], model.rotary_pos_emb(T), model.config)
    return _compare(
        turned[:, 0, 0],
        reference.rotate(q_T, phi_T, _shape()),
        {"phi": (phi, phi_T), "q": (q, q_T)},
    )


def _value_residual(model: Any) -> Pairs:
    attention = model.decoder.layers[1].self_attention
    logit = attention.value_residual_logit
    logit_T = logit.detach().double().clone().requires_grad_()
    x, first, first_T = _random(T, 32, seed=3), *(2 * [_random(T, 1, 2, 8, seed=4)])
    first, first_T = first.clone().requires_grad_(), first_T.clone().requires_grad_()
    attention.first_value_SBGD = first
    _, _, value = attention.get_query_key_value_tensors(x[:, None])
    state = {n: p.detach() for n, p in attention.linear_qkv.named_parameters()}
    own = torch.stack(reference.tpa_projection(state, _shape(), x)[2], dim=1)[:, None]
    lam = 1 / (1 + torch.exp(-logit_T))
    want = lam * own + (1 - lam) * first_T
    return _compare(value, want, {"logit": (logit, logit_T), "first": (first, first_T)})


def _far_positions(model: Any) -> float:
    """Largest error of a bf16 query turned at positions up to 2047, whose entries are below 1."""
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    q = torch.rand(FAR, 8, generator=torch.Generator().manual_seed(6)).bfloat16()
    rotary = model.rotary_pos_emb.bfloat16()
    turned = apply_rotary_pos_emb(q[:, None, None], rotary(FAR), model.config)[:, 0, 0]
    assert turned.dtype == torch.bfloat16
    want = reference.rotate(q.double(), rotary.log_frequency.double(), _shape())
    return float((turned.double() - want).abs().max())


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_gloo(_in_process, 1)[0]


@pytest.mark.parametrize("part", ["tpa", "grape_m", "value_residual"])
def test_a_part_equals_its_formula(seen, part) -> None:
    """To 1e-12 in fp64; phi and lam are fp32 in the student, so what they touch to 2e-6."""
    tolerance = 1e-12 if part == "tpa" else 2e-6
    for name, (got, expected) in seen[part].items():
        assert np.abs(expected).max() > 0, name
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=name
        )


def test_rotation_in_bf16_is_right_at_the_end_of_a_row(seen) -> None:
    """Angles rounded to bf16 would be off by whole turns there; cos, sin and products round to 2^-8."""
    assert seen["far"] < 4 * 2**-8
