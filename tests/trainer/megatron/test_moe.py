"""The mixture-of-experts layer in fp64 against the formula, token by token in plain Python, and EP=2 against EP=1."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.expert_errors import product_errors
from tests.trainer.megatron.tiny import STUDENT

S, B, D, E = 12, 2, 32, 8
SCALING, AUX = 2.5, 1e-2
# experts a token, groups, groups kept, and what else is unusual
CASES = {
    "one": (1, 4, 1, ""),
    "two": (2, 4, 2, ""),
    "two of one group": (2, 4, 1, ""),
    "three": (3, 4, 3, ""),
    "four": (4, 4, 2, ""),
    "four without groups": (4, 1, 1, ""),
    "padding": (2, 4, 2, "padding"),
    "all to one expert": (1, 4, 1, "one expert"),
}
PARTS = {
    "router.weight",
    "router.bias",
    "experts.fc1_weight",
    "experts.fc1_bias",
    "experts.fc2_weight",
    "experts.fc2_bias",
    "shared_experts.linear_fc1.weight",
    "shared_experts.linear_fc1.bias",
    "shared_experts.linear_fc2.weight",
    "shared_experts.linear_fc2.bias",
}


def _layer(case: str, expert_parallel: int = 1):
    """The layer in fp64, its weights drawn whole and then sliced to this rank's experts."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    from tests.trainer.megatron.tiny import tiny_config
    from trainer.config import ParallelConfig
    from trainer.megatron.moe import StudentMoE
    from trainer.megatron.student import transformer_config

    topk, groups, group_topk, unusual = CASES[case]
    router = {"groups": groups, "group_topk": group_topk, "aux_loss": AUX, "scaling": SCALING}
    runtime = tiny_config(student=STUDENT | {"experts_per_token": topk, "router": router})
    config = transformer_config(runtime.student, runtime, ParallelConfig(expert=expert_parallel))
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = StudentMoE(config, linear, compute="loop").double().train()
    generator = torch.Generator().manual_seed(7)
    rank, local = layer.experts.groups.ep.rank(), E // expert_parallel
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            whole = (E, *parameter.shape[1:]) if ".fc" in name else parameter.shape
            drawn = 0.3 * torch.randn(whole, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn[rank * local :][:local] if ".fc" in name else drawn)
        layer.router.expert_bias.copy_(0.1 * torch.randn(E, generator=generator))
        if unusual == "one expert":
            layer.router.expert_bias[5] += 20.0
    return layer


def _inputs(case: str, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x, weigh = (torch.randn(S, B, D, generator=generator, dtype=torch.float64) for _ in range(2))
    padding_BS = None
    if CASES[case][3] == "padding":
        padding_BS = torch.arange(S) >= torch.tensor([[9], [4]])
    return x.requires_grad_(), padding_BS, weigh


def _run(layer, case: str, seed: int = 1) -> dict[str, np.ndarray]:
    x, padding_BS, weigh = _inputs(case, seed)
    layer.router.local_tokens_per_expert.zero_()
    layer.router.take_aux_loss()
    out, bias = layer(x, padding_mask=padding_BS)
    assert bias is None
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad((out * weigh).sum(), [x, *parameters.values()])
    values = {"out": out, "x": grads[0], "counts": layer.router.local_tokens_per_expert.clone()}
    values |= {"aux": layer.router.take_aux_loss() / B}
    values |= dict(zip(parameters, grads[1:], strict=True))
    return {name: value.detach().double().numpy() for name, value in values.items()}


def _by_formula(layer, case: str) -> dict[str, np.ndarray]:
    topk, groups, group_topk, _ = CASES[case]
    x, padding_BS, weigh = _inputs(case)
    w = dict(layer.named_parameters())
    size, counts = E // groups, torch.zeros(E)
    outs, plain = [], torch.zeros(B, E, dtype=torch.float64)
    shares, lengths = [torch.zeros(E, dtype=torch.float64) for _ in range(B)], [0] * B
    for s in range(S):
        for b in range(B):
            t = x[s, b]
            score = 1 / (1 + torch.exp(-(w["router.weight"] @ t + w["router.bias"])))
            biased = (score + layer.router.expert_bias).tolist()
            parts = [sorted(biased[g * size :][:size], reverse=True) for g in range(groups)]
            value = [sum(part[: topk // group_topk]) for part in parts]
            kept = sorted(range(groups), key=lambda g: -value[g])[:group_topk]
            allowed = [e for e in range(E) if e // size in kept]
            chosen = sorted(allowed, key=lambda e: -biased[e])[:topk]
            total = sum(score[e] for e in chosen) + 1e-20 if topk > 1 else 1.0
            routed = sum(SCALING * score[e] / total * _expert(w, e, t) for e in chosen)
            outs.append(routed + _shared(w, t))
            if padding_BS is not None and padding_BS[b, s]:
                continue
            counts[chosen] += 1
            plain[b, score.detach().argsort(descending=True)[:topk]] += 1
            shares[b] = shares[b] + score / score.sum()
            lengths[b] += 1
    rows = [AUX * E / (topk * n**2) * (plain[b] * shares[b]).sum() for b, n in enumerate(lengths)]
    aux, out = sum(rows) / B, torch.stack(outs).view(S, B, D)
    grads = torch.autograd.grad((out * weigh).sum() + aux, [x, *w.values()])
    values = {"out": out, "x": grads[0], "counts": counts, "aux": aux}
    values |= dict(zip(w, grads[1:], strict=True))
    return {name: value.detach().double().numpy() for name, value in values.items()}


def _expert(w, e, t):
    inner = torch.clamp(w["experts.fc1_weight"][e] @ t + w["experts.fc1_bias"][e], min=0) ** 2
    return w["experts.fc2_weight"][e] @ inner + w["experts.fc2_bias"][e]


def _shared(w, t):
    fc1, fc2 = ("shared_experts.linear_fc1", "shared_experts.linear_fc2")
    inner = torch.clamp(w[f"{fc1}.weight"] @ t + w[f"{fc1}.bias"], min=0) ** 2
    return w[f"{fc2}.weight"] @ inner + w[f"{fc2}.bias"]


def _in_process(_rank: int) -> dict:
    from trainer.config import ParallelConfig
    from trainer.megatron.topology import distributed

    with distributed("cpu", ParallelConfig(), seed=1, deterministic=True):
        layers = {case: _layer(case) for case in CASES}
        return {
            "cases": {c: (_run(layers[c], c), _by_formula(layers[c], c)) for c in CASES},
            "again": _run(layers["padding"], "padding"),
            "ranks": [_run(layers["four"], "four", seed) for seed in (10, 11)],
            "one expert": [
                _run(layers["all to one expert"], "all to one expert", s) for s in (10, 11)
            ],
            "no gradients": _counted_without_gradients(layers["two"]),
            "product": product_errors("cpu"),
            "no rows": _no_rows(layers["three"].experts),
        }


def _counted_without_gradients(layer) -> float:
    layer.router.local_tokens_per_expert.zero_()
    with torch.no_grad():
        layer(_inputs("two")[0])
    return float(layer.router.local_tokens_per_expert.sum() + layer.router.take_aux_loss())


def _no_rows(experts) -> list[float]:
    """Largest gradients of experts without a token."""
    x_TD = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    slots = experts.sort(torch.zeros(0, 1, dtype=torch.int64))
    out = experts(x_TD, torch.zeros(0, 1), slots)
    assert out.shape == x_TD.shape
    grads = torch.autograd.grad(out.sum(), list(experts.parameters()))
    return [float(grad.abs().max()) for grad in grads]


def _two_ranks(rank: int) -> dict:
    from trainer.config import ParallelConfig
    from trainer.megatron.topology import distributed

    with distributed("cpu", ParallelConfig(expert=2), seed=1, deterministic=True):
        return {
            case: _run(_layer(case, 2), case, 10 + rank) for case in ("four", "all to one expert")
        }


@pytest.fixture(scope="module")
def seen() -> dict:
    return run_gloo(_in_process, 1)[0]


@pytest.mark.parametrize("case", CASES)
def test_the_layer_equals_the_formula(seen, case) -> None:
    got, want = seen["cases"][case]
    assert set(got) == set(want) == PARTS | {"out", "x", "counts", "aux"}
    for name in want:
        tolerance = 1e-6 if name == "aux" else 1e-11  # the sum for the log is kept in fp32
        np.testing.assert_allclose(
            got[name], want[name], atol=tolerance * np.abs(want[name]).max(), rtol=0, err_msg=name
        )


def test_all_tokens_went_to_one_expert(seen) -> None:
    got, _ = seen["cases"]["all to one expert"]
    assert got["counts"].tolist() == [0, 0, 0, 0, 0, S * B, 0, 0]
    assert np.abs(got["experts.fc1_weight"][4]).max() == 0


def test_the_same_bits_twice(seen) -> None:
    got, _ = seen["cases"]["padding"]
    for name, value in seen["again"].items():
        np.testing.assert_array_equal(value, got[name], err_msg=name)


def test_nothing_is_counted_without_gradients(seen) -> None:
    assert seen["no gradients"] == 0


def test_the_router_product_keeps_fp32_accuracy(seen) -> None:
    for name, error in seen["product"].items():
        assert error <= 1, name


def test_experts_without_rows_have_gradients_of_zero(seen) -> None:
    assert seen["no rows"] == [0, 0, 0, 0]


def test_two_expert_ranks_equal_one(seen) -> None:
    """Each rank has rows of its own; the experts' gradients are the sums over both."""
    two = run_gloo(_two_ranks, 2)
    for case, one in (("four", seen["ranks"]), ("all to one expert", seen["one expert"])):
        for name in PARTS | {"out", "x", "counts", "aux"}:
            pairs = [(two[rank][case][name], one[rank][name]) for rank in range(2)]
            if name.startswith("experts."):
                pairs = [
                    (np.concatenate([got for got, _ in pairs]), sum(want for _, want in pairs))
                ]
            for got, want in pairs:
                np.testing.assert_allclose(
                    got, want, atol=1e-12 * np.abs(want).max(), rtol=0, err_msg=name
                )
