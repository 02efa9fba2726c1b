"""How many parameters a student has, by component, from its config alone. Pure."""

from __future__ import annotations

from trainer.student_config import StudentConfig


def parameter_counts(student: StudentConfig) -> dict[str, int]:
    """Parameters by component, `total`, and `active`: those that one token passes (experts_per_token of the
    experts).
    """
    D, width = student.hidden, student.expert_width
    moe_layers = student.layers - student.dense_layers
    queries, keys = student.heads * student.head_dim, student.kv_groups * student.head_dim
    experts = moe_layers * student.experts * _mlp(D, width)
    counts = {
        "embedding": student.vocab_size * D,
        "lm_head": student.vocab_size * D,
        "attention": student.layers * ((D + 1) * (queries + 2 * keys) + (queries + 1) * D),
        "sinks": student.layers * student.heads,
        "norms": (2 * student.layers + 1) * D + 2 * student.layers * student.head_dim,
        "dense_mlp": student.dense_layers * _mlp(D, student.ffn),
        "routers": moe_layers * student.experts * (D + 1),
        "shared_experts": moe_layers * _mlp(D, student.shared_width),
        "routed_experts": experts,
    }
    total = sum(counts.values())
    idle = experts * (student.experts - student.experts_per_token) // student.experts
    return counts | {"total": total, "active": total - idle}


def _mlp(hidden: int, inner: int) -> int:
    return (hidden + 1) * inner + (inner + 1) * hidden
