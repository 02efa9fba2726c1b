"""Reads an export as a stranger does, in a process that cannot import this project.

Arguments: the folder, questions.npz, answers.npz.
"""

from __future__ import annotations

import sys


class _NoProject:
    """Importing this project fails, though an editable install offers it."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in {"common", "datastore", "trainer", "demo", "megatron"}:
            raise ImportError(f"{name} is not there")


sys.meta_path.insert(0, _NoProject())

import numpy as np  # noqa: E402
import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: E402

NEW = 24  # more than the window of the tiny student


def generate(model: torch.nn.Module, ids: torch.Tensor, **keywords: object) -> np.ndarray:
    """The greedy continuation, ends of documents ignored."""
    mask = keywords.pop("attention_mask", torch.ones_like(ids))
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **keywords
    )
    return tokens[:, ids.shape[1] :].numpy()


def padded(model: torch.nn.Module, prompts: list[torch.Tensor]) -> np.ndarray:
    """The continuations of prompts of several lengths, padded on the left into one batch."""
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), model.config.pad_token_id)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :] = prompt
    real = torch.arange(length) >= length - torch.tensor([[len(p)] for p in prompts])
    return generate(model, ids, attention_mask=real.long())


def fp32_parts(model: torch.nn.Module) -> list[str]:
    """Names of what is not bf16, after the last number."""
    state = model.state_dict().items()
    return sorted({n.rpartition(".")[2] for n, t in state if t.dtype == torch.float32})


@torch.no_grad()
def main(folder: str, questions: str, answers: str) -> None:
    """Answer: logits of documents, continuations, losses, dtypes."""
    documents = [torch.from_numpy(d).long() for d in np.load(questions).values()]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    answer = {f"logits{i}": model(d[None]).logits[0].numpy() for i, d in enumerate(documents)}
    answer["loss"] = model(documents[0][None], labels=documents[0][None]).loss.numpy()
    alone = [generate(model, d[None])[0] for d in documents]
    answer["cached"] = np.stack(alone)
    answer["uncached"] = np.concatenate(
        [generate(model, d[None], use_cache=False) for d in documents]
    )
    answer["padded"] = padded(model, documents)
    answer["dtype"] = np.array([str(model.dtype), type(config).__name__])
    answer["stops"] = np.array(model.generation_config.eos_token_id)
    half = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.bfloat16
    )
    answer["half"] = half(documents[0][None]).logits[0].float().numpy()
    answer["half_dtype"] = np.array([str(half.lm_head.weight.dtype), *fp32_parts(half)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer["prompt"] = prompt["input_ids"][0].numpy()
    model.generate(**prompt, max_new_tokens=2)
    np.savez(answers, **answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
