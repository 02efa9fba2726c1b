"""How many parameters a student has, by component, from its config alone. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.student_config import StudentConfig


@dataclass(frozen=True, kw_only=True)
class Component:
    """A kind of parameter: `copies` of `each`, `used` of them when one token passes the student."""

    name: str
    copies: int
    each: int
    used: int

    @property
    def total(self) -> int:
        """Parameters in all."""
        return self.copies * self.each

    @property
    def active(self) -> int:
        """Parameters that one token passes."""
        return self.used * self.each


def parameter_table(student: StudentConfig) -> list[Component]:
    """Every parameter once, by component, in the order of docs/architecture.md. Components without parameters are
    left out.
    """
    D, hd = student.hidden, student.head_dim
    layers, moe = student.layers, student.layers - student.dense_layers
    residual = 0 if student.value_residual is None else layers - 1
    rows = [
        ("routed_experts", moe * student.experts, _mlp(D, student.expert_width)),
        ("embedding", student.vocab_size, D),
        ("lm_head", student.vocab_size, D),
        (
            "local_attention",
            student.local_layers,
            _projections(student, factored=student.tpa is not None),
        ),
        ("shared_experts", moe, _mlp(D, student.shared_width)),
        ("global_attention", student.global_layers, _projections(student, factored=False)),
        ("routers", moe, student.experts * (D + 1)),
        ("dense_mlp", student.dense_layers, _mlp(D, student.ffn)),
        ("norms", 2 * layers + 1, D),
        ("qk_norms", 2 * layers, hd),
        ("sinks", layers, student.heads),
        ("grape_m", 0 if student.grape_m is None else 1, hd // 2),
        ("value_residual", residual, 1),
    ]
    used = {"routed_experts": moe * student.experts_per_token}
    return [
        Component(name=name, copies=copies, each=each, used=used.get(name, copies))
        for name, copies, each in rows
        if copies
    ]


def parameter_counts(student: StudentConfig) -> dict[str, int]:
    """Parameters by component, then `total`, `active` (that one token passes), and `active_inner` (the active ones
    without embedding and lm_head).
    """
    table = parameter_table(student)
    active = sum(component.active for component in table)
    return {component.name: component.total for component in table} | {
        "total": sum(component.total for component in table),
        "active": active,
        "active_inner": active - 2 * student.vocab_size * student.hidden,
    }


def component_of(name: str, student: StudentConfig) -> str:
    """The component of the parameter that Megatron's student calls `name`."""
    parts = name.split(".")
    if name.startswith("decoder.layers."):
        number, leaf = int(parts[2]) + 1, parts[-1]
        for part, component in _LAYER_PARTS.items():
            if part in parts or part == leaf or leaf.startswith(part):
                return component
        if "mlp" in parts:
            return "dense_mlp"
        return "global_attention" if student.is_global(number) else "local_attention"
    return _WHOLE_MODEL[parts[0] if parts[0] != "decoder" else parts[1]]


_LAYER_PARTS = {
    "input_layernorm": "norms",
    "pre_mlp_layernorm": "norms",
    "layer_norm_": "norms",  # TransformerEngine's, fused into the next product
    "q_layernorm": "qk_norms",
    "k_layernorm": "qk_norms",
    "sink": "sinks",
    "value_residual_logit": "value_residual",
    "router": "routers",
    "experts": "routed_experts",
    "shared_experts": "shared_experts",
}
_WHOLE_MODEL = {
    "embedding": "embedding",
    "output_layer": "lm_head",
    "rotary_pos_emb": "grape_m",
    "final_layernorm": "norms",
}


def _projections(student: StudentConfig, *, factored: bool) -> int:
    """Query, key, value and output projections of a layer, biases included."""
    D, queries = student.hidden, student.heads * student.head_dim
    out = map_rows(student, factored=False)
    return D * map_rows(student, factored=factored) + out + (queries + 1) * D


def map_rows(student: StudentConfig, *, factored: bool) -> int:
    """Rows of a layer's maps of a token to query, key and value, or with TPA to their factors."""
    if factored and student.tpa is not None:
        RQ, R = student.tpa.q_rank, student.tpa.kv_rank
        return student.heads * RQ + 2 * student.kv_groups * R + (RQ + 2 * R) * student.head_dim
    return (student.heads + 2 * student.kv_groups) * student.head_dim


def _mlp(hidden: int, inner: int) -> int:
    return (hidden + 1) * inner + (inner + 1) * hidden
