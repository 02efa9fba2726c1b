"""Two GPUs: experts shared out for the optimizer, expert parallelism, and exchanges by each other's memory."""

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
_SENT = [(70_000, "bfloat16"), (6, "float32"), (0, "bfloat16"), (300, "bfloat16")]
_FAST = {
    "device": "cuda",
    "deterministic": False,
    "precision": "bf16",
    "transformer_impl": "compiled",
    "core_attention": "triton",
    "expert_compute": "triton",
}


def run(runtimes: dict[str, dict[str, Any]], out: Path) -> None:
    """One rank: of each runtime, six steps of a small student; and differences of exchanges."""
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_stream(
        torch.cuda.Stream()
    )  # as topology.py does; the default one is not recorded
    dist.init_process_group("nccl")
    seen = {name: _steps(runtime) for name, runtime in runtimes.items()}
    seen["exchanges"] = {f"{rows} {dtype}": _different(rows, dtype) for rows, dtype in _SENT}
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def _steps(runtime: dict[str, Any]) -> dict[str, Any]:
    """Losses, norms and a hash of every parameter."""
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
        return seen | {"weights": {name: int(bit_sum(parameter)) for name, parameter in parameters}}


def _different(num_rows: int, dtype: str) -> int:
    """Entries that exchanges by each other's memory give otherwise than collectives, both lanes at once, twice."""
    import torch.distributed as dist

    from trainer.megatron.exchange import Collectives
    from trainer.megatron.peers import Peers

    group = dist.group.WORLD
    peers, collectives, wrong = Peers(group), Collectives(group), 0
    make = torch.Generator("cuda").manual_seed(dist.get_rank())
    for in_place in (True, False):
        own = torch.randn(num_rows, 64, device="cuda", generator=make).to(getattr(torch, dtype))
        few, both = own[:, :4].float().contiguous(), torch.cat([own, -own])
        rows, choices = own, few
        if in_place:
            rows, choices = peers.place(own).copy_(own), peers.place(few, "choices").copy_(few)
        sent = [peers.gather(rows), peers.gather(choices, "choices")]
        for of, got in zip((own, few), sent, strict=True):
            wrong += int((got.wait() != collectives.gather(of).wait()).sum())
        room = peers.room(both)
        room.copy_(both)
        for given, lane in ((room, "rows"), (both.float(), "choices")):
            arriving, want = peers.give(given, lane), collectives.give(given).wait()
            rank, others = dist.get_rank(), arriving.wait()
            wrong += int((others != want.chunk(2)[1 - rank]).sum())
            wrong += int((arriving.own_TD != want.chunk(2)[rank]).sum())
    return wrong


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """By runtime, of both ranks."""
    folder, shards = tmp_path_factory.mktemp("two"), {"distributed_optimizer": True}
    runtimes = {
        "whole": {"cuda_graph": True},
        "shards": {"parallel": shards, "cuda_graph": True},
        "experts": {"parallel": {"expert": 2}},
        "recorded experts": {"parallel": {"expert": 2}, "cuda_graph": True},
    }
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = ["-m", "tests.gpu.test_two_gpus", json.dumps(runtimes), str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", *launch, *worker],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def test_ranks_tell_the_same(seen) -> None:
    for name in ("whole", "shards", "experts", "recorded experts"):
        first, second = seen[name]
        assert first["losses"] == second["losses"] and first["norms"] == second["norms"]


def test_exchanges_by_memory_give_what_collectives_give(seen) -> None:
    assert all(not any(rank.values()) for rank in seen["exchanges"])


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
