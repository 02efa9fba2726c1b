"""Time and peak memory of the loss at the lm_head, forward and backward, ours beside others in one run.

    python benchmarks/loss.py --device cpu             hidden 64, 512 to 2048 tokens
    python benchmarks/loss.py --device cuda            hidden 1024, 8192 tokens, bf16
    python benchmarks/loss.py --device cuda --variants its kernels one by one (loss_variants.py)

Ways: `gemms` is the floor, the three products alone; `naive_ce` and `naive_kd` form float32 log-probabilities of all
logits; `ours_ce` and `ours_kd` are the fused function without and with teacher entries, at each chunk size.
Writes benchmarks/results/loss_<device>.json; `ms` is the least of the repeats, as other load on
the machine only adds; `over_gemms` is its ratio to the floor; memory is the peak above the inputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks.report import header
from common.files import write_json
from common.tokenizer import VOCAB_SIZE
from trainer.losses.chunk import TokenTargets
from trainer.losses.coefficients import Coefficients
from trainer.losses.fused_linear import fused_linear_loss

RESULTS = Path(__file__).parent / "results"
DEFAULTS = {
    "cpu": {"tokens": [512, 1024, 2048], "hidden": 64, "dtype": "float32", "chunks": [128, 256]},
    "cuda": {
        "tokens": [8192],
        "hidden": 1024,
        "dtype": "bfloat16",
        "chunks": [1024, 2048, 4096],
    },
}
Inputs = tuple[torch.Tensor, torch.Tensor, TokenTargets]


def make_inputs(tokens: int, hidden: int, entries: int, dtype: torch.dtype, device: str) -> Inputs:
    """Hidden states, lm_head, and labels with `entries` teacher entries a position."""
    torch.manual_seed(0)
    hidden_TD = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight_VD = (torch.randn(VOCAB_SIZE, hidden, device=device) / hidden**0.5).to(dtype)
    return (
        hidden_TD,
        weight_VD.requires_grad_(),
        TokenTargets(
            index_N=torch.arange(tokens, device=device),
            labels_N=torch.randint(VOCAB_SIZE, (tokens,), device=device),
            ids_NK=torch.randint(VOCAB_SIZE, (tokens, entries), device=device).int(),
            weights_NK=torch.rand(tokens, entries, device=device) / entries,
        ),
    )


def gemms(inputs: Inputs) -> Callable[..., None]:
    """logits = H W', dH = G W, dW = G' H, with the logits in the place of G and all outputs allocated before."""
    hidden_TD, weight_VD = (each.detach() for each in inputs[:2])
    logits_TV = hidden_TD @ weight_VD.T
    grad_TD, grad_VD = torch.empty_like(hidden_TD), torch.empty_like(weight_VD)

    def step(*_: object) -> None:
        torch.mm(hidden_TD, weight_VD.T, out=logits_TV)
        torch.mm(logits_TV, weight_VD, out=grad_TD)
        torch.mm(logits_TV.T, hidden_TD, out=grad_VD)

    return step


def naive_ce(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets: TokenTargets) -> None:
    logits_TV = (hidden_TD @ weight_VD.T).float()
    functional.cross_entropy(logits_TV, targets.labels_N).backward()


def naive_kd(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets: TokenTargets) -> None:
    logprobs_TV = (hidden_TD @ weight_VD.T).float().log_softmax(dim=1)
    ce_T = -logprobs_TV.gather(1, targets.labels_N[:, None])[:, 0]
    kd_T = -(logprobs_TV.gather(1, targets.ids_NK.long()) * targets.weights_NK).sum(dim=1)
    (0.5 * ce_T + 0.5 * kd_T).mean().backward()


def ours(chunk: int, kd_weight: float) -> Callable[..., None]:
    """The fused function; without teacher entries at kd_weight 0."""

    def step(hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets: TokenTargets) -> None:
        num = len(targets.index_N)
        if kd_weight == 0:
            ids_NK, weights_NK = targets.ids_NK[:, :0], targets.weights_NK[:, :0]
            targets = TokenTargets(targets.index_N, targets.labels_N, ids_NK, weights_NK)
        coefficients = Coefficients(
            torch.full((num,), (1 - kd_weight) / num, device=hidden_TD.device),
            torch.full((num,), kd_weight / num, device=hidden_TD.device),
        )
        loss, _ = fused_linear_loss(hidden_TD, weight_VD, targets, coefficients, chunk_tokens=chunk)
        loss.backward()

    return step


class CpuMeter:
    """Wall time, and the peak resident memory, which Linux resets on a write of 5 to clear_refs."""

    def start(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = self._read("VmRSS")
        self.clock = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        seconds = time.perf_counter() - self.clock
        return seconds, (self._read("VmHWM") - self.before) / 2**20

    def _read(self, key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
        raise KeyError(key)


class CudaMeter:
    """Device time between synchronisations, and the allocator's peak."""

    def start(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        self.clock = time.perf_counter()

    def stop(self) -> tuple[float, float]:
        torch.cuda.synchronize()
        seconds = time.perf_counter() - self.clock
        return seconds, (torch.cuda.max_memory_allocated() - self.before) / 2**30


def measure(
    steps: dict[str, Callable[..., None]], inputs: Inputs, repeats: int
) -> dict[str, dict[str, float]]:
    """Milliseconds (least and median) and peak GiB above the inputs of each step.

    The steps take turns, so that a change of the machine's other load meets all of them; the first round warms up.
    """
    meter = CudaMeter() if inputs[0].is_cuda else CpuMeter()
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            inputs[0].grad = inputs[1].grad = None
            meter.start()
            step(*inputs)
            runs[name].append(meter.stop())
    return {name: _summary(taken[1:]) for name, taken in runs.items()}


def _summary(taken: list[tuple[float, float]]) -> dict[str, float]:
    seconds = [each for each, _ in taken]
    return {
        "ms": round(1000 * min(seconds), 2),
        "median_ms": round(1000 * statistics.median(seconds), 2),
        "peak_gib": round(max(peak for _, peak in taken), 3),
    }


def compare(tokens: int, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Every way at one number of tokens, with its time over the floor."""
    dtype = getattr(torch, arguments.dtype)
    inputs = make_inputs(tokens, arguments.hidden, arguments.entries, dtype, arguments.device)
    steps: dict[str, Callable[..., None]] = {
        "gemms": gemms(inputs),
        "naive_ce": naive_ce,
        "naive_kd": naive_kd,
    }
    for chunk in arguments.chunks:
        steps[f"ours_ce chunk {chunk}"] = ours(chunk, 0.0)
        steps[f"ours_kd chunk {chunk}"] = ours(chunk, 0.5)
    results = measure(steps, inputs, arguments.repeats)
    for name, result in results.items():
        result["over_gemms"] = round(result["ms"] / results["gemms"]["ms"], 3)
        print(f"T={tokens:<6} {name:24} {json.dumps(result)}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=sorted(DEFAULTS), required=True)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--chunks", type=int, nargs="+")
    parser.add_argument("--entries", type=int, default=20, help="teacher entries a position")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", action="store_true", help="time the kernels alone")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for key, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, key) is None:
            setattr(arguments, key, value)
    if arguments.variants:
        from benchmarks.loss_variants import time_variants  # needs Triton

        time_variants(max(arguments.chunks), arguments.hidden, arguments.entries)
        return
    results = {str(tokens): compare(tokens, arguments) for tokens in arguments.tokens}
    settings = {
        key: value for key, value in vars(arguments).items() if key not in ("out", "variants")
    }
    report = header(("torch",), device=arguments.device) | {
        "settings": settings | {"vocab": VOCAB_SIZE, "threads": torch.get_num_threads()},
        "by_tokens": results,
    }
    write_json(arguments.out or RESULTS / f"loss_{arguments.device}.json", report)


if __name__ == "__main__":
    main()
