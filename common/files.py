"""Durable files: write to a temporary name, fsync, rename, fsync the folder. Hashes and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common.errors import ResumeError, VpmoeError

_READ_BYTES = 1 << 22
_LOCK_POLL_SEC = 0.1
TMP_PREFIX = ".tmp-"


def fsync_path(path: Path) -> None:
    """Make what is written under `path` durable: a file's bytes, or a folder's own entries (a rename, a new file)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_writer(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` complete and durable, or not at all.

    The commit happens only on a clean exit of the block: an exception (also KeyboardInterrupt) removes
    the temporary file and leaves whatever stood at `path` before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(prefix=TMP_PREFIX, suffix="-" + path.name, dir=path.parent)
    try:
        with os.fdopen(fd, "wb") as handle:
            yield handle
            handle.flush()
            os.fchmod(handle.fileno(), 0o666 & ~umask())
            os.fsync(handle.fileno())
        os.replace(tmp, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(tmp)
        raise
    fsync_path(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` atomically and durably."""
    with atomic_writer(path) as handle:
        handle.write(content)


def write_json(path: Path, value: object) -> None:
    """Write `value` as readable JSON, keys in the given order, atomically and durably."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def canonical_json(value: object) -> bytes:
    """The one byte form of a JSON value that is hashed: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_bytes(content: bytes) -> str:
    """Hex sha256 of `content`."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sweep_temporaries(folder: Path) -> None:
    """Remove what killed writers left in `folder`; only the holder of the folder's lock may call it."""
    for stale in Path(folder).glob(f"{TMP_PREFIX}*"):
        stale.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive_lock(path: Path, purpose: str, *, wait_sec: float = 0.0) -> Iterator[int]:
    """Hold the lock file `path` for the block; the kernel frees it when the process dies, however it dies.

    Gives the descriptor: a process that inherits it holds the lock too. Raises ResumeError when another process has
    held it for wait_sec, which a killed one does until the kernel has taken its memory back.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_sec
    with open(path, "a+") as handle:
        while not _locked(handle.fileno()):
            if time.monotonic() >= deadline:
                raise ResumeError(
                    f"{purpose}: {path.parent} is being written by another process",
                    remedy="wait for it to end, or stop it, then run the same command again",
                )
            time.sleep(_LOCK_POLL_SEC)
        yield handle.fileno()


def _locked(descriptor: int) -> bool:
    """Take the lock unless another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def full_disk_told(folder: Path, remedy: str) -> Iterator[None]:
    """A full disk (or quota) in the block becomes a VpmoeError with this remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise VpmoeError(
            f"the disk that holds {folder} is full", got=error.strerror, remedy=remedy
        ) from None


def umask() -> int:
    """The permissions that new files of this process go without."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
