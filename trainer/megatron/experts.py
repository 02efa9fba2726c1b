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
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_data_parallel_rng_tracker_name
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

Compute = Literal["grouped_mm", "loop"]
_LANES = 8  # grouped_mm wants 16-byte rows: a column more is eight bf16 columns more


class RoutedExperts(MegatronModule):
    """The experts of this rank as four batched parameters.

    fc1_weight [E, F, D], fc1_bias [E, F], fc2_weight [E, D, F], fc2_bias [E, D]. Initial values are drawn for all
    experts and sliced, so they do not depend on the expert-parallel size. `grouped_mm` is one launch per product
    (bf16, CUDA); `loop` is the plain form for any device and dtype, and its reference.
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
        self.compute = _grouped if compute == "grouped_mm" else _loop
        D, F = config.hidden_size, config.moe_ffn_hidden_size
        self.fc1_weight = self._parameter(num_local_experts, (F, D), config.init_method)
        self.fc1_bias = self._parameter(num_local_experts, (F,), torch.nn.init.zeros_)
        self.fc2_weight = self._parameter(
            num_local_experts, (D, F), config.output_layer_init_method
        )
        self.fc2_bias = self._parameter(num_local_experts, (D,), torch.nn.init.zeros_)

    def forward(
        self, x_ND: torch.Tensor, rows_E: torch.Tensor, gate_N: torch.Tensor
    ) -> torch.Tensor:
        """Rows sorted by expert, rows_E of them for each; returns the gated outputs [N, D]."""
        parameters = (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        return self.compute(x_ND, rows_E, gate_N, *parameters)

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
    parts = x_ND.split(rows_E.tolist())
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
    return (y_ND * gate_N.unsqueeze(-1)).to(x_ND.dtype)


def _grouped(
    x_ND: torch.Tensor,
    rows_E: torch.Tensor,
    gate_N: torch.Tensor,
    fc1_EFD: torch.Tensor,
    bias1_EF: torch.Tensor,
    fc2_EDF: torch.Tensor,
    bias2_ED: torch.Tensor,
) -> torch.Tensor:
    if x_ND.shape[0] == 0:
        # Expert parallelism can leave a rank without a row, and grouped_mm refuses such strides in its backward pass.
        return _loop(x_ND, rows_E, gate_N, fc1_EFD, bias1_EF, fc2_EDF, bias2_ED)
    rows_E = rows_E.to(x_ND.device, torch.int32)
    ends_E = rows_E.cumsum(0, dtype=torch.int32)
    expert_N = torch.repeat_interleave(rows_E, output_size=x_ND.shape[0])
    grouped_mm = torch.nn.functional.grouped_mm
    hidden_NF = _AddExpertBias.apply(
        grouped_mm(x_ND, fc1_EFD.transpose(1, 2), offs=ends_E), bias1_EF, expert_N, ends_E
    )
    return _GatedProduct.apply(relu_squared(hidden_NF), gate_N, fc2_EDF, bias2_ED, ends_E)


class _GatedProduct(torch.autograd.Function):
    """gate (W2 h + b2) as one product: [gate h, gate] [W2, b2]'. The gate multiplies rows of width F, not D, and the
    bias and all gradients come out of the products: no pass over [N, D] beside them. The gate's column is its bf16
    rounding and the rest (error 2^-17); the columns of W2 and b2 are joined again in the backward pass, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_NF: torch.Tensor,
        gate_N: torch.Tensor,
        fc2_EDF: torch.Tensor,
        bias2_ED: torch.Tensor,
        ends_E: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(h_NF, gate_N, fc2_EDF, bias2_ED, ends_E)
        joined_EDG = _join_bias(fc2_EDF, bias2_ED)
        return torch.nn.functional.grouped_mm(
            _join_gate(h_NF, gate_N), joined_EDG.transpose(1, 2), offs=ends_E
        )

    @staticmethod
    def backward(ctx: Any, grad_ND: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h_NF, gate_N, fc2_EDF, bias2_ED, ends_E = ctx.saved_tensors
        grad_ND, F = grad_ND.contiguous(), h_NF.shape[1]
        grouped_mm = torch.nn.functional.grouped_mm
        row_NG = grouped_mm(grad_ND, _join_bias(fc2_EDF, bias2_ED), offs=ends_E)
        joined_EDG = grouped_mm(grad_ND.t(), _join_gate(h_NF, gate_N), offs=ends_E)
        inner_NF = row_NG[:, :F].to(gate_N.dtype)
        gate_grad_N = (inner_NF * h_NF).sum(dim=1) + row_NG[:, F]
        h_grad_NF = (inner_NF * gate_N.unsqueeze(1)).to(h_NF.dtype)
        bias_grad_ED = joined_EDG[:, :, F] + joined_EDG[:, :, F + 1]
        return h_grad_NF, gate_grad_N, joined_EDG[:, :, :F].contiguous(), bias_grad_ED, None


def _join_gate(h_NF: torch.Tensor, gate_N: torch.Tensor) -> torch.Tensor:
    """[gate h, high part of gate, low part, zeros], F + 8 columns of h's dtype."""
    joined_NG = h_NF.new_zeros(h_NF.shape[0], h_NF.shape[1] + _LANES)
    F, high_N = h_NF.shape[1], gate_N.to(h_NF.dtype)
    torch.mul(h_NF, gate_N.unsqueeze(1), out=joined_NG[:, :F])
    joined_NG[:, F], joined_NG[:, F + 1] = high_N, gate_N - high_N
    return joined_NG


def _join_bias(fc2_EDF: torch.Tensor, bias2_ED: torch.Tensor) -> torch.Tensor:
    """[W2, b2, b2, zeros], F + 8 columns."""
    zeros_EDG = fc2_EDF.new_zeros(*bias2_ED.shape, _LANES - 2)
    bias_ED1 = bias2_ED.unsqueeze(2)
    return torch.cat([fc2_EDF, bias_ED1, bias_ED1, zeros_EDG], dim=2)


class _AddExpertBias(torch.autograd.Function):
    """x + bias[expert of the row]. The bias gradient is a grouped product with ones: fp32 sums, a fixed order,
    no atomics.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NF: torch.Tensor,
        bias_EF: torch.Tensor,
        expert_N: torch.Tensor,
        ends_E: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(ends_E)
        return x_NF + bias_EF[expert_N]

    @staticmethod
    def backward(ctx: Any, grad_NF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        (ends_E,) = ctx.saved_tensors
        grad_NF = grad_NF.contiguous()
        ones_N8 = torch.ones(grad_NF.shape[0], _LANES, dtype=grad_NF.dtype, device=grad_NF.device)
        sums_E8F = torch.nn.functional.grouped_mm(ones_N8.t(), grad_NF, offs=ends_E)
        return grad_NF, sums_E8F[:, 0].contiguous(), None, None


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
