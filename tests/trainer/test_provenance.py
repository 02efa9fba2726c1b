"""A resume of another run is refused with a table of what differs; other code and packages are named."""

from __future__ import annotations

import pytest

from common.errors import ResumeError
from tests.trainer.megatron.tiny import STUDENT, tiny_config
from trainer.provenance import (
    FREE_KEYS,
    changed_code,
    provenance,
    provenance_hash,
    require_same_run,
    shaping,
)

DATA = {"dataset": "d1", "tokenizer": "t", "targets": None}


def test_a_resume_may_change_what_shapes_no_weight() -> None:
    stored = provenance(tiny_config(), DATA)
    free = {
        "run": "elsewhere",
        "log": {"every": 5},
        "eval": {"every": 3},
        "checkpoint": {"every": 1, "asynchronous": True},
    }
    require_same_run(stored, provenance(tiny_config(**free), DATA))
    require_same_run(
        stored,
        provenance(tiny_config(batch={"global_batch_size": 8, "micro_batch_size": 4}), DATA),
    )


def test_what_shapes_the_weights_leaves_out_what_is_free_and_nothing_else() -> None:
    config = tiny_config()
    of_run = provenance(config, DATA) | {"init_from": {"run": "runs/one", "step": 4}}
    kept = shaping(of_run)
    assert of_run["config"] == config.resolved(), "the provenance itself stays whole"
    assert (kept["data"], kept["init_from"]) == (DATA, {"run": "runs/one", "step": 4})
    gone = {key for key in of_run["config"] if key not in kept["config"]}
    assert gone == {key for key in FREE_KEYS if key in of_run["config"]}
    assert "micro_batch_size" not in kept["config"]["batch"]
    assert kept["config"]["batch"]["global_batch_size"] == config.batch.global_batch_size
    moved = tiny_config(run="elsewhere", log={"every": 5})
    assert shaping(provenance(moved, DATA))["config"] == kept["config"]
    other = tiny_config(seed=config.seed + 1)
    assert shaping(provenance(other, DATA))["config"] != kept["config"]


def test_another_run_is_refused_with_a_table() -> None:
    wanted = provenance(
        tiny_config(
            steps=21,
            optimizer=tiny_config().optimizer.resolved() | {"lr": 0.5},
            student=STUDENT | {"layers": 8},
            init_from=None,
        ),
        DATA | {"dataset": "d2", "targets": "a" * 64},
    )
    with pytest.raises(ResumeError) as error:
        require_same_run(provenance(tiny_config(run="runs/one"), DATA), wanted)
    assert str(error.value).startswith(
        """the checkpoint is of another run:

                    checkpoint  this run
  config
    optimizer.lr    0.01        0.5
    steps           20          21
  student
    student.layers  4           8
  data
    dataset         d1          d2
    targets         null        """
        + "a" * 37
        + "..."
    )
    assert "init_from.run=runs/one" in str(error.value)
    assert "Free to change: run, dataset, log" in str(error.value)


def test_other_packages_and_code_are_named() -> None:
    stored = provenance(tiny_config(), DATA)
    assert changed_code(stored, stored) == []
    before = stored | {"packages": stored["packages"] | {"torch": "1.0"}, "git_sha": "abc"}
    assert changed_code(before, stored) == [
        f"torch is {stored['packages']['torch']}, the checkpoint's is 1.0",
        f"the code is {stored['git_sha']}, the checkpoint's is abc",
    ]
    assert provenance_hash(before) != provenance_hash(stored)
