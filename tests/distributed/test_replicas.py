"""Ranks that start from different weights are refused, by name and on every rank."""

from __future__ import annotations

import pytest

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import SEQ_LEN, tiny_config

EXPERT = "decoder.layers.2.mlp.experts.fc2_bias"
OTHER = "decoder.layers.3.self_attention.linear_proj.weight"


def _required(rank: int, precision: str, expert: int, changed: str | None) -> str:
    """What a student is told in which rank 1 has one last bit of a parameter changed."""
    import torch

    from trainer.megatron.topology import distributed

    config = tiny_config(precision=precision, parallel={"expert": expert})
    with distributed("cpu", config.parallel, seed=1, deterministic=True):
        from trainer.megatron.replicas import ReplicaError, require_equal_replicas
        from trainer.megatron.student import build_student

        student = build_student(config.student, config, config.parallel, SEQ_LEN)
        if rank == 1 and changed is not None:
            parameter = dict(student.named_parameters())[changed]
            kind = torch.int16 if parameter.element_size() == 2 else torch.int32
            parameter.data.view(kind).flatten()[3] += 1
        try:
            require_equal_replicas(student)
        except ReplicaError as error:
            return str(error)
        return ""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("changed", [EXPERT, OTHER])
def test_one_bit_is_found_and_named_on_every_rank(precision, changed) -> None:
    for said in run_gloo(_required, 2, precision, 1, changed):
        assert "1 parameters are not the same" in said and changed in said


def test_equal_ranks_pass_and_experts_of_different_ranks_are_no_replicas() -> None:
    assert run_gloo(_required, 2, "fp32", 2, None) == ["", ""]
    assert run_gloo(_required, 2, "bf16", 2, EXPERT) == ["", ""]
    assert OTHER in run_gloo(_required, 2, "bf16", 2, OTHER)[0]
