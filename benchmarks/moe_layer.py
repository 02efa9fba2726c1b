"""Time of one mixture-of-experts layer, forward and backward, ours beside Megatron's dispatcher path, in one run.

    python -m benchmarks.moe_layer --device cuda      full width, bf16, 8192 and 32768 tokens
    python -m benchmarks.moe_layer --device cpu       tiny, float32; shows that it runs

Ways: `ours` is StudentMoE, `megatron` MoELayer with TopKRouter and the alltoall dispatcher (allgather on the CPU)
around the same RoutedExperts and SharedExpert with the same weights. `host_ms`: until everything is enqueued;
`wall_ms`: until the device is done; `graph_ms`: replayed from a CUDA graph (ours alone: Megatron's path waits for the
host); `busy_ms`: sum of kernel times (profiler), with the kernels that take longest. Medians of the repeats.
`second_half`: the layer from attention's output on, as training runs it, recorded: output projection, residual, norm,
and ours, gradients of experts added to fp32 sums; on the GPU alone.
Floors: `flops_ms` at 989.4 TFLOP/s of router, experts and shared expert; `bytes_ms` at 4.8 TB/s: expert weights read
twice and their gradient written, and 11 passes over the routed rows [N, D] (gathered, in and out of both products and
of their gradients, summed). That of the second half has the arithmetic of the projection too.
Writes benchmarks/results/moe_layer_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from copy import copy
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel_timing import graph_ms
from benchmarks.report import header
from common.files import write_json
from trainer.config import ModelRuntime, ParallelConfig
from trainer.student_config import StudentConfig

RESULTS = Path(__file__).parent / "results"
FULL: dict[str, Any] = {
    "layers": 4,
    "hidden": 1024,
    "heads": 8,
    "kv_groups": 2,
    "head_dim": 128,
    "ffn": 128,
    "experts": 256,
    "experts_per_token": 4,
    "expert_width": 128,
    "shared_width": 512,
    "router": {"groups": 8, "group_topk": 4, "aux_loss": 1e-4},
}
TINY = FULL | {"hidden": 64, "experts": 16, "expert_width": 32, "shared_width": 32}
SETTINGS = {
    "cuda": {"student": FULL, "tokens": [8192, 32768], "precision": "bf16", "repeats": 30},
    "cpu": {"student": TINY, "tokens": [512], "precision": "fp32", "repeats": 3},
}
ROW = 2048  # tokens of a packed row
REPLAYS = 20


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(SETTINGS), required=True)
    parser.add_argument("--tokens", type=int, nargs="*", help="instead of all numbers of tokens")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings = dict(SETTINGS[arguments.device])
    settings["tokens"] = arguments.tokens or settings["tokens"]
    student = StudentConfig.model_validate(settings["student"])
    report = header(("torch", "megatron-core"), device=arguments.device) | {
        "what": (__doc__ or "").splitlines()[0],
        "settings": settings,
        "by_tokens": compare(student, settings, arguments.device),
    }
    write_json(arguments.out or RESULTS / f"moe_layer_{arguments.device}.json", report)


def compare(student: StudentConfig, settings: dict[str, Any], device: Any) -> dict[str, Any]:
    """Both ways and the floors at each number of tokens."""
    from trainer.megatron.topology import distributed

    with distributed(device, ParallelConfig(), seed=1):
        layers = make_layers(student, settings["precision"], device)
        results: dict[str, Any] = {}
        for tokens in settings["tokens"]:
            inputs = make_inputs(tokens, student, settings["precision"], device)
            figures: dict[str, Any] = {"floor": floor(student, tokens)}
            if device == "cuda":
                figures["second_half"] = {
                    "floor": floor(student, tokens, projected=True),
                    "graph_ms": second_half(layers["ours"], inputs),
                }
            outs = {name: layer(inputs[0])[0].float() for name, layer in layers.items()}
            gap = (outs["ours"] - outs["megatron"]).norm() / outs["megatron"].norm()
            figures["relative_gap_of_outputs"] = float(gap)
            for name, layer in layers.items():
                figures[name] = measure(layer, inputs, settings["repeats"])
                if name == "ours" and device == "cuda":
                    figures[name]["graph_ms"] = replayed(layer, inputs)
            results[str(tokens)] = figures
            for name, of in figures.items():
                print(f"T={tokens} {name}: {of}", flush=True)
        return results


def make_layers(student: StudentConfig, precision: Any, device: Any) -> dict[str, torch.nn.Module]:
    """Ours, and Megatron's with the same weights."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from trainer.megatron.experts import RoutedExperts, SharedExpert
    from trainer.megatron.moe import StudentMoE
    from trainer.megatron.student import transformer_config

    # As MoELayer calls them: experts return outputs and a bias, and the shared one is told whether it has a gate.
    class Routed(RoutedExperts):
        def forward(self, x_ND: Any, rows_E: Any, gate_N: Any) -> Any:
            """Rows that the dispatcher has sorted: each its own token with one slot."""
            rows_E = rows_E.to(x_ND.device, torch.int32)
            if device == "cuda":
                from trainer.kernels.dispatch import Slots

                order_N = torch.arange(len(x_ND), dtype=torch.int32, device=device)
                ends_E = rows_E.cumsum(0, dtype=torch.int32)
                longest_E = rows_E.argsort(descending=True, stable=True).int()
                slots: Any = Slots(order_N, order_N.unsqueeze(1), rows_E, ends_E, longest_E)
            else:
                expert_N = torch.repeat_interleave(rows_E, output_size=len(x_ND))
                slots = self.sort(expert_N.unsqueeze(1))
            return super().forward(x_ND, gate_N.unsqueeze(1).float(), slots), None

    class Shared(SharedExpert):
        def __init__(self, *args: Any, gate: bool, **kwargs: Any) -> None:
            assert not gate
            super().__init__(*args, **kwargs)

    compute: Any = "triton" if device == "cuda" else "loop"
    runtime = ModelRuntime(
        device=device,
        transformer_impl="local",
        core_attention="dense",
        expert_compute=compute,
        precision=precision,
    )
    config = transformer_config(student, runtime, ParallelConfig())
    stock_config = copy(config)
    stock_config.moe_token_dispatcher_type = "alltoall" if device == "cuda" else "allgather"
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    ours = StudentMoE(config, linear, compute=compute).to(device)
    parts = MoESubmodules(
        experts=ModuleSpec(module=Routed, params={"compute": compute}),
        shared_experts=ModuleSpec(module=Shared, submodules=linear),
    )
    if not hasattr(moe_utils, "te_general_gemm"):
        # Without TransformerEngine the name is unbound (line 34), and TopKRouter's product reads it (line 1192).
        moe_utils.te_general_gemm = None
    stock = MoELayer(stock_config, parts, layer_number=1).to(device)
    stock.set_layer_number(1)
    stock.load_state_dict(ours.state_dict())
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device=device))
    return {"ours": ours, "megatron": stock}


def make_inputs(
    tokens: int, student: StudentConfig, precision: str, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [S, B, D] in packed rows, and a gradient of the output."""
    torch.manual_seed(0)
    row = min(ROW, tokens)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x, grad = (
        torch.randn(row, tokens // row, student.hidden, device=device).to(dtype) for _ in range(2)
    )
    return x.requires_grad_(), grad * 1e-3


def second_half(moe: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Median milliseconds of a recorded pass from attention's output on, forward and backward."""
    from trainer.kernels.norm import Unsummed
    from trainer.megatron.around_attention import after, shared_expert

    x, grad = inputs
    for parameter in moe.experts.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    D, shared = x.shape[-1], moe.shared_experts
    draw = lambda *shape: torch.randn(*shape, device="cuda").mul_(D**-0.5).bfloat16()  # noqa: E731
    own = [draw(D, D).requires_grad_(), draw(D).requires_grad_(), (1 + draw(D)).requires_grad_()]
    of_shared = [shared.linear_fc1.weight, shared.linear_fc1.bias]
    of_shared += [shared.linear_fc2.weight, shared.linear_fc2.bias]
    hidden, out = (torch.randn_like(x).requires_grad_() for _ in range(2))
    leaves = [hidden, out, *own, *of_shared, *moe.router.parameters()]

    def once() -> None:
        unsummed = Unsummed()
        inputs = (t.flatten(0, 1) for t in (hidden, out))
        residual, normed, for_router, for_shared = after(
            *inputs, tuple(own), of_shared[-1], 1e-5, unsummed
        )

        def beside() -> tuple[torch.Tensor, ...]:
            both = shared_expert(for_shared, residual, tuple(of_shared))
            return tuple(of.view_as(x) for of in both)

        total = moe.routed(
            normed.view_as(x),
            None,
            beside,
            router_x_SBD=for_router.view_as(x),
            unsummed=unsummed,
        )
        torch.autograd.grad(total, leaves, grad)

    figure = graph_ms(once, REPLAYS)
    for parameter in moe.experts.parameters():
        del parameter.main_grad
    return figure


def floor(student: StudentConfig, tokens: int, *, projected: bool = False) -> dict[str, float]:
    """Least milliseconds by arithmetic and by memory; see the top of this file."""
    D, F, K = student.hidden, student.expert_width, student.experts_per_token
    own = D if projected else 0
    macs = tokens * D * (student.experts + 2 * K * F + 2 * student.shared_width + own)
    weights = 2 * student.experts * D * F * 2
    rows = tokens * K * D * 2
    return {
        "flops_ms": round(3 * 2 * macs / 989.4e12 * 1e3, 3),
        "bytes_ms": round((3 * weights + 11 * rows) / 4.8e12 * 1e3, 3),
    }


def measure(
    layer: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], repeats: int
) -> dict[str, Any]:
    """Medians over `repeats` passes, after a few that warm up."""
    x, grad = inputs
    on_gpu = x.is_cuda
    wait = torch.cuda.synchronize if on_gpu else (lambda: None)

    def once() -> tuple[float, float]:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        wait()
        start = time.perf_counter()
        layer(x)[0].backward(grad)
        enqueued = time.perf_counter()
        wait()
        return enqueued - start, time.perf_counter() - start

    for _ in range(5 if on_gpu else 1):
        once()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host, wall = zip(*(once() for _ in range(repeats)), strict=True)
    figures: dict[str, Any] = {
        "host_ms": round(1e3 * statistics.median(host), 3),
        "wall_ms": round(1e3 * statistics.median(wall), 3),
    }
    if on_gpu:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures |= kernels(once)
    return figures


def replayed(layer: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Median milliseconds of a recorded pass, forward and backward."""
    x, grad = inputs
    weights = [x, *layer.parameters()]

    return graph_ms(lambda: torch.autograd.grad(layer(x)[0], weights, grad), REPLAYS)


def kernels(once: Any) -> dict[str, Any]:
    """Time and number of kernels of one pass, and those that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        once()
    events = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    return {
        "busy_ms": round(sum(e.self_device_time_total for e in events) / 1e3, 3),
        "kernels": sum(e.count for e in events),
        "longest_ms": {e.key[:90]: round(e.self_device_time_total / 1e3, 3) for e in events[:10]},
    }


if __name__ == "__main__":
    main()
