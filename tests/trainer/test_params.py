"""`vpmoe-train params` in processes of its own: the table, and the whole student built on the meta device."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from common.errors import EngineError
from tests.trainer.megatron.tiny import STUDENT
from trainer.parameters import parameter_table
from trainer.params import require_equal
from trainer.student_config import StudentConfig


def _params(*arguments: str) -> str:
    program = "from trainer.cli import main; main()"
    command = [sys.executable, "-c", program, "params", "configs/base.yaml", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "140"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_modules_of_the_locked_student_hold_exactly_the_table() -> None:
    shown = _params("--check")
    assert re.search(r"total +6,021,784,719 +780,087,951", shown)
    assert re.search(r"without embedding and lm_head +368,259,727", shown)
    assert re.search(r"local_attention +60 x 2,140,672 +128,440,320 +2\.13%", shown)
    assert "3.785 GFLOPs a token" in shown
    assert "the built modules hold exactly these parameters" in shown


def test_a_student_without_its_parts_is_counted_too() -> None:
    shown = _params(
        "--check", "student.tpa=null", "student.grape_m=null", "student.value_residual=null"
    )
    assert re.search(r"total +6,050,784,256", shown)
    assert "the built modules hold exactly these parameters" in shown


def test_a_difference_is_told_by_component() -> None:
    student = StudentConfig.model_validate(STUDENT)
    built = {part.name: part.total for part in parameter_table(student)}
    require_equal(student, built)
    with pytest.raises(EngineError, match="sinks 15; expected sinks 16"):
        require_equal(student, built | {"sinks": 15})
