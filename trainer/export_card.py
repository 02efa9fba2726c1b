"""README.md of an export: what it is, how it was made, how it is used. Pure."""

from __future__ import annotations

from typing import Any

from trainer.parameters import parameter_counts
from trainer.student_config import StudentConfig

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# vpMoE, step {step}

A mixture-of-experts language model distilled from stored targets of a teacher: {total:,} parameters, {active:,} of them
active in a token. {layers} layers, hidden size {hidden}, {experts} experts, {topk} of them for a token.

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = tokenizer.apply_chat_template(
        [{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=512)

The chat template writes the Harmony documents of training: an answer has an analysis and a final channel and ends with
`<|return|>`. Text is trained in rows of {seq_len} tokens. modeling_vpmoe.py is code of this repository, not of
transformers: read it before `trust_remote_code`.

| made from | |
|---|---|
{facts}

export.json holds the same facts and the hash of every file. Data, evaluation, limits and licence: to be written by
whoever publishes the weights.
"""


def model_card(student: StudentConfig, source: dict[str, Any], seq_len: int) -> str:
    """The card of one export. source: trainer/export.py, `describe_source`."""
    counts = parameter_counts(student)
    return _CARD.format(
        step=source["step"],
        total=counts["total"],
        active=counts["active"],
        layers=student.layers,
        hidden=student.hidden,
        experts=student.experts,
        topk=student.experts_per_token,
        seq_len=seq_len,
        facts="\n".join(
            f"| {key.replace('_', ' ')} | {value} |" for key, value in source.items() if value
        ),
    )
