"""What the student sampled, as it passes from the sampler to the buffer, the teacher and the trainer.

Legend: T tokens of the whole document, S sampled tokens. The sampled tokens are those with a span other than 0, and
they end the document: the prompt before them has span 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from datastore.harmony import Reasoning


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rollout:
    """One sampled document.

    prompt: its number in the run's endless order of prompts; sample: number among the rollouts of that prompt.
    doc_id, language, exercise: of the document that gave the prompt.
    tokens_T: int32, the prompt and the sampled tokens, no <|endoftext|>. spans_T: uint8, 0 on the prompt.
    logprobs_S: float32, of the sampled tokens under the weights that sampled them, temperature 1, natural log.
    policy_version: optimizer steps that those weights had seen. reasoning: the effort that the teacher is shown.
    verdict: of the Harmony grammar (datastore/harmony_grammar.py).
    """

    prompt: int
    sample: int
    doc_id: bytes
    language: str
    exercise: str
    tokens_T: np.ndarray
    spans_T: np.ndarray
    logprobs_S: np.ndarray
    policy_version: int
    reasoning: Reasoning
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredTokens:
    """The sampled tokens of one document as the policy loss needs them, in order: float32 [S] each, natural log.

    sampling_logprob_S: under the weights that sampled them. teacher_logprob_S: the teacher's, exact (the codec's
    realised logprobs have steps of 1/64 nat).
    """

    sampling_logprob_S: np.ndarray
    teacher_logprob_S: np.ndarray
