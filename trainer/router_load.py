"""How evenly the routers spread tokens over experts. Pure."""

from __future__ import annotations

import torch


def router_metrics(tokens_LE: torch.Tensor, bias_LE: torch.Tensor) -> dict[str, float]:
    """Load over the L layers with E experts each: mean entropy (1 is even), the busiest expert's multiple of the mean,
    experts without a token, and the range of the balancing bias in its widest layer.

    tokens_LE: routed tokens of the step, all ranks. bias_LE: the biases after it.
    """
    share_LE = tokens_LE.double() / tokens_LE.double().sum(dim=1, keepdim=True).clamp(min=1)
    num_experts = tokens_LE.shape[1]
    entropy_L = -(share_LE * share_LE.clamp(min=1e-30).log()).sum(dim=1)
    even = torch.tensor(float(max(num_experts, 2)), dtype=torch.float64).log()
    return {
        "router/load_entropy": float(entropy_L.mean() / even),
        "router/max_load": float(share_LE.max() * num_experts),
        "router/dead_experts": float((tokens_LE == 0).sum()),
        "router/bias_range": float((bias_LE.amax(dim=1) - bias_LE.amin(dim=1)).max()),
    }
