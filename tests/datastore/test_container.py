"""A shard file appears whole or not at all: exceptions, a full disk, kill -9, two writers."""

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from datastore.shard import FileEntry, TokenShard, shard_name, write_token_shard
from datastore.types import PackedRow

PLACE = {"dataset_id": "ab" * 32, "split": "train", "shard": 0, "seq_len": 8}


@pytest.fixture
def rows(handmade) -> list[PackedRow]:
    rng = np.random.default_rng(5)
    return [handmade.random_row(rng, 8) for _ in range(3)]


def write(folder: Path, rows: Iterable[PackedRow]) -> FileEntry:
    return write_token_shard(folder, rows, **PLACE)


def holds(folder: Path, entry: FileEntry, rows: list[PackedRow]) -> bool:
    """Whether the folder holds this one shard with exactly these rows."""
    reader = TokenShard(folder, entry, **PLACE)
    found = [reader.row(index).tokens_T.tolist() for index in range(reader.num_rows)]
    names = [path.name for path in (folder / "train").iterdir()]
    return names == ["shard-00000.arrow"] and found == [row.tokens_T.tolist() for row in rows]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError, GeneratorExit])
def test_an_exception_in_the_writer_commits_nothing(tmp_path, rows, error) -> None:
    before = write(tmp_path, rows[:1])

    def failing():
        yield from rows * 50
        raise error

    with pytest.raises(error):
        write(tmp_path, failing())
    assert holds(tmp_path, before, rows[:1])


def test_a_full_disk_commits_nothing(tmp_path, rows) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, rows * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "train").iterdir()) == []


_ENDLESS_WRITER = """
import itertools, sys
from pathlib import Path
import numpy as np
from datastore.shard import write_token_shard
from datastore.types import PackedRow
row = PackedRow(tokens_T=np.zeros(64, np.int32), spans_T=np.zeros(64, np.uint8),
                doc_ends_D=np.array([64], np.int32), doc_ids=(b"x" * 16,), languages=("",),
                exercises=("",), row_hash=0)
print("started", flush=True)
write_token_shard(Path(sys.argv[1]), itertools.repeat(row), dataset_id="ab" * 32, split="train",
                  shard=0, seq_len=64)
"""


def test_a_killed_writer_leaves_no_visible_file(tmp_path) -> None:
    for delay_sec in (0.0, 0.02, 0.1):
        writer = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS_WRITER, str(tmp_path)], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None and writer.stdout.readline() == b"started\n"
        time.sleep(delay_sec)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert not (tmp_path / shard_name("train", 0)).exists()
        left = [path.name for path in (tmp_path / "train").glob("*")]
        assert all(name.startswith(".tmp-") for name in left)


def test_two_writers_of_one_shard_leave_one_whole_file(tmp_path, rows) -> None:
    def interleaved():
        yield rows[0]
        write(tmp_path, rows[:2])
        yield from rows[1:]

    entry = write(tmp_path, interleaved())
    assert holds(tmp_path, entry, rows)
