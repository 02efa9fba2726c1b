"""The tracked files: short enough to read, no paths of one machine, no secrets."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
FORBIDDEN = {
    "a home folder": r"/(?:home|Users)/\w+|/root/\w+",
    "a private network address": r"\b(?:10(?:\.\d{1,3}){3}|(?:192\.168|172\.(?:1[6-9]|2\d|3[01]))(?:\.\d{1,3}){2})\b",
    "an access token": r"\b(?:hf_[A-Za-z0-9]{30,}|gh[ps]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}


def _tracked() -> list[Path]:
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("not a git checkout")
    return [path for name in result.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_path_secret_or_address_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {kind}: {match.group()}"
        for path in _tracked()
        if path != Path(__file__)
        for kind, pattern in FORBIDDEN.items()
        if (match := re.search(pattern, _text(path)))
    ]
    assert found == []


def test_documents_that_are_named_are_there() -> None:
    named = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in _tracked()
        for name in re.findall(r"\bdocs/[a-z_]+\.md\b", _text(path))
        if not (ROOT / name).is_file()
    }
    assert named == set()


def _code() -> list[Path]:
    return [path for path in _tracked() if path.suffix == ".py"]


def test_files_are_short_enough_to_read() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in _code()
        if (n := len(_text(p).splitlines())) > MAX_FILE_LINES
    }
    assert long == {}


def test_functions_are_short_enough_to_read() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {length} lines"
        for path in _code()
        for node in ast.walk(ast.parse(_text(path)))
        if isinstance(node, ast.FunctionDef)
        if (length := (node.end_lineno or node.lineno) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_large_files_stay_out() -> None:
    sizes = {str(p.relative_to(ROOT)): p.stat().st_size for p in _tracked()}
    assert {name: size for name, size in sizes.items() if size > 4 << 20} == {}
