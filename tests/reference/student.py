"""The student from its formulas (docs/architecture.md): loops over heads, positions, tokens and experts, in fp64.

Plain functions over the parameters by name; nothing of the trainer is imported. `shape` is the dictionary of a student
config with every key. Differentiable in every parameter. T positions of one row, D hidden size, hd head dim.
"""

from __future__ import annotations

import math
from typing import Any

import torch

Parameters = dict[str, torch.Tensor]


def final_hidden(
    state: Parameters, shape: dict[str, Any], tokens_T: list[int], document_T: list[int]
) -> tuple[torch.Tensor, list[list[tuple[torch.Tensor, list[int]]]]]:
    """Hidden states after the last norm [T, D], and for every layer with experts what `route` said of each token."""
    x_TD = state["embedding.word_embeddings.weight"][torch.tensor(tokens_T)]
    first_value = None
    routed = []
    for number in range(1, shape["layers"] + 1):
        layer = part(state, f"decoder.layers.{number - 1}.")
        normed_TD = rms_norm(x_TD, layer["input_layernorm.weight"], shape)
        phi = state.get("rotary_pos_emb.log_frequency")
        attended_TD, value = attention(
            layer, shape, number, normed_TD, document_T, phi, first_value
        )
        first_value = value if number == 1 else first_value
        x_TD = x_TD + attended_TD
        normed_TD = rms_norm(x_TD, layer["pre_mlp_layernorm.weight"], shape)
        if number <= shape["dense_layers"]:
            x_TD = x_TD + torch.stack([mlp(part(layer, "mlp."), x_D) for x_D in normed_TD])
        else:
            decisions = [route(part(layer, "mlp.router."), shape, x_D) for x_D in normed_TD]
            pairs = zip(normed_TD, decisions, strict=True)
            x_TD = x_TD + torch.stack([experts(part(layer, "mlp."), x, *d) for x, d in pairs])
            routed.append(decisions)
    return rms_norm(x_TD, state["decoder.final_layernorm.weight"], shape), routed


def part(state: Parameters, prefix: str) -> Parameters:
    """The parameters below a prefix."""
    return {name.removeprefix(prefix): p for name, p in state.items() if name.startswith(prefix)}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, shape: dict[str, Any]) -> torch.Tensor:
    """Over the last axis."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + shape["norm_eps"]) * weight


def attention(
    layer: Parameters,
    shape: dict[str, Any],
    number: int,
    x_TD: torch.Tensor,
    document_T: list[int],
    phi: torch.Tensor | None,
    first_value: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, D] of the attention of layer `number` (from 1), and its values as projected [G][T, hd]."""
    own = part(layer, "self_attention.")
    is_global = number % shape["global_every"] == 0
    project = fused_projection if is_global or shape["tpa"] is None else tpa_projection
    queries, keys, values = project(part(own, "linear_qkv."), shape, x_TD)
    projected = torch.stack(values)
    if number > 1 and shape["value_residual"] is not None:
        lam = 1 / (1 + torch.exp(-own["value_residual_logit"][0]))
        values = [lam * v + (1 - lam) * v1 for v, v1 in zip(values, first_value, strict=True)]
    queries = [rms_norm(q, own["q_layernorm.weight"], shape) for q in queries]
    keys = [rms_norm(k, own["k_layernorm.weight"], shape) for k in keys]
    if not is_global:
        queries, keys = ([rotate(q, phi, shape) for q in of] for of in (queries, keys))
    heads = []
    for h in range(shape["heads"]):
        group = h // (shape["heads"] // shape["kv_groups"])
        slope = 2.0 ** (-8.0 * (h + 1) / shape["heads"]) if is_global else 0.0
        sink = own["core_attention.sink"][h]
        rows = []
        for i in range(len(document_T)):
            seen = [j for j in range(i + 1) if document_T[j] == document_T[i]]
            if not is_global:
                seen = [j for j in seen if i - j < shape["window"]]
            scores = torch.stack(
                [
                    (queries[h][i] * keys[group][j]).sum() / math.sqrt(shape["head_dim"])
                    - slope * (i - j)
                    for j in seen
                ]
            )
            mass = torch.exp(scores)
            p = mass / (torch.exp(sink) + mass.sum())
            rows.append((p[:, None] * values[group][seen]).sum(0))
        heads.append(torch.stack(rows))
    mixed = torch.cat(heads, dim=-1)
    return mixed @ own["linear_proj.weight"].T + own["linear_proj.bias"], projected


def fused_projection(
    own: Parameters, shape: dict[str, Any], x_TD: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Queries [H][T, hd], keys and values [G][T, hd]; rows of the weight lie group by group [q .. q k v]."""
    return split_groups(x_TD @ own["weight"].T + own["bias"], shape)


def tpa_projection(
    own: Parameters, shape: dict[str, Any], x_TD: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """The same from factors: head h is the mean over ranks r of a[h, r] * b[r]."""
    RQ, R, hd = shape["tpa"]["q_rank"], shape["tpa"]["kv_rank"], shape["head_dim"]

    def product(what: str, rank: int, heads: int) -> list[torch.Tensor]:
        a, b = own[f"a_{what}"], own[f"b_{what}"]
        out = []
        for h in range(heads):
            terms = [
                (x_TD @ a[h * rank + r])[:, None] * (x_TD @ b[r * hd : (r + 1) * hd].T)
                for r in range(rank)
            ]
            out.append(sum(terms) / rank)
        return out

    G, H = shape["kv_groups"], shape["heads"]
    queries = product("query", RQ, H)
    keys, values = product("key", R, G), product("value", R, G)
    bias = split_groups(own["bias"][None], shape)
    pairs = zip((queries, keys, values), bias, strict=True)
    return tuple([t + b for t, b in zip(ts, bs, strict=True)] for ts, bs in pairs)


def split_groups(
    mixed: torch.Tensor, shape: dict[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """[T, (H + 2 G) hd] cut into queries, keys and values."""
    hd, per_group = shape["head_dim"], shape["heads"] // shape["kv_groups"]
    heads = [mixed[:, n * hd : (n + 1) * hd] for n in range(mixed.shape[1] // hd)]
    queries, keys, values = [], [], []
    for g in range(shape["kv_groups"]):
        of = heads[g * (per_group + 2) : (g + 1) * (per_group + 2)]
        queries += of[:per_group]
        keys.append(of[per_group])
        values.append(of[per_group + 1])
    return queries, keys, values


def rotate(q_TC: torch.Tensor, phi: torch.Tensor | None, shape: dict[str, Any]) -> torch.Tensor:
    """Plane i, the channels (i, i + hd / 2), of position t turned by t exp(phi_i / log_scale), as complex numbers."""
    planes = shape["head_dim"] // 2
    if phi is None:
        theta = torch.tensor(
            [shape["rotary_base"] ** (-i / planes) for i in range(planes)]
        ).double()
    else:
        theta = torch.exp(phi / shape["grape_m"]["log_scale"])
    t = torch.arange(len(q_TC), dtype=torch.float64)
    turned = torch.complex(q_TC[:, :planes], q_TC[:, planes:]) * torch.exp(
        1j * t[:, None] * theta[None]
    )
    return torch.cat([turned.real, turned.imag], dim=-1)


def mlp(own: Parameters, x_D: torch.Tensor) -> torch.Tensor:
    """W2 max(W1 x + b1, 0)^2 + b2."""
    inner = own["linear_fc1.weight"] @ x_D + own["linear_fc1.bias"]
    return own["linear_fc2.weight"] @ (inner * (inner > 0)) ** 2 + own["linear_fc2.bias"]


def route(
    own: Parameters, shape: dict[str, Any], x_D: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    """Scores of all experts [E] and the chosen ones of a token, by sorting."""
    groups, kept = shape["router"]["groups"], shape["router"]["group_topk"]
    k, size = shape["experts_per_token"], shape["experts"] // groups
    s_E = 1 / (1 + torch.exp(-(own["weight"] @ x_D + own["bias"])))
    biased = (s_E + own["expert_bias"]).tolist()
    best = [
        sum(sorted(biased[g * size : (g + 1) * size], reverse=True)[: k // kept])
        for g in range(groups)
    ]
    open_groups = sorted(range(groups), key=lambda g: -best[g])[:kept]
    candidates = [e for e in range(shape["experts"]) if e // size in open_groups]
    return s_E, sorted(candidates, key=lambda e: -biased[e])[:k]


def experts(
    own: Parameters, x_D: torch.Tensor, s_E: torch.Tensor, chosen: list[int], scaling: float = 2.5
) -> torch.Tensor:
    """Gated sum of the chosen experts, and the shared one."""
    out = mlp(part(own, "shared_experts."), x_D)
    for e in chosen:
        one = {
            f"linear_{name}.{kind}": own[f"experts.{name}_{kind}"][e]
            for name in ("fc1", "fc2")
            for kind in ("weight", "bias")
        }
        out = out + scaling * s_E[e] / s_E[chosen].sum() * mlp(one, x_D)
    return out


def balance_loss(
    decisions: list[tuple[torch.Tensor, list[int]]], shape: dict[str, Any]
) -> torch.Tensor:
    """Of one row and layer, its tokens without padding: c E / (k T^2) sum_i count_i sum_t p_ti; counts of a plain
    top k of the scores, without groups and bias.
    """
    E, k, T = shape["experts"], shape["experts_per_token"], len(decisions)
    counts = torch.zeros(E, dtype=torch.float64)
    for s_E, _ in decisions:
        for e in sorted(range(E), key=lambda e: -float(s_E[e]))[:k]:
            counts[e] += 1
    share = sum(s_E / s_E.sum() for s_E, _ in decisions)
    return shape["router"]["aux_loss"] * E / (k * T * T) * (counts * share).sum()
