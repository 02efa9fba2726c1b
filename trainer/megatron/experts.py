"""Feed-forward modules of the student: routed experts with batched weights, the shared expert, RMSNorm.

Expert e maps a routed token x with gate p to p * (W2_e relu(W1_e x + b1_e)^2 + b2_e) (ReLU^2: arXiv 2109.08668).

Why not Megatron-Core 0.16.1's own: its local experts add the bias in place on a view and autograd refuses
(transformer/mlp.py:247); GroupedMLP has no bias (transformer/moe/experts.py:84); TransformerEngine's GroupedLinear
launches one GEMM per expert, 66 ms a layer at 256 experts on an H100; SharedExpertMLP refuses a bias and would drop it
(transformer/moe/shared_experts.py:47); WrappedTorchNorm refuses sequence parallelism (transformer/torch_norm.py:32).

Shapes: N routed rows sorted by expert, E experts of this rank, D hidden size, F expert width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import TYPE_CHECKING, Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from trainer.megatron.dispatch import Slots, gather_gates, gather_rows, sort_slots, sum_slots

if TYPE_CHECKING:  # triton is on CUDA alone
    from trainer.kernels.experts import Send
    from trainer.kernels.norm import Unsummed
    from trainer.megatron.crossing import Crossing

Compute = Literal["triton", "loop"]


class RoutedExperts(MegatronModule):
    """The experts of this rank as four batched parameters.

    fc1_weight [E, F, D], fc1_bias [E, F], fc2_weight [E, D, F], fc2_bias [E, D]. Initial values are drawn for all
    experts and sliced, so they do not depend on the expert-parallel size. compute: `triton` is one launch per product
    (bf16, CUDA; trainer/kernels/experts.py), `loop` the plain form for any device and dtype, and its reference.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        compute: Compute,
        pg_collection: Any,
    ) -> None:
        super().__init__(config)
        self.groups = pg_collection
        self.compute = compute
        D, F = config.hidden_size, config.moe_ffn_hidden_size
        self.fc1_weight = self._parameter(num_local_experts, (F, D), config.init_method)
        self.fc1_bias = self._parameter(num_local_experts, (F,), torch.nn.init.zeros_)
        self.fc2_weight = self._parameter(
            num_local_experts, (D, F), config.output_layer_init_method
        )
        self.fc2_bias = self._parameter(num_local_experts, (D,), torch.nn.init.zeros_)

    def forward(
        self,
        x_TD: torch.Tensor,
        gates_TK: torch.Tensor,
        slots: Slots,
        *bases_TD: torch.Tensor,
        unsummed: Unsummed | Crossing | None = None,
        send: Send | None = None,
    ) -> torch.Tensor:
        """The sum of bases, at most two, and of the gated outputs of every token's experts here, [T, D].

        slots: of `sort`. unsummed: see trainer/kernels/norm.py, send: trainer/kernels/experts.py; with `triton` alone.
        """
        parameters = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        if self.compute == "triton":
            from trainer.kernels.experts import fused_experts

            inputs = (x_TD, gates_TK, slots, bases_TD, *parameters)
            return fused_experts(*inputs, sums=_sums(parameters), unsummed=unsummed, send=send)
        y_ND = _loop(
            gather_rows(x_TD, slots), slots.rows_E, gather_gates(gates_TK, slots), *parameters
        )
        return sum(bases_TD, start=sum_slots(y_ND, slots))

    def sort(self, experts_TK: torch.Tensor) -> Slots:
        """Where each slot of each token goes, as `forward` takes it; experts counted over all ranks."""
        ranks, num_local = self.groups.ep.size(), len(self.fc1_bias)
        first = None if ranks == 1 else self.groups.ep.rank() * num_local
        if self.compute == "triton":
            from trainer.kernels import dispatch

            return dispatch.sort_slots(experts_TK, num_local, first)
        return sort_slots(experts_TK, num_local, first)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, ShardedTensor]:
        """Every parameter split over EP on its expert axis; identical on the ranks of the expert data group."""
        groups, axis = self.groups, len(sharded_offsets)
        split = (axis, groups.ep.rank(), groups.ep.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter,
                *sharded_offsets,
                split,
                replica_id=(0, 0, groups.expt_dp.rank()),
                prepend_axis_num=axis,
            )
            for name, parameter in self.named_parameters()
        }

    def _parameter(self, num_local: int, shape: tuple[int, ...], init: Any) -> torch.nn.Parameter:
        config, first = self.config, self.groups.ep.rank() * num_local
        every = torch.empty(config.num_moe_experts, *shape, device=torch.cuda.current_device())
        with _shared_generator(config):
            init(every)
        local = every[first : first + num_local].to(config.params_dtype).clone()
        parameter = torch.nn.Parameter(local)
        parameter.allreduce = config.expert_model_parallel_size == 1
        # Without this optimizer/clip_grads.py leaves the experts of TP ranks above 0 out of the gradient norm, as
        # copies.
        parameter.tensor_model_parallel = config.expert_model_parallel_size > 1
        parameter.partition_dim, parameter.partition_stride = 0, 1
        return parameter


def _sums(parameters: tuple[torch.nn.Parameter, ...]) -> list[torch.Tensor] | None:
    """The fp32 buffers in which Megatron's DDP adds up gradients of micro-batches; None where there is no DDP.

    Its hook adds `grad` of a parameter, and nothing where there is none (distributed_data_parallel.py:437).
    """
    sums = [getattr(parameter, "main_grad", None) for parameter in parameters]
    return None if any(of is None for of in sums) else sums


def _shared_generator(config: TransformerConfig) -> AbstractContextManager[None]:
    """The generator that every rank has in the same state, tensor-parallel ones too: they hold the same experts."""
    if config.use_cpu_initialization:
        return nullcontext()
    return get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name())


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2."""
    return torch.relu(x).square()


def _loop(
    x_ND: torch.Tensor,
    rows_E: torch.Tensor,
    gate_N: torch.Tensor,
    fc1_EFD: torch.Tensor,
    bias1_EF: torch.Tensor,
    fc2_EDF: torch.Tensor,
    bias2_ED: torch.Tensor,
) -> torch.Tensor:
    rows = rows_E.tolist()
    parts = x_ND[: sum(rows)].split(rows)
    weights = zip(
        fc1_EFD.unbind(0), bias1_EF.unbind(0), fc2_EDF.unbind(0), bias2_ED.unbind(0), strict=True
    )
    linear = torch.nn.functional.linear
    y_ND = torch.cat(
        [
            linear(relu_squared(linear(part, w1, b1)), w2, b2)
            for part, (w1, b1, w2, b2) in zip(parts, weights, strict=True)
        ]
    )
    # Nothing from experts elsewhere.
    y_ND = torch.nn.functional.pad(y_ND, (0, 0, 0, len(x_ND) - len(y_ND)))
    return (y_ND * gate_N.unsqueeze(-1)).to(x_ND.dtype)


class SharedExpert(MLP):
    """The expert that every token visits. Returns one tensor, the second bias added."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, *, pg_collection: Any
    ) -> None:
        config = copy(config)
        config.ffn_hidden_size = config.moe_shared_expert_intermediate_size
        super().__init__(
            config, submodules, ffn_hidden_size=config.ffn_hidden_size, tp_group=pg_collection.tp
        )

    def forward(self, hidden_SBD: torch.Tensor) -> torch.Tensor:
        """[S, B, D] to [S, B, D]."""
        out_SBD, bias_D = super().forward(hidden_SBD)
        return out_SBD + bias_D


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, computed in fp32 (arXiv 1910.07467)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis; returns x's dtype."""
        weight = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        return torch.nn.functional.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(
            x.dtype
        )
