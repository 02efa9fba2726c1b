"""The config of an OPD run: each rule is refused with its message, and the files of configs/ hold them all."""

from __future__ import annotations

from typing import Any

import pytest

from common.config import CONFIG_ROOT, load_config, parse_config
from common.errors import ConfigError
from tests.trainer.megatron.tiny import tiny_config
from tests.trainer.opd.configs import MIX, opd_config, opd_values
from trainer.config import KDConfig
from trainer.opd.config import OPDConfig, parse_run_config

_STAGE = {"modes": MIX}
_SAMPLING = {"slots": 2, "max_reasoning": 8, "max_final": 8}


@pytest.mark.parametrize("name", ["opd", "demo-opd"])
def test_the_configs_load_and_come_back_from_a_checkpoint(name: str) -> None:
    config = load_config(OPDConfig, CONFIG_ROOT / f"{name}.yaml")
    assert parse_run_config(config.resolved(), "a checkpoint") == config
    assert config.init_from is not None
    assert sum(stage.until is None for stage in config.curriculum) == 1


def test_a_checkpoint_says_which_kind_of_run_it_is_of() -> None:
    kd, opd = tiny_config(), opd_config()
    assert type(parse_run_config(kd.resolved(), "here")) is KDConfig
    assert type(parse_run_config(opd.resolved(), "here")) is OPDConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": []}, "curriculum needs a stage"),
        ({"curriculum": [_STAGE, _STAGE]}, "every stage .* but the last has `until`"),
        ({"curriculum": [_STAGE | {"until": 5}]}, "the last has none"),
        (
            {"curriculum": [_STAGE | {"until": 9}, _STAGE | {"until": 5}, _STAGE]},
            "must end one after another",
        ),
        (
            {"curriculum": [_STAGE | {"until": 5}, _STAGE | {"until": 5}, _STAGE]},
            "must end one after another",
        ),
        (
            {"curriculum": [_STAGE | {"rollouts_per_prompt": 4}]},
            "batch.rollouts must be a multiple of every stage's rollouts_per_prompt",
        ),
        (
            {"curriculum": [{"modes": MIX | {"low": 0.4}}]},
            "key 'curriculum.0.modes': the shares of low, medium and high must sum to 1",
        ),
        ({"curriculum": [{"modes": MIX | {"low": -0.5, "high": 1.2}}]}, "modes.low"),
        ({"sampling": _SAMPLING | {"temperature": 0.7}}, "temperature 1; leave the key out"),
        ({"sampling": _SAMPLING | {"slots": 0}}, "sampling.slots"),
        ({"anchor_share": 1.0}, "anchor_share"),
        ({"anchor_share": -0.1}, "anchor_share"),
        ({"staleness": -1}, "staleness"),
        ({"eval": {"every": 1}}, "'eval.prompts' is required"),
        ({"eval": {"prompts": 2, "rows": 2}}, "unknown key 'eval.rows'"),
        ({"batch": {"rollouts": 0, "micro_batch_size": 1}}, "batch.rollouts"),
        ({"samples": {"every": 0}}, "samples.every"),
        ({"teacher": {"name": "tiny"}}, "'teacher.url' is required"),
        ({"schedule": {"kind": "constant", "warmup": 20}}, "warmup must be below steps"),
    ],
)
def test_each_rule_is_refused_with_its_message(changes: dict[str, Any], message: str) -> None:
    parse_config(OPDConfig, opd_values(), "opd.yaml")
    with pytest.raises(ConfigError, match=f"opd.yaml: .*{message}"):
        parse_config(OPDConfig, opd_values(**changes), "opd.yaml")


def test_a_sum_of_shares_may_be_rounded() -> None:
    thirds = {"low": 0.1, "medium": 0.2, "high": 0.7}
    stages = [{"until": 5, "modes": thirds, "rollouts_per_prompt": 3}, {"modes": thirds}]
    assert opd_config(curriculum=stages).curriculum[0].rollouts_per_prompt == 3
