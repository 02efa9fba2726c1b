"""What a student takes, starts anew and leaves behind: every name is accounted for, or told."""

from __future__ import annotations

import pytest

from common.errors import ConfigError
from trainer.init_from import plan_weights


def _layers(count: int, shape: tuple[int, ...] = (4, 2)) -> dict[str, tuple[int, ...]]:
    return {f"decoder.layers.{i}.mlp.experts.fc1_weight": shape for i in range(count)}


HEAD = {"output_layer.weight": (300, 32)}


def test_alike_students_take_everything() -> None:
    plan = plan_weights(HEAD | _layers(3), HEAD | _layers(3))
    assert (plan.taken, plan.new, plan.dropped) == (HEAD | _layers(3), {}, {})
    assert plan.table()["taken"] == [
        {"name": "output_layer.weight", "shape": [300, 32], "tensors": 1, "parameters": 9600},
        {
            "name": "decoder.layers.{0..2}.mlp.experts.fc1_weight",
            "shape": [4, 2],
            "tensors": 3,
            "parameters": 24,
        },
    ]
    assert plan.text().splitlines()[0] == "taken: 4 tensors, 9,624 numbers"


def test_more_layers_start_anew_where_named() -> None:
    with pytest.raises(ConfigError) as error:
        plan_weights(_layers(2), _layers(5))
    assert (
        "only in the student, not in init_from.new: "
        "decoder.layers.{2..4}.mlp.experts.fc1_weight [4, 2] x 3" in str(error.value)
    )
    plan = plan_weights(_layers(2), _layers(5), new=["decoder.layers.[2-4].*"])
    assert len(plan.taken) == 2 and len(plan.new) == 3 and not plan.dropped


def test_what_only_the_checkpoint_has_is_dropped_where_named() -> None:
    with pytest.raises(
        ConfigError, match=r"only in the checkpoint, not in init_from\.drop: output"
    ):
        plan_weights(HEAD | _layers(1), _layers(1))
    plan = plan_weights(HEAD | _layers(1), _layers(1), drop=["output_layer.*"])
    assert plan.dropped == HEAD and plan.table()["dropped"][0]["parameters"] == 9600


@pytest.mark.parametrize(("new", "drop"), [((), ()), (("output*",), ()), ((), ("output*",))])
def test_another_shape_needs_both_patterns(new, drop) -> None:
    with pytest.raises(ConfigError, match=r"of another shape \(student .*output_layer\.weight"):
        plan_weights(HEAD, {"output_layer.weight": (400, 32)}, new=new, drop=drop)


def test_another_shape_named_on_both_sides_starts_anew() -> None:
    wider = {"output_layer.weight": (400, 32)}
    plan = plan_weights(HEAD | _layers(1), wider | _layers(1), new=["out*"], drop=["out*"])
    assert (plan.taken, plan.new, plan.dropped) == (_layers(1), wider, HEAD)


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        plan_weights(HEAD, HEAD, new=["output*"], drop=["*.a_query"])
    assert "init_from.new names nothing that is only in the student: output*" in str(error.value)
    assert "init_from.drop names nothing that is only in the checkpoint: *.a_query" in str(
        error.value
    )


def test_scattered_layers_are_folded_by_runs() -> None:
    shapes = {f"decoder.layers.{i}.x": (1,) for i in (0, 1, 2, 4, 8, 9)}
    with pytest.raises(ConfigError, match=r"decoder\.layers\.\{0\.\.2,4,8\.\.9\}\.x \[1\] x 6"):
        plan_weights(shapes, {})
