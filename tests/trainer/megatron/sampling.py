"""What tests of the sampler share: its config, a grammar of the tiny vocabulary, prompts, training's numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from datastore.harmony_grammar import Verdict
from datastore.types import SPAN_FINAL, SPAN_REASONING
from tests.trainer.megatron.tiny import VOCAB, in_vocabulary
from tests.trainer.opd import configs
from tests.trainer.packed import pack
from trainer.batch import make_batch
from trainer.opd.config import OPDConfig
from trainer.opd.slots import Grammar, Sample, SamplePrompt

CLOSING, RETURNING = range(20), range(20, 40)


def opd_config(*, slots: int = 3, caps: tuple[int, int] = (18, 18), **changes: Any) -> OPDConfig:
    """An OPD config of the tiny student on CPU; keyword arguments replace top-level keys."""
    values = {
        "sampling": {"slots": slots, "max_reasoning": caps[0], "max_final": caps[1]},
        "curriculum": [{"modes": {"low": 1, "medium": 0, "high": 0}}],
        "batch": {"rollouts": 4, "micro_batch_size": 2},
    }
    return configs.opd_config(**(values | changes))


def grammar() -> Grammar:
    """Reasoning up to and with the first id of CLOSING, then final up to and with the first of RETURNING; an id of
    RETURNING in the reasoning is a fault. States: start, reasoning, closed, final, returned, fault.
    """
    classes_V = np.zeros(VOCAB, dtype=np.uint8)
    classes_V[list(CLOSING)], classes_V[list(RETURNING)] = 1, 2
    reasoning, final = SPAN_REASONING, SPAN_FINAL
    return Grammar(
        start=0,
        token_class_V=classes_V,
        next_state_SC=np.array(
            [[1, 2, 5], [1, 2, 5], [3, 3, 4], [3, 3, 4], [4, 4, 4], [5, 5, 5]], dtype=np.uint8
        ),
        span_S=np.array([0, reasoning, reasoning, final, final, reasoning], dtype=np.uint8),
        next_span_S=np.array([reasoning, reasoning, final, final, 0, 0], dtype=np.uint8),
        ended_S=np.array([0, 0, 0, 0, 1, 1], dtype=bool),
        verdict_S=(
            *(Verdict.CUT_REASONING, Verdict.CUT_REASONING, Verdict.CUT_FINAL, Verdict.CUT_FINAL),
            *(Verdict.VALID, Verdict.EARLY_RETURN),
        ),
    )


def prompts(lengths: list[int], seed: int = 0) -> list[SamplePrompt]:
    """Random prompts; their keys are large, as keys are."""
    rng = np.random.default_rng(seed)
    return [
        SamplePrompt(
            tokens_T=rng.integers(0, VOCAB, length).astype(np.int32),
            key=int(rng.integers(0, 2**64, dtype=np.uint64)),
        )
        for length in lengths
    ]


def student_of(trainer: Any, seed: int = 3) -> Any:
    """The trainer's student with biases, norms, sinks and balancing biases away from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*trainer.student.named_parameters(), *trainer.student.named_buffers()]:
            vector = tensor.ndim == 1 and "log_frequency" not in name and "local_tokens" not in name
            if vector or name.endswith("bias"):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor)
    return trainer.student


@torch.no_grad()
def forced(trainer: Any, pairs: list[tuple[SamplePrompt, Sample]], per_row: int) -> list[Any]:
    """The log-probabilities of the sampled tokens by the training path: `per_row` documents packed a row, rows of
    one length.
    """
    trainer.model.eval()
    found = []
    for first in range(0, len(pairs), per_row):
        group = pairs[first : first + per_row]
        documents = []
        for prompt, sample in group:
            tokens_T = np.concatenate([prompt.tokens_T, sample.tokens_S, [0]]).astype(np.int32)
            documents.append((tokens_T, np.zeros(len(tokens_T), dtype=np.uint8)))
        row = pack(documents, per_row * trainer.student.max_sequence_length)
        batch = in_vocabulary(make_batch([row], [None])).to(trainer.topology.device)
        hidden_TD = trainer._hidden(trainer.model, batch)[0]
        head_VD = trainer.student.output_layer.weight
        logprob_TV = (hidden_TD.float() @ head_VD.float().t()).log_softmax(dim=-1).cpu()
        at = 0
        for (prompt, sample), (tokens_T, _) in zip(group, documents, strict=True):
            begin = at + len(prompt.tokens_T) - 1
            rows_S = torch.arange(begin, begin + len(sample.tokens_S))
            ids_S = torch.from_numpy(sample.tokens_S.astype(np.int64))
            found.append(logprob_TV[rows_S, ids_S].numpy())
            at += len(tokens_T)
    return found
