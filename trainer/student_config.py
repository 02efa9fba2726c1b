"""The student's shape: configs/student/NAME.yaml. Needs no Megatron, so it can be checked anywhere."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from common.config import Config


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


class TPAConfig(Config):
    """Tensor-product attention of the local layers (arXiv 2501.06425): ranks of the query and of key and value."""

    q_rank: PositiveInt
    kv_rank: PositiveInt


class GrapeMConfig(Config):
    """Learnable rotary frequencies of the local layers (GRAPE-M, arXiv 2512.07805), one vector for all of them.

    log_scale: frequency i is exp(phi_i / log_scale), phi the parameter; rotary_base gives its start.
    """

    log_scale: PositiveFloat = 16.0


class ValueResidualConfig(Config):
    """v_l <- lam_l v_l + (1 - lam_l) v_1 from layer 2 on (arXiv 2410.17897), lam_l the sigmoid of a scalar.

    init: lam at the start, kept within [1e-4, 1 - 1e-4] so that its scalar is finite.
    """

    init: float = Field(1.0, ge=0, le=1)


class StudentConfig(Config):
    """The student's shape; docs/architecture.md holds the locked one (configs/student/vpmoe.yaml).

    layers: all of them, the first `dense_layers` without experts. Layer numbers divisible by global_every are global
    (full document, ALiBi, no rotary); the others see `window` positions including their own and have rotary keys.
    ffn, expert_width, shared_width: inner widths of the dense layer, of one routed expert, of the shared expert.
    tpa, grape_m, value_residual: null leaves a part out: fused QKV everywhere, fixed rotary frequencies, no residual.
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
    tpa: TPAConfig | None = None
    grape_m: GrapeMConfig | None = None
    value_residual: ValueResidualConfig | None = None

    def is_global(self, number: int) -> bool:
        """Whether the layer of this number, counted from 1, sees the whole document."""
        return number % self.global_every == 0

    @property
    def global_layers(self) -> int:
        """How many layers are global."""
        return self.layers // self.global_every

    @property
    def local_layers(self) -> int:
        """How many layers are local."""
        return self.layers - self.global_layers

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
