"""Two GPUs on NCCL: experts shared out for the optimizer, expert parallelism."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"
    ),
]
_WIDE = {"layers": 8, "hidden": 128, "heads": 4, "head_dim": 32, "ffn": 128, "shared_width": 64}
_FAST = {
    "device": "cuda",
    "deterministic": False,
    "precision": "bf16",
    "transformer_impl": "compiled",
    "core_attention": "triton",
    "expert_compute": "triton",
}


def run(runtime: dict[str, Any], out: Path) -> None:
    """One rank: six steps of a small student; losses, norms and a hash of every parameter."""
    from tests.trainer.megatron.tiny import (
        SEQ_LEN,
        STUDENT,
        own_micro_batches,
        tiny_config,
        tiny_rows,
    )
    from trainer.megatron.topology import distributed

    student = STUDENT | _WIDE | {"expert_width": 128}
    config = tiny_config(**_FAST | runtime, student=student)
    with distributed("cuda", config.parallel, seed=1) as topology:
        from trainer.megatron.replicas import bit_sum, require_equal_replicas
        from trainer.megatron.step import Clock, Trainer

        trainer = Trainer(config, topology, SEQ_LEN)
        seen: dict[str, Any] = {"losses": [], "norms": []}
        for number in range(6):
            batches = own_micro_batches(tiny_rows(16, seed=number), 4, topology)
            clock = Clock(topology.device)
            clock.mark("data")
            on_device = [batch.to(topology.device) for batch in batches]
            values = trainer.step(on_device, 3e-3, clock).values
            seen["losses"].append(values["loss/total"])
            seen["norms"].append(values["grad_norm"])
        require_equal_replicas(trainer.student)
        parameters = trainer.student.named_parameters()
        seen["weights"] = {name: int(bit_sum(parameter)) for name, parameter in parameters}
        (out / f"{topology.rank}.json").write_text(json.dumps(seen))


def _both(folder: Path, **runtime: Any) -> list[dict[str, Any]]:
    folder.mkdir()
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ),
            *("-m", "tests.gpu.test_two_gpus", json.dumps(runtime), str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    folder, shards = tmp_path_factory.mktemp("two"), {"distributed_optimizer": True}
    return {
        "whole": _both(folder / "whole", cuda_graph=True),
        "shards": _both(folder / "shards", parallel=shards, cuda_graph=True),
        "experts": _both(folder / "experts", parallel={"expert": 2}),
        "recorded experts": _both(folder / "recorded", parallel={"expert": 2}, cuda_graph=True),
    }


def test_ranks_tell_the_same(seen) -> None:
    for first, second in seen.values():
        assert first["losses"] == second["losses"] and first["norms"] == second["norms"]


def test_shared_out_experts_train_as_whole_ones_in_every_bit(seen) -> None:
    got, expected = seen["shards"][0], seen["whole"][0]
    assert got["losses"] == expected["losses"]
    assert [n for n, bits in expected["weights"].items() if got["weights"][n] != bits] == []
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)


def test_expert_parallel_ranks_train_as_data_parallel_ones(seen) -> None:
    """Sums over two ranks' experts are rounded once more, and some choices of experts fall otherwise."""
    got, expected = seen["experts"][0], seen["whole"][0]
    assert got["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-2)
    assert got["norms"][0] == pytest.approx(expected["norms"][0], rel=5e-2)
    assert got["losses"] == pytest.approx(expected["losses"], rel=5e-2)


def test_recording_exchanges_changes_no_bit(seen) -> None:
    for plain, recorded in zip(seen["experts"], seen["recorded experts"], strict=True):
        assert recorded == plain


if __name__ == "__main__":
    run(json.loads(sys.argv[1]), Path(sys.argv[2]))
