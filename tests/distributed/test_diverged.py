"""A step that is not finite: told with rank and place on every rank, and as if it had never been tried."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.distributed.gloo import run_gloo
from tests.trainer.megatron.tiny import SEQ_LEN, micro_batches, step, tiny_config, tiny_rows

POISONED = "decoder.layers.1.self_attention.linear_proj.weight"


def _train(rank: int, faults: tuple[str, ...]) -> dict:
    """A step, those that meet the faults, and another; what each fault said, and the state at the end."""
    from trainer.megatron.diverged import DivergedError
    from trainer.megatron.topology import distributed

    config = tiny_config(run="runs/mine")
    with distributed("cpu", config.parallel, seed=1, deterministic=True) as topology:
        from trainer.megatron.step import Trainer

        trainer = Trainer(config, topology, SEQ_LEN)
        batches = micro_batches(tiny_rows(8)[4 * rank :][:4], 2)
        step(trainer, batches, 1e-2)
        said = {}
        for fault in faults:
            faulty = _poison(trainer, batches, fault, rank)
            before = _state(trainer)
            with pytest.raises(DivergedError) as caught:
                step(trainer, faulty, 1e-2)
            said[fault] = str(caught.value), caught.value.worth_keeping
            assert _different(_state(trainer), before) == []
        if "weight" not in faults:
            step(trainer, batches, 1e-2)
        return {"said": said, "state": _state(trainer)}


def _different(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    assert one.keys() == other.keys() and len(one) > 100
    return [n for n, v in one.items() if not np.array_equal(v, other[n], equal_nan=True)]


def _poison(trainer, batches: list, fault: str, rank: int) -> list:
    parameter = dict(trainer.student.named_parameters())[POISONED]
    if fault == "weight":
        parameter.data[0, 0] = float("inf")
    if rank != 1:
        return batches
    if fault == "target":
        weights_BTK = batches[1].target_weights_BTK * float("nan")
        return [batches[0], dataclasses.replace(batches[1], target_weights_BTK=weights_BTK)]
    if fault in ("gradient", "passing"):
        times = [
            2 if fault == "passing" else 4
        ]  # the step has two micro-batches, and is computed twice

        def hook(gradient):
            times[0] -= 1
            handle.remove() if times[0] == 0 else None
            return gradient * float("nan")

        handle = parameter.register_hook(hook)
    return batches


def _state(trainer) -> dict[str, np.ndarray]:
    """Weights, buffers and the optimizer's states."""
    state = {
        name: value.double().numpy().copy()
        for name, value in trainer.student.state_dict().items()
        if value is not None and hasattr(value, "double")
    }
    for number, one in enumerate(trainer.optimizer.chained_optimizers):
        for index, of in enumerate(one.optimizer.state.values()):
            for name, value in of.items():
                state[f"{number}/{index}/{name}"] = np.array(value, dtype=np.float64)
    return state


@pytest.mark.slow
def test_the_place_is_named_and_nothing_has_changed() -> None:
    faults = {
        "target": ("on rank 1 the sum of kd of reasoning;", "start another run"),
        "gradient": (f"on rank 1 the gradient of {POISONED};", "init_from.run=runs/mine"),
        "passing": ("computed once more, the same step is finite on every rank;", "run the same"),
    }
    disturbed = run_gloo(_train, 2, tuple(faults))
    for fault, (place, remedy) in faults.items():
        message, worth_keeping = disturbed[0]["said"][fault]
        assert disturbed[1]["said"][fault] == (message, worth_keeping)
        assert place in message and remedy in message and worth_keeping
    undisturbed = run_gloo(_train, 2, ())
    assert _different(disturbed[0]["state"], undisturbed[0]["state"]) == []


@pytest.mark.slow
def test_damaged_weights_are_named_and_not_worth_keeping() -> None:
    for result in run_gloo(_train, 2, ("weight",)):
        message, worth_keeping = result["said"]["weight"]
        assert f"rank 0 holds weights that are not: {POISONED};" in message and not worth_keeping
