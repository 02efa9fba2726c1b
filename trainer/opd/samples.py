"""Rollouts as people read them: samples.jsonl in the run's folder, and text in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from common.tokenizer import encoding
from datastore.rollout import Rollout, ScoredTokens
from datastore.types import SPAN_FINAL, SPAN_REASONING
from trainer.run import RunLog, keep_until

PROMPT_CHARS = 600
_SPANS = {"reasoning": SPAN_REASONING, "final": SPAN_FINAL}
# JSON leaves these as they are; a terminal obeys some, and str.splitlines ends a line at others.
_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


def sample_record(step: int, rollout: Rollout, scored: ScoredTokens) -> dict[str, Any]:
    """One line of samples.jsonl, of a rollout that optimizer step `step` was trained on.

    tokens: counts. advantage: mean of teacher's minus sampling logprob, nats, null without tokens of the span. text:
    the last PROMPT_CHARS of the prompt, reasoning and final as sampled, marks included; bytes that are no whole
    character, as where a rollout was cut, are U+FFFD.
    """
    spans_S = rollout.spans_T[rollout.spans_T != 0]
    gap_S = scored.teacher_logprob_S.astype(np.float64) - scored.sampling_logprob_S
    prompt = _text(rollout.tokens_T[rollout.spans_T == 0])
    texts = {
        name: _text(rollout.tokens_T[rollout.spans_T == span]) for name, span in _SPANS.items()
    }
    masks = {name: spans_S == span for name, span in _SPANS.items()}
    return {
        "step": step,
        "policy_version": rollout.policy_version,
        "prompt": rollout.prompt,
        "sample": rollout.sample,
        "doc_id": rollout.doc_id.hex(),
        "language": rollout.language,
        "exercise": rollout.exercise,
        "mode": rollout.reasoning,
        "verdict": str(rollout.verdict),
        "tokens": {"prompt": len(rollout.tokens_T) - len(spans_S)}
        | {name: int(mask_S.sum()) for name, mask_S in masks.items()},
        "advantage": {
            name: float(gap_S[mask_S].mean()) if mask_S.any() else None
            for name, mask_S in masks.items()
        },
        "text": {"prompt": prompt[-PROMPT_CHARS:], **texts},
    }


def json_line(record: dict[str, Any]) -> str:
    """A record as one line of UTF-8 text that a terminal may be shown."""
    return json.dumps(record, ensure_ascii=False).translate(_ESCAPES) + "\n"


def sample_markdown(record: dict[str, Any]) -> str:
    """A record as TensorBoard shows it: its facts, then each text as it stands."""
    gaps = record["advantage"]
    facts = [
        f"**{record['verdict']}**",
        f"effort {record['mode']}",
        f"prompt {record['prompt']} sample {record['sample']}",
        f"weights of step {record['policy_version']}",
        *(
            f"{name} {record['tokens'][name]} tokens"
            + ("" if gaps[name] is None else f", teacher - student {gaps[name]:+.3f}")
            for name in _SPANS
        ),
    ]
    blocks = [
        f"**{name}**\n\n" + "\n".join(f"    {line}" for line in text.split("\n"))
        for name, text in record["text"].items()
    ]
    return "\n\n".join([" | ".join(facts), *blocks])


class SampleLog:
    """samples.jsonl beside the metrics of a run, and the same in its TensorBoard; on rank 0 alone.

    Records after the resumed step are dropped, as those of the metrics are: their steps will be made again.
    """

    def __init__(self, folder: Path, log: RunLog, *, resumed_step: int) -> None:
        self._path, self._log = folder / "samples.jsonl", log
        keep_until(self._path, resumed_step)

    def write(self, step: int, rollouts: Iterable[tuple[Rollout, ScoredTokens]]) -> None:
        """The records of `step` (steps done)."""
        records = [sample_record(step, rollout, scored) for rollout, scored in rollouts]
        with open(self._path, "a", encoding="utf-8") as file:
            file.writelines(map(json_line, records))
        for number, record in enumerate(records):
            self._log.write_text(step, f"rollout/{number}", sample_markdown(record))


def _text(tokens_T: np.ndarray) -> str:
    return encoding().decode(tokens_T.tolist(), errors="replace")
