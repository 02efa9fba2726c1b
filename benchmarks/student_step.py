"""One training step of a student on this machine's devices: memory by part, time by phase, tokens/s, MFU, kernels.

    python -m benchmarks.student_step configs/base.yaml --steps 20
    python -m benchmarks.student_step configs/base.yaml --rows 64        steps on 64 rows of each batch too
    torchrun --nproc-per-node 2 -m benchmarks.student_step configs/base.yaml parallel.expert=2 --steps 20

Builds the run as `vpmoe-train kd` does (same data, student, optimizer, step; no checkpoint) and takes real steps.
MFU = tokens/s of a device x FLOPs a token (trainer/flops.py: forward and backward, lm_head counted, recomputation not)
/ 989.4 TFLOP/s, the dense bf16 peak of an H100 or H200. Writes benchmarks/results/student_step-NAME.json on rank 0.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from benchmarks.kernel_classes import by_class, draw_bar, profiled
from benchmarks.report import device_name, header
from common.config import load_config
from common.files import write_json
from trainer.config import KDConfig

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton")
GIB = 2**30


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4, help="steps left out of the medians")
    parser.add_argument("--name", default="", help="of the result file; not written without one")
    parser.add_argument(
        "--rows",
        type=int,
        help="then as many steps on so many rows of each batch, as of one of several GPUs",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="profile one more step, launched one by one"
    )
    parser.add_argument("--chart", type=Path, help="PNG of where the time goes; needs --kernels")
    arguments = parser.parse_intermixed_args()
    config = load_config(KDConfig, arguments.config, tuple(arguments.overrides))
    if arguments.kernels and config.cuda_graph:
        # The profiler of torch 2.11 ends with a segmentation fault on graphs of ten thousand kernels (seen).
        parser.error("--kernels needs cuda_graph=false")
    figures, rank = measure(
        config, arguments.steps, arguments.warm_up, rows=arguments.rows, kernels=arguments.kernels
    )
    if rank:
        return
    report = {"what": (__doc__ or "").splitlines()[0]}
    report |= header(PACKAGES, device=config.device) | figures
    for key, value in report.items():
        print(f"{key}: {value}"[:4000])
    if arguments.name:
        write_json(RESULTS / f"student_step-{arguments.name}.json", report)
    if arguments.chart:
        draw_step(figures, arguments.chart)


def measure(
    config: KDConfig, steps: int, warm_up: int, *, rows: int | None = None, kernels: bool
) -> tuple[dict[str, Any], int]:
    """The figures, and this process's rank."""
    from trainer.kd import KDRun
    from trainer.megatron.topology import distributed

    with distributed(
        config.device, config.parallel, config.seed, deterministic=config.deterministic
    ) as topology:
        run = KDRun(config, topology)
        records = take_steps(run, steps)
        figures = {
            "layout": topology.layout(),
            "config": {key: config.resolved()[key] for key in ("batch", "recompute", "precision")},
            "seq_len": run.seq_len,
            "loss": [record["loss/total"] for record in records],
            "router": {k: v for k, v in records[-1].items() if k.startswith("router/")},
            "timing": timing(config, run.seq_len, records[warm_up:], topology),
            "memory_gib": memory_by_part(run.trainer, topology.device),
        }
        if rows is not None:
            some = take_steps(run, steps, rows)[warm_up:]
            figures["timing_of_rows"] = timing(config, run.seq_len, some, topology, rows)
        if topology.rank == 0:
            print(figures["timing"], figures["memory_gib"], flush=True)
        if kernels:
            figures["kernels_ms"] = kernel_times(run)
            figures["classes_ms"] = by_class(figures["kernels_ms"])
        return figures, topology.rank


def draw_step(figures: dict[str, Any], path: Path) -> None:
    """Phases of a step, and classes of its kernels."""
    of = figures["timing"]
    phases = phases_ms(of)
    phases["host and waiting"] = max(0.0, 1e3 * of["seconds"]["step"] - sum(phases.values()))
    title = f"{of['tokens_a_step']} tokens a step, {of['tokens_per_sec_a_device']:.0f} tokens/s"
    draw_bar({"phases": phases, "kernels": figures["classes_ms"]}, path, title)


def phases_ms(timing: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each phase of a step, from what `timing` gives."""
    return {name: 1e3 * of for name, of in timing["seconds"].items() if name != "step"}


def take_steps(run: Any, steps: int, rows: int | None = None) -> list[dict[str, float]]:
    """Real steps, each on its whole batch or on its first rows; the values of each."""
    import time

    from trainer.megatron.step import Clock
    from trainer.schedule import learning_rate

    loader, batch = run.feed(None), run.config.batch
    used = None if rows is None else rows // (batch.micro_batch_size * run.topology.dp_size)
    records = []
    for step in range(steps):
        clock, began = Clock(run.topology.device), time.perf_counter()
        clock.mark("data")
        report = run.trainer.step(loader.next()[:used], learning_rate(run.config, step), clock)
        loader.finished()
        seconds = time.perf_counter() - began
        phases = {f"seconds/{phase}": value for phase, value in report.seconds.items()}
        records.append(report.values | phases | {"seconds/step": seconds})
        if run.topology.rank == 0:
            print(
                f"step {step + 1}: loss {records[-1]['loss/total']:.4f}, {seconds:.3f} s",
                flush=True,
            )
    return records


def timing(
    config: KDConfig,
    seq_len: int,
    records: list[dict[str, float]],
    topology: Any,
    rows: int | None = None,
) -> dict[str, Any]:
    """Medians over the steps."""
    from trainer.flops import flops_per_token, mfu, peak_bf16_flops

    median = {
        key.removeprefix("seconds/"): statistics.median(record[key] for record in records)
        for key in records[0]
        if key.startswith("seconds/")
    }
    tokens = (rows or config.batch.global_batch_size) * seq_len
    tokens_per_sec = tokens / median["step"]
    of_device = tokens_per_sec / topology.world_size
    flops, peak = (
        flops_per_token(config.student, seq_len),
        peak_bf16_flops(device_name(config.device)),
    )
    return {
        "tokens_a_step": tokens,
        "tokens_per_sec": tokens_per_sec,
        "tokens_per_sec_a_device": of_device,
        "seconds": median,
        "share_of_step": {key: value / median["step"] for key, value in median.items()},
        "flops_per_token": flops,
        "mfu": mfu(of_device, flops, peak) if peak else None,
    }


def memory_by_part(trainer: Any, device: Any) -> dict[str, float]:
    """GiB on this rank. Activations and temporaries: the peak of a step beyond what stays."""
    import torch

    stays = {
        "weights": _bytes(trainer.student.parameters()) + _bytes(trainer.student.buffers()),
        "gradients": sum(
            buffer.grad_data.nbytes
            for buffer in trainer.model.buffers + trainer.model.expert_parallel_buffers
        ),
    } | _optimizer_bytes(trainer)
    values = {key: value / GIB for key, value in stays.items()}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / GIB
        values |= {"activations_and_temporaries": peak - sum(values.values()), "peak": peak}
    return values


def _optimizer_bytes(trainer: Any) -> dict[str, int]:
    """States by name, and the fp32 copies of weights in bf16."""
    found: dict[str, int] = {"master_weights": 0}
    for chained in trainer.optimizer.chained_optimizers:
        for group in getattr(chained, "fp32_from_float16_groups", []):
            found["master_weights"] += _bytes(group)
        for state in chained.optimizer.state.values():
            for name, value in state.items():
                if hasattr(value, "nbytes"):
                    key = f"optimizer {name}"
                    found[key] = found.get(key, 0) + value.nbytes
    return found


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def kernel_times(run: Any) -> dict[str, dict[str, float]]:
    """Milliseconds and calls of every kernel in one step."""
    return profiled(lambda: take_steps(run, 1))


if __name__ == "__main__":
    main()
