"""A layer's pass between ranks, the second one made up: what crosses goes on beside other work."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.gloo import run_gloo
from tests.trainer.made_up_rank import Alone
from tests.trainer.megatron.tiny import STUDENT

T, B, D = 6, 2, 32


def _layer(exchange=None):
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    from tests.trainer.megatron.tiny import tiny_config
    from trainer.config import ParallelConfig
    from trainer.megatron.moe import StudentMoE
    from trainer.megatron.student import transformer_config

    torch.manual_seed(0)
    runtime = tiny_config(student=STUDENT)
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    config = transformer_config(runtime.student, runtime, ParallelConfig())
    return StudentMoE(config, linear, compute="loop", exchange=exchange).double().train()


def _run(layer, log: list[str]) -> list[torch.Tensor]:
    x = torch.randn(T, B, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    layer.shared_experts.register_forward_hook(lambda *_: log.append("shared"))
    last = layer.shared_experts.linear_fc1.weight
    last.register_hook(lambda _: log.append("gradients of shared"))
    layer.experts.fc1_weight.register_hook(lambda _: log.append("gradients of experts"))
    out, _ = layer(x)
    log.append("backward")
    grads = torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])
    return [out.detach(), *grads]


def _passes(_rank: int) -> dict:
    from trainer.config import ParallelConfig
    from trainer.megatron.topology import distributed

    with distributed("cpu", ParallelConfig(), seed=1):
        alone = _run(_layer(), [])
        found = {}
        for own in (False, True):
            exchange = Alone(own)
            got = _run(_layer(exchange), exchange.log)
            errors = [float((a - b).abs().max()) for a, b in zip(got, alone, strict=True)]
            found[own] = (exchange.log, max(errors))
        return found


@pytest.fixture(scope="module")
def passes() -> dict:
    return run_gloo(_passes, 1)[0]


@pytest.mark.parametrize("own", [False, True])
def test_with_a_rank_that_brings_nothing_the_layer_is_that_of_one(passes, own) -> None:
    assert passes[own][1] < 1e-12


@pytest.mark.parametrize("own", [False, True])
def test_shared_expert_runs_while_rows_are_on_their_way(passes, own) -> None:
    """The order backward is autograd's, by when its nodes were made."""
    assert passes[own][0] == [
        "gather rows",
        "gather choices",
        "wait for gather choices",
        "wait for gather rows",
        "give rows",
        "shared",
        "wait for give rows",
        "backward",
        "gather rows",
        "gradients of shared",
        "wait for gather rows",
        "gradients of experts",
        "give rows",
        "wait for give rows",
        "give choices",
        "wait for give choices",
    ]


@pytest.mark.parametrize(("tokens", "parts"), [(5, 2), (1, 2), (8, 4), (6, 1), (0, 2)])
@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_of_a_token_lie_behind_those_of_the_parts_before(tokens, parts, ranks) -> None:
    from trainer.megatron.crossing import _spans, _table

    got = _table(tokens, ranks, parts, torch.device("cpu"))
    assert got.shape == (tokens, ranks) and got.dtype == torch.int32
    spans = _spans(tokens, parts) if tokens else []
    rows = [(t, rank) for start, end in spans for rank in range(ranks) for t in range(start, end)]
    assert sorted(rows) == [(t, rank) for t in range(tokens) for rank in range(ranks)]
    assert all(got[of] == row for row, of in enumerate(rows))


def test_gradients_of_rows_that_were_overwritten_are_refused() -> None:
    from common.errors import EngineError
    from trainer.megatron.crossing import Crossing, GatheredRows

    kept, exchange = GatheredRows(), Alone(own=True)
    first, second = Crossing(exchange, kept), Crossing(exchange, kept)
    first.gather(torch.zeros(T, D))
    first.send_gradients(torch.zeros(T, D))
    second.gather(torch.zeros(T, D))
    with pytest.raises(EngineError, match="run again since"):
        first.send_gradients(torch.zeros(T, D))
    second.send_gradients(torch.zeros(T, D))
