"""The config of a KD run: one YAML file, `configs/base.yaml` or `configs/demo.yaml`.

`student: NAME` reads configs/student/NAME.yaml. Keys that hold a later part of the locked student (`student.tpa`
and the like) exist and are refused until that part does. Needs no Megatron, so a config can be checked anywhere.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config import Config
from datastore.budget import BudgetLimits
from trainer.losses.spans import LossConfig

_LATER = {
    "tpa": "tensor-product attention",
    "grape_m": "learnable rotary frequencies",
    "value_residual": "the value residual",
}


class RouterConfig(Config):
    """DeepSeek-V3 routing (arXiv 2412.19437, 2408.15664): sigmoid scores, expert groups, bias-balanced load.

    groups: experts are split into this many; group_topk of them are kept for a token. scaling: factor on the gates,
    which sum to 1 before it. bias_update_rate: step of the balancing bias per optimizer step. aux_loss: coefficient
    of the sequence-wise balance loss.
    """

    groups: PositiveInt
    group_topk: PositiveInt
    scaling: PositiveFloat = 2.5
    bias_update_rate: PositiveFloat = 1e-3
    aux_loss: float = Field(1e-4, ge=0)


class StudentConfig(Config):
    """The student's shape; docs/architecture.md holds the locked one (configs/student/vpmoe.yaml).

    layers: all of them, the first `dense_layers` without experts. Layer numbers divisible by global_every are global
    (full document, ALiBi, no rotary); the others see `window` positions including their own and have rotary keys.
    ffn, expert_width, shared_width: inner widths of the dense layer, of one routed expert, of the shared expert.
    """

    layers: PositiveInt
    hidden: PositiveInt
    heads: PositiveInt
    kv_groups: PositiveInt
    head_dim: PositiveInt
    dense_layers: PositiveInt = 1
    ffn: PositiveInt
    experts: PositiveInt
    experts_per_token: PositiveInt
    expert_width: PositiveInt
    shared_width: PositiveInt
    router: RouterConfig
    window: PositiveInt = 128
    global_every: PositiveInt = 4
    rotary_base: PositiveInt = 10_000
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02
    vocab_size: PositiveInt = 201_088
    tpa: None = None
    grape_m: None = None
    value_residual: None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_slots(cls, raw: object) -> object:
        for key, what in _LATER.items():
            if isinstance(raw, dict) and raw.get(key) is not None:
                raise ValueError(
                    f"student.{key} comes with {what}, which this version does not have; set it to null"
                )
        return raw

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        router = self.router
        rules = [
            (self.heads % self.kv_groups == 0, "heads must be a multiple of kv_groups"),
            (self.head_dim % 2 == 0, "head_dim must be even (rotary pairs)"),
            (self.layers % self.global_every == 0, "layers must be a multiple of global_every"),
            (
                self.dense_layers < self.layers,
                "dense_layers must leave at least one layer with experts",
            ),
            (self.experts % router.groups == 0, "experts must be a multiple of router.groups"),
            (
                self.experts_per_token % router.group_topk == 0,
                "experts_per_token must be a multiple of router.group_topk",
            ),
            (router.group_topk <= router.groups, "router.group_topk is at most router.groups"),
            (
                self.experts_per_token <= router.group_topk * (self.experts // router.groups),
                "the kept groups hold fewer than experts_per_token experts",
            ),
        ]
        for holds, rule in rules:
            if not holds:
                raise ValueError(f"student: {rule}")
        return self


class ParallelConfig(Config):
    """How one model is spread over processes; data parallelism is what remains of the world size.

    tensor: TP size, with sequence_parallel when above 1. expert: EP size, a part of the data-parallel ranks.
    Which layouts run: trainer/megatron/topology.py, `check_layout`.
    """

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    expert: PositiveInt = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False


class ModelRuntime(Config):
    """How the model is computed: nothing here is guessed from the machine.

    transformer_impl: norms and linear layers, Megatron's own or TransformerEngine's (CUDA only).
    core_attention: FlexAttention (CUDA only) or the dense evaluation of the same functions, S x S scores kept.
    expert_compute: one grouped product for all experts (CUDA, bf16) or a plain loop. precision: of weights and
    activations; gradients and optimizer states are fp32. deterministic: only kernels that repeat bit by bit.
    recompute: keep only layer inputs and compute each layer again in the backward pass.
    """

    device: Literal["cpu", "cuda"]
    transformer_impl: Literal["local", "transformer_engine"]
    core_attention: Literal["flex", "dense"]
    expert_compute: Literal["grouped_mm", "loop"]
    precision: Literal["fp32", "bf16"]
    deterministic: bool = False
    recompute: bool = False

    @model_validator(mode="after")
    def _runs_there(self) -> Self:
        cuda = self.device == "cuda"
        rules = [
            (
                cuda or self.core_attention != "flex",
                "core_attention: flex needs device: cuda (it has no backward on CPU); set it to dense",
            ),
            (
                cuda or self.transformer_impl == "local",
                "transformer_impl: transformer_engine needs device: cuda; set it to local",
            ),
            (
                self.expert_compute == "loop" or (cuda and self.precision == "bf16"),
                "expert_compute: grouped_mm needs device: cuda and precision: bf16; set it to loop",
            ),
        ]
        for holds, rule in rules:
            if not holds:
                raise ValueError(rule)
        return self


class BatchConfig(Config):
    """Packed rows: of one optimizer step, and of one forward pass of a rank (changes memory and speed, not the
    result).
    """

    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101). No decay on biases, norms, sinks and other vectors. clip: of the global gradient
    norm.
    """

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    clip: PositiveFloat = 1.0
    normuon: None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_slots(cls, raw: object) -> object:
        if isinstance(raw, dict) and raw.get("normuon") is not None:
            raise ValueError(
                "optimizer.normuon comes with a later version; set it to null for AdamW on every parameter"
            )
        return raw


class ScheduleConfig(Config):
    """Linear warmup over `warmup` steps, then constant, or a cosine from lr to min_lr at the last step."""

    kind: Literal["constant", "cosine"]
    warmup: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)


class CheckpointConfig(Config):
    """every: steps between checkpoints (the last step is always kept). keep: how many stay on disk."""

    every: PositiveInt
    keep: PositiveInt = 2


class EvalConfig(Config):
    """every: steps between evaluations, one before the first step and one after the last (0: only the last).

    rows: of the valid split, from its start; null: all.
    """

    every: int = Field(0, ge=0)
    rows: PositiveInt | None = None


class LogConfig(Config):
    """every: steps between lines for people and machines (metrics.jsonl, TensorBoard)."""

    every: PositiveInt = 1


class KDConfig(ModelRuntime):
    """One run of `vpmoe-train kd`.

    run: folder of the run. dataset: a built dataset; its valid split is evaluated. teacher: slug of the targets
    under it, null for cross entropy alone. kd_share: part of every global batch's rows that use their targets; the
    others train with cross entropy. Where only a part of the rows is scored it mixes the two kinds, and 1 reads scored
    rows alone (docs/order.md). budget: limits on the targets' own error, checked before the first step.
    steps: optimizer steps.
    """

    INCLUDES: ClassVar[dict[str, str]] = {"student": "student"}

    run: str
    dataset: str
    teacher: str | None
    student: StudentConfig
    seed: int = Field(0, ge=0)
    steps: PositiveInt
    batch: BatchConfig
    loss: LossConfig
    kd_share: float = Field(1.0, ge=0, le=1)
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig
    eval: EvalConfig = EvalConfig()
    budget: BudgetLimits = BudgetLimits()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _whole_run(self) -> Self:
        rules = [
            (self.schedule.warmup < self.steps, "schedule.warmup must be below steps"),
            (self.schedule.min_lr <= self.optimizer.lr, "schedule.min_lr is above optimizer.lr"),
            (
                self.batch.global_batch_size % self.batch.micro_batch_size == 0,
                "batch.global_batch_size must be a multiple of batch.micro_batch_size",
            ),
            (
                self.teacher is not None or self.loss.kd_weight == 0,
                "loss.kd_weight above 0 needs a teacher; name its slug, or set loss.kd_weight=0",
            ),
            (
                self.teacher is not None or self.loss.confidence is None,
                "loss.confidence weighs by a teacher's logprobs: name the teacher's slug, or set it to null",
            ),
        ]
        for holds, rule in rules:
            if not holds:
                raise ValueError(rule)
        return self
