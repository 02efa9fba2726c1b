"""Both programs answer --help without loading an engine, and end with the right exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "vllm", "megatron", "transformers", "pyarrow", "numpy", "datasets"]
PROGRAMS = {"vpmoe-data": "datastore.cli", "vpmoe-train": "trainer.cli"}
HELP = """
import importlib, json, sys
main = importlib.import_module(sys.argv[1]).main
try:
    main([*sys.argv[3:], "--help"], prog_name=sys.argv[2])
except SystemExit as stop:
    assert stop.code == 0
print(json.dumps(sorted(sys.modules)))
"""


def _run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)


def _commands(program: str) -> list[str]:
    module = __import__(PROGRAMS[program], fromlist=["main"])
    return sorted(module.main.commands)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_no_engine(program: str) -> None:
    for command in [[], *([name] for name in _commands(program))]:
        result = _run("-c", HELP, PROGRAMS[program], program, *command)
        assert result.returncode == 0, result.stderr
        *shown, modules = result.stdout.splitlines()
        assert shown[0].startswith(f"Usage: {program}")
        assert not set(HEAVY) & set(json.loads(modules))


def _program(program: str, *arguments: str) -> subprocess.CompletedProcess:
    call = f"from {PROGRAMS[program]} import main; main(prog_name='{program}')"
    return _run("-c", call, *arguments)


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("vpmoe-data", ["build", "--manifest", "no-such.yaml"]),
        ("vpmoe-data", ["no-such-command"]),
        ("vpmoe-train", ["kd", "no-such.yaml"]),
        ("vpmoe-train", ["kd", "configs/demo.yaml", "no_such_key=1"]),
    ],
)
def test_wrong_command_line_or_config_exits_2(program: str, arguments: list[str]) -> None:
    result = _program(program, *arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "no-such" in result.stderr or "no_such" in result.stderr


def test_wrong_data_exits_1(tmp_path) -> None:
    result = _program("vpmoe-data", "verify", str(tmp_path))
    assert result.returncode == 1
    output = result.stdout + result.stderr
    assert "manifest" in output and "Traceback" not in output
