"""The student's optimizer: NorMuon for matrices, AdamW for the rest, as one Megatron ChainedOptimizer.

Megatron's own get_megatron_optimizer makes an entry for experts only when EP > 1, so its states cannot move between
EP sizes ("Expected 2 entries in state dict, but got 4"). Here a parameter's entry depends on the parameter alone:

    NorMuon dense     matrices [m, n] but embedding and lm_head
    NorMuon experts   stacks of matrices [E, m, n]
    AdamW dense       embedding, lm_head, norms, biases, sinks
    AdamW experts     their biases [E, F]
    AdamW fp32        what stays fp32 in a bf16 model: a Float16Optimizer would give it the states of others
                      (optimizer/optimizer.py:812 maps float16_groups only)

Without `optimizer.normuon` AdamW takes the matrices too. An entry without parameters is left out; that depends on the
config, never on the layout. Gradient norms of experts are summed over their own model-parallel group (over all ranks
where each owns some: expert_shards.py), those of the rest over theirs; otherwise ranks would clip differently under EP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from common.errors import ConfigError
from trainer.config import RunConfig
from trainer.megatron.expert_shards import ExpertShards, shard_of
from trainer.normuon import NorMuon


class Entry(NamedTuple):
    """One optimizer of the chain. fp32: its parameters are fp32 in a bf16 model too."""

    normuon: bool
    experts: bool
    fp32: bool = False


ENTRIES = (
    Entry(normuon=True, experts=False),
    Entry(normuon=True, experts=True),
    Entry(normuon=False, experts=False),
    Entry(normuon=False, experts=True),
    Entry(normuon=False, experts=False, fp32=True),
)
_EXPERTS = ".mlp.experts."
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_VALUE_RESIDUAL, _GRAPE_M = "value_residual_logit", "rotary_pos_emb.log_frequency"


def build_optimizer(config: RunConfig, model: torch.nn.Module) -> ChainedOptimizer:
    """The chain over the model's parameters, in order of ENTRIES; every parameter is in exactly one.

    Every param group has `lr_mult`, the factor on the rate of the step, and its own constant `weight_decay`.
    Raises ConfigError when a bf16 model holds an fp32 parameter that is not known to stay so, or the reverse.
    """
    named: dict[Entry, dict[str, torch.nn.Parameter]] = {entry: {} for entry in ENTRIES}
    for name, parameter in model.named_parameters():
        entry = _entry(config, name, parameter)
        named[entry][name] = shard_of(parameter)
        if config.precision == "bf16" and (parameter.dtype == torch.float32) != entry.fp32:
            raise ConfigError(
                f"parameter {name} of a bf16 model",
                got=str(parameter.dtype),
                expected=f"fp32 for {_VALUE_RESIDUAL} and {_GRAPE_M} alone",
                remedy="name it in trainer/megatron/optimizer.py, _entry, when it has to stay fp32",
            )
    megatron = _megatron_config(config)
    chain = [_wrapped(config, megatron, entry, of) for entry, of in named.items() if of]
    return ChainedOptimizer(chain)


def gradient_norm(chain: ChainedOptimizer) -> float:
    """Of all parameters, over all model-parallel ranks, after `prepare_grads`. Every rank calls it.

    Megatron's own (optimizer/clip_grads.py:103) waits for the device once a parameter without TransformerEngine.
    """
    squares = []
    for optimizer in chain.chained_optimizers:
        # A tensor-parallel rank may hold copies alone, which count on another.
        grads = optimizer.get_main_grads_for_grad_norm()
        device = optimizer.get_parameters()[0].device
        norms = torch._foreach_norm(grads) if grads else [torch.zeros((), device=device)]
        square = torch.stack(norms).square().sum()
        dist.all_reduce(square, group=optimizer.get_grad_stats_parallel_group())
        squares.append(square)
    return float(torch.stack(squares).sum().sqrt())


def update(
    chain: ChainedOptimizer,
    learning_rate: float,
    max_norm: float,
    total_norm: float,
    shards: ExpertShards | None = None,
) -> None:
    """The update behind `prepare_grads`, gradients scaled so that a total norm above max_norm becomes it.

    In place of ChainedOptimizer.step (optimizer/optimizer.py:1300). NorMuon takes the factor (clip_grads.py,
    clip_coeff) as it reads gradients, which stay as they are: writing them would move 45 GB for the full student.
    AdamW's are changed in place. Experts are first: their 70 ms on the device hide the host's work on the 699 dense
    matrices, and with shards their new weights travel meanwhile.
    """
    factor = min(1.0, max_norm / (total_norm + 1e-6))
    for group in chain.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
    dense = []
    for optimizer in chain.chained_optimizers:
        if optimizer.optimizer.param_groups[0]["is_expert_parallel"]:
            _step(optimizer, factor)
        else:
            dense.append(optimizer)
    arrived = None if shards is None else shards.gather_weights()
    for optimizer in dense:
        _step(optimizer, factor)
    if arrived is not None:
        arrived()


def _step(optimizer: MegatronOptimizer, factor: float) -> None:
    if isinstance(optimizer.optimizer, NorMuon):
        optimizer.optimizer.grad_scale = factor
    elif factor < 1.0:
        torch._foreach_mul_([parameter.grad for parameter in optimizer.get_parameters()], factor)
    optimizer.step_with_ready_grads()


def _entry(config: RunConfig, name: str, parameter: torch.nn.Parameter) -> Entry:
    if name.endswith((_VALUE_RESIDUAL, _GRAPE_M)):
        return Entry(normuon=False, experts=False, fp32=True)
    experts = _EXPERTS in name
    matrix = parameter.ndim == (3 if experts else 2) and not name.endswith(_VOCABULARY)
    return Entry(normuon=matrix and config.optimizer.normuon is not None, experts=experts)


def _groups(
    config: RunConfig, entry: Entry, named: dict[str, torch.nn.Parameter]
) -> list[dict[str, Any]]:
    """Param groups of one entry, unlike in (wd_mult, lr_mult): by these a checkpoint's groups are told apart."""
    of = config.optimizer
    decay = of.normuon.weight_decay if entry.normuon and of.normuon else of.weight_decay
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named.items():
        vector = parameter.ndim == (2 if entry.experts else 1)
        key = (0.0 if vector else 1.0, _rate_factor(config, entry, name))
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": of.lr * lr_mult,
            "weight_decay": decay * wd_mult,
            "wd_mult": wd_mult,
            "lr_mult": lr_mult,
            "is_expert_parallel": entry.experts,
            "is_decoupled_lr": False,
        }
        for (wd_mult, lr_mult), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _rate_factor(config: RunConfig, entry: Entry, name: str) -> float:
    of = config.optimizer
    if entry.normuon and of.normuon:
        return of.normuon.lr / of.lr
    if name.endswith(_VALUE_RESIDUAL):
        return of.rates.value_residual
    return of.rates.grape_m if name.endswith(_GRAPE_M) else 1.0


def _wrapped(
    config: RunConfig,
    megatron: MegatronOptimizerConfig,
    entry: Entry,
    named: dict[str, torch.nn.Parameter],
) -> MegatronOptimizer:
    groups = _groups(config, entry, named)
    plain = _normuon(config, groups) if entry.normuon else _adamw(config, groups)
    init = _init_normuon if entry.normuon else _init_adamw
    if config.precision == "bf16" and not entry.fp32:
        half = _Float16WithRows if entry.normuon else _Float16WithStep
        wrapped = half(plain, megatron, None, init)
    else:
        whole = _FP32WithRows if entry.normuon else _FP32WithStep
        wrapped = whole(plain, megatron, init)
    wrapped.grad_stats_parallel_group = _norm_group(config, entry)
    wrapped.tp_group = parallel_state.get_tensor_model_parallel_group()
    return wrapped


def _norm_group(config: RunConfig, entry: Entry) -> dist.ProcessGroup:
    """The ranks whose parameters of this entry make up the model's."""
    if not entry.experts:
        return parallel_state.get_model_parallel_group()
    if config.parallel.distributed_optimizer:
        return dist.group.WORLD
    return parallel_state.get_expert_tensor_model_pipeline_parallel_group()


def _normuon(config: RunConfig, groups: list[dict[str, Any]]) -> NorMuon:
    of = config.optimizer.normuon
    assert of is not None
    return NorMuon(
        groups,
        of.lr,
        momentum=of.momentum,
        beta2=of.beta2,
        eps=of.eps,
        polar_dtype=torch.bfloat16 if config.device == "cuda" else torch.float32,
    )


def _adamw(config: RunConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """fused on CUDA: one pass, where the other forms keep temporaries of the embedding's size."""
    of = config.optimizer
    return torch.optim.AdamW(
        groups, lr=of.lr, betas=of.betas, eps=of.eps, fused=config.device == "cuda"
    )


def _init_normuon(optimizer: NorMuon, _config: object = None) -> None:
    optimizer.init_state()


def _init_adamw(optimizer: torch.optim.AdamW, _config: object = None) -> None:
    """Moments to load into; the step comes with the checkpoint, one for all parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                }


def _megatron_config(config: RunConfig) -> MegatronOptimizerConfig:
    bf16 = config.precision == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.optimizer.lr,
        clip_grad=config.optimizer.clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


class _RowStatistics:
    """Checkpoints of NorMuon's row mean squares, to be mixed in before one of Megatron's wrappers.

    optim_state_to_sharding_state takes states of the parameter's shape alone, so they are kept from it and then laid
    out as the momentum is, less its last axis.
    """

    optimizer: NorMuon

    def sharded_state_dict(
        self, model_sharded_state_dict: dict, is_loading: bool = False, metadata: dict | None = None
    ) -> dict[str, Any]:
        """As of the wrapper, with `row_second_moment` of every parameter. Zeros stand in before the first step."""
        self.optimizer.init_state()
        states = self.optimizer.state
        rows = {parameter: state.pop("row_second_moment") for parameter, state in states.items()}
        try:
            sharded = super().sharded_state_dict(model_sharded_state_dict, is_loading, metadata)
        finally:
            for parameter, state in states.items():
                state["row_second_moment"] = rows[parameter]
        of_ids = sharded.get("optimizer", sharded)["state"]
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        for number, parameter in enumerate(parameters):
            of_ids[number]["row_second_moment"] = _sharded_rows(
                of_ids[number]["momentum"], rows[parameter]
            )
        return sharded


def _sharded_rows(momentum: ShardedTensor, rows: torch.Tensor) -> ShardedTensor:
    if momentum.axis_fragmentations[-1] != 1:
        raise ConfigError(
            f"{momentum.key} is split along its columns, whose mean squares are one number a row",
            remedy="set optimizer.normuon=null or parallel.tensor=1",
        )
    return replace(
        momentum,
        key=momentum.key.replace("optimizer.state.momentum.", "optimizer.state.row_second_moment."),
        data=rows,
        dtype=rows.dtype,
        local_shape=momentum.local_shape[:-1],
        global_shape=momentum.global_shape[:-1],
        global_offset=momentum.global_offset[:-1],
        axis_fragmentations=momentum.axis_fragmentations[:-1],
    )


class _StepOnHost:
    """AdamW's step count on the host in checkpoints, to be mixed in before one of Megatron's wrappers.

    Fused AdamW keeps it on its GPU; Megatron compares it between ranks and takes another device for another value.
    """

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """As of the wrapper."""
        sharded = super().sharded_state_dict(*arguments, **keywords)
        state = sharded.get("optimizer", sharded)["state"]
        if "common_step" in state:
            state["common_step"] = state["common_step"].cpu()
        return sharded


class _FP32WithStep(_StepOnHost, FP32Optimizer):
    """Megatron's FP32Optimizer around AdamW."""


class _Float16WithStep(_StepOnHost, Float16OptimizerWithFloat16Params):
    """Megatron's Float16OptimizerWithFloat16Params around AdamW; weights are copied by a few launches, not one each."""

    def _copy_main_params_to_model_params(self) -> None:
        torch._foreach_copy_(*self._get_model_and_main_params_data_float16())


class _FP32WithRows(_RowStatistics, FP32Optimizer):
    """Megatron's FP32Optimizer around NorMuon."""


class _Float16WithRows(_RowStatistics, Float16OptimizerWithFloat16Params):
    """Megatron's Float16OptimizerWithFloat16Params around NorMuon, whose step writes the model's weights too.

    A pass of their own would read and write 6 bytes a weight once more: 33 GB of the full student's experts.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        for masters, halves in zip(self.fp32_from_float16_groups, self.float16_groups, strict=True):
            self.optimizer.copies.update(zip(masters, halves, strict=True))

    def _copy_main_params_to_model_params(self) -> None:
        """After the step (optimizer/optimizer.py:585): done by it."""
