"""How a run starts: fresh, with the weights of another run (`init_from`), or at its own newest checkpoint."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_json
from trainer.checkpoints import Progress, find_checkpoint, read_checkpoint, read_progress
from trainer.config import InitFromConfig
from trainer.megatron.checkpoint import load_checkpoint
from trainer.megatron.step import Trainer
from trainer.megatron.weights import take_weights
from trainer.provenance import changed_code, provenance_hash, require_same_run

_LOG = logging.getLogger(__name__)


def resume(checkpoints: Path, trainer: Trainer) -> tuple[Progress, float]:
    """Fill the trainer from the newest checkpoint of its run; with the seconds that took. Every rank calls it."""
    began = time.perf_counter()
    progress = load_checkpoint(checkpoints, trainer)
    trainer.topology.barrier()
    return progress, time.perf_counter() - began


def stored_progress(checkpoints: Path, of_run: dict[str, Any]) -> Progress | None:
    """What the newest checkpoint says, None without one. Raises ResumeError when it is of another run than `of_run`.

    Warns of other code and packages.
    """
    stored = read_progress(checkpoints)
    if stored is not None:
        require_same_run(stored.provenance, of_run)
        for difference in changed_code(stored.provenance, of_run):
            _LOG.warning("%s", difference)
    return stored


def take_from(
    init_from: InitFromConfig, trainer: Trainer, of_run: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Weights of another run's checkpoint; what the provenance of this run says of it. Every rank calls it.

    Rank 0 logs the table of what was taken, new and dropped and writes it to `folder`/init_from.json. Raises
    ConfigError for another tokenizer and for any weight that is not accounted for.
    """
    path = find_checkpoint(Path(init_from.run) / "checkpoints", init_from.step)
    source, _ = read_checkpoint(path)
    theirs, ours = (of["data"]["tokenizer"] for of in (source.provenance, of_run))
    if theirs != ours:
        raise ConfigError(
            f"init_from.run={init_from.run} was trained on another tokenizer",
            got=theirs,
            expected=f"{ours}, the dataset's",
            remedy="its embeddings mean other tokens: use a run of this tokenizer, or a dataset of that one",
        )
    plan = take_weights(path, trainer.student, new=init_from.new, drop=init_from.drop)
    origin = {
        "run": init_from.run,
        "step": source.step,
        "provenance": provenance_hash(source.provenance),
        "git_sha": source.provenance["git_sha"],
    }
    if trainer.topology.rank == 0:
        write_json(folder / "init_from.json", origin | plan.table())
    _LOG.info("weights of %s, step %d\n%s", init_from.run, source.step, plan.text())
    return origin
