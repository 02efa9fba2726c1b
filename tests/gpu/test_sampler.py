"""The sampler on CUDA in bf16: log-probabilities as exact as training's, by single kernels and by a graph."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The process groups are those of a process: each case runs in its own.
_SAMPLE = """
import json, sys
import numpy as np
import torch
from tests.trainer.megatron.sampling import forced, grammar, opd_config, prompts, student_of
from tests.trainer.megatron.tiny import STUDENT, tiny_config
from trainer.megatron.topology import distributed

SEQ_LEN = 256
student = STUDENT | {"hidden": 128, "heads": 4, "head_dim": 32, "ffn": 128, "expert_width": 64, "shared_width": 64}
student |= {"window": 32, "init_std": 0.05}
runtime = {
    "device": "cuda", "precision": "bf16", "core_attention": "triton", "expert_compute": "triton",
    "deterministic": False, "student": student,
}
config = tiny_config(**runtime)
with distributed("cuda", config.parallel, seed=1) as topology:
    from trainer.megatron.sampler import Sampler
    from trainer.megatron.step import Trainer

    trainer = Trainer(config, topology, SEQ_LEN)
    student_of(trainer)
    before = [p.clone() for p in trainer.student.parameters()]
    plain = {"precision": "fp32", "core_attention": "dense", "expert_compute": "loop"}
    exact = Trainer(tiny_config(**(runtime | plain)), topology, SEQ_LEN)
    exact.student.load_state_dict(trainer.student.state_dict())
    sampler = Sampler(
        trainer.student, opd_config(sampling=json.loads(sys.argv[1]), **runtime), topology, SEQ_LEN, grammar()
    )
    asked = prompts([1, 100, 31, 32, 33, 64, 7, 150, 240, 90, 12, 200, 5, 77, 180, 40] * 4)
    samples = sampler.sample(asked)
    pairs = list(zip(asked, samples, strict=True))
    packed, alone = (np.concatenate(forced(trainer, pairs, per_row=n)) for n in (2, 1))
    wide = np.concatenate(forced(exact, pairs, per_row=1))
    sampled = np.concatenate([sample.logprobs_S for sample in samples])
    again = sampler.sample(asked)
    same = np.mean([np.array_equal(a.tokens_S, b.tokens_S) for a, b in zip(samples, again, strict=True)])
    print(json.dumps({
        "unchanged": all(torch.equal(a, b) for a, b in zip(before, trainer.student.parameters(), strict=True)),
        "tokens": len(sampled),
        "ratio": float(np.exp(packed - sampled).mean()),
        "sampled": float(np.abs(sampled - wide).mean()),
        "packed": float(np.abs(packed - wide).mean()),
        "alone": float(np.abs(alone - wide).mean()),
        "between": float(np.abs(packed - sampled).mean()),
        "same": float(same),
    }))
"""


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_logprobs_are_those_of_training(cuda_graph) -> None:
    """Mean distances to the fp32 form of the same weights, of sampling and of training, are alike (bf16 rounds both);
    the distance between the two is that of independent roundings, at most their sum.

    ratio: the mean of p_training / p_sampling over sampled tokens is 1 where both are one distribution.
    """
    sampling = {"slots": 8, "max_reasoning": 60, "max_final": 60, "cuda_graph": cuda_graph}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SAMPLE, json.dumps(sampling)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    print(seen)
    assert seen["unchanged"] and seen["tokens"] > 500
    assert seen["sampled"] < 1.25 * max(seen["packed"], seen["alone"]) < 0.05
    assert seen["between"] < seen["packed"] + seen["sampled"]
    assert seen["ratio"] == pytest.approx(1, abs=0.02)
    assert seen["same"] > 0.8
