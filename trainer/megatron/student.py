"""The student: Megatron-Core's GPTModel from our specs, returning hidden states (the loss owns the lm_head product).

Every layer gets a fresh spec: models/gpt/gpt_layer_specs.py repeats one object, and an edit to one layer would
reach all. `core_attention` and `linear_qkv` are plain callables there, the other slots go through build_module
(transformer/attention.py:318,1267).
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import get_expert_model_parallel_group
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from trainer.config import ModelRuntime, ParallelConfig
from trainer.megatron.attention import CoreAttention
from trainer.megatron.embedding import SummedEmbedding
from trainer.megatron.exchange import Exchange, exchange_over
from trainer.megatron.expert_shards import ExpertShards
from trainer.megatron.experts import RMSNorm, relu_squared
from trainer.megatron.fused_layer import CompiledLayer, is_plain, rotation_table
from trainer.megatron.moe import StudentMoE
from trainer.megatron.rotary import GrapeM
from trainer.megatron.self_attention import ValueResidualAttention, ValueResidualLayer
from trainer.megatron.tpa import TPAProjection
from trainer.student_config import StudentConfig

_FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
# Megatron's defaults turn on kernels of Apex, or drop units; none of that is in the student.
_PLAIN_PATHS = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
}


class Student(GPTModel):
    """GPTModel whose forward ends at the final norm: it returns [S, B, D], under sequence parallelism this rank's S.

    The lm_head is `output_layer.weight` [V / TP, D], untied from the embedding; losses multiply by it in chunks, so
    logits [S, B, V] never exist. takes_table: its layers are CompiledLayers. expert_shards: where the optimizer's ranks
    share experts out (ddp.py).
    """

    takes_table = False
    expert_shards: ExpertShards | None = None

    def _preprocess(self, *arguments: Any, packed_seq_params: Any, **keywords: Any) -> tuple:
        """Rows that say their positions are rotated by these, from the same table of angles as all others."""
        hidden_SBD, angle_SB1C, *rest = super()._preprocess(
            *arguments, packed_seq_params=packed_seq_params, **keywords
        )
        if packed_seq_params.position_SB is not None:
            angle_SB1C = angle_SB1C[packed_seq_params.position_SB, 0]
        elif self.takes_table and is_plain(packed_seq_params):
            return hidden_SBD, rotation_table(angle_SB1C), *rest
        return hidden_SBD, angle_SB1C, *rest

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


def build_student(
    student: StudentConfig,
    runtime: ModelRuntime,
    parallel: ParallelConfig,
    seq_len: int,
    *,
    initialise: bool = True,
) -> Student:
    """The model on this rank's device, initialised from the seeded generators unless told otherwise."""
    config = transformer_config(student, runtime, parallel)
    if not initialise:
        config.perform_initialization = config.use_cpu_initialization = False
    model = Student(
        config,
        block_spec(student, runtime),
        vocab_size=student.vocab_size,
        max_sequence_length=seq_len,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=student.rotary_base,
    )
    model.takes_table = runtime.transformer_impl == "compiled"
    if student.grape_m is not None:
        model.rotary_pos_emb = GrapeM(
            student.head_dim,
            student.rotary_base,
            student.grape_m.log_scale,
            sequence_parallel=config.sequence_parallel,
        )
    if runtime.device == "cpu":
        return model
    model = model.cuda()
    if runtime.transformer_impl == "compiled" and parallel.tensor == 1:
        SummedEmbedding(model.embedding.word_embeddings)
    return model


def transformer_config(
    student: StudentConfig, runtime: ModelRuntime, parallel: ParallelConfig
) -> TransformerConfig:
    """Megatron's config. Its defaults that would add dropout, fused kernels of other paths or another norm are
    set here.
    """
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    return TransformerConfig(
        num_layers=student.layers,
        hidden_size=student.hidden,
        num_attention_heads=student.heads,
        num_query_groups=student.kv_groups,
        kv_channels=student.head_dim,
        ffn_hidden_size=student.ffn,
        activation_func=relu_squared,
        gated_linear_unit=False,
        add_bias_linear=True,
        normalization="RMSNorm",
        layernorm_epsilon=student.norm_eps,
        qk_layernorm=True,
        init_method_std=student.init_std,
        window_size=(student.window - 1, 0),
        window_attn_skip_freq=student.global_every,
        no_rope_freq=student.global_every,
        rotary_interleaved=False,
        num_moe_experts=student.experts,
        moe_layer_freq=[0] * student.dense_layers + [1] * (student.layers - student.dense_layers),
        moe_ffn_hidden_size=student.expert_width,
        moe_shared_expert_intermediate_size=student.shared_width,
        **_router_settings(student),
        tensor_model_parallel_size=parallel.tensor,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.sequence_parallel,
        bf16=runtime.precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        deterministic_mode=runtime.deterministic,
        use_cpu_initialization=runtime.device == "cpu",
        **(_FULL_RECOMPUTE if runtime.recompute else {}),
        **_PLAIN_PATHS,
        hetereogenous_dist_checkpoint=True,
        cuda_graph_scope=[],
    )


def _router_settings(student: StudentConfig) -> dict[str, Any]:
    router = student.router
    return {
        "moe_router_topk": student.experts_per_token,
        "moe_router_num_groups": router.groups,
        "moe_router_group_topk": router.group_topk,
        "moe_router_topk_scaling_factor": router.scaling,
        "moe_router_score_function": "sigmoid",
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": router.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": router.aux_loss,
    }


def block_spec(student: StudentConfig, runtime: ModelRuntime) -> TransformerBlockSubmodules:
    """One fresh spec for each layer, and the final norm."""
    exchange = exchange_over(get_expert_model_parallel_group())
    layers = [
        _layer_spec(student, runtime, number, exchange) for number in range(1, student.layers + 1)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_parts(runtime)["norm"])


def _layer_spec(
    student: StudentConfig, runtime: ModelRuntime, number: int, exchange: Exchange | None
) -> ModuleSpec:
    """Layer `number`, counted from 1. Global layers, and all without student.tpa, have the fused projection."""
    part = _parts(runtime)
    dense = number <= student.dense_layers
    factored = student.tpa is not None and not student.is_global(number)
    return ModuleSpec(
        module=_layer_class(student, runtime),
        submodules=TransformerLayerSubmodules(
            input_layernorm=part["norm"] if factored else part["norm_before_linear"],
            self_attention=_attention_spec(student, runtime, factored),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=part["norm_before_linear"] if dense else part["norm"],
            mlp=_dense_spec(part) if dense else _experts_spec(part, runtime, exchange),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_norm_keys(factored, dense)
            if runtime.transformer_impl != "transformer_engine"
            else {},
        ),
    )


def _layer_class(student: StudentConfig, runtime: ModelRuntime) -> type[TransformerLayer]:
    if runtime.transformer_impl == "compiled":
        return CompiledLayer
    return TransformerLayer if student.value_residual is None else ValueResidualLayer


def _attention_spec(student: StudentConfig, runtime: ModelRuntime, factored: bool) -> ModuleSpec:
    part, residual = _parts(runtime), student.value_residual
    return ModuleSpec(
        module=SelfAttention if residual is None else ValueResidualAttention,
        params={"attn_mask_type": AttnMaskType.causal}
        | ({} if residual is None else {"init": residual.init}),
        submodules=SelfAttentionSubmodules(
            linear_qkv=partial(TPAProjection, **student.tpa.model_dump())
            if factored
            else part["norm_column"],
            core_attention=partial(CoreAttention, backend=runtime.core_attention),
            linear_proj=part["row"],
            q_layernorm=part["norm"],
            k_layernorm=part["norm"],
        ),
    )


def _dense_spec(part: dict[str, Any]) -> ModuleSpec:
    return ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=part["norm_column"], linear_fc2=part["row"])
    )


def _experts_spec(
    part: dict[str, Any], runtime: ModelRuntime, exchange: Exchange | None
) -> SimpleNamespace:
    """Not a ModuleSpec: TransformerLayer warns in every layer of one whose class it does not know."""
    return SimpleNamespace(
        module=StudentMoE,
        submodules=MLPSubmodules(linear_fc1=part["column"], linear_fc2=part["row"]),
        params={"compute": runtime.expert_compute, "exchange": exchange},
    )


def _parts(runtime: ModelRuntime) -> dict[str, Any]:
    """Norms and linear layers: Megatron's local ones, or TransformerEngine's with the norm fused into the next
    product.
    """
    if runtime.transformer_impl != "transformer_engine":
        return {
            "norm": RMSNorm,
            "norm_before_linear": RMSNorm,
            "column": ColumnParallelLinear,
            "norm_column": ColumnParallelLinear,
            "row": RowParallelLinear,
        }
    from megatron.core.extensions import transformer_engine as te

    return {
        "norm": te.TENorm,
        "norm_before_linear": IdentityOp,
        "column": te.TEColumnParallelLinear,
        "norm_column": te.TELayerNormColumnParallelLinear,
        "row": te.TERowParallelLinear,
    }


def _norm_keys(factored: bool, dense: bool) -> dict[str, str]:
    """Checkpoint names of the norms that TransformerEngine fuses into the next product, so that both forms read one
    checkpoint; TPA layers keep theirs apart in both.
    """
    attention = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    mlp = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
    return ({} if factored else attention) | (mlp if dense else {})
