"""A small OPD config as plain values, for tests that need no model."""

from __future__ import annotations

from typing import Any

from tests.trainer.megatron.tiny import tiny_config
from trainer.opd.config import OPDConfig

MIX = {"low": 0.5, "medium": 0.3, "high": 0.2}


def opd_values(**changes: Any) -> dict[str, Any]:
    """Values of a valid config; keyword arguments replace top-level keys."""
    shared = tiny_config().resolved()
    shared = {name: shared[name] for name in OPDConfig.model_fields if name in shared}
    own = {
        "teacher": {"name": "tiny", "url": "http://127.0.0.1:1"},
        "loss": {},
        "batch": {"rollouts": 6, "micro_batch_size": 2},
        "sampling": {"slots": 2, "max_reasoning": 8, "max_final": 8},
        "curriculum": [{"modes": MIX}],
        "eval": {"prompts": 2},
    }
    return shared | own | changes


def opd_config(**changes: Any) -> OPDConfig:
    """The config of `opd_values`."""
    return OPDConfig.model_validate(opd_values(**changes))
