"""Source rows whose synth_id came before, found from the id column alone before anything is built.

Units are built apart and cannot know each other's rows, so the whole input is looked at once: 16 bytes a row, 1.2 GB
for all of SYNTH. The first row of an id stays; the later ones are rejected with the reason `duplicate_id`, even where
the first gives no document: which row is kept must not depend on the render config.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.logs import progress
from datastore.checks import duplicate_documents
from datastore.harmony import document_id
from datastore.source import read_ids
from datastore.workers import run_jobs

_NO_ID = b"\0" * 16


def repeated_rows(paths: Sequence[Path], rows_per_file: Sequence[int], workers: int) -> np.ndarray:
    """Numbers (int64, ascending) of the rows over all files, in order, whose synth_id an earlier row has.

    Rows without a usable id are no repeats: they have a reject reason of their own. Raises SourceError.
    """
    first_row = dict(zip(paths, np.cumsum([0, *rows_per_file[:-1]]).tolist(), strict=True))
    ids_R16 = np.zeros((sum(rows_per_file), 16), dtype=np.uint8)
    with progress("looking for repeated ids", len(ids_R16), "rows") as bar:
        for path, digests in run_jobs(file_digests, paths, workers=workers):
            start, count = first_row[path], len(digests) // 16
            ids_R16[start : start + count] = np.frombuffer(digests, np.uint8).reshape(-1, 16)
            bar.advance(count)
    repeats_R = duplicate_documents(ids_R16.data)
    return repeats_R[ids_R16[repeats_R].any(axis=1)]


def file_digests(path: Path) -> tuple[Path, bytes]:
    """The document id of each row of a file, 16 bytes each; zeros where a row has no usable synth_id."""
    return path, b"".join(_digest(synth_id) for synth_id in read_ids(path))


def _digest(synth_id: str | None) -> bytes:
    try:
        return document_id(synth_id) if synth_id and not synth_id.isspace() else _NO_ID
    except UnicodeEncodeError:
        return _NO_ID
