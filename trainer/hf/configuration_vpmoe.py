"""Shape of a vpMoE model. Needs transformers alone: this file is copied into every export."""

from transformers import PretrainedConfig

DEFAULTS = {
    "vocab_size": 201_088,
    "hidden_size": 1024,
    "num_hidden_layers": 80,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "intermediate_size": 128,
    "num_dense_layers": 1,
    "num_experts": 256,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 512,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "sliding_window": 128,
    "global_every": 4,
    "rotary_base": 10_000,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "tpa_query_rank": 4,
    "tpa_kv_rank": 2,
    "frequency_log_scale": 16.0,
    "value_residual": True,
    "use_cache": True,
}


class VpMoEConfig(PretrainedConfig):
    """Layer numbers divisible by `global_every` (from 1) see the whole document, the others `sliding_window` positions.

    num_dense_layers: how many layers open the model without experts; intermediate_size: their inner width.
    n_group, topk_group: experts are split into groups, of which the best topk_group are kept for a token.
    tpa_query_rank, tpa_kv_rank: of tensor-product attention in local layers; None: ordinary projections.
    frequency_log_scale: rotary frequencies are exp(log_frequency / scale), learned; None: fixed by rotary_base.
    value_residual: values of layers 2 and later are mixed with those of layer 1.
    layer_types follows from global_every; transformers reads it to make a cache that keeps windows only.
    """

    model_type = "vpmoe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(self, **kwargs):
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        kwargs["layer_types"] = [
            "sliding_attention" if self.is_local(layer) else "full_attention"
            for layer in range(self.num_hidden_layers)
        ]
        special = {"bos_token_id": 199_998, "eos_token_id": 200_002, "pad_token_id": 199_999}
        super().__init__(**({"tie_word_embeddings": False} | special | kwargs))

    def is_local(self, layer):
        """Whether layer `layer`, counted from 0, attends to a window."""
        return (layer + 1) % self.global_every != 0
