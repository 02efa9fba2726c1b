"""`vpmoe-data plan`: what a whole scoring will take, from a pilot: a store of which a small part was scored.

Bytes and counts are ratio estimates over the pilot's rows, which were chosen by a hash; speed is one over its shards.
Errors are half of 95 % confidence intervals.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.config import Config, parse_config
from common.errors import ConfigError, FormatError
from datastore.estimate import Moments
from datastore.manifest import MANIFEST_NAME, DatasetManifest, target_folder
from datastore.reader import Dataset, TargetStore
from datastore.scored import ScoredRow, scored_jobs, scored_rows
from datastore.selection import Selection
from datastore.types import SPLITS

# Rows of the pilot that are read: a ratio is then known to about 0.5 %, after half a minute.
MAX_ROWS = 20_000
ROW_QUANTITIES = ("documents", "tokens", "targets", "blob_bytes")
TIMINGS = "timings.jsonl"
NOT_COVERED = (
    "the start of the engines and their canary, some minutes each",
    "stragglers: the last shards leave devices idle",
    "another device, engine version or config than the pilot's",
)


class ShardTiming(Config):
    """A line of timings.jsonl: a scored shard, and how long an engine of `devices` devices worked on it."""

    split: str
    shard: int
    tokens: int
    targets: int
    documents: int
    blob_bytes: int
    seconds: float
    devices: int
    device: str


class Estimate(Config):
    """A prediction. error: half of the 95 % interval, null where the pilot is too small to tell."""

    value: float
    error: float | None


class DevicePlan(Config):
    """Time on one kind of device. cost: USD, null without a price."""

    device: str
    shards: int
    tokens_per_second: Estimate
    device_hours: Estimate
    wall_hours: Estimate
    cost: Estimate | None


class Plan(Config):
    """What scoring `documents` documents takes. token_bytes, target_bytes: on disk, files of both splits."""

    teacher: str
    target_id: str
    pilot_rows: int
    pilot_documents: int
    documents: Estimate
    tokens: Estimate
    targets: Estimate
    token_bytes: Estimate
    target_bytes: Estimate
    gpus: int
    devices: tuple[DevicePlan, ...]
    not_covered: tuple[str, ...]


@dataclass(frozen=True)
class Whole:
    """What is planned: `total` of the quantity `base`, exactly known. sampled: the part of it that the pilot holds."""

    base: str
    total: float
    sampled: float = 0.0


def plan_scoring(
    dataset: Path,
    slug: str,
    *,
    documents: int | None,
    tokens: int | None,
    gpus: int,
    price: float | None,
) -> Plan:
    """Plan for so many documents or tokens like those of the pilot, or for the whole dataset when both are None.

    gpus: devices that work at a time. price: USD a device-hour. Raises FormatError without a pilot or its timings,
    ConfigError for a whole dataset of which a filtered part was the pilot.
    """
    store = _open_pilot(dataset, slug)
    rows = Moments(ROW_QUANTITIES)
    for job in scored_jobs(store, SPLITS, MAX_ROWS):
        rows.add(np.array([_row_values(scored) for scored in scored_rows(job)], dtype=np.float64))
    manifest = store.dataset.manifest
    named = {"documents": documents, "tokens": tokens}
    known = {name: float(total) for name, total in named.items() if total is not None}
    known = known or _whole_dataset(store)
    predicted = {name: _predicted(rows, name, known) for name in ROW_QUANTITIES}
    a_token = _bytes_a_token(manifest, store)
    timings = read_timings(store.path / TIMINGS)
    return Plan(
        teacher=slug,
        target_id=store.manifest.target_id,
        pilot_rows=rows.clusters,
        pilot_documents=round(rows.sum("documents")),
        documents=predicted["documents"],
        tokens=predicted["tokens"],
        targets=predicted["targets"],
        token_bytes=_scaled(predicted["tokens"], a_token["token_bytes"]),
        target_bytes=_sum(
            predicted["blob_bytes"], _scaled(predicted["tokens"], a_token["around_blobs"])
        ),
        gpus=gpus,
        devices=_device_plans(timings, predicted["tokens"], gpus, price),
        not_covered=(*NOT_COVERED, *_doubts(store, timings, known)),
    )


def predict(rows: Moments, quantity: str, whole: Whole) -> Estimate:
    """The total of a quantity in the whole, by its ratio to the base in the sampled clusters.

    What the sample holds is known, so only the rest of the whole is uncertain (finite population correction).
    """
    ratio = rows.ratio([quantity], whole.base)
    share = min(whole.sampled / whole.total, 1.0) if whole.total else 0.0
    return _estimate(
        ratio.value * whole.total, ratio.half_width() * whole.total * math.sqrt(1 - share)
    )


def read_timings(path: Path) -> list[ShardTiming]:
    """The shards of timings.jsonl on which an engine worked. Raises FormatError: absent, damaged, none."""
    remedy = "score the pilot again; `vpmoe-data score` writes it"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        timings = [parse_config(ShardTiming, json.loads(line), str(path)) for line in lines]
    except FileNotFoundError:
        raise FormatError(f"the pilot has no {path}", remedy=remedy) from None
    except (ValueError, ConfigError) as error:
        raise FormatError(f"{path}: {error}", remedy=remedy) from None
    timings = [timing for timing in timings if timing.tokens and timing.seconds > 0]
    if not timings:
        raise FormatError(f"{path} times no shard", remedy=remedy)
    return timings


def _open_pilot(dataset: Path, slug: str) -> TargetStore:
    opened = Dataset.open(dataset)
    if not (target_folder(dataset, slug) / MANIFEST_NAME).is_file():
        raise FormatError(
            f"{dataset} has no targets of {slug} to plan from",
            remedy=f"score a pilot, `vpmoe-data score {dataset} --teacher {slug} --fraction 0.001 "
            f"name={slug}-pilot`, then `vpmoe-data plan {dataset} --teacher {slug}-pilot`",
        )
    return TargetStore.open(opened, slug)


def _row_values(scored: ScoredRow) -> tuple[int, ...]:
    """ROW_QUANTITIES of one row: of its scored documents."""
    lengths_D = np.diff(scored.row.doc_ends_D, prepend=0).tolist()
    found = [
        (length, len(document.target.positions_P))
        for length, document in zip(lengths_D, scored.documents, strict=True)
        if document
    ]
    tokens, targets = (sum(values) for values in zip(*found, strict=True))
    return len(found), tokens, targets, scored.blob_bytes


def _whole_dataset(store: TargetStore) -> dict[str, float]:
    """What the dataset holds, by quantity. Raises ConfigError when the pilot chose among documents by a filter."""
    selection = parse_config(Selection, store.manifest.selection, "the pilot's selection")
    if selection.model_copy(update={"fraction": 1.0}) != Selection():
        raise ConfigError(
            "the pilot was scored with filters, so it does not stand for the whole dataset",
            got=selection.model_dump_json(exclude_defaults=True),
            remedy="give --documents or --tokens, or score a pilot with --fraction alone",
        )
    counts = store.dataset.manifest.counts.values()
    spans = [split.tokens_by_span for split in counts]
    return {
        "documents": sum(split.documents for split in counts),
        "tokens": sum(split.tokens for split in counts),
        "targets": sum(span.reasoning + span.final for span in spans),
    }


def _predicted(rows: Moments, quantity: str, known: dict[str, float]) -> Estimate:
    """Exact where it is known; else by its ratio to what is known (blobs follow targets most closely)."""
    if quantity in known:
        return Estimate(value=known[quantity], error=0.0)
    base = "targets" if "targets" in known else next(iter(known))
    is_dataset = len(known) > 1
    return predict(rows, quantity, Whole(base, known[base], rows.sum(base) if is_dataset else 0.0))


def _bytes_a_token(manifest: DatasetManifest, store: TargetStore) -> dict[str, float]:
    """Bytes of token shards, and of target shards around their blobs (a fixed cost a row), for each token."""
    tokens = sum(split.tokens for split in manifest.counts.values())
    token_files, target_files = (
        sum(entry.bytes for split in SPLITS for entry in listed.entries(split))
        for listed in (manifest, store.manifest)
    )
    budget = store.manifest.budget
    blobs = budget["bytes_per_token"] * budget["positions"]
    return {"token_bytes": token_files / tokens, "around_blobs": (target_files - blobs) / tokens}


def _device_plans(
    timings: list[ShardTiming], tokens: Estimate, gpus: int, price: float | None
) -> tuple[DevicePlan, ...]:
    """One plan for each kind of device that the pilot ran on."""
    plans = []
    for device in sorted({timing.device for timing in timings}):
        mine = [timing for timing in timings if timing.device == device]
        shards = Moments(("device_seconds", "tokens"))
        shards.add(np.array([(t.seconds * t.devices, t.tokens) for t in mine], dtype=np.float64))
        ratio = shards.ratio(["device_seconds"], "tokens")
        a_token = _estimate(ratio.value, ratio.half_width())
        hours = _scaled(_product(a_token, tokens), 1 / 3600)
        speed = 1 / a_token.value
        relative = None if a_token.error is None else a_token.error / a_token.value
        plans.append(
            DevicePlan(
                device=device,
                shards=len(mine),
                tokens_per_second=Estimate(value=speed, error=relative and relative * speed),
                device_hours=hours,
                wall_hours=_scaled(hours, 1 / gpus),
                cost=None if price is None else _scaled(hours, price),
            )
        )
    return tuple(plans)


def _doubts(store: TargetStore, timings: list[ShardTiming], known: dict[str, float]) -> list[str]:
    """What this pilot in particular cannot tell."""
    doubts = []
    call = store.manifest.teacher.get("engine", {}).get("documents_per_call", 0)
    if max(timing.documents for timing in timings) < call:
        doubts.append(
            f"batches: each of the pilot's shards held fewer than the {call:,} documents of a call, so the whole may "
            "run faster; `benchmarks/score.py` measures full batches"
        )
    if len(known) == 1:
        doubts.append("text that the pilot's dataset was not built from")
    if len(timings) == 1:
        doubts.append("the error of the speed: the pilot timed one shard only")
    return doubts


def _estimate(value: float, error: float) -> Estimate:
    return Estimate(value=value, error=None if math.isnan(error) else error)


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    error = estimate.error
    return Estimate(value=estimate.value * factor, error=None if error is None else error * factor)


def _sum(first: Estimate, second: Estimate) -> Estimate:
    """The sum of two that may depend on each other: errors add."""
    value = first.value + second.value
    if first.error is None or second.error is None:
        return Estimate(value=value, error=None)
    return Estimate(value=value, error=first.error + second.error)


def _product(first: Estimate, second: Estimate) -> Estimate:
    """The product of two independent ones: relative errors add in squares."""
    if first.error is None or second.error is None:
        return Estimate(value=first.value * second.value, error=None)
    error = math.hypot(first.error * second.value, second.error * first.value)
    return Estimate(value=first.value * second.value, error=error)
