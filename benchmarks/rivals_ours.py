"""The student's own layers as one of the ways of benchmarks/rivals.py.

A local and a global layer as they train: TPA, window 128 and full attention with ALiBi, sinks, learned rotation, value
residual, biases, documents (here one a row). `recorded`: as CUDA graphs, gradients of weights added into fp32 buffers,
as in a run; else launched one by one, gradients in `grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from common.config import PROJECT_ROOT, load_config
from trainer.config import ModelRuntime, ParallelConfig
from trainer.student_config import StudentConfig

Made = tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.nn.Parameter], str]


def ours(sizes: dict[str, Any], device: str, *, layers: int, recorded: bool) -> Made:
    """Layers that map hidden states [S, B, D] to hidden states, their parameters, and the layout's name."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from trainer.megatron.attention import PackedRows
    from trainer.megatron.graphs import GraphedLayers

    model = _student(sizes, device, layers + 1)
    block = model.decoder
    block.layers[0] = _FirstValue(sizes)
    block.post_layer_norm, plain = False, block.forward
    parameters = list(block.layers.parameters())
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device))
    with torch.no_grad():
        token_11 = torch.zeros(1, sizes["row"], dtype=torch.long, device=device)
        rows = PackedRows(
            document_BS=torch.zeros(1, sizes["row"], dtype=torch.int32, device=device)
        )
        rotation = model._preprocess(token_11, None, packed_seq_params=rows)[1]
    graphs: dict[torch.Size, Any] = {}

    def run(x_SBD: torch.Tensor) -> torch.Tensor:
        document = torch.zeros(*x_SBD.shape[1::-1], dtype=torch.int32, device=device)
        keywords = {"rotary_pos_emb": rotation, "padding_mask": document < 0}
        keywords["packed_seq_params"] = PackedRows(document_BS=document)
        if recorded and x_SBD.shape not in graphs:
            for parameter in block.parameters():
                parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
            graphs.clear()  # one recording's memory at a time
            block.forward = plain
            layered = GraphedLayers(block)
            layered.record(lambda: layered(x_SBD, None, **keywords))
            graphs[x_SBD.shape] = layered
        return (graphs[x_SBD.shape] if recorded else block)(x_SBD, None, **keywords)

    return run, parameters, "sbd"


class _FirstValue(torch.nn.Module):
    """Stands in for the student's first layer, which has no experts: gives v_1 of the value residual, and no more."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self.shape = (sizes["kv_groups"], sizes["head_dim"])

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        """hidden [S, B, D] as it is, and v_1 [S, B, G, C]."""
        groups, dim = self.shape
        return hidden_states, hidden_states.unflatten(2, (-1, dim))[:, :, :groups]


def _student(sizes: dict[str, Any], device: str, layers: int) -> Any:
    from megatron.core.transformer.module import Float16Module

    from trainer.megatron.student import build_student

    on_gpu = device == "cuda"
    overrides = {
        "layers": layers,
        "global_every": layers,
        "vocab_size": 256,
        "hidden": sizes["hidden"],
        "heads": sizes["heads"],
        "kv_groups": sizes["kv_groups"],
        "head_dim": sizes["head_dim"],
        "experts": sizes["experts"],
        "experts_per_token": sizes["top_k"],
        "expert_width": sizes["expert_width"],
        "shared_width": sizes["shared_width"],
        "router.groups": sizes["groups"],
        "router.group_topk": sizes["group_top_k"],
    }
    student = load_config(
        StudentConfig,
        PROJECT_ROOT / "configs/student/vpmoe.yaml",
        tuple(f"{key}={value}" for key, value in overrides.items()),
    )
    runtime = ModelRuntime(
        device="cuda" if on_gpu else "cpu",
        transformer_impl="compiled" if on_gpu else "local",
        core_attention="triton" if on_gpu else "dense",
        expert_compute="triton" if on_gpu else "loop",
        precision="bf16" if on_gpu else "fp32",
    )
    model = build_student(student, runtime, ParallelConfig(), sizes["row"])
    if on_gpu:
        Float16Module(model.config, model)
    return model.train()
