"""SYNTH to a dataset: units to shards in worker processes, the valid split last, the manifest at the very end.

What any dataset needs on its way into its folder (resume, commit) is in datastore/assembly.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.logs import progress
from datastore.assembly import (
    Provenance,
    commit_dataset,
    dataset_identity,
    finished_dataset,
    held_folder,
    identity_hash,
    open_work_folder,
    run_units,
    summed,
    write_valid,
)
from datastore.data_config import DataConfig
from datastore.harmony import RENDERER_VERSION
from datastore.manifest import DatasetManifest, SourceFile
from datastore.repeats import repeated_rows
from datastore.source import SourcePath, cut_units, inspect_source, locate_sources
from datastore.split import SPLIT_RULE, split_bound
from datastore.unit import UnitJob, UnitRecord, build_unit, read_fragment
from datastore.workers import run_jobs


def build_dataset(config: DataConfig, *, workers: int, ray: str | None = None) -> DatasetManifest:
    """Build the dataset that `config` describes, go on with it, or do nothing when it is finished.

    ray: the address of a Ray cluster whose machines see the same folders and build the units; None: processes here.
    Raises SourceError (no usable input), ResumeError (config.out holds another dataset, or another builder is at
    work), VpmoeError (disk full, a worker died); what is finished by then is kept for the next run.
    """
    sources = locate_sources(config.source)
    out = Path(config.out)
    with held_folder(out, "build"):
        files = _inspect_sources(sources, workers)
        provenance = Provenance(
            sources=tuple(files),
            renderer_version=RENDERER_VERSION,
            split_rule={"rule": SPLIT_RULE, "valid_fraction": config.split.valid_fraction},
        )
        identity = dataset_identity(config.resolved(), provenance)
        if finished := finished_dataset(out, identity):
            return finished
        open_work_folder(out, identity)
        dataset_id = identity_hash(identity)
        jobs = _unit_jobs(config, out, dataset_id, sources, files, workers)

        def run(left: Sequence[UnitJob]) -> Iterable[UnitRecord]:
            return _run(left, workers, ray)

        records = run_units(run, jobs, threads=workers, title="building")
        fragments = (read_fragment(job.fragment_path) for job in jobs)
        valid = write_valid(config, dataset_id, itertools.chain.from_iterable(fragments))
        return commit_dataset(
            config,
            identity,
            provenance,
            records,
            valid,
            rejects=summed(record.rejects for record in records),
            truncated=summed(record.truncated for record in records),
            remedy="check the columns of the source, render.* and max_doc_tokens",
        )


def _inspect_sources(sources: list[SourcePath], workers: int) -> list[SourceFile]:
    """Sizes, hashes and rows of the sources, in their order. In threads: hashing releases the interpreter."""
    found = []
    total = sum(source.path.stat().st_size for source in sources)
    with progress("hashing sources", total, "B") as bar, ThreadPoolExecutor(workers) as pool:
        for file in pool.map(inspect_source, sources):
            found.append(file)
            bar.advance(file.bytes)
    return found


def _unit_jobs(
    config: DataConfig,
    out: Path,
    dataset_id: str,
    sources: list[SourcePath],
    files: list[SourceFile],
    workers: int,
) -> list[UnitJob]:
    paths, rows = [source.path.resolve() for source in sources], [file.rows for file in files]
    repeats_R = repeated_rows(paths, rows, workers)
    unit_rows = config.shard.source_rows
    return [
        UnitJob(
            folder=out.resolve(),
            dataset_id=dataset_id,
            unit=unit,
            segments=segments,
            repeats=frozenset(
                (repeats_R[repeats_R // unit_rows == unit] - unit * unit_rows).tolist()
            ),
            render=config.render,
            pack=config.pack,
            valid_bound=split_bound(config.split.valid_fraction),
            seq_len=config.seq_len,
            max_doc_tokens=config.max_doc_tokens,
        )
        for unit, segments in enumerate(cut_units(paths, rows, unit_rows))
    ]


def _run(jobs: Sequence[UnitJob], workers: int, ray: str | None) -> Iterable[UnitRecord]:
    if ray is None:
        return run_jobs(build_unit, jobs, workers=workers)
    from datastore import cluster

    return cluster.run_jobs(build_unit, jobs, address=ray)
