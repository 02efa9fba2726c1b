"""The config of a KD run: one YAML file, `configs/base.yaml` or `configs/demo.yaml`.

`student: NAME` reads configs/student/NAME.yaml (trainer/student_config.py). Needs no Megatron, so a config can be
checked anywhere.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config import Config
from datastore.budget import BudgetLimits
from trainer.losses.spans import LossConfig
from trainer.student_config import StudentConfig


class ParallelConfig(Config):
    """How one model is spread over processes; data parallelism is what remains of the world size.

    tensor: TP size, with sequence_parallel when above 1. expert: EP size, a part of the data-parallel ranks.
    distributed_optimizer: ranks that hold the same routed experts share them out for the optimizer, its states and fp32
    weights included; the experts of a rank must be a multiple of those ranks.
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

    transformer_impl: layers as Megatron's own modules, as TransformerEngine's (CUDA only), or compiled: Megatron's hold
    the weights, compiled functions and kernels compute them (CUDA with triton attention, no tensor parallelism).
    core_attention: Triton kernels (CUDA, bf16) or the dense evaluation of the same functions, S x S scores kept.
    expert_compute: grouped Triton kernels for all experts at once (CUDA, bf16) or a plain loop. precision: of weights
    and activations; gradients and optimizer states are fp32. deterministic: only kernels that repeat bit by bit.
    recompute: keep only layer inputs and compute each layer again in the backward pass.
    cuda_graph: the layers' forward and backward passes are recorded before the first step and replayed, so that no
    kernel waits for the host to launch it (compiled and triton, no recompute).
    """

    device: Literal["cpu", "cuda"]
    transformer_impl: Literal["local", "transformer_engine", "compiled"]
    core_attention: Literal["triton", "dense"]
    expert_compute: Literal["triton", "loop"]
    precision: Literal["fp32", "bf16"]
    deterministic: bool = False
    recompute: bool = False
    cuda_graph: bool = False

    @staticmethod
    def on_cpu(precision: Literal["fp32", "bf16"]) -> ModelRuntime:
        """The plain forms, which run in any process."""
        return ModelRuntime(
            device="cpu",
            transformer_impl="local",
            core_attention="dense",
            expert_compute="loop",
            precision=precision,
        )

    @model_validator(mode="after")
    def _runs_there(self) -> Self:
        cuda = self.device == "cuda"
        rules = [
            (
                self.core_attention == "dense" or (cuda and self.precision == "bf16"),
                "core_attention: triton needs device: cuda and precision: bf16; set it to dense",
            ),
            (
                cuda or self.transformer_impl == "local",
                "transformer_impl: transformer_engine needs device: cuda; set it to local",
            ),
            (
                self.expert_compute == "loop" or (cuda and self.precision == "bf16"),
                "expert_compute: triton needs device: cuda and precision: bf16; set it to loop",
            ),
            (
                self.transformer_impl != "compiled" or self.core_attention == "triton",
                "transformer_impl: compiled needs core_attention: triton; set it to local",
            ),
            (
                not self.cuda_graph
                or (self.transformer_impl, self.expert_compute) == ("compiled", "triton"),
                "cuda_graph needs transformer_impl: compiled and expert_compute: triton; set it to false",
            ),
            (
                not (self.cuda_graph and self.recompute),
                "cuda_graph and recompute exclude each other (recomputation forks random states on the host)",
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


class NorMuonConfig(Config):
    """NorMuon (arXiv 2510.05491) with Polar Express (arXiv 2505.16932) for every matrix but embedding and lm_head.

    lr: peak of its own, on the schedule of optimizer.lr. momentum: of the gradient; beta2, eps: of the mean square of
    every row.
    """

    lr: PositiveFloat
    momentum: float = Field(0.95, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: PositiveFloat = 1e-10
    weight_decay: float = Field(0.1, ge=0)


class RateConfig(Config):
    """Factors on optimizer.lr for parameters whose scale is not a weight's (docs/architecture.md says why).

    value_residual: the scalars of lam_l. grape_m: the log frequencies.
    """

    value_residual: PositiveFloat = 100.0
    grape_m: PositiveFloat = 1.0


class OptimizerConfig(Config):
    """AdamW (arXiv 1711.05101), for everything or, beside `normuon`, for embedding, lm_head, vectors and scalars.

    No decay on biases, norms, sinks and other vectors. clip: of the global gradient norm. rates: factors on lr.
    """

    lr: PositiveFloat
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0)
    clip: PositiveFloat = 1.0
    normuon: NorMuonConfig | None = None
    rates: RateConfig = RateConfig()


class ScheduleConfig(Config):
    """Linear warmup over `warmup` steps, then constant, or a cosine from lr to min_lr at the last step."""

    kind: Literal["constant", "cosine"]
    warmup: int = Field(0, ge=0)
    min_lr: float = Field(0.0, ge=0)


class CheckpointConfig(Config):
    """every: steps between checkpoints (the last step is always kept). keep: how many stay on disk.

    asynchronous: steps go on while a checkpoint is written; it needs host memory for a second copy of the states.
    """

    every: PositiveInt
    keep: PositiveInt = 2
    asynchronous: bool = False


class InitFromConfig(Config):
    """Weights of another run's checkpoint as the start of this one; optimizer, stream and step begin anew.

    run: its folder. step: of the checkpoint, null for the newest. new, drop: shell patterns of the names of parameters
    that only this student, or only that checkpoint, has; any other difference is an error.
    """

    run: str
    step: PositiveInt | None = None
    new: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


class WatchConfig(Config):
    """When a run stops by itself. data_sec: longest wait for the rows of a step. silent_sec: longest silence of a rank.

    stuck_sec: longest time without a finished step, first step and its compilation included.
    """

    data_sec: PositiveFloat = 30.0
    silent_sec: PositiveFloat = 30.0
    stuck_sec: PositiveFloat = 1800.0


class EvalConfig(Config):
    """every: steps between evaluations, one before the first step and one after the last (0: only the last).

    rows: of the valid split, from its start; null: all.
    """

    every: int = Field(0, ge=0)
    rows: PositiveInt | None = None


class LogConfig(Config):
    """every: steps between lines for people and machines (metrics.jsonl, TensorBoard)."""

    every: PositiveInt = 1


class RunConfig(ModelRuntime):
    """What every run that trains has: its folder, its student, its steps.

    run: folder of the run. dataset: a built dataset. steps: optimizer steps.
    """

    INCLUDES: ClassVar[dict[str, str]] = {"student": "student"}

    run: str
    dataset: str
    student: StudentConfig
    seed: int = Field(0, ge=0)
    steps: PositiveInt
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = ParallelConfig()
    init_from: InitFromConfig | None = None
    checkpoint: CheckpointConfig
    watch: WatchConfig = WatchConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.schedule.warmup >= self.steps:
            raise ValueError("schedule.warmup must be below steps")
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError("schedule.min_lr is above optimizer.lr")
        return self


class KDConfig(RunConfig):
    """One run of `vpmoe-train kd`.

    The dataset's valid split is evaluated. teacher: slug of the targets under it, null for cross entropy alone.
    kd_share: part of every global batch's rows that use their targets; the others train with cross entropy. Where only
    a part of the rows is scored it mixes the two kinds, and 1 reads scored rows alone (docs/order.md).
    budget: limits on the targets' own error, checked before the first step.
    """

    teacher: str | None
    batch: BatchConfig
    loss: LossConfig
    kd_share: float = Field(1.0, ge=0, le=1)
    eval: EvalConfig = EvalConfig()
    budget: BudgetLimits = BudgetLimits()

    @model_validator(mode="after")
    def _whole_run(self) -> Self:
        rules = [
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
