"""What an OPD run reads: prompts to sample from, held-out prompts, and the rows of the anchor."""

from __future__ import annotations

import numpy as np

from common.config import parse_config
from common.errors import ConfigError
from datastore.harmony import RenderConfig
from datastore.prompts import PromptIndex, prompt_document
from datastore.reader import Dataset
from datastore.stream import RowStream
from datastore.types import SPLITS, PackedRow
from trainer.opd.config import OPDConfig


class OPDData:
    """A built dataset as prompts (its documents, cut after the user's message) and as rows (its train split).

    render: how its constant prefix was written, for a teacher that is shown another effort. seq_len: of its rows, and
    the longest document that a rollout may become.
    """

    def __init__(self, dataset: Dataset, config: OPDConfig) -> None:
        self.dataset, self._seed = dataset, config.seed
        manifest = dataset.manifest
        self.seq_len = manifest.seq_len
        self.render = parse_config(
            RenderConfig, manifest.config.get("render", {}), "the dataset's render"
        )
        self.prompts = PromptIndex(dataset, "train")
        self.held_out = PromptIndex(dataset, "valid")
        self._anchors = RowStream(
            dataset.num_rows("train"),
            fingerprint=manifest.fingerprint,
            seed=config.seed,
            global_batch_size=1,
        )

    @classmethod
    def open(cls, config: OPDConfig) -> OPDData:
        """Open and check. Raises ConfigError, FormatError."""
        dataset = Dataset.open(config.dataset)
        vocab_size = dataset.manifest.tokenizer.vocab_size
        if vocab_size != config.student.vocab_size:
            raise ConfigError(
                "student.vocab_size",
                got=config.student.vocab_size,
                expected=f"{vocab_size}, the dataset's",
            )
        for split in SPLITS:
            if not dataset.num_rows(split):
                raise ConfigError(
                    f"{config.dataset} has no {split} rows", remedy="build it with more documents"
                )
        data = cls(dataset, config)
        if config.eval.prompts > data.held_out.size:
            raise ConfigError(
                "eval.prompts",
                got=config.eval.prompts,
                expected=f"at most {data.held_out.size}, the documents of the valid split",
            )
        return data

    def documents_of(self, prompts_P: np.ndarray) -> np.ndarray:
        """The train documents at these places of the endless order of prompts: int64 [P]."""
        return prompt_document(prompts_P, self.prompts.size, self._seed)

    def anchor(self, number: int) -> PackedRow:
        """Row `number` of the endless order of anchor rows."""
        (index,) = self._anchors.peek(number).tolist()
        return self.dataset.row("train", index)
