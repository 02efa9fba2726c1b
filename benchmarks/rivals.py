"""One decoder layer at the student's sizes, forward and backward: stock Megatron-Core and transformers 5.

    python -m benchmarks.rivals --device cuda                 all ways, 16384 and 32768 tokens, bf16
    python -m benchmarks.rivals --device cuda --only hf_nemotron_grouped_mm,megatron_te
    python -m benchmarks.rivals --device cpu                  tiny, float32; shows that it runs

Sizes: hidden 1024, 8 heads, 2 KV groups, head dim 128, 256 experts of width 128, top-4 of 4 of 8 groups by sigmoid, a
shared expert of width 512, rows of 2048. What each way cannot do of the student's layer is left out, in its favour:

- megatron_te: get_gpt_decoder_block_spec with TransformerEngine (attention, TEGroupedMLP), alltoall dispatcher, squared
  ReLU, fp32 router with groups, expert bias and auxiliary loss, QK-norm, rotation; no bias (its shared expert allows
  none), no sink, no documents, full causal attention. `megatron_te_fused` adds its fused permute, router and rotation.
- ours, ours_recorded: the student's own layers, whole (benchmarks/rivals_ours.py).
- hf_nemotron_*: NemotronH's attention and MoE blocks, which together are a layer (squared ReLU without a gate, sigmoid
  groups, shared expert); no QK-norm, no rotation. hf_glm_*: Glm4Moe's decoder layer (QK-norm, rotation, sigmoid groups;
  its experts have a gate, so half as much arithmetic again). Causal attention by torch's scaled_dot_product_attention.
  The ending names `experts_implementation`.

Weights random. Each way runs LAYERS layers on one input without final norm; figures are of one layer: `host_ms` until
everything is enqueued, `wall_ms` until the device is done, medians of the repeats after the warm-up (at most `seconds`
of them); `peak_gib` of memory with weights and gradients, of all LAYERS; `kernels` and `busy_ms` from a profile of one
pass. A way that fails leaves its error. Writes benchmarks/results/rivals.json.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import header
from benchmarks.rivals_ours import ours
from common.files import write_json

RESULT = Path(__file__).parent / "results" / "rivals.json"
LAYERS = 2
FULL: dict[str, Any] = {
    "hidden": 1024,
    "heads": 8,
    "kv_groups": 2,
    "head_dim": 128,
    "experts": 256,
    "top_k": 4,
    "groups": 8,
    "group_top_k": 4,
    "expert_width": 128,
    "shared_width": 512,
    "row": 2048,
}
TINY = FULL | {"hidden": 64, "head_dim": 16, "experts": 16, "expert_width": 32, "shared_width": 128}
SETTINGS: dict[str, dict[str, Any]] = {
    "cuda": {"sizes": FULL, "tokens": [16384, 32768], "repeats": 20, "seconds": 5.0},
    "cpu": {"sizes": TINY | {"row": 64}, "tokens": [256], "repeats": 3, "seconds": 5.0},
}
LIMIT_SEC = 40  # of building a way, and of each number of tokens: its first compiles what Megatron leaves to torch
Sizes = dict[str, Any]
# Layers that map hidden states to hidden states, and where the number of tokens stands in them: "sbd" or "bsd".
Made = tuple[Callable[[torch.Tensor], torch.Tensor], list[torch.nn.Parameter], str]


def megatron(sizes: Sizes, device: str, *, fused: bool) -> Made:
    """Stock layers in a TransformerBlock; with the local spec on a CPU, where there is no TransformerEngine."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_block import TransformerBlock

    on_gpu = device == "cuda"
    if not on_gpu and not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = (
            None  # unbound without TransformerEngine, and read by its router
        )
    config = megatron_config(sizes, on_gpu=on_gpu, fused=fused)
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=on_gpu, normalization="RMSNorm"
    )
    block = TransformerBlock(config, spec, post_layer_norm=False).to(device)
    block.train()
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device))
    rotary = RotaryEmbedding(
        sizes["head_dim"], rotary_percent=1.0, use_cpu_initialization=not on_gpu
    )
    angles = rotary(sizes["row"]).to(device)

    def run(x_SBD: torch.Tensor) -> torch.Tensor:
        out = block(x_SBD, attention_mask=None, rotary_pos_emb=angles)
        return out[0] if isinstance(out, tuple) else out

    return run, list(block.parameters()), "sbd"


def megatron_config(sizes: Sizes, *, on_gpu: bool, fused: bool) -> Any:
    """TransformerConfig of 0.16.1 as its own training script would set it for this layer."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    dtype = torch.bfloat16 if on_gpu else torch.float32
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_query_groups=sizes["kv_groups"],
        kv_channels=sizes["head_dim"],
        ffn_hidden_size=sizes["expert_width"],
        activation_func=squared_relu,
        gated_linear_unit=False,
        add_bias_linear=False,
        normalization="RMSNorm",
        qk_layernorm=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=sizes["experts"],
        moe_layer_freq=1,
        moe_ffn_hidden_size=sizes["expert_width"],
        moe_shared_expert_intermediate_size=sizes["shared_width"],
        moe_router_topk=sizes["top_k"],
        moe_router_num_groups=sizes["groups"],
        moe_router_group_topk=sizes["group_top_k"],
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_grouped_gemm=on_gpu,
        moe_token_dispatcher_type="alltoall" if on_gpu else "allgather",
        moe_permute_fusion=fused,
        moe_router_fusion=fused,
        apply_rope_fusion=fused,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=False,  # has no squared ReLU
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=not on_gpu,
        bf16=on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
    )


def nemotron(sizes: Sizes, device: str, *, experts: str) -> Made:
    """LAYERS pairs of an attention and a MoE block of transformers' NemotronH."""
    from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHModel

    config = NemotronHConfig(
        vocab_size=256,  # its embedding takes no part
        hidden_size=sizes["hidden"],
        layers_block_type=["full_attention", "moe"] * LAYERS,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_groups"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["row"],
        mlp_hidden_act="relu2",
        n_routed_experts=sizes["experts"],
        num_experts_per_tok=sizes["top_k"],
        moe_intermediate_size=sizes["expert_width"],
        moe_shared_expert_intermediate_size=sizes["shared_width"],
        n_group=sizes["groups"],
        topk_group=sizes["group_top_k"],
        routed_scaling_factor=2.5,
        use_cache=False,
    )
    model = _hf_model(NemotronHModel, config, device, experts)

    def run(x_BSD: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            # Without a mask scaled_dot_product_attention is causal, as in the model's own forward.
            x_BSD = layer(x_BSD, attention_mask=None)
        return x_BSD

    return run, list(model.layers.parameters()), "bsd"


def glm(sizes: Sizes, device: str, *, experts: str) -> Made:
    """LAYERS decoder layers of transformers' Glm4Moe."""
    from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeModel

    config = Glm4MoeConfig(
        vocab_size=256,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["shared_width"],
        num_hidden_layers=LAYERS,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_groups"],
        head_dim=sizes["head_dim"],
        max_position_embeddings=sizes["row"],
        hidden_act="relu2",
        n_routed_experts=sizes["experts"],
        num_experts_per_tok=sizes["top_k"],
        moe_intermediate_size=sizes["expert_width"],
        n_shared_experts=sizes["shared_width"] // sizes["expert_width"],
        n_group=sizes["groups"],
        topk_group=sizes["group_top_k"],
        first_k_dense_replace=0,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        use_cache=False,
    )
    model = _hf_model(Glm4MoeModel, config, device, experts)
    positions_1S = torch.arange(sizes["row"], device=device)[None]
    probe_1SD = torch.zeros(1, sizes["row"], sizes["hidden"], device=device)
    angles = model.rotary_emb(probe_1SD.to(model.norm.weight.dtype), position_ids=positions_1S)

    def run(x_BSD: torch.Tensor) -> torch.Tensor:
        for layer in model.layers:
            x_BSD = layer(x_BSD, attention_mask=None, position_embeddings=angles)
        return x_BSD

    return run, list(model.layers.parameters()), "bsd"


def _hf_model(kind: Any, config: Any, device: str, experts: str) -> Any:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = kind._from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation=experts
        )
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # as transformers keeps it in a loaded model
    return model.to(device).train()


WAYS: dict[str, Callable[[Sizes, str], Made]] = {
    "ours": lambda sizes, device: ours(sizes, device, layers=LAYERS, recorded=False),
    "ours_recorded": lambda sizes, device: ours(
        sizes, device, layers=LAYERS, recorded=device == "cuda"
    ),
    "hf_nemotron_grouped_mm": lambda sizes, device: nemotron(sizes, device, experts="grouped_mm"),
    "hf_glm_grouped_mm": lambda sizes, device: glm(sizes, device, experts="grouped_mm"),
    "hf_nemotron_eager": lambda sizes, device: nemotron(sizes, device, experts="eager"),
    "megatron_te": lambda sizes, device: megatron(sizes, device, fused=False),
    "megatron_te_fused": lambda sizes, device: megatron(sizes, device, fused=device == "cuda"),
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--only", help="ways, separated by commas")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(WAYS)
    settings = SETTINGS[arguments.device]
    packages = ("torch", "megatron-core", "transformers", "transformer-engine", "triton")
    report = header(packages, device=arguments.device) | {
        "layers": LAYERS,
        "settings": settings,
    }
    compare(names, settings, arguments.device, report, arguments.out)


def compare(
    names: list[str], settings: dict[str, Any], device: Any, report: dict[str, Any], out: Path
) -> None:
    """Every way at every number of tokens, written after each; a way is built once."""
    from trainer.config import ParallelConfig
    from trainer.megatron.topology import distributed

    results: dict[str, Any] = {str(tokens): {} for tokens in settings["tokens"]}
    report["by_tokens"] = results
    with distributed(device, ParallelConfig(), seed=1):
        for name in names:
            made = _told(lambda name=name: WAYS[name](settings["sizes"], device))
            for tokens in settings["tokens"]:
                found = made
                if not isinstance(made, dict):
                    found = _told(lambda made=made, tokens=tokens: measure(made, tokens, settings))
                results[str(tokens)][name] = found
                print(_line(tokens, name, found), flush=True)
            write_json(out, report)
            del made, found
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def _told(work: Callable[[], Any]) -> Any:
    """What `work` returns, or its error as a value; it is ended after LIMIT_SEC."""
    try:
        with _limited(LIMIT_SEC):
            return work()
    except Exception as error:
        lines = traceback.format_exc().splitlines()
        return {"error": f"{type(error).__name__}: {error}"[:500], "where": lines[-8:]}


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    """TimeoutError in the block after so many seconds, once the interpreter has its turn."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure(made: Made, tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Figures of one layer."""
    run, parameters, layout = made
    row, hidden = settings["sizes"]["row"], settings["sizes"]["hidden"]
    torch.manual_seed(0)
    first = parameters[0]
    on_gpu = first.is_cuda
    shape = (row, tokens // row) if layout == "sbd" else (tokens // row, row)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    x, grad = (torch.randn(*shape, hidden, device=first.device).to(dtype) for _ in range(2))
    x.requires_grad_()
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)

    def once() -> tuple[float, float]:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        wait()
        start = time.perf_counter()
        run(x).backward(grad)
        enqueued = time.perf_counter()
        wait()
        return enqueued - start, time.perf_counter() - start

    for _ in range(3 if on_gpu else 1):
        once()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    taken: list[tuple[float, float]] = []
    end = time.perf_counter() + settings["seconds"]
    while len(taken) < settings["repeats"] and (time.perf_counter() < end or len(taken) < 3):
        taken.append(once())
    assert x.grad is not None
    host, wall = (1e3 * statistics.median(of) / LAYERS for of in zip(*taken, strict=True))
    without = sum(
        1 for p in parameters if p.requires_grad and p.grad is None and not hasattr(p, "main_grad")
    )
    figures: dict[str, Any] = {
        "host_ms": round(host, 3),
        "wall_ms": round(wall, 3),
        "tokens_per_sec": round(tokens / wall * 1e3),
        "repeats": len(taken),
        "parameters": sum(p.numel() for p in parameters) // LAYERS,
        "parameters_without_gradient": without,
        "finite": bool(torch.isfinite(x.grad).all()),
    }
    if on_gpu:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures |= kernels(once)
    return figures


def kernels(once: Callable[[], Any]) -> dict[str, Any]:
    """Time and number of kernels of one layer, and the ten that take longest, from a profile of one pass."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        once()
    events = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "busy_ms": round(sum(e.self_device_time_total for e in events) / 1e3 / LAYERS, 3),
        "kernels": sum(e.count for e in events) // LAYERS,
        "longest_ms": {
            e.key[:90]: round(e.self_device_time_total / 1e3 / LAYERS, 3) for e in events[:10]
        },
    }


def _line(tokens: int, name: str, found: dict[str, Any]) -> str:
    start = f"{tokens:6}  {name:24}"
    if "error" in found:
        return f"{start} {found['error'][:160]}"
    shown = ("host_ms", "wall_ms", "busy_ms", "kernels", "peak_gib", "tokens_per_sec")
    return start + "  ".join(f"{key} {found[key]}" for key in shown if key in found)


if __name__ == "__main__":
    main()
