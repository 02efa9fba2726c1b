"""Model FLOPs of a token of training, from the student's shape, and the share of a GPU's peak they make up. Pure.

A product of [m, k] and [k, n] counts 2 m k n. The forward pass of one token is

    matrices     2 x every weight (no bias) of a matrix that the token passes: projections of attention, dense MLP,
                 router, shared expert, experts_per_token routed experts, lm_head; the embedding is a look-up
    TPA          2 hd (H RQ + 2 G R) a local layer: the factors' products
    attention    4 H hd n a layer: scores and values over the n positions that a query of a packed row sees on average,
                 local n = w - w (w - 1) / (2 T) with w = min(window, T), global n = (T + 1) / 2 for T = seq_len

forward and backward together 3 x that (the backward pass has two products for each of the forward). Not counted:
norms, rotary, softmax, biases, routing, the optimizer, and layers computed again under `recompute`. Documents within
a row are not counted: a global layer sees at most its own document, so n above is the upper bound, and exact for a
row of one document.
"""

from __future__ import annotations

from trainer.parameters import map_rows
from trainer.student_config import StudentConfig

_PEAK_BF16 = {"H100 80GB HBM3": 989.4e12, "H200": 989.4e12}
_OTHER_FORMS = ("PCIe", "NVL")


def flops_per_token(student: StudentConfig, seq_len: int) -> float:
    """Forward and backward FLOPs of one token of a packed row of `seq_len`."""
    return 3.0 * sum(forward_flops(student, seq_len).values())


def forward_flops(student: StudentConfig, seq_len: int) -> dict[str, float]:
    """Forward FLOPs of one token by part: `matrices`, `tpa`, `attention`, `lm_head`."""
    heads = student.heads * student.head_dim
    window = min(student.window, seq_len)
    seen_local = window - window * (window - 1) / (2 * seq_len)
    seen_global = (seq_len + 1) / 2
    global_layers, local_layers = student.global_layers, student.local_layers
    rows = (
        local_layers * map_rows(student, factored=student.tpa is not None)
        + global_layers * map_rows(student, factored=False)
        + student.layers * heads  # the output projection
    )
    weights = student.hidden * rows + _mlp_weights(student)
    return {
        "matrices": 2.0 * weights,
        "tpa": 2.0 * student.head_dim * local_layers * _tpa_ranks(student),
        "attention": 4.0 * heads * (local_layers * seen_local + global_layers * seen_global),
        "lm_head": 2.0 * student.vocab_size * student.hidden,
    }


def mfu(tokens_per_sec: float, flops_of_token: float, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0 to 1: of all GPUs' tokens and the sum of their peaks, or of one and its own."""
    return tokens_per_sec * flops_of_token / peak_flops


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOPs a second, by its CUDA name; None for one that is not in the table.

    H100 and H200 SXM: 989.4e12 (NVIDIA's data sheets, without sparsity); other forms of them clock lower.
    """
    if any(form in device_name for form in _OTHER_FORMS):
        return None
    return next((peak for name, peak in _PEAK_BF16.items() if name in device_name), None)


def _mlp_weights(student: StudentConfig) -> int:
    moe_layers = student.layers - student.dense_layers
    inner = student.shared_width + student.experts_per_token * student.expert_width
    expert_layer = 2 * student.hidden * inner + student.experts * student.hidden
    return moe_layers * expert_layer + student.dense_layers * 2 * student.hidden * student.ffn


def _tpa_ranks(student: StudentConfig) -> int:
    if student.tpa is None:
        return 0
    return student.heads * student.tpa.q_rank + 2 * student.kv_groups * student.tpa.kv_rank
