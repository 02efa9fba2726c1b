"""The folder of a run: what it is, what it measured, where it stands. Written by rank 0.

config.yaml      the resolved config          run.json         versions, git sha, fingerprints, layout
metrics.jsonl    one line a logged step       tensorboard/     the same numbers
checkpoints/     see trainer/checkpoints.py
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from common.files import exclusive_lock, write_bytes, write_json
from trainer.batch import CLASSES
from trainer.config import RunConfig
from trainer.flops import flops_per_token, mfu, peak_bf16_flops

_LOCK_WAIT_SEC = 15.0
_LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def run_folder(folder: Path, rank: int) -> Iterator[None]:
    """Hold the run's lock on rank 0 for the block; one of a process that was killed is waited for."""
    if rank:
        yield
        return
    with exclusive_lock(folder / ".lock", "vpmoe-train", wait_sec=_LOCK_WAIT_SEC):
        yield


def describe_run(
    folder: Path, config: RunConfig, of_run: dict[str, Any], layout: dict[str, int]
) -> None:
    """Write config.yaml and run.json."""
    resolved = yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)
    write_bytes(folder / "config.yaml", resolved.encode())
    kept = {key: of_run[key] for key in ("git_sha", "config_hash", "data", "init_from")}
    write_json(folder / "run.json", {"versions": of_run["packages"], "layout": layout} | kept)


class RunLog:
    """metrics.jsonl, TensorBoard and one line for people; on ranks other than 0 it does nothing.

    is_evaluated: on rank 0, whether the step that the run goes on from has its evaluation in the log; elsewhere False.
    """

    def __init__(self, folder: Path, rank: int, *, resumed_step: int) -> None:
        self._active, self.is_evaluated = rank == 0, False
        if not self._active:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        keep_until(path, resumed_step)
        self.is_evaluated = _is_evaluated(path, resumed_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, step: int, values: dict[str, float], line: str) -> None:
        """One record of `step` (steps done), and its line."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        _LOG.info("%s", line)

    def write_text(self, step: int, name: str, markdown: str) -> None:
        """Text of `step` for TensorBoard."""
        if self._active:
            self._board.add_text(name, markdown, step)

    def close(self) -> None:
        """Flush both."""
        if self._active:
            self._file.close()
            self._board.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the records of a .jsonl that will be made again: those after `step`, every one at step 0, and a line cut by
    a kill, which may end inside a character.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            if step and json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    write_bytes(path, b"".join(kept))


def _is_evaluated(path: Path, step: int) -> bool:
    if not path.is_file():
        return False
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    return any(r["step"] == step and any(key.startswith("eval/") for key in r) for r in records)


def peak_memory_gib(device: torch.device) -> float:
    """The most memory this rank has used: of the GPU by tensors, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def utilisation(
    config: RunConfig, seq_len: int, tokens_per_sec: float, device: torch.device, gpus: int
) -> dict[str, float]:
    """`mfu` of the whole run on `gpus` of this kind (trainer/flops.py), or nothing where the peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = peak_bf16_flops(name)
    if peak is None:
        return {}
    return {"mfu": mfu(tokens_per_sec, flops_per_token(config.student, seq_len), peak * gpus)}


def step_line(step: int, steps: int, values: dict[str, float]) -> str:
    """A step as people read it; r, f and c are reasoning, final and control tokens, kd the share that uses targets."""
    losses = "  ".join(
        f"{quantity} "
        + " ".join(f"{name[0]} {values[f'loss/{quantity}/{name}']:.3f}" for name in names)
        for quantity in ("ce", "kl")
        if (names := [name for name in CLASSES if f"loss/{quantity}/{name}" in values])
    )
    phases = " ".join(
        f"{phase} {100 * values[f'seconds/{phase}'] / values['seconds/step']:.0f}%"
        for phase in ("data", "forward", "loss", "backward", "optimizer")
    )
    return (
        f"step {step}/{steps}  loss {values['loss/total']:.4f}  {losses}  "
        f"kd {100 * values['loss/scored_share/total']:.0f}%  "
        f"grad {values['grad_norm']:.3f}  lr {values['lr']:.2e}  load {values['router/load_entropy']:.3f}  "
        f"{values['tokens_per_sec']:,.0f} tok/s  {values['seconds/step']:.2f} s ({phases})"
    )


def eval_line(step: int, values: dict[str, float]) -> str:
    """An evaluation as people read it."""
    parts = [
        f"{name}: "
        + ", ".join(
            f"{q} {values[f'eval/{q}/{name}']:.4f}"
            for q in ("ce", "kl")
            if f"eval/{q}/{name}" in values
        )
        for name in CLASSES
        if f"eval/ce/{name}" in values
    ]
    return f"eval at step {step}  " + "  ".join(parts)
