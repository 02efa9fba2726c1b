"""The prompts of on-policy distillation: the documents of a split, cut after the `<|end|>` of the user's message.

Documents are numbered over the rows of a split in order. Which of them is prompt p of a run: docs/order.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common import tokenizer
from common.errors import ConfigError, FormatError
from datastore.harmony import parse
from datastore.order import endless_order, prompt_seed
from datastore.reader import Dataset
from datastore.types import Split


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """What the student continues. tokens_T: int32, ends with the `<|end|>` of the user's message.

    doc_id, language, exercise: of the document it opens.
    """

    doc_id: bytes
    tokens_T: np.ndarray
    language: str
    exercise: str


class PromptIndex:
    """The prompts of one split by number of their document. size: documents of the split.

    Holds the number of documents up to each row: 8 bytes a row.
    """

    def __init__(self, dataset: Dataset, split: Split) -> None:
        """Reads the numbers of documents, not the documents. Raises FormatError; ConfigError for an empty split."""
        self.dataset, self.split = dataset, split
        self._before_R1 = np.concatenate([[0], np.cumsum(dataset.documents_per_row(split))])
        self.size = int(self._before_R1[-1])
        if self.size == 0:
            raise ConfigError(
                f"the {split} split of {dataset.path} has no document to take prompts from",
                remedy="use a dataset with documents in this split",
            )

    def prompt(self, document: int) -> Prompt:
        """The prompt of document `document`, in memory of its own. Raises IndexError, FormatError.

        FormatError where the document is damaged, is no Harmony, or has no user's message right before what the
        assistant says.
        """
        if not 0 <= document < self.size:
            raise IndexError(f"document {document} of {self.size} in split {self.split}")
        index = int(np.searchsorted(self._before_R1, document, side="right")) - 1
        number = document - int(self._before_R1[index])
        row = self.dataset.row(self.split, index)
        where = f"{self.split} row {index}, document {number}, of {self.dataset.path}"
        place = row.documents()[number]
        tokens_T = row.tokens_T[place]
        return Prompt(
            doc_id=row.doc_ids[number],
            tokens_T=tokens_T[: _prompt_length(tokens_T, row.spans_T[place], where)].copy(),
            language=row.languages[number],
            exercise=row.exercises[number],
        )


def prompt_document(prompts_P: np.ndarray, size: int, seed: int) -> np.ndarray:
    """The document of each prompt of a run over `size` documents: int64 [P]. Every document comes once an epoch.

    prompts_P: int64, numbers in the endless order of the run, from 0. A pure function of its arguments.
    """
    return endless_order(prompts_P, size, prompt_seed(seed))


def _prompt_length(tokens_T: np.ndarray, spans_T: np.ndarray, where: str) -> int:
    """Tokens up to the user's `<|end|>`: the first span other than 0 begins the assistant's first message."""
    try:
        roles = [message.role for message in parse(tokens_T)]
    except FormatError as error:
        raise FormatError(f"{where} gives no prompt: {error}") from None
    answer = roles.index("assistant") if "assistant" in roles else 0
    # No content holds a control id, so message n begins at the <|start|> number n.
    starts = np.flatnonzero(tokens_T == tokenizer.START)
    if answer == 0 or roles[answer - 1] != "user":
        raise FormatError(
            f"{where} gives no prompt",
            got=f"messages of {', '.join(roles)}",
            expected="a message of the user, then of the assistant",
            remedy="build the dataset again with `vpmoe-data build`",
        )
    spoken = np.flatnonzero(spans_T)
    if not len(spoken) or spoken[0] != starts[answer]:
        raise FormatError(
            f"{where} gives no prompt",
            got=f"the first span other than 0 at token {spoken[0] if len(spoken) else 'none'}",
            expected=f"the assistant's <|start|> at token {starts[answer]}",
            remedy="build the dataset again with `vpmoe-data build`",
        )
    return int(spoken[0])
