"""What a checkpoint is bound to, and what differs between it and a run that would go on from it."""

from __future__ import annotations

import copy
from typing import Any

from common.differences import difference_table, differences
from common.errors import ResumeError
from common.files import canonical_json, sha256_bytes
from common.provenance import git_sha, package_versions
from trainer.config import RunConfig

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "numpy",
    "pyarrow",
    "tiktoken",
    "oss-harmony",
)
# Keys that may change when a run goes on: they shape no weight. `dataset` is held by its fingerprint instead of its
# path.
FREE_KEYS = (
    *("run", "dataset", "log", "eval", "checkpoint", "watch", "batch.micro_batch_size"),
    *("samples", "sampling.slots", "sampling.cuda_graph"),
    *("teacher.url", "teacher.token_env", "teacher.request_sec", "teacher.gate_documents"),
)


def provenance(config: RunConfig, data: dict[str, str | None]) -> dict[str, Any]:
    """Of a run: config, code, packages, the fingerprints of its data. init_from: null until weights were taken."""
    return {
        "config": config.resolved(),
        "config_hash": config.digest(),
        "git_sha": git_sha(),
        "packages": package_versions(PACKAGES),
        "data": data,
        "init_from": None,
    }


def provenance_hash(of_run: dict[str, Any]) -> str:
    """One name for a provenance: sha256 of its canonical JSON."""
    return sha256_bytes(canonical_json(of_run))


def shaping(of_run: dict[str, Any]) -> dict[str, Any]:
    """All of a provenance that shapes the weights: config but for FREE_KEYS, data, and the weights it began with."""
    config = copy.deepcopy(of_run["config"])
    for key in FREE_KEYS:
        *groups, last = key.split(".")
        values: Any = config
        for group in groups:
            values = values.get(group) if isinstance(values, dict) else None
        if isinstance(values, dict):  # `teacher` is a name in the config of an offline run
            values.pop(last, None)
    return {"config": config, "data": of_run["data"], "init_from": of_run["init_from"]}


def require_same_run(stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """ResumeError with a table of every difference in config (but for FREE_KEYS), student and data."""
    config = {
        key: values
        for key, values in differences(stored["config"], wanted["config"]).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    }
    groups = {
        "config": {key: v for key, v in config.items() if not key.startswith("student.")},
        "student": {key: v for key, v in config.items() if key.startswith("student.")},
        "data": differences(stored["data"], wanted["data"]),
    }
    if any(groups.values()):
        raise ResumeError(
            "the checkpoint is of another run:\n\n"
            + difference_table(groups, "checkpoint")
            + "\n\n",
            remedy="resume with the values of the checkpoint, or start a new run (run=FOLDER), from these weights "
            f"alone by init_from.run={stored['config'].get('run')}. Free to change: {', '.join(FREE_KEYS)}",
        )


def changed_code(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """What differs in code: each package by name, and the commit. A resume warns of it and goes on."""
    packages = differences(stored["packages"], wanted["packages"])
    lines = [
        f"{name} is {now}, the checkpoint's is {was}"
        for name, (was, now) in sorted(packages.items())
    ]
    if stored["git_sha"] != wanted["git_sha"]:
        lines.append(f"the code is {wanted['git_sha']}, the checkpoint's is {stored['git_sha']}")
    return lines
