"""`vpmoe-train eval` of an OPD run: its student on the valid rows of its dataset, with targets where there are some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.config import load_config
from tests.datastore.conftest import write_targets
from tests.distributed.opd_runs import (
    SYNCHRONOUS,
    SYNCHRONOUS_STEPS,
    train,
    warm_up,
    write_opd_config,
)
from tests.distributed.runs import records, run_program
from tests.trainer.opd.served import NAME, ServerProcess
from trainer.opd.config import OPDConfig, as_kd

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OPD run whose teacher has gone."""
    folder = tmp_path_factory.mktemp("opd-eval")
    process = ServerProcess("--dataset", str(folder / "data"))
    config = write_opd_config(folder, process.url)
    warm_up(config)
    with process:
        train(1, config, folder / "run", *SYNCHRONOUS)
    return folder / "run"


def evaluated(run: Path, *overrides: str) -> dict[str, Any]:
    done = run_program(1, "eval", str(run), *overrides)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((run / "eval.json").read_text()) | {"said": done.stderr + done.stdout}


def test_it_is_the_evaluation_of_the_same_weights_offline(run: Path) -> None:
    bare = evaluated(run)
    assert bare["step"] == SYNCHRONOUS_STEPS
    assert "no targets of bigram: cross entropy alone" in bare["said"]
    assert "eval/kl/reasoning" not in bare
    data = run.parent / "data"
    write_targets(data, slug=NAME)
    scored = evaluated(run)
    classes = ("reasoning", "final", "control")
    for name in classes:
        assert scored[f"eval/ce/{name}"] == pytest.approx(bare[f"eval/ce/{name}"], rel=1e-6)
    few = evaluated(run, "eval.rows=3")
    assert few["eval/ce/final"] != bare["eval/ce/final"]
    # A KD run that begins with these weights evaluates them before its first step.
    values = as_kd(load_config(OPDConfig, run / "config.yaml"), NAME)
    path = run.parent / "kd.yaml"
    changes = {"run": str(run.parent / "kd"), "steps": 1, "init_from": {"run": str(run)}}
    path.write_text(yaml.safe_dump(values | changes | {"eval": {"every": 1}}))
    done = run_program(1, "kd", str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    first = next(record for record in records(run.parent / "kd") if "eval/ce/final" in record)
    assert first["step"] == 0
    for name in classes:
        for quantity in ("ce", "kl"):
            key = f"eval/{quantity}/{name}"
            assert scored[key] == pytest.approx(first[key], rel=1e-6), key


def test_what_is_not_the_run_is_refused(run: Path) -> None:
    done = run_program(1, "eval", str(run), "seed=7")
    assert done.returncode == 1 and "the checkpoint is of another run" in done.stderr
    done = run_program(1, "eval", str(run), "eval.prompts=3")
    assert done.returncode == 2 and "unknown key 'eval.prompts'" in done.stderr
