"""Rollouts and tokens a second of the sampler by number of slots, beside the floor of reading weights and cache.

    python -m benchmarks.sampler --device cuda      the full student, bf16, FlexAttention; also by a captured CUDA graph
    python -m benchmarks.sampler --device cpu       the demonstration's student, float32; shows that it runs

Random weights, random prompts of 50 to 250 tokens, four rollouts for each slot, and a grammar in which every id of a
share 1 / mean_tokens of the vocabulary ends a rollout: their lengths are geometric, so slots are filled again at
different times.
`step_ms`: a decoded token in every slot, prefills left out. `prefill_share`: of the device's time. Medians of the
repeats.
Floor of a step: bytes / 4.8 TB/s (H200). Bytes: all weights but the embedding once, of the routed experts those that
this many tokens are expected to choose; of the cache what a rollout in its middle can see. On CPU only the bytes.
Writes benchmarks/results/sampler_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import header
from common.files import write_json
from trainer.config import ParallelConfig
from trainer.opd.config import OPDConfig
from trainer.student_config import StudentConfig

RESULTS = Path(__file__).parent / "results"
STUDENTS = Path(__file__).parents[1] / "configs" / "student"
PROMPT_TOKENS = (50, 250)
BANDWIDTH = 4.8e12  # bytes/s of an H200
ON_CUDA = {
    "device": "cuda",
    "transformer_impl": "local",
    "core_attention": "triton",
    "expert_compute": "triton",
    "precision": "bf16",
}
ON_CPU = {
    "device": "cpu",
    "transformer_impl": "local",
    "core_attention": "dense",
    "expert_compute": "loop",
    "precision": "fp32",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "cuda": {
        "student": "vpmoe",
        "slots": [32, 128, 256],
        "seq_len": 2048,
        "mean_tokens": 400,
        "repeats": 2,
        "graphs": [False, True],
        "runtime": ON_CUDA,
    },
    "cpu": {
        "student": "demo",
        "slots": [4, 16],
        "seq_len": 512,
        "mean_tokens": 12,
        "repeats": 1,
        "graphs": [False],
        "runtime": ON_CPU,
    },
}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=sorted(SETTINGS), required=True)
    parser.add_argument(
        "--slots", type=int, nargs="+", help="instead of the numbers of the settings"
    )
    parser.add_argument("--mean-tokens", type=int, help="instead of that of the settings")
    parser.add_argument("--repeats", type=int, help="instead of those of the settings")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    settings = SETTINGS[arguments.device]
    for name in ("slots", "mean_tokens", "repeats"):
        if given := getattr(arguments, name):
            settings = settings | {name: given}
    report = header(("torch", "megatron-core"), device=arguments.device) | {
        "what": (__doc__ or "").splitlines()[0],
        "settings": settings,
        "by_slots": measure_all(settings),
    }
    write_json(arguments.out or RESULTS / f"sampler_{arguments.device}.json", report)


def measure_all(settings: dict[str, Any]) -> dict[str, Any]:
    """The figures and the floor for each number of slots."""
    from trainer.megatron.topology import distributed

    config = run_config(settings, slots=1, graph=False)
    with distributed(config.device, ParallelConfig(), seed=1) as topology:
        from trainer.megatron.student import build_student

        student = build_student(config.student, config, config.parallel, settings["seq_len"])
        results: dict[str, Any] = {}
        for slots in settings["slots"]:
            figures: dict[str, Any] = {"floor": floor(student, config.student, settings, slots)}
            for graph in settings["graphs"]:
                name = "cuda_graph" if graph else "eager"
                figures[name] = measure(student, settings, slots, topology, graph)
                print(f"slots={slots} {name}: {figures[name]}", flush=True)
            results[str(slots)] = figures
        return results


def run_config(settings: dict[str, Any], slots: int, graph: bool) -> OPDConfig:
    """What the sampler reads of a run's config."""
    import yaml

    return OPDConfig.model_validate(
        settings["runtime"]
        | {
            "run": "unused",
            "dataset": "unused",
            "student": yaml.safe_load((STUDENTS / f"{settings['student']}.yaml").read_text()),
            "steps": 1,
            "optimizer": {"lr": 1e-3},
            "schedule": {"kind": "constant"},
            "checkpoint": {"every": 1},
            "teacher": {"name": "unused", "url": "http://unused"},
            "sampling": {
                "slots": slots,
                "max_reasoning": settings["seq_len"],
                "max_final": 1,
                "cuda_graph": graph,
            },
            "curriculum": [{"modes": {"low": 1, "medium": 0, "high": 0}}],
            "batch": {"rollouts": 1, "micro_batch_size": 1},
            "eval": {"prompts": 1},
        }
    )


def measure(
    student: Any, settings: dict[str, Any], slots: int, topology: Any, graph: bool
) -> dict[str, Any]:
    """Medians over the repeats, after a call that warms up."""
    from trainer.megatron.sampler import Sampler

    config = run_config(settings, slots, graph)
    grammar = grammar_of(config.student.vocab_size, settings["mean_tokens"])
    sampler = Sampler(student, config, topology, settings["seq_len"], grammar)
    sampler.sample(prompts(settings, config.student.vocab_size, 2, seed=99))
    if topology.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for repeat in range(settings["repeats"]):
        samples = sampler.sample(prompts(settings, config.student.vocab_size, 4 * slots, repeat))
        assert sampler.report is not None
        report = sampler.report
        seconds = report.prefill_sec + report.decode_sec
        runs.append(
            {
                "rollouts_per_sec": len(samples) / seconds,
                "tokens_per_sec": report.tokens / seconds,
                "step_ms": 1e3 * report.decode_sec / report.steps,
                "prefill_ms": 1e3 * report.prefill_sec / report.prefills,
                "prefill_share": report.prefill_sec / seconds,
                "occupied": report.occupied,
            }
        )
    figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    if topology.device.type == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {key: float(f"{value:.4g}") for key, value in figures.items()}


def grammar_of(vocab: int, mean_tokens: int) -> Any:
    """One state until an id of a share 1 / mean_tokens of the vocabulary."""
    from datastore.harmony_grammar import Verdict
    from trainer.opd.slots import Grammar

    classes_V = np.zeros(vocab, dtype=np.uint8)
    classes_V[: vocab // mean_tokens] = 1
    return Grammar(
        start=0,
        token_class_V=classes_V,
        next_state_SC=np.array([[0, 1], [1, 1]], dtype=np.uint8),
        span_S=np.array([1, 1], dtype=np.uint8),
        next_span_S=np.array([1, 1], dtype=np.uint8),
        ended_S=np.array([False, True]),
        verdict_S=(Verdict.CUT_REASONING, Verdict.VALID),
    )


def prompts(settings: dict[str, Any], vocab: int, count: int, seed: int) -> list[Any]:
    """Random prompts of random lengths."""
    from trainer.opd.slots import SamplePrompt

    rng = np.random.default_rng(seed)
    lengths = rng.integers(*PROMPT_TOKENS, count)
    return [
        SamplePrompt(tokens_T=rng.integers(0, vocab, n).astype(np.int32), key=1000 * seed + number)
        for number, n in enumerate(lengths)
    ]


def floor(
    student: Any, config: StudentConfig, settings: dict[str, Any], slots: int
) -> dict[str, float]:
    """Bytes of a step, and their milliseconds on an H200; see the top of this file."""
    size = student.output_layer.weight.element_size()
    experts = config.experts
    touched = 1 - (1 - config.experts_per_token / experts) ** slots
    weights = sum(
        p.numel() * p.element_size() * (touched if ".mlp.experts." in name else 1)
        for name, p in student.named_parameters()
        if not name.startswith("embedding")
    )
    middle = sum(PROMPT_TOKENS) / 2 + settings["mean_tokens"] / 2
    seen = config.global_layers * middle + config.local_layers * min(config.window, middle)
    cache = slots * seen * 2 * config.kv_groups * config.head_dim * size
    bytes_ = {"weights_gb": weights / 1e9, "cache_gb": cache / 1e9}
    if settings["runtime"]["device"] == "cuda":
        bytes_["step_ms"] = 1e3 * (weights + cache) / BANDWIDTH
    return {key: float(f"{value:.4g}") for key, value in bytes_.items()}


if __name__ == "__main__":
    main()
