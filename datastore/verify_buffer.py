"""`vpmoe-data verify` of a rollout buffer that is not sealed: every shard that is there, as its records list it."""

from __future__ import annotations

from pathlib import Path

from common.errors import VpmoeError
from datastore.checks import RowTally
from datastore.faults import Fault, Faults
from datastore.manifest import MANIFEST_NAME, buffer_path
from datastore.rollout_reader import RolloutReader
from datastore.rollout_records import SampledRecord, ScoredRecord
from datastore.selection import Selection
from datastore.verify import ShardJob, ShardReport, shard_reports, verify_identities
from datastore.verify_rollouts import RolloutJob
from datastore.verify_targets import TargetJob


def is_unsealed_buffer(folder: Path) -> bool:
    """Whether the folder is a rollout buffer that is no dataset yet."""
    return buffer_path(folder).exists() and not (Path(folder) / MANIFEST_NAME).exists()


def verify_buffer(folder: Path, *, workers: int = 1) -> list[Fault]:
    """The first fault of each kind in the shards that are there; empty when all is well.

    A shard that is being written is not looked at, so a buffer may be verified while it grows.
    """
    faults = Faults()
    try:
        reader = RolloutReader.open_reader(folder)
        shards = [_records(reader, shard) for shard in range(reader.num_sampled)]
    except VpmoeError as error:
        return [Fault("record", "rollouts", None, str(error))]
    jobs = [_job(reader, sampled, scored) for sampled, scored in shards]
    reports = shard_reports(jobs, workers)
    for report, (sampled, scored) in zip(reports, shards, strict=True):
        faults.merge(report.faults)
        _verify_records(reader, report, sampled, scored, faults)
    verify_identities(reports, faults)
    return faults.found()


def buffer_summary(folder: Path) -> str:
    """One line on a verified buffer."""
    reader = RolloutReader.open_reader(folder)
    shards = reader.num_sampled
    scored = sum(reader.is_scored(shard) for shard in range(shards))
    counts = [reader.counts(shard) for shard in range(shards)]
    return (
        f"{folder}: a buffer of rollouts that is not sealed; every hash and invariant of its shards holds "
        f"({shards:,} sampled, {scored:,} of them with targets of {reader.buffer.slug}; "
        f"{sum(part.rollouts for part in counts):,} rollouts, "
        f"{sum(part.tokens for part in counts):,} sampled tokens)"
    )


def _records(reader: RolloutReader, shard: int) -> tuple[SampledRecord, ScoredRecord | None]:
    scored = reader.scored_record("train", shard) if reader.is_scored(shard) else None
    return reader.sampled_record("train", shard), scored


def _job(reader: RolloutReader, sampled: SampledRecord, scored: ScoredRecord | None) -> ShardJob:
    place, where = reader.place, (sampled.split, sampled.shard)
    return ShardJob(
        folder=place.folder,
        entry=sampled.entry,
        dataset_id=sampled.dataset_id,
        split=sampled.split,
        shard=sampled.shard,
        seq_len=reader.buffer.seq_len,
        targets=() if scored is None else (_target_job(reader, scored),),
        rollouts=RolloutJob(place.rollouts, sampled.rollouts, sampled.dataset_id, *where),
    )


def _target_job(reader: RolloutReader, scored: ScoredRecord) -> TargetJob:
    return TargetJob(
        slug=reader.buffer.slug,
        folder=reader.place.targets,
        entry=scored.entry,
        split=scored.split,
        shard=scored.shard,
        target_id=scored.target_id,
        threshold=reader.buffer.threshold,
        id_order_sha256=scored.id_order_sha256,
        selection=Selection(),
        quarantine=(),
        is_repacked=False,
        logprobs=scored.logprobs,
    )


def _verify_records(
    reader: RolloutReader,
    report: ShardReport,
    sampled: SampledRecord,
    scored: ScoredRecord | None,
    faults: Faults,
) -> None:
    """What the records state, against what the shard holds."""
    if not report.is_whole:
        return
    seq_len, path = reader.buffer.seq_len, reader.place.sampled(report.split, report.shard)
    file = path.relative_to(reader.folder).as_posix()
    tally = RowTally(seq_len)
    tally.merge(report.tally)
    if tally.counts() != sampled.row_counts.of_split(seq_len):
        message = f"the record states {sampled.row_counts}, the rows hold {tally.counts()}"
        faults.add("counts", file, None, message)
    if report.sampled is not None and report.sampled != sampled.counts:
        message = f"the record states {sampled.counts}, stored are {report.sampled}"
        faults.add("rollout counts", file, None, message)
    targets = report.targets.get(reader.buffer.slug)
    if scored is not None and targets is not None and targets.is_whole:
        for difference in targets.tally.differences(scored.sums.budget()):
            faults.add("budget", file, None, difference)
