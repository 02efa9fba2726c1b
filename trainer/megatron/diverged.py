"""What is behind a loss or a gradient that is not finite: looked for after the fact, so that good steps pay nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.batch import CLASSES
from trainer.config import RunConfig
from trainer.losses.report import QUANTITIES
from trainer.megatron.student import Student
from trainer.megatron.topology import Topology
from trainer.stops import RunStopped

_REPORTED = ("ce", "kd", "loss", "weight", "entropy", "teacher_nll")


class DivergedError(RunStopped):
    """A loss or gradient is no finite number."""


@dataclass(frozen=True)
class _Seen:
    """What one rank holds that is not finite: names of parameters by their values and their gradients, loss sums."""

    weights: list[str]
    losses: list[str]
    gradients: list[str]


def diverged(
    loss: float,
    grad_norm: float,
    student: Student,
    config: RunConfig,
    topology: Topology,
    again: Callable[[], torch.Tensor],
) -> DivergedError:
    """The error to raise, naming rank and place. Every rank calls it.

    again: computes the step's forward and backward passes once more without summing over ranks, so that gradients and
    the returned loss sums [C, M] are this rank's own.
    """
    sums_CM = again()
    parameters = dict(student.named_parameters())
    own = _Seen(
        [name for name, p in parameters.items() if not _finite(p.detach())],
        _losses(sums_CM),
        [name for name, p in parameters.items() if not _finite(p.main_grad)],
    )
    seen = [own] * topology.world_size
    dist.all_gather_object(seen, own)
    error = DivergedError(
        "the loss or the gradient is not finite",
        got=f"loss {loss}, gradient norm {grad_norm}: {_cause(seen)}",
        remedy=_remedy(seen, config),
    )
    error.worth_keeping = not any(rank.weights for rank in seen)
    return error


def _cause(seen: list[_Seen]) -> str:
    for rank, of in enumerate(seen):
        if of.weights:
            return f"rank {rank} holds weights that are not: {_names(of.weights, of.weights[0])}"
    for rank, of in enumerate(seen):
        if of.losses:
            return f"on rank {rank} the sum of {of.losses[0]}"
    for rank, of in enumerate(seen):
        if of.gradients:
            # The last in the order of the forward pass is the first that the backward pass met.
            return f"on rank {rank} the gradient of {_names(of.gradients, of.gradients[-1])}"
    return "computed once more, the same step is finite on every rank"


def _names(names: list[str], first: str) -> str:
    return first + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _remedy(seen: list[_Seen], config: RunConfig) -> str:
    if not any(of.weights or of.losses or of.gradients for of in seen):
        return "a fault that does not repeat is the hardware's; run the same command to go on"
    return (
        "the same command would meet the same batch and end here again, so start another run from this one's weights "
        f"with a lower rate: run=ANOTHER init_from.run={config.run} optimizer.lr=LOWER"
    )


def _losses(sums_CM: torch.Tensor) -> list[str]:
    return [
        f"{quantity} of {name}"
        for quantity in _REPORTED
        for name, value in zip(CLASSES, sums_CM[:, QUANTITIES.index(quantity)], strict=True)
        if not bool(torch.isfinite(value))
    ]


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
