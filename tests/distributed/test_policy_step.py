"""Steps on rollouts: two ranks equal one, padding counts for nothing, missing targets stop every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from common.tokenizer import PAD
from datastore.types import PackedRow
from tests.distributed.gloo import run_gloo
from tests.trainer.losses.sampling import MixedRow, mixed_rows
from tests.trainer.megatron.tiny import (
    SEQ_LEN,
    VOCAB,
    in_vocabulary,
    main_gradients,
    step,
    tiny_config,
)
from trainer.batch import Batch, make_batch
from trainer.opd.config import OPDConfig

ROWS = 6
OBJECTIVES = ("policy_gradient", "reverse_kl", "forward_kl")


def opd_config(objective: str, **changes: Any) -> OPDConfig:
    shared = tiny_config().model_dump()
    for key in ("teacher", "batch", "loss", "kd_share", "eval", "budget"):
        del shared[key]
    values = {
        "teacher": {"name": "tiny", "url": "http://unused"},
        "sampling": {"slots": 2, "max_reasoning": 8, "max_final": 8},
        "curriculum": [{"modes": {"low": 1, "medium": 0, "high": 0}}],
        "batch": {"rollouts": 4, "micro_batch_size": 2},
        "loss": {"objective": objective, "chunk_tokens": 16},
        "eval": {"prompts": 1},
    }
    return OPDConfig.model_validate(shared | values | changes)


def padding_row() -> MixedRow:
    """A row without any document."""
    row = PackedRow(
        tokens_T=np.full(SEQ_LEN, PAD, dtype=np.int32),
        spans_T=np.zeros(SEQ_LEN, dtype=np.uint8),
        doc_ends_D=np.zeros(0, dtype=np.int32),
        doc_ids=(),
        languages=(),
        exercises=(),
        row_hash=0,
    )
    return row, None, None


def batches_of(rows: list[MixedRow], size: int) -> list[Batch]:
    parts = [rows[first : first + size] for first in range(0, len(rows), size)]
    return [in_vocabulary(make_batch(*zip(*part, strict=True))) for part in parts]


def _steps(_rank: int, size: int, padding: int) -> dict[str, dict]:
    """A step by each objective, and the evaluation of the rollouts after the last one."""
    import torch

    from trainer.losses.report import loss_metrics
    from trainer.megatron.topology import distributed

    results: dict[str, dict] = {}
    config = opd_config("policy_gradient")
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        rows = mixed_rows(ROWS, SEQ_LEN, VOCAB)
        for objective in OBJECTIVES:
            torch.manual_seed(1)
            trainer = Trainer(opd_config(objective), topology, SEQ_LEN)
            padded = rows + [padding_row()] * (padding if objective == OBJECTIVES[0] else 0)
            mine = len(padded) // topology.dp_size
            batches = batches_of(padded[topology.dp_rank * mine :][:mine], size)
            report = step(trainer, batches, 1e-2)
            results[objective] = {"values": report.values, "gradients": main_gradients(trainer)}
        sampled = [row for row in rows if row[2] is not None][topology.dp_rank :: topology.dp_size]
        ones = torch.ones(2, dtype=torch.int64)
        sums_CM = sum(trainer.evaluate(batch, ones) for batch in batches_of(sampled, 1))
        results["eval"] = {"values": loss_metrics(topology.sum(sums_CM), prefix="eval")}
    return results


@pytest.fixture(scope="module")
def one() -> dict[str, dict]:
    return run_gloo(_steps, 1, 3, 0)[0]


@pytest.fixture(scope="module")
def two() -> list[dict[str, dict]]:
    """Two ranks; the first objective has two rows of padding, on the second rank."""
    return run_gloo(_steps, 2, 1, 2)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_equal_one(objective: str, one: dict[str, dict], two: list[dict]) -> None:
    """Two rows of padding change neither the loss nor the log of routing; the gradient of the balance loss is a mean
    over all rows, so that one is compared without them.
    """
    wanted = one[objective]
    names = [name for name in wanted["values"] if name.startswith(("loss/", "router/"))]
    assert {"loss/reverse_kl/final", "loss/ratio/final", "loss/ce/reasoning"} <= {*names}
    assert ("loss/coarse_kl/final" in names) == (objective == "reverse_kl")
    for rank in two:
        for name in names:
            assert rank[objective]["values"][name] == pytest.approx(
                wanted["values"][name], rel=1e-5, abs=1e-7
            ), name
        if objective != OBJECTIVES[0]:
            got, expected = (
                np.concatenate([of["gradients"][n].ravel() for n in wanted["gradients"]])
                for of in (rank[objective], wanted)
            )
            assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_held_out_rollouts_are_evaluated(one: dict[str, dict]) -> None:
    values = one["eval"]["values"]
    for name in ("reasoning", "final"):
        student, teacher = (values[f"eval/{of}_logprob/{name}"] for of in ("student", "teacher"))
        assert values[f"eval/reverse_kl/{name}"] == pytest.approx(student - teacher)
        assert values[f"eval/coarse_kl/{name}"] > 0
        assert values[f"eval/sampled/{name}"] == values[f"eval/positions/{name}"]
        assert f"eval/ce/{name}" not in values


def _misses_targets(rank: int) -> str:
    from common.errors import AlignmentError
    from trainer.megatron.topology import distributed

    config = opd_config("reverse_kl")
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        trainer = Trainer(config, topology, SEQ_LEN)
        rows = mixed_rows(2, SEQ_LEN, VOCAB)
        if rank == 1:
            rows = [(row, None, sampled) for row, _, sampled in rows]
        try:
            step(trainer, batches_of(rows, 1), 1e-2)
        except AlignmentError as error:
            return str(error)
    return "no error"


def test_targets_that_one_rank_misses_stop_all() -> None:
    for message in run_gloo(_misses_targets, 2):
        assert "loss.objective=reverse_kl" in message
