"""`vpmoe-train export`: a checkpoint as a folder that Hugging Face transformers loads. docs/export.md lists its files.

The folder is written beside its place, export.json last, and renamed: it is there whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from common import tokenizer
from common.config import parse_config
from common.errors import ConfigError, EngineError, FormatError, ResumeError
from common.files import (
    TMP_PREFIX,
    exclusive_lock,
    fsync_path,
    sha256_file,
    umask,
    write_bytes,
    write_json,
)
from common.host import free_host_bytes
from common.provenance import git_sha
from datastore.harmony import RenderConfig
from datastore.manifest import DatasetManifest, load_dataset_manifest
from trainer.checkpoints import Progress, find_checkpoint, read_checkpoint
from trainer.export_card import model_card
from trainer.export_names import (
    CODE_FILES,
    DTYPES,
    Entry,
    entries,
    generation_config,
    hf_config,
    require_complete,
)
from trainer.export_tokenizer import chat_template, fast_tokenizer, tokenizer_config
from trainer.opd.config import parse_run_config
from trainer.student_config import StudentConfig

VERSION = 1
MANIFEST = "export.json"
SHARD_BYTES = 2 * 10**9
"""Of a weight file: one is in memory beside the model. Hubs and loaders ask for at most 5 GB."""
_PROCESS_BYTES = (
    3 << 30
)  # torch, Megatron and the tokenizer take 0.9 GiB; an embedding is drawn before it is filled
_CODE = Path(__file__).parent / "hf"
_LOG = logging.getLogger(__name__)


def run_export(
    run: Path,
    *,
    out: Path | None = None,
    step: int | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    dataset: Path | None = None,
) -> Path:
    """Export a checkpoint of `run`, the newest or that of `step`; returns the folder.

    dtype: None for the run's own precision. dataset: where the run's dataset lies now, when it was moved; only its
    manifest is read. Raises ConfigError, FormatError, ResumeError (another thing lies at `out`), EngineError.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "export runs in one process", remedy="start it without torchrun; any layout is read"
        )
    checkpoint = find_checkpoint(run / "checkpoints", step)
    progress, _ = read_checkpoint(checkpoint)
    config = parse_run_config(progress.provenance["config"], f"{checkpoint}: config")
    manifest = _manifest_of(dataset or Path(config.dataset), progress)
    dtype = dtype or config.precision
    folder = out or run / "exports" / f"{checkpoint.name}-{dtype}"
    source = describe_source(run.resolve().name, progress, manifest, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder.parent / ".export.lock", "vpmoe-train export"):
        if folder.exists():
            require_same_export(folder, source)
            _LOG.info("%s holds this very export already", folder)
            return folder
        _require_memory(config.student, dtype)
        from trainer.megatron.export import stored_weights

        with stored_weights(
            run / "checkpoints", config.student, step=progress.step, precision=dtype
        ) as weights:
            write_export(folder, weights, config.student, manifest, dtype, source)
    _LOG.info("exported step %d to %s", progress.step, folder)
    return folder


def describe_source(
    run: str, progress: Progress, manifest: DatasetManifest, dtype: str
) -> dict[str, Any]:
    """What an export was made from; two exports of the same source are the same."""
    trained = progress.provenance
    return {
        "run": run,
        "step": progress.step,
        "config_hash": trained["config_hash"],
        "trained_by": trained["git_sha"],
        "exported_by": git_sha(),
        "dataset": manifest.fingerprint,
        "targets": trained["data"].get("targets"),
        "dtype": dtype,
    }


def write_export(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    student: StudentConfig,
    manifest: DatasetManifest,
    dtype: str,
    source: dict[str, Any],
) -> None:
    """Write the folder. weights: by the student's own names. Raises FormatError unless they are exactly its own."""
    found = entries(student)
    require_complete(found, weights)
    unfinished = folder.parent / f"{TMP_PREFIX}{folder.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        write_weights(unfinished, found, weights, DTYPES[dtype])
        _write_json_files(unfinished, student, manifest.seq_len, dtype)
        _write_texts(unfinished, student, manifest, source)
        files = {path.name: _described(path) for path in sorted(unfinished.iterdir())}
        write_json(unfinished / MANIFEST, {"version": VERSION, "source": source, "files": files})
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    fsync_path(folder.parent)


def write_weights(
    folder: Path, found: list[Entry], weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """model.safetensors, or several with their index."""
    shards = plan_shards(found, dtype, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        tensors = {entry.name: entry.tensor(weights, dtype) for entry in shard}
        save_file(tensors, str(folder / name), metadata={"format": "pt"})
        os.chmod(folder / name, 0o666 & ~umask())  # safetensors makes files for their owner alone
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(entry.size_bytes(dtype) for entry in found)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def plan_shards(found: list[Entry], dtype: torch.dtype, limit: int) -> list[list[Entry]]:
    """The entries in order, cut so that no shard of several exceeds `limit` bytes."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in found:
        size = entry.size_bytes(dtype)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def require_same_export(folder: Path, source: dict[str, Any]) -> None:
    """ResumeError unless `folder` is an export of this very source, every file with its hash."""
    remedy = "name another folder with --out, or remove this one"
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        found, files = content["source"], content["files"]
    except (OSError, ValueError, KeyError):
        raise ResumeError(f"{folder} is there and is no export", remedy=remedy) from None
    differences = [
        f"{key}: there {found.get(key)!r}, wanted {value!r}"
        for key, value in source.items()
        if found.get(key) != value
    ]
    differences += [
        f"{name}: not the file that was exported"
        for name, described in files.items()
        if not (folder / name).is_file() or _described(folder / name) != described
    ]
    if differences:
        raise ResumeError(
            f"{folder} holds another export:\n  " + "\n  ".join(differences) + "\n", remedy=remedy
        )


def _write_json_files(folder: Path, student: StudentConfig, seq_len: int, dtype: str) -> None:
    write_json(folder / "config.json", hf_config(student, seq_len=seq_len, dtype=dtype))
    write_json(folder / "generation_config.json", generation_config())
    write_json(folder / "tokenizer_config.json", tokenizer_config(seq_len))


def _write_texts(
    folder: Path, student: StudentConfig, manifest: DatasetManifest, source: dict[str, Any]
) -> None:
    render = parse_config(RenderConfig, manifest.config["render"], "the dataset's render config")
    texts = {
        "tokenizer.json": fast_tokenizer().to_str(),
        "chat_template.jinja": chat_template(render),
        "README.md": model_card(student, source, manifest.seq_len),
    }
    texts |= {name: (_CODE / name).read_text(encoding="utf-8") for name in CODE_FILES}
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())


def _described(path: Path) -> dict[str, Any]:
    """Size and hash of a file, which is durable from here on."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _manifest_of(dataset: Path, progress: Progress) -> DatasetManifest:
    """The manifest of the dataset that the run trained on: it knows the length of rows and the constant prompt."""
    remedy = "name its folder with --dataset; the manifest alone is enough"
    try:
        manifest = load_dataset_manifest(dataset)
    except FormatError as error:
        raise FormatError(f"the run's dataset: {error}", remedy=remedy) from error
    trained_on = progress.provenance["data"]["dataset"]
    if manifest.fingerprint != trained_on:
        raise FormatError(
            f"{dataset} is not the dataset of this run",
            got=f"fingerprint {manifest.fingerprint}",
            expected=trained_on,
            remedy=remedy,
        )
    if manifest.tokenizer.ranks_sha256 != tokenizer.RANKS_SHA256:
        raise FormatError(f"{dataset} was built with another tokenizer")
    return manifest


def _require_memory(student: StudentConfig, dtype: str) -> None:
    """EngineError unless the weights fit, with one weight file and _PROCESS_BYTES beside them.

    A checkpoint is read into the model in place: 1.16 GiB of fp32 weights in one file peaked at 2.33 GiB in all.
    """
    weights = sum(entry.size_bytes(DTYPES[dtype]) for entry in entries(student))
    needed, free = weights + min(SHARD_BYTES, weights) + _PROCESS_BYTES, free_host_bytes()
    if needed > free:
        raise EngineError(
            f"exporting {weights / 2**30:.1f} GiB of weights in {dtype}",
            got=f"{free / 2**30:.1f} GiB of free memory",
            expected=f"{needed / 2**30:.1f} GiB",
            remedy="export on a larger host, or with --dtype bf16",
        )
