"""The config of an OPD run: configs/opd.yaml or configs/demo-opd.yaml. docs/opd.md tells the loop."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from common.config import Config, parse_config
from trainer.config import KDConfig, RunConfig
from trainer.losses.policy import PolicyLossConfig


class SamplingConfig(Config):
    """How the student samples. slots: sequences that a rank decodes at a time.

    max_reasoning, max_final: longest span in sampled tokens, marks included; a rollout ends there, cut.
    Sampling is from the whole distribution, as the objective is that of the distribution that is sampled.
    cuda_graph: whether a step of decoding is captured once a shard and replayed; on CUDA, with parallel.expert=1.
    """

    slots: PositiveInt
    max_reasoning: PositiveInt
    max_final: PositiveInt
    cuda_graph: bool = False
    temperature: float = 1.0

    @field_validator("temperature")
    @classmethod
    def _as_trained(cls, temperature: float) -> float:
        if temperature != 1.0:
            raise ValueError("the objective holds for samples at temperature 1; leave the key out")
        return temperature


class TeacherServerConfig(Config):
    """The teacher: the address of a `vpmoe-data serve`, and who must answer there.

    name: its slug. token_env: environment variable with the bearer token; where it is not set, none is sent.
    request_sec: longest wait for one answer before it is told and asked again. gate_documents: documents of the dataset
    that it scores first, for the alignment gate.
    """

    name: str
    url: str
    token_env: str = "VPMOE_TOKEN"
    request_sec: PositiveFloat = 600.0
    gate_documents: PositiveInt = 8


class ModeMix(Config):
    """Shares of prompts whose teacher is shown each reasoning effort; they sum to 1."""

    low: float = Field(ge=0, le=1)
    medium: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if abs(self.low + self.medium + self.high - 1) > 1e-9:
            raise ValueError("the shares of low, medium and high must sum to 1")
        return self


class StageConfig(Config):
    """A stage of the curriculum. until: null for the last stage; of the others, sampled tokens of the whole run (all
    ranks) after which no shard of this stage begins.
    """

    until: PositiveInt | None = None
    modes: ModeMix
    rollouts_per_prompt: PositiveInt = 1


class OPDBatchConfig(Config):
    """rollouts: sampled for one optimizer step, by all ranks. micro_batch_size: packed rows of one pass of a rank."""

    rollouts: PositiveInt
    micro_batch_size: PositiveInt


class OPDEvalConfig(Config):
    """every: steps between evaluations (0: only after the last). prompts: held out, the first of the valid split."""

    every: int = Field(0, ge=0)
    prompts: PositiveInt
    rollouts_per_prompt: PositiveInt = 1


class SamplesConfig(Config):
    """Rollouts as text in samples.jsonl and TensorBoard. every: steps between them; count: of one step."""

    every: PositiveInt = 50
    count: PositiveInt = 2


class OPDConfig(RunConfig):
    """One run of `vpmoe-train opd`.

    dataset: gives the prompts, the rows of the anchor (train split) and the held-out prompts (valid split).
    staleness: optimizer steps between the weights that sample a rollout and those that it trains; 0 is the synchronous
    loop. anchor_share: part of all trained rows that are rows of the dataset, with cross entropy.
    """

    teacher: TeacherServerConfig
    sampling: SamplingConfig
    curriculum: tuple[StageConfig, ...]
    batch: OPDBatchConfig
    loss: PolicyLossConfig = PolicyLossConfig()
    anchor_share: float = Field(0.15, ge=0, lt=1)
    staleness: int = Field(1, ge=0)
    eval: OPDEvalConfig
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="after")
    def _loop_fits(self) -> Self:
        stages = self.curriculum
        ends = [stage.until for stage in stages]
        rules = [
            (len(stages) > 0, "curriculum needs a stage"),
            (
                all(end is not None for end in ends[:-1]) and ends[-1:] in ([None], []),
                "every stage of the curriculum but the last has `until`, the last has none",
            ),
            (
                [end for end in ends if end] == sorted({end for end in ends if end}),
                "the stages of the curriculum must end one after another",
            ),
            (
                all(self.batch.rollouts % stage.rollouts_per_prompt == 0 for stage in stages),
                "batch.rollouts must be a multiple of every stage's rollouts_per_prompt",
            ),
        ]
        for holds, rule in rules:
            if not holds:
                raise ValueError(rule)
        return self


def as_kd(config: OPDConfig, teacher: str | None) -> dict[str, Any]:
    """Values of the KD config whose evaluation is that of this run's student on the valid rows of its dataset.

    teacher: slug of the dataset's targets, None for cross entropy alone.
    """
    values = config.resolved()
    micro = config.batch.micro_batch_size
    return {key: values[key] for key in RunConfig.model_fields} | {
        "teacher": teacher,
        "batch": {"global_batch_size": micro, "micro_batch_size": micro},
        "loss": {
            "kd_weight": float(teacher is not None),
            "span_weights": values["loss"]["span_weights"],
            "chunk_tokens": config.loss.chunk_tokens,
        },
    }


def parse_run_config(values: dict[str, Any], where: str) -> RunConfig:
    """The config of a run of either kind, from plain values as a checkpoint holds them."""
    return parse_config(OPDConfig if "sampling" in values else KDConfig, values, where)
