"""Which parameter has which optimizer, rate and decay, in a process of its own for each precision."""

from __future__ import annotations

import fnmatch

import pytest

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import SEQ_LEN, micro_batches, step, tiny_config, tiny_rows

RATE = 4e-3
OPTIMIZER = {
    "lr": 1e-2,
    "weight_decay": 0.3,
    "normuon": {"lr": 5e-2, "weight_decay": 0.2},
    "rates": {"value_residual": 7.0, "grape_m": 3.0},
}
# kind of optimizer, its place in the chain, rate over that of the step, decay; the first pattern that fits
RULES = [
    ("rotary_pos_emb.log_frequency", ("AdamW", 4, 3.0, 0.0)),
    ("*.value_residual_logit", ("AdamW", 4, 7.0, 0.0)),
    ("*.mlp.experts.*_weight", ("NorMuon", 1, 5.0, 0.2)),
    ("*.mlp.experts.*_bias", ("AdamW", 3, 1.0, 0.0)),
    ("embedding.word_embeddings.weight", ("AdamW", 2, 1.0, 0.3)),
    ("output_layer.weight", ("AdamW", 2, 1.0, 0.3)),
    ("*layernorm.weight", ("AdamW", 2, 1.0, 0.0)),
    ("*bias", ("AdamW", 2, 1.0, 0.0)),
    ("*.sink", ("AdamW", 2, 1.0, 0.0)),
    ("*", ("NorMuon", 0, 5.0, 0.2)),
]


def _places(_rank: int, precision: str) -> list[dict]:
    """Of a chain with NorMuon and of one without, after a step: every parameter's optimizer and settings."""
    from trainer.megatron.topology import distributed

    parts = {"precision": precision}
    config = tiny_config(**parts, optimizer=OPTIMIZER)
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        found = []
        for optimizer in (OPTIMIZER, OPTIMIZER | {"normuon": None}):
            trainer = Trainer(tiny_config(**parts, optimizer=optimizer), topology, SEQ_LEN)
            step(trainer, micro_batches(tiny_rows(4), 4), RATE)
            found.append(_by_name(trainer))
        return found


def _by_name(trainer) -> dict[str, tuple]:
    names = {
        id(getattr(parameter, "main_param", parameter)): name
        for name, parameter in trainer.student.named_parameters()
    }
    found: dict[str, tuple] = {}
    for place, chained in enumerate(trainer.optimizer.chained_optimizers):
        kind = type(chained.optimizer).__name__
        for group in chained.optimizer.param_groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                assert name not in found
                assert str(parameter.dtype) == "torch.float32"
                settings = (kind, place, round(group["lr"] / RATE, 9), group["weight_decay"])
                found[name] = settings
    assert set(found) == set(names.values())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_has_its_optimizer_rate_and_decay(precision) -> None:
    both, adamw = run_gloo(_places, 1, precision)[0]
    wanted = {
        name: next(of for pattern, of in RULES if fnmatch.fnmatchcase(name, pattern))
        for name in both
    }
    assert both == wanted
    assert set(wanted.values()) == {of for _, of in RULES}
    for name, (kind, _, rate, decay) in adamw.items():
        matrix = wanted[name][0] == "NorMuon"
        assert (kind, rate) == ("AdamW", 1.0 if matrix else wanted[name][2]), name
        assert decay == (0.3 if matrix else wanted[name][3]), name
