"""Prompts by number against reading every row, and their order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import tokenizer
from common.errors import ConfigError, FormatError
from datastore.harmony import parse
from datastore.harmony_grammar import Verdict, verdict
from datastore.manifest import load_dataset_manifest
from datastore.prompts import PromptIndex, prompt_document
from datastore.reader import Dataset, open_token_shard
from datastore.stream import RowStream
from datastore.types import RenderedDoc

SEQ_LEN = 1024
# Documents of each row: three shards, one of them longer than a record batch of 64 rows.
ROWS = [[1, 3, 2], [1 + i % 4 for i in range(70)], [2]]
KEYS = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module")
def dataset(handmade, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Documents of many lengths, a few a row, in train and valid."""
    folder, made = tmp_path_factory.mktemp("prompts"), iter(range(10_000))

    def row(num_documents: int):
        numbers = [next(made) for _ in range(num_documents)]
        documents = [handmade.document(n, answer="word " * (1 + n % 7)) for n in numbers]
        labelled = [
            dataclasses.replace(document, language=f"l{n}", exercise=f"e{n % 3}")
            for n, document in zip(numbers, documents, strict=True)
        ]
        return handmade.pack(labelled, SEQ_LEN)

    shards = {"train": [[row(n) for n in shard] for shard in ROWS], "valid": [[row(2), row(1)]]}
    handmade.write_dataset(folder, shards, seq_len=SEQ_LEN)
    return Dataset.open(folder)


def one_document_index(handmade, folder: Path, document: RenderedDoc) -> PromptIndex:
    """The index over a dataset that holds `document` alone."""
    row = handmade.pack([document], SEQ_LEN)
    handmade.write_dataset(folder, {"train": [[row]]}, seq_len=SEQ_LEN)
    return PromptIndex(Dataset.open(folder), "train")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_prompt_is_the_head_of_its_document(dataset, split):
    index, document = PromptIndex(dataset, split), 0
    for number in range(dataset.num_rows(split)):
        row = dataset.row(split, number)
        for i, place in enumerate(row.documents()):
            prompt = index.prompt(document)
            labels = prompt.doc_id, prompt.language, prompt.exercise
            assert labels == (row.doc_ids[i], row.languages[i], row.exercises[i])
            assert prompt.tokens_T.dtype == np.int32
            length = len(prompt.tokens_T)
            assert prompt.tokens_T.tolist() == row.tokens_T[place][:length].tolist()
            assert verdict(row.tokens_T[place][length:-1]) == Verdict.VALID
            document += 1
    assert index.size == document == dataset.manifest.counts[split].documents


def test_documents_of_each_row_are_those_of_the_rows(dataset):
    counted = dataset.documents_per_row("train")
    assert counted.dtype == np.int64
    assert counted.tolist() == [n for shard in ROWS for n in shard]


def test_a_prompt_ends_with_what_the_user_said_and_outlives_the_dataset(dataset):
    prompt = PromptIndex(Dataset.open(dataset.path), "train").prompt(5)
    closed = [*prompt.tokens_T, *_answer()]
    said = parse(np.array(closed))[-2]
    assert (said.role, said.terminator) == ("user", tokenizer.END)
    assert said.text == "What is 5 + 1? 🙂"
    assert prompt.tokens_T.base is None


def _answer() -> list[int]:
    text = "<|start|>assistant<|channel|>final<|message|>6<|return|><|endoftext|>"
    return tokenizer.encoding().encode(text, allowed_special="all")


@pytest.mark.parametrize("document", [-1, 3])
def test_a_number_outside_the_split_is_refused(dataset, document):
    with pytest.raises(IndexError, match="of 3 in split valid"):
        PromptIndex(dataset, "valid").prompt(document)


def test_a_split_without_documents_is_refused(handmade, tmp_path):
    rows = [handmade.pack([handmade.document(1)], SEQ_LEN)]
    handmade.write_dataset(tmp_path, {"train": [rows], "valid": []}, seq_len=SEQ_LEN)
    with pytest.raises(ConfigError, match="no document to take prompts from"):
        PromptIndex(Dataset.open(tmp_path), "valid")


def test_a_count_that_is_not_that_of_the_manifest_is_refused(dataset):
    manifest = load_dataset_manifest(dataset.path)
    fewer = manifest.model_copy(update={"files": {"train": manifest.files["train"][:2]}})
    with pytest.raises(FormatError, match="another number of documents"):
        PromptIndex(Dataset(dataset.path, fewer), "train")
    shard = open_token_shard(dataset.path, manifest, "train", 1)
    assert shard.documents_per_row().tolist() == ROWS[1]


def user_left_out(document: RenderedDoc) -> RenderedDoc:
    starts = np.flatnonzero(document.tokens_T == tokenizer.START)
    kept = np.delete(np.arange(len(document.tokens_T)), np.arange(starts[2], starts[3]))
    return _taking(document, kept)


def assistant_left_out(document: RenderedDoc) -> RenderedDoc:
    """The user has the last word."""
    first = int(np.flatnonzero(document.spans_T)[0])
    tokens_T = np.array(
        [*document.tokens_T[: first - 1], tokenizer.RETURN, tokenizer.ENDOFTEXT], np.int32
    )
    return dataclasses.replace(
        document, tokens_T=tokens_T, spans_T=np.zeros(len(tokens_T), np.uint8)
    )


def cut_short(document: RenderedDoc) -> RenderedDoc:
    return _taking(document, np.arange(len(document.tokens_T) - 4))


def spans_shifted(document: RenderedDoc) -> RenderedDoc:
    return dataclasses.replace(document, spans_T=np.roll(document.spans_T, 1))


def spans_cleared(document: RenderedDoc) -> RenderedDoc:
    return dataclasses.replace(document, spans_T=np.zeros_like(document.spans_T))


def _taking(document: RenderedDoc, kept: np.ndarray) -> RenderedDoc:
    return dataclasses.replace(
        document, tokens_T=document.tokens_T[kept], spans_T=document.spans_T[kept]
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (user_left_out, "messages of system, developer, assistant, assistant"),
        (assistant_left_out, "messages of system, developer, user; expected"),
        (cut_short, "malformed Harmony document"),
        (spans_shifted, "the first span other than 0 at token"),
        (spans_cleared, "the first span other than 0 at token none"),
    ],
)
def test_a_document_without_a_prompt_is_refused(handmade, tmp_path, broken, said):
    index = one_document_index(handmade, tmp_path, broken(handmade.document(3)))
    with pytest.raises(FormatError, match=said) as error:
        index.prompt(0)
    assert "train row 0, document 0" in str(error.value)


@given(st.integers(1, 300), KEYS)
@settings(max_examples=60, deadline=None)
def test_every_epoch_holds_every_document_once_in_an_order_of_its_own(size, seed):
    prompts_P = np.arange(3 * size)
    epochs = prompt_document(prompts_P, size, seed).reshape(3, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    if size > 20:  # 20! orders: none comes twice by chance
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@given(st.integers(1, 2**40), KEYS, st.lists(st.integers(0, 2**50), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_document_of_a_prompt_does_not_depend_on_others(size, seed, prompts):
    together = prompt_document(np.array(prompts), size, seed).tolist()
    assert together == [prompt_document(np.array([p]), size, seed)[0] for p in prompts]


def test_prompts_do_not_follow_the_rows_of_the_same_seed():
    """In a dataset of one document a row, the anchor would else repeat the prompts."""
    rows = RowStream(600, fingerprint="", seed=11, global_batch_size=600).peek(0)
    meetings = (rows == prompt_document(np.arange(600), 600, 11)).sum()
    assert meetings < 10, "one of 600 pairs meets by chance"
