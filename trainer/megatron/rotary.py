"""GRAPE-M: rotary embeddings with learnable frequencies (arXiv 2512.07805).

The commuting form of GRAPE-M on canonical planes is RoPE with free frequencies: plane i of a head is the pair of
channels (i, i + head_dim / 2), position t turns it by t * theta_i, and

    theta_i = exp(phi_i / log_scale),   phi_i = log_scale * ln(base^(-2 i / head_dim)) at the start.

One vector phi serves every head of every local layer. d ln(theta) = d phi / log_scale: an optimizer that moves phi by
its rate moves the frequencies by a log_scale-th of that, relatively. phi reaches 147 at the locked sizes, where bf16
has steps of 1 (6 % of a frequency), so it stays fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from trainer.megatron.keep_fp32 import KeepsFP32


class GrapeM(KeepsFP32):
    """Stands where GPTModel keeps its RotaryEmbedding, whose forward is cached and so cannot learn.

    log_frequency: phi, fp32 [head_dim / 2]. Under tensor parallelism every rank rotates its own heads only, so the
    gradient is summed over the ranks: that is what `sequence_parallel` on a parameter asks finalize_model_grads for.
    """

    def __init__(
        self, head_dim: int, base: float, log_scale: float, *, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.log_scale = log_scale
        plane = torch.arange(head_dim // 2, dtype=torch.float64)
        phi = log_scale * plane * (-2.0 / head_dim) * math.log(base)
        self.log_frequency = torch.nn.Parameter(phi.to(torch.cuda.current_device(), torch.float32))
        self.log_frequency.sequence_parallel = sequence_parallel

    def forward(self, max_seq_len: int, **_: Any) -> torch.Tensor:
        """Angles of positions 0 .. max_seq_len - 1 of a row, fp32 radians [S, 1, 1, head_dim], planes repeated.

        Packed documents do not start at 0; only differences of positions reach the scores.
        """
        theta_P = torch.exp(self.log_frequency / self.log_scale)
        position_S = torch.arange(max_seq_len, dtype=theta_P.dtype, device=theta_P.device)
        angle_SP = torch.outer(position_S, theta_P)
        return torch.cat([angle_SP, angle_SP], dim=-1)[:, None, None, :]

    def get_rotary_seq_len(self, *arguments: Any) -> int:
        """Positions of a whole row; GPTModel passes the packed rows last."""
        return arguments[-1].max_seqlen_q
