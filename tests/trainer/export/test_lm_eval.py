"""lm-eval runs on an export, without network: its numbers are those that the model gives when asked directly."""

from __future__ import annotations

import json
import math
import sys

import pytest

from tests.trainer.export.exported import Exported, program

pytestmark = pytest.mark.slow
QUESTIONS = [
    {"query": "Two and two make", "choices": [" four", " five", " a red house"], "answer": 0},
    {"query": "Снег", "choices": [" бел", " чёрен"], "answer": 0},
    {"query": "水は", "choices": ["冷たい", "四角い", "青"], "answer": 2},
    {"query": "def f(x):", "choices": [" return x", " 17"], "answer": 1},
]
CHOICE = """
task: vpmoe_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""
PERPLEXITY = """
task: vpmoe_text
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{query}}{{choices[0]}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
metadata: {version: 1}
"""


@pytest.fixture(scope="module")
def results(full_export: Exported, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What lm-eval reports and the samples that it judged, by task."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps(question, ensure_ascii=False) for question in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, task in (("choice", CHOICE), ("text", PERPLEXITY)):
        filled = task.replace("QUESTIONS", str(folder / "questions.jsonl"))
        (folder / f"{name}.yaml").write_text(filled, encoding="utf-8")
    out = folder / "out"
    program(
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        *("--model_args", f"pretrained={full_export.folder},trust_remote_code=True,dtype=float32"),
        *("--tasks", "vpmoe_choice,vpmoe_text", "--include_path", str(folder)),
        *("--batch_size", "2", "--output_path", str(out), "--log_samples"),
        HF_HOME=str(folder / "home"),
    )
    (report,) = out.rglob("results_*.json")
    samples = {
        task: [json.loads(line) for line in path.read_text().splitlines()]
        for task in ("vpmoe_choice", "vpmoe_text")
        for path in out.rglob(f"samples_{task}_*.jsonl")
    }
    return {"report": json.loads(report.read_text())["results"], "samples": samples}


@pytest.fixture(scope="module")
def asked(full_export: Exported):
    """log p(continuation | context) by the export itself, one sequence at a time."""
    import torch

    from common import tokenizer
    from trainer.hf.modeling_vpmoe import VpMoEForCausalLM

    model = VpMoEForCausalLM.from_pretrained(full_export.folder).eval()

    def logprob(context: str, continuation: str) -> float:
        encode = tokenizer.encoding().encode_ordinary
        before = encode(context) if context else [tokenizer.STARTOFTEXT]
        ids = torch.tensor([before + encode(continuation)])
        with torch.no_grad():
            logprobs = model(ids).logits[0].double().log_softmax(dim=-1)
        picked = [logprobs[t - 1, ids[0, t]].item() for t in range(len(before), ids.shape[1])]
        return sum(picked)

    return logprob


def test_choices_are_judged_by_the_models_own_probabilities(results: dict, asked) -> None:
    hits = 0
    for question, sample in zip(QUESTIONS, results["samples"]["vpmoe_choice"], strict=True):
        expected = [asked(question["query"], choice) for choice in question["choices"]]
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-3)
        hits += max(range(len(expected)), key=expected.__getitem__) == question["answer"]
    assert results["report"]["vpmoe_choice"]["acc,none"] == hits / len(QUESTIONS)


def test_perplexity_of_a_text_is_that_of_the_model(results: dict, asked) -> None:
    texts = [question["query"] + question["choices"][0] for question in QUESTIONS]
    total, size = sum(asked("", text) for text in texts), sum(len(t.encode()) for t in texts)
    found = results["report"]["vpmoe_text"]["byte_perplexity,none"]
    assert found == pytest.approx(math.exp(-total / size), rel=1e-3)
