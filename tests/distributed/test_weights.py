"""Weights alone: from a checkpoint of any layout and precision into a student of any other, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import SEQ_LEN, own_micro_batches, step, tiny_config, tiny_rows

EXPERT = {"expert": 2}
TENSOR = {"tensor": 2, "expert": 2, "sequence_parallel": True}
SHARDS = {"distributed_optimizer": True}


def _trained(_rank: int, folder: str, changes: dict[str, Any], steps: list[int]) -> dict:
    """Train the tiny student, with a checkpoint after each of `steps`; what its weights exactly are at the end."""
    from trainer.checkpoints import Progress
    from trainer.megatron.checkpoint_write import CheckpointWriter
    from trainer.megatron.step import Trainer
    from trainer.megatron.topology import distributed

    config = tiny_config(**changes)
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        trainer = Trainer(config, topology, SEQ_LEN)
        batches = own_micro_batches(tiny_rows(8), 2, topology)
        writer = CheckpointWriter(Path(folder), trainer, keep=len(steps), asynchronous=False)
        for done in range(1, max(steps) + 1):
            step(trainer, batches, 1e-2)
            if done in steps:
                progress = Progress(step=done, stream={}, provenance={})
                writer.save(progress)
        return exact(trainer.student, topology)


def _loaded(_rank: int, folder: str, changes: dict[str, Any], bare: bool, at: int | None) -> dict:
    from trainer.megatron.step import Trainer
    from trainer.megatron.student import build_student
    from trainer.megatron.topology import distributed
    from trainer.megatron.weights import load_weights

    config = tiny_config(**changes)
    with distributed("cpu", config.parallel, seed=2, deterministic=True) as topology:
        student = (
            build_student(config.student, config, config.parallel, SEQ_LEN)
            if bare
            else Trainer(config, topology, SEQ_LEN).student
        )
        progress = load_weights(Path(folder), student, step=at)
        rounded = {
            name: bool((p.main_param.to(p.dtype) == p).all())
            for name, p in held(student)
            if hasattr(p, "main_param")
        }
        return exact(student, topology) | {"step": progress.step, "rounded": rounded}


def held(student: Any) -> list[tuple[str, Any]]:
    """What this rank's optimizer holds of every parameter: of experts that ranks share out, its shard."""
    from trainer.megatron.expert_shards import shard_of

    return [(name, shard_of(p)) for name, p in student.named_parameters()]


def exact(student: Any, topology: Any) -> dict[str, Any]:
    """Weights of this rank as fp32, masters where there are any, and the balancing biases, with the axis of a shard."""
    values = {
        name: getattr(p, "main_param", p).detach().float().numpy() for name, p in held(student)
    }
    biases = {
        name: b.float().numpy() for name, b in student.named_buffers() if "expert_bias" in name
    }
    axes = {
        name: p.partition_dim
        for name, p in student.named_parameters()
        if ((topology.ep_size > 1 or student.expert_shards) and ".experts." in name)
        or (topology.tp_size > 1 and getattr(p, "tensor_model_parallel", False))
    }
    return {"weights": values | biases, "axes": axes}


def _whole(ranks: list[dict]) -> dict[str, np.ndarray]:
    """The weights of all ranks put together."""
    return {
        name: np.concatenate([rank["weights"][name] for rank in ranks], axis=ranks[0]["axes"][name])
        if len(ranks) > 1 and name in ranks[0]["axes"]
        else value
        for name, value in ranks[0]["weights"].items()
    }


def _assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys() and len(one) > 30
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A bf16 run with checkpoints after steps 2 and 3, and its exact weights at the end."""
    folder = tmp_path_factory.mktemp("bf16")
    trained = run_gloo(_trained, 1, str(folder), {"precision": "bf16"}, [2, 3])[0]
    return folder, trained["weights"]


def test_an_fp32_student_gets_the_masters_of_a_bf16_run(bf16) -> None:
    folder, weights = bf16
    got = run_gloo(_loaded, 1, str(folder), {}, True, None)[0]
    assert got["step"] == 3
    _assert_equal(got["weights"], weights)
    finer = weights["decoder.layers.1.mlp.experts.fc1_weight"]
    assert (finer.view(np.uint32) & 0xFFFF).any()  # more than bf16 holds


def test_a_bf16_run_starts_from_the_masters(bf16) -> None:
    folder, weights = bf16
    got = run_gloo(_loaded, 1, str(folder), {"precision": "bf16"}, False, None)[0]
    _assert_equal(got["weights"], weights)
    assert len(got["rounded"]) > 30 and all(got["rounded"].values())


def test_shards_of_experts_start_from_the_masters_and_from_fp32(bf16, tmp_path) -> None:
    folder, weights = bf16
    changes = {"precision": "bf16", "parallel": SHARDS}
    got = run_gloo(_loaded, 2, str(folder), changes, False, None)
    _assert_equal(_whole(got), weights)
    assert all(len(rank["rounded"]) > 30 and all(rank["rounded"].values()) for rank in got)
    trained = run_gloo(_trained, 2, str(tmp_path), {"parallel": SHARDS}, [1])
    again = run_gloo(_loaded, 2, str(tmp_path), changes, False, None)
    _assert_equal(_whole(again), _whole(trained))


def test_a_step_that_is_not_there_is_refused_with_those_that_are(bf16) -> None:
    folder, weights = bf16
    earlier = run_gloo(_loaded, 1, str(folder), {}, True, 2)[0]
    name = "output_layer.weight"
    assert earlier["step"] == 2 and not np.array_equal(earlier["weights"][name], weights[name])
    with pytest.raises(RuntimeError, match=r"no checkpoint of step 7.*expected one of 2, 3"):
        run_gloo(_loaded, 1, str(folder), {}, True, 7)


def test_any_layout_reads_the_weights_of_any_other(tmp_path) -> None:
    for name, source, layouts in (
        ("one", {}, [EXPERT, TENSOR]),
        ("tensor", TENSOR, [{}, EXPERT]),
    ):
        folder = str(tmp_path / name)
        # TP has no NorMuon.
        changes = {"parallel": source, "optimizer": {"lr": 1e-2}}
        trained = run_gloo(_trained, 2 if source else 1, folder, changes, [1])
        for layout in layouts:
            got = run_gloo(_loaded, 2 if layout else 1, folder, {"parallel": layout}, True, None)
            _assert_equal(_whole(got), _whole(trained))


def test_another_student_is_refused_by_name(bf16) -> None:
    folder, _ = bf16
    student = tiny_config().student.resolved() | {"layers": 8, "shared_width": 16}
    with pytest.raises(RuntimeError, match="differ") as error:
        run_gloo(_loaded, 1, str(folder), {"student": student}, True, None)
    said = str(error.value)
    assert "only in the student" in said and "decoder.layers.{4..7}.mlp.experts.fc1_weight" in said
    assert "of another shape" in said and "shared_experts.linear_fc1.weight" in said
