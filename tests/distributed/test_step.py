"""One step on two processes equals the same step on one: data, expert and tensor parallel."""

from __future__ import annotations

import numpy as np
import pytest

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import (
    SEQ_LEN,
    main_gradients,
    micro_batches,
    own_micro_batches,
    step,
    tiny_config,
    tiny_rows,
)

ADAMW = {"lr": 1e-2, "clip": 1e6}  # NorMuon does not run on parts of a matrix
LAYOUTS = {
    "data": {},
    "expert": {"expert": 2},
    "tensor": {"tensor": 2, "expert": 2, "sequence_parallel": True},
    "shards": {"distributed_optimizer": True},
}


def _one_step(_rank: int, parallel: dict, size: int, changes: dict) -> dict:
    from trainer.megatron.topology import distributed

    config = tiny_config(parallel=parallel, **changes)
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        trainer = Trainer(config, topology, SEQ_LEN)
        report = step(trainer, own_micro_batches(tiny_rows(8), size, topology), 1e-2)
        axes = {n: getattr(p, "partition_dim", -1) for n, p in trainer.student.named_parameters()}
        return {
            "values": report.values,
            "gradients": main_gradients(trainer),
            "weights": {
                n: p.detach().double().numpy() for n, p in trainer.student.named_parameters()
            },
            "axes": axes,
        }


def _changes(layout: str) -> dict:
    return {"optimizer": ADAMW} if layout == "tensor" else {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_equal_one(layout) -> None:
    one = run_gloo(_one_step, 1, {}, 4, _changes(layout))[0]
    two = run_gloo(_one_step, 2, LAYOUTS[layout], 2, _changes(layout))
    for name in ("loss/total", "loss/ce/reasoning", "loss/kl/final", "grad_norm"):
        assert two[0]["values"][name] == two[1]["values"][name]
        assert two[0]["values"][name] == pytest.approx(one["values"][name], rel=1e-6), name
    assert two[0]["values"]["router/aux_loss"] == pytest.approx(
        one["values"]["router/aux_loss"], rel=1e-5
    )
    for kind, tolerance in (("gradients", 5e-6), ("weights", 1e-5)):
        whole = {name: _whole(two, kind, name, layout) for name in one[kind]}
        got, expected = (
            np.concatenate([of[n].ravel() for n in one[kind]]) for of in (whole, one[kind])
        )
        assert np.linalg.norm(got - expected) < tolerance * np.linalg.norm(expected), kind
        for name, expected in one[
            kind
        ].items():  # one sum over ranks left out would be lost in the whole
            difference = np.linalg.norm(whole[name] - expected)
            assert difference < 1e-4 * np.linalg.norm(expected), (kind, name)


def _whole(two: list[dict], kind: str, name: str, layout: str) -> np.ndarray:
    """A parameter of the whole model from its parts on two ranks; parts that both hold must agree."""
    first, second = (rank[kind][name] for rank in two)
    if ".experts." in name and layout != "data" and (layout, kind) != ("shards", "weights"):
        return np.concatenate([first, second])
    if layout == "tensor" and two[0]["axes"][name] >= 0:
        return np.concatenate([first, second], axis=two[0]["axes"][name])
    np.testing.assert_array_equal(first, second)
    return first


def _broken_step(rank: int) -> tuple[str, bool]:
    """A step in which rank 1 alone holds a weight that is no number; its error, and whether any weight moved."""
    import torch

    from common.errors import VpmoeError
    from trainer.megatron.topology import distributed

    config = tiny_config()
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        trainer = Trainer(config, topology, SEQ_LEN)
        with torch.no_grad():
            if rank == 1:
                trainer.student.output_layer.weight[0] = float("nan")
        before = [p.detach().clone() for p in trainer.student.parameters()]
        try:
            step(trainer, micro_batches(tiny_rows(4, seed=rank), 2), 1e-2)
        except VpmoeError as error:
            pairs = zip(before, trainer.student.parameters(), strict=True)
            return str(error), any(
                not torch.equal(old, new) for old, new in pairs if not old.isnan().any()
            )
    return "no error", True


def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_update() -> None:
    for message, moved in run_gloo(_broken_step, 2):
        assert "not finite" in message
        assert not moved
