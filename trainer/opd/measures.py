"""Numbers of rollouts for the log and for people. Pure.

reverse_kl: mean over sampled tokens of log p_S - log p_T in nats, an estimate without bias of the reverse KL.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from common.tokenizer import FIRST_CONTROL_ID
from datastore.rollout import Rollout, ScoredTokens
from datastore.types import SPAN_FINAL, SPAN_IGNORED, SPAN_NAMES, SPAN_REASONING


def rollout_values(rollouts: Sequence[Rollout], prefix: str) -> dict[str, float]:
    """Validity, verdicts, modes and lengths of these rollouts (at least one).

    Under PREFIX: valid, a share; verdict/NAME, shares; mode/NAME, rollouts of a teacher mode; length/NAME, mean sampled
    tokens of a mode or of a span.
    """
    count = len(rollouts)
    verdicts = Counter(str(rollout.verdict) for rollout in rollouts)
    modes = Counter(rollout.reasoning for rollout in rollouts)
    values = {f"{prefix}/valid": verdicts["valid"] / count}
    values |= {f"{prefix}/verdict/{name}": n / count for name, n in sorted(verdicts.items())}
    values |= {f"{prefix}/mode/{name}": float(n) for name, n in sorted(modes.items())}
    for mode in sorted(modes):
        lengths = [len(r.logprobs_S) for r in rollouts if r.reasoning == mode]
        values[f"{prefix}/length/{mode}"] = float(np.mean(lengths))
    for span, name in SPAN_NAMES.items():
        values[f"{prefix}/length/{name}"] = float(
            np.mean([np.count_nonzero(r.spans_T == span) for r in rollouts])
        )
    return values


def reverse_kl_values(
    pairs: Sequence[tuple[Rollout, ScoredTokens]], prefix: str
) -> dict[str, float]:
    """PREFIX/reverse_kl/CLASS for the spans, the control ids and all sampled tokens (total): means over tokens.

    Also PREFIX/student_logprob/total and /teacher_logprob/total. A class without tokens has no value.
    """
    student_N, teacher_N = (
        np.concatenate([getattr(scored, name) for _, scored in pairs]).astype(np.float64)
        for name in ("sampling_logprob_S", "teacher_logprob_S")
    )
    spans_T, tokens_T = (
        np.concatenate([getattr(rollout, name) for rollout, _ in pairs])
        for name in ("spans_T", "tokens_T")
    )
    span_N, token_N = spans_T[spans_T != SPAN_IGNORED], tokens_T[spans_T != SPAN_IGNORED]
    classes = {
        "reasoning": span_N == SPAN_REASONING,
        "final": span_N == SPAN_FINAL,
        "control": token_N >= FIRST_CONTROL_ID,
        "total": np.ones(len(span_N), dtype=bool),
    }
    return {
        f"{prefix}/reverse_kl/{name}": float((student_N - teacher_N)[mask_N].mean())
        for name, mask_N in classes.items()
        if mask_N.any()
    } | {
        f"{prefix}/student_logprob/total": float(student_N.mean()),
        f"{prefix}/teacher_logprob/total": float(teacher_N.mean()),
    }
