"""Durable writes: a file appears whole or not at all, and a lock dies with its process."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common import files
from common.errors import ResumeError


def test_file_appears_only_at_the_end_of_the_block(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.bin"
    with files.atomic_writer(path) as handle:
        handle.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_write_keeps_the_old_content(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file.bin"
    files.write_bytes(path, b"old")
    with pytest.raises(error), files.atomic_writer(path) as handle:
        handle.write(b"new")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


def test_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "ours", b"")
    (tmp_path / "plain").write_bytes(b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")}
    assert len(modes) == 1


def test_killed_writer_leaves_only_a_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    files.write_bytes(path, b"old")
    program = (
        "import os, signal, sys; from common import files\n"
        "with files.atomic_writer(sys.argv[1]) as handle:\n"
        "    handle.write(b'half'); handle.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(path)])
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == 2
    files.sweep_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["file.bin"]


def test_hashes_agree_with_hashlib(tmp_path: Path) -> None:
    content = os.urandom((1 << 22) + 17)
    (tmp_path / "f").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert files.sha256_file(tmp_path / "f") == files.sha256_bytes(content) == expected


def test_canonical_json_is_one_form() -> None:
    assert files.canonical_json({"b": [1, 2.5], "a": "é"}) == '{"a":"é","b":[1,2.5]}'.encode()
    assert files.canonical_json({"x": 1, "y": 2}) == files.canonical_json({"y": 2, "x": 1})
    with pytest.raises(ValueError):
        files.canonical_json(float("nan"))


HOLD = (
    "import sys, time; from common.files import exclusive_lock\n"
    "with exclusive_lock(sys.argv[1], 'build'):\n"
    "    print('held', flush=True); time.sleep(60)"
)


def test_lock_refuses_a_second_holder_and_dies_with_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "work" / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ResumeError, match="being written by another process"),
            files.exclusive_lock(lock, "build"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with files.exclusive_lock(lock, "build"):
        pass
