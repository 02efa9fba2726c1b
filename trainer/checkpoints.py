"""The checkpoint folder of a run as files: what is complete, what is newest, what a killed writer left.

    checkpoints/latest                    name of the newest complete checkpoint, moved last
    checkpoints/step-00000020/            *.distcp, common.pt, metadata.json: Megatron's; vpmoe.json: ours
    checkpoints/.tmp-step-00000040/       being written, or left by a killed writer and swept at the next start

Needs no Megatron: what lies there can be told anywhere.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import FormatError, ResumeError
from common.files import TMP_PREFIX, fsync_path, write_bytes, write_json

VERSION = 2
LATEST = "latest"
_OURS = "vpmoe.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: optimizer steps done, state of the row stream, and what it was trained on and with.

    provenance: plain values by name; trainer/provenance.py says which must agree on a resume.
    """

    step: int
    stream: dict[str, Any]
    provenance: dict[str, Any]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def unfinished_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is written before it is complete."""
    return folder / f"{TMP_PREFIX}{checkpoint_name(step)}"


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, None without one. Raises FormatError when it is gone."""
    pointer = folder / LATEST
    if not pointer.is_file():
        return None
    path = folder / pointer.read_text().strip()
    if not (path / _OURS).is_file():
        raise FormatError(
            f"{pointer} names {path.name}, which is not a complete checkpoint",
            remedy=f"restore it, or write the name of another checkpoint into {LATEST}",
        )
    return path


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The newest checkpoint, or the one after `step` steps. Raises ResumeError, which lists those that are there."""
    newest = latest_checkpoint(folder)
    if newest is None:
        raise ResumeError(f"{folder} holds no checkpoint", remedy="train the run first")
    if step is None:
        return newest
    path = folder / checkpoint_name(step)
    if not (path / _OURS).is_file():
        raise ResumeError(
            f"{folder} holds no checkpoint of step {step}",
            expected=f"one of {', '.join(map(str, stored_steps(folder)))}",
            remedy="name one of them, or null for the newest",
        )
    return path


def stored_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    return sorted(
        int(path.parent.name.removeprefix("step-")) for path in folder.glob(f"step-*/{_OURS}")
    )


def read_progress(folder: Path) -> Progress | None:
    """What the newest checkpoint says of itself, None when there is none; nothing is loaded."""
    path = latest_checkpoint(folder)
    return None if path is None else read_checkpoint(path)[0]


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, int]]:
    """Progress and layout (sizes by kind of parallelism) of one checkpoint. Raises FormatError for another version."""
    content = json.loads((path / _OURS).read_text(encoding="utf-8"))
    if content["version"] != VERSION:
        raise FormatError(
            f"checkpoint {path}", got=f"version {content['version']}", expected=f"version {VERSION}"
        )
    progress = Progress(**{name: content[name] for name in Progress.__dataclass_fields__})
    return progress, content["layout"]


def commit(folder: Path, progress: Progress, layout: dict[str, int], keep: int) -> None:
    """Make the written folder of this step the newest checkpoint and drop all but the newest `keep`.

    Every file is durable before the folder gets its name, and that before `latest` moves.
    """
    unfinished, final = (
        unfinished_folder(folder, progress.step),
        folder / checkpoint_name(progress.step),
    )
    write_json(unfinished / _OURS, {"version": VERSION, "layout": layout} | asdict(progress))
    for path in unfinished.rglob("*"):
        if path.is_file():
            fsync_path(path)
    fsync_path(unfinished)
    os.rename(unfinished, final)
    fsync_path(folder)
    write_bytes(folder / LATEST, f"{final.name}\n".encode())
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what a killed writer left: unfinished folders, and complete ones that `latest` never reached."""
    newest = latest_checkpoint(folder)
    for path in folder.glob(f"{TMP_PREFIX}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in folder.glob("step-*"):
        if newest is None or path.name > newest.name:
            shutil.rmtree(path)
