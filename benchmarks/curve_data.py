"""The two datasets of benchmarks/kd_curve.py: all documents for the teacher, a share of them for the students.

A teacher that learnt from the students' own documents alone has nothing to tell them: it must have seen more. The
valid documents are the same in both, as the split is by the hash of synth_id; the students' train documents are those
whose hash is highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import PROJECT_ROOT, load_config
from datastore.data_config import DataConfig
from datastore.manifest import DatasetManifest, load_dataset_manifest
from datastore.reader import Dataset
from datastore.split import split_bound, split_of

TEACHER_DATA = "data"
STUDENT_DATA = "student-data"


def prepare_datasets(
    work: Path, sources: Sequence[Path], *, valid_fraction: float, student_share: float
) -> dict[str, DatasetManifest]:
    """Build both under `work` from SYNTH's parquet files; manifests by name. Raises ValueError as `seen` does."""
    fewer = work / "source" / "student.parquet"
    _write_student_rows(sources, fewer, valid_fraction, student_share)
    built = {
        name: _build(work / name, files, valid_fraction)
        for name, files in ((TEACHER_DATA, sources), (STUDENT_DATA, [fewer]))
    }
    seen(work)
    return built


def first_rows(work: Path, source: Path, rows: int) -> Path:
    """The first rows of a file as a file of its own."""
    import pyarrow.parquet as pq

    path = work / "source" / "first.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pq.read_table(source).slice(0, rows), path)
    return path


def _write_student_rows(
    sources: Sequence[Path], path: Path, valid_fraction: float, share: float
) -> None:
    """The valid rows and, of the train rows, those in the uppermost `share` of the hashes, as one file.

    Rows without a usable synth_id, which no dataset takes, are left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not 0 < share <= 1:
        raise ValueError(f"student_share is the students' part of the train rows, 0 to 1: {share}")
    valid, upper = split_bound(valid_fraction), split_bound(1 - share * (1 - valid_fraction))

    def is_kept(synth_id: str | None) -> bool:
        if not synth_id:
            return False
        return split_of(synth_id, valid) == "valid" or split_of(synth_id, upper) == "train"

    tables = []
    for source in sources:
        table = pq.read_table(source)
        kept = [is_kept(synth_id) for synth_id in table.column("synth_id").to_pylist()]
        tables.append(table.filter(pa.array(kept, pa.bool_())))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), path)


def _build(out: Path, files: Sequence[Path], valid_fraction: float) -> DatasetManifest:
    from datastore.build import build_dataset

    overrides = [
        f"source.files={[str(file) for file in files]}",
        f"split.valid_fraction={valid_fraction}",
        "seq_len=2048",
        f"out={out}",
    ]
    config = load_config(DataConfig, PROJECT_ROOT / "configs/data/demo.yaml", overrides)
    return build_dataset(config, workers=1)


def seen(work: Path) -> dict[str, Any]:
    """Documents and tokens that teacher and students saw, and the number of their common valid documents.

    Raises ValueError when the valid documents differ or a valid one was trained on.
    """
    ids = {
        (name, split): _document_ids(work / name, split)
        for name in (TEACHER_DATA, STUDENT_DATA)
        for split in ("train", "valid")
    }
    valid = ids[TEACHER_DATA, "valid"]
    if other := valid ^ ids[STUDENT_DATA, "valid"]:
        raise ValueError(f"{len(other)} valid documents are in one dataset only, under {work}")
    if leaked := valid & (ids[TEACHER_DATA, "train"] | ids[STUDENT_DATA, "train"]):
        raise ValueError(f"{len(leaked)} valid documents are in a train split, under {work}")
    train = {name: load_dataset_manifest(work / name).counts["train"] for name, _ in ids}
    return {
        "teacher": _amount(train[TEACHER_DATA]),
        "students": _amount(train[STUDENT_DATA]),
        "valid_documents_of_both": len(valid),
    }


def _amount(counts: Any) -> dict[str, int]:
    return {"documents": counts.documents, "tokens": counts.tokens}


def _document_ids(dataset: Path, split: Any) -> set[bytes]:
    opened = Dataset.open(dataset)
    rows = (opened.row(split, index) for index in range(opened.num_rows(split)))
    return {doc_id for row in rows for doc_id in row.doc_ids}
