"""vpMoE for Hugging Face transformers. Needs torch and transformers alone: this file is copied into every export.

A decoder of pre-norm layers x += attention(norm(x)), x += mlp(norm(x)). For head h, query i and key j <= i, in fp32:

    s_ij = q_i . k_j / sqrt(head_dim)  -  [global layers] 2^(-8 h / H) (i - j)      ALiBi, arXiv 2108.12409
    p_ij = exp(s_ij) / (exp(sink_h) + sum_j' exp(s_ij'))                            a learned key without a value

Local layers see i - j < window and rotate queries and keys by i * theta (GRAPE-M, arXiv 2512.07805); their projections
may be tensor products (arXiv 2501.06425). Values of later layers may be mixed with those of the first (arXiv
2410.17897). Every position enters by a distance alone, so left padding needs nothing but its mask.

Shapes: B rows, Q new positions, K keys at hand, D hidden, H heads, G key-value heads, C head size, E experts, T = B Q.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_vpmoe import VpMoEConfig


def wide(x):
    """x in fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VpMoERMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32."""

    def __init__(self, size, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        """Any [..., size]; returns x's dtype."""
        normed = F.rms_norm(wide(x), self.weight.shape, wide(self.weight), self.eps)
        return normed.to(x.dtype)


class VpMoERotary(nn.Module):
    """Angles of the local layers: theta_c = exp(log_frequency_c / scale), c < C / 2, learned and in fp32, or fixed."""

    def __init__(self, config):
        super().__init__()
        self.size, self.base = config.head_dim, config.rotary_base
        self.scale = config.frequency_log_scale
        if self.scale is not None:
            self.log_frequency = nn.Parameter(self.scale * self.fixed_log_theta())

    def fixed_log_theta(self, device=None):
        """ln(base^(-2 c / C)), [C / 2]."""
        even = torch.arange(0, self.size, 2, dtype=torch.float32, device=device)
        return even * (-math.log(self.base) / self.size)

    def forward(self, position_Q):
        """cos and sin, each fp32 [Q, C / 2]."""
        if self.scale is None:
            log_theta = self.fixed_log_theta(position_Q.device)
        else:
            log_theta = self.log_frequency.float() / self.scale
        angle = position_Q.float()[:, None] * log_theta.exp()
        return angle.cos(), angle.sin()


def rotate(x_BHQC, rotation):
    """Turn the pair (c, c + C / 2) of every head by its angle."""
    cos, sin = rotation
    first, second = wide(x_BHQC).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BHQC.dtype)


class TensorProductLinear(nn.Module):
    """heads vectors a_h of rank numbers times rank vectors of C numbers, both linear in x, over rank; then the bias."""

    def __init__(self, hidden, heads, size, rank):
        super().__init__()
        self.heads, self.size, self.rank = heads, size, rank
        self.a_weight = nn.Parameter(torch.empty(heads * rank, hidden))
        self.b_weight = nn.Parameter(torch.empty(rank * size, hidden))
        self.bias = nn.Parameter(torch.zeros(heads * size))

    def forward(self, x_BQD):
        """Returns [B, Q, heads * C]."""
        a = F.linear(x_BQD, self.a_weight).unflatten(-1, (self.heads, self.rank))
        b = F.linear(x_BQD, self.b_weight).unflatten(-1, (self.rank, self.size))
        return (a @ b / self.rank).flatten(-2) + self.bias


def projection(hidden, heads, size, rank):
    """hidden -> heads * size, as a tensor product where there is a rank."""
    if rank is None:
        return nn.Linear(hidden, heads * size)
    return TensorProductLinear(hidden, heads, size, rank)


class VpMoEAttention(nn.Module):
    """Attention of one layer, with its sinks, QK-norm (arXiv 2010.04245) and its part of the value residual."""

    def __init__(self, config, layer):
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.layer, self.heads, self.groups, self.size = layer, heads, groups, size
        self.window = config.sliding_window if config.is_local(layer) else None
        tpa = self.window is not None and config.tpa_query_rank is not None
        ranks = (config.tpa_query_rank, config.tpa_kv_rank) if tpa else (None, None)
        self.q_proj = projection(hidden, heads, size, ranks[0])
        self.k_proj = projection(hidden, groups, size, ranks[1])
        self.v_proj = projection(hidden, groups, size, ranks[1])
        self.o_proj = nn.Linear(heads * size, hidden)
        self.q_norm = VpMoERMSNorm(size, config.rms_norm_eps)
        self.k_norm = VpMoERMSNorm(size, config.rms_norm_eps)
        self.sinks = nn.Parameter(torch.zeros(heads))
        self.mixes = config.value_residual and layer > 0
        if self.mixes:
            self.value_residual_logit = nn.Parameter(torch.zeros(1))

    def forward(self, x_BQD, first_value, rotation, mask_BK, cache, past):
        """Output [B, Q, D] and the values of the first layer [B, G, Q, C], from it on.

        mask_BK: True where a key is no padding, or None. past: positions before the new ones.
        """
        q_BHQC = self.q_norm(self.q_proj(x_BQD).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k_BGQC = self.k_norm(self.k_proj(x_BQD).unflatten(-1, (self.groups, -1))).transpose(1, 2)
        v_BGQC = self.v_proj(x_BQD).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        if self.layer == 0:
            first_value = v_BGQC
        if self.mixes:
            lam = wide(self.value_residual_logit).sigmoid()
            v_BGQC = (lam * v_BGQC + (1 - lam) * first_value).to(v_BGQC.dtype)
        if self.window is not None:
            q_BHQC, k_BGQC = rotate(q_BHQC, rotation), rotate(k_BGQC, rotation)
        if cache is not None:
            k_BGQC, v_BGQC = cache.update(k_BGQC, v_BGQC, self.layer)
        out_BHQC = self.attend(q_BHQC, k_BGQC, v_BGQC, mask_BK, past)
        return self.o_proj(out_BHQC.transpose(1, 2).flatten(2)), first_value

    def attend(self, q_BHQC, k_BGKC, v_BGKC, mask_BK, past):
        """Every pair, in fp32. The keys at hand are the last K positions, whatever the cache dropped before them."""
        queries, keys = q_BHQC.shape[2], k_BGKC.shape[2]
        end, device = past + queries, q_BHQC.device
        distance_QK = torch.arange(past, end, device=device)[:, None] - torch.arange(
            end - keys, end, device=device
        )
        spread = partial(torch.repeat_interleave, repeats=self.heads // self.groups, dim=1)
        q, k, v = wide(q_BHQC), spread(wide(k_BGKC)), spread(wide(v_BGKC))
        score = q @ k.transpose(-1, -2) * self.size**-0.5
        visible = distance_QK >= 0
        if self.window is None:
            head = torch.arange(1, self.heads + 1, device=device, dtype=score.dtype)
            score = score - torch.exp2(-8 / self.heads * head).view(-1, 1, 1) * distance_QK
        else:
            visible = visible & (distance_QK < self.window)
        if mask_BK is not None:
            visible = visible & mask_BK[:, None, None, -keys:]
        score = score.masked_fill(~visible, float("-inf"))
        sink = wide(self.sinks).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        probability = torch.cat([score, sink.to(score.dtype)], dim=-1).softmax(dim=-1)[..., :-1]
        return (probability @ v).to(q_BHQC.dtype)


class VpMoEMLP(nn.Module):
    """down(max(up(x), 0)^2), arXiv 2109.08668."""

    def __init__(self, hidden, inner):
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner)
        self.down_proj = nn.Linear(inner, hidden)

    def forward(self, x):
        """[..., D] to [..., D]."""
        return self.down_proj(self.up_proj(x).relu().square())


class VpMoERouter(nn.Module):
    """Sigmoid scores; groups and experts are chosen by score + expert_bias, gates are scores (arXiv 2412.19437)."""

    def __init__(self, config):
        super().__init__()
        self.topk, self.groups = config.num_experts_per_tok, config.n_group
        self.topk_groups, self.scaling = config.topk_group, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.num_experts))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x_TD):
        """Chosen experts and their gates in fp32, both [T, topk]."""
        score_TE = F.linear(wide(x_TD), wide(self.weight), wide(self.bias)).sigmoid()
        biased = (score_TE + self.expert_bias).unflatten(-1, (self.groups, -1))
        best = biased.topk(self.topk // self.topk_groups, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept = kept.scatter(-1, best.topk(self.topk_groups, dim=-1).indices, True)
        biased = biased.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = biased.topk(self.topk, dim=-1).indices
        gate = score_TE.gather(-1, chosen)
        if self.topk > 1:
            gate = gate / (gate.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, gate * self.scaling


class VpMoEExperts(nn.Module):
    """The routed experts as four batched parameters; each hit expert computes its tokens together."""

    def __init__(self, config):
        super().__init__()
        experts, hidden = config.num_experts, config.hidden_size
        inner = config.moe_intermediate_size
        self.up_weight = nn.Parameter(torch.empty(experts, inner, hidden))
        self.up_bias = nn.Parameter(torch.zeros(experts, inner))
        self.down_weight = nn.Parameter(torch.empty(experts, hidden, inner))
        self.down_bias = nn.Parameter(torch.zeros(experts, hidden))

    def forward(self, x_TD, chosen, gate):
        """sum over a token's experts of gate * expert(x), [T, D]."""
        out_TD = torch.zeros_like(x_TD, dtype=gate.dtype)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            inner = F.linear(x_TD[token], self.up_weight[expert], self.up_bias[expert])
            y = F.linear(inner.relu().square(), self.down_weight[expert], self.down_bias[expert])
            out_TD = out_TD.index_add(0, token, y.to(gate.dtype) * gate[token, slot, None])
        return out_TD.to(x_TD.dtype)


class VpMoESparseMLP(nn.Module):
    """Routed experts and the shared expert that every token visits."""

    def __init__(self, config):
        super().__init__()
        self.router = VpMoERouter(config)
        self.experts = VpMoEExperts(config)
        self.shared_expert = VpMoEMLP(config.hidden_size, config.shared_expert_intermediate_size)

    def forward(self, x_BQD):
        """[B, Q, D] to [B, Q, D]."""
        x_TD = x_BQD.flatten(0, 1)
        return self.experts(x_TD, *self.router(x_TD)).view_as(x_BQD) + self.shared_expert(x_BQD)


class VpMoELayer(GradientCheckpointingLayer):
    """One layer; the first `num_dense_layers` have no experts."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = VpMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = VpMoEAttention(config, layer)
        self.post_attention_layernorm = VpMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        if layer < config.num_dense_layers:
            self.mlp = VpMoEMLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = VpMoESparseMLP(config)

    def forward(self, x_BQD, first_value, rotation, mask_BK, past, past_key_values=None):
        """See VpMoEAttention.forward."""
        x = self.input_layernorm(x_BQD)
        x, first_value = self.self_attn(x, first_value, rotation, mask_BK, past_key_values, past)
        x_BQD = x_BQD + x
        return x_BQD + self.mlp(self.post_attention_layernorm(x_BQD)), first_value


class VpMoEPreTrainedModel(PreTrainedModel):
    """Initial values, and what transformers has to know."""

    config_class = VpMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("VpMoELayer",)
    _skip_keys_device_placement = ("past_key_values",)
    # bf16 spaces log frequencies of magnitude 147 by 1.0, and rounds the balancing biases away.
    _keep_in_fp32_modules_strict = ("log_frequency", "value_residual_logit", "expert_bias")

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
            return
        for name, value in module.named_parameters(recurse=False):
            if isinstance(module, VpMoERotary):
                nn.init.zeros_(value).add_(module.scale * module.fixed_log_theta(value.device))
            elif isinstance(module, VpMoERMSNorm):
                nn.init.ones_(value)
            elif name == "value_residual_logit":
                nn.init.constant_(value, math.log(1e4 - 1))
            elif name == "bias" or name.endswith("_bias"):
                nn.init.zeros_(value)
            else:
                nn.init.normal_(value, std=std)
        if isinstance(module, VpMoERouter):
            nn.init.zeros_(module.expert_bias)


class VpMoEModel(VpMoEPreTrainedModel):
    """Token ids to hidden states after the final norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = VpMoERotary(config)
        self.layers = nn.ModuleList(VpMoELayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = VpMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **unsupported,
    ):
        """attention_mask: [B, past + Q], nonzero for tokens, zero for padding on either side."""
        _refuse(unsupported)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BQD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = None if self.training else DynamicCache(config=self.config)
        if cache is not None and (not isinstance(cache, Cache) or cache.is_compileable):
            raise ValueError(f"past_key_values: got {type(cache).__name__}, expected DynamicCache")
        past = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(past, past + x_BQD.shape[1], device=x_BQD.device)
        mask_BK = _key_mask(attention_mask, (x_BQD.shape[0], past + x_BQD.shape[1]))
        rotation, first_value = self.rotary(positions), None
        for layer in self.layers:
            x_BQD, first_value = layer(
                x_BQD, first_value, rotation, mask_BK, past, past_key_values=cache
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x_BQD), past_key_values=cache)


class VpMoEForCausalLM(VpMoEPreTrainedModel, GenerationMixin):
    """The language model; input and output matrices are separate."""

    def __init__(self, config):
        super().__init__(config)
        self.model = VpMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **unsupported,
    ):
        """logits [B, Q, V] of the last logits_to_keep positions (0: all); with labels (-100: none), the mean loss."""
        outputs = self.model(
            input_ids, attention_mask, past_key_values, inputs_embeds, use_cache, **unsupported
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch
            )
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values
        )


def _refuse(unsupported):
    """position_ids in particular: documents packed into one row would see each other."""
    named = [
        name for name, value in unsupported.items() if value is not None and value is not False
    ]
    if named := [name for name in named if name != "return_dict"]:
        raise ValueError(f"vpMoE does not take {', '.join(named)}; give input_ids, attention_mask")


def _key_mask(attention_mask, shape):
    if attention_mask is None:
        return None
    if (given := tuple(attention_mask.shape)) != shape:
        raise ValueError(f"attention_mask: got shape {given}, expected {shape}")
    return attention_mask.bool()
