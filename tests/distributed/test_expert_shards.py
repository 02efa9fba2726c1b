"""Experts shared out among their ranks for the optimizer: the same steps, bit by bit, and states that move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.gloo import run_gloo
from tests.distributed.stored import assert_same_tensors, newest
from tests.trainer.megatron.tiny import SEQ_LEN, own_micro_batches, step, tiny_config, tiny_rows

NORMUON = {"lr": 1e-2, "clip": 1e6, "normuon": {"lr": 2e-2}}


def _run(
    _rank: int,
    parallel: dict[str, Any],
    changes: dict[str, Any],
    steps: tuple[int, int],
    to: str,
    source: str | None,
) -> dict:
    """Steps of these numbers, from the checkpoint in `source` if there is one; a checkpoint at the end."""
    from trainer.checkpoints import Progress
    from trainer.megatron.checkpoint import load_checkpoint
    from trainer.megatron.checkpoint_write import CheckpointWriter
    from trainer.megatron.replicas import require_equal_replicas
    from trainer.megatron.step import Trainer
    from trainer.megatron.topology import distributed

    config = tiny_config(parallel=parallel, **changes)
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        trainer = Trainer(config, topology, SEQ_LEN)
        if source is not None:
            load_checkpoint(Path(source), trainer)
        norms = []
        for number in range(*steps):
            batches = own_micro_batches(tiny_rows(8, seed=number), 2, topology)
            norms.append(step(trainer, batches, 1e-2).values["grad_norm"])
        require_equal_replicas(trainer.student)
        progress = Progress(step=steps[1], stream={}, provenance={})
        CheckpointWriter(Path(to), trainer, keep=1, asynchronous=False).save(progress)
        held = sum(
            entry.optimizer.state[parameter][name].numel()
            for entry in trainer.optimizer.chained_optimizers
            for group in entry.optimizer.param_groups
            if group["is_expert_parallel"]
            for parameter in group["params"]
            for name in ("momentum", "exp_avg")
            if name in entry.optimizer.state[parameter]
        )
        return {"norms": norms, "held": held}


@pytest.mark.parametrize(
    ("changes", "world", "expert"),
    [
        ({"optimizer": NORMUON}, 2, 1),
        ({"optimizer": NORMUON, "precision": "bf16"}, 2, 1),
        ({"optimizer": {"lr": 1e-2, "clip": 1e6}}, 2, 1),
        ({"optimizer": NORMUON}, 4, 2),
    ],
    ids=["normuon", "bf16", "adamw", "with EP"],
)
def test_every_bit_is_that_of_whole_states(tmp_path, changes, world, expert) -> None:
    """Two ranks sum in no other order. Each of them then holds half of the experts' states."""
    told = {}
    for name, shards in (("whole", False), ("shards", True)):
        parallel = {"expert": expert, "distributed_optimizer": shards}
        folder = str(tmp_path / name)
        told[name] = run_gloo(_run, world, parallel, changes, (0, 3), folder, None)
    assert_same_tensors(newest(tmp_path / "whole"), newest(tmp_path / "shards"))
    for one, other in zip(told["whole"], told["shards"], strict=True):
        assert other["norms"] == pytest.approx(one["norms"], rel=1e-6)
        assert other["held"] * 2 == one["held"] > 0


def test_a_clipped_run_goes_on_in_every_bit_and_from_whole_states_too(tmp_path) -> None:
    changes = {"optimizer": NORMUON | {"clip": 0.05}}
    whole, shards = {"distributed_optimizer": False}, {"distributed_optimizer": True}
    at = {name: str(tmp_path / name) for name in ("half", "end", "resumed", "from whole", "one")}
    norms = run_gloo(_run, 2, shards, changes, (0, 2), at["half"], None)[0]["norms"]
    assert min(norms) > 0.1
    run_gloo(_run, 2, shards, changes, (0, 4), at["end"], None)
    run_gloo(_run, 2, shards, changes, (2, 4), at["resumed"], at["half"])
    assert_same_tensors(newest(Path(at["end"])), newest(Path(at["resumed"])))
    run_gloo(_run, 2, whole, changes, (0, 2), at["one"], None)
    run_gloo(_run, 2, shards, changes, (2, 4), at["from whole"], at["one"])
    _assert_close(Path(at["from whole"]), Path(at["end"]))


def _assert_close(one: Path, other: Path) -> None:
    """The clipping factor may differ in its last bit: norms are summed in another order."""
    from tests.distributed.stored import stored_tensors

    got, expected = stored_tensors(newest(one)), stored_tensors(newest(other))
    for name, value in expected.items():
        if value.is_floating_point():
            np.testing.assert_allclose(got[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_ranks_that_cannot_share_the_experts_out_evenly_are_refused(tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"3 data-parallel ranks.*8 experts.*a multiple of 3"):
        parallel = {"distributed_optimizer": True}
        run_gloo(_run, 3, parallel, {}, (0, 1), str(tmp_path), None)
