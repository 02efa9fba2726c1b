"""Real rows with stored targets that need no teacher, for benchmarks/feed.py.

    python -m benchmarks.feed_data FOLDER          makes FOLDER/data

The rows of VPMOE_SYNTH (or ../shared/synth), else the demo's sample, built at 2048 tokens by the project's own build.
Their targets are synthetic distributions with the entries of a language model's (SmolLM2 at threshold 1/50: 20 a
position, 5 of them heads; benchmarks/results/codec.json), reduced, coded and written as a scorer does.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.config import PROJECT_ROOT, load_config
from common.tokenizer import VOCAB_SIZE
from datastore.budget import BudgetSums, row_budget
from datastore.codec import CODEC_VERSION, encode_blob
from datastore.id_order import IdOrder, count_order
from datastore.manifest import TargetManifest, TokenizerInfo, commit_manifest, target_folder
from datastore.reader import Dataset
from datastore.shard import FORMAT_VERSION, write_target_shard
from datastore.target import (
    content_key,
    entropy_sums,
    position_uniforms,
    reduce_logprobs,
    target_positions,
)
from datastore.types import DocTarget, PackedRow

SEQ_LEN, THRESHOLD, SLUG = 2048, 1 / 50, "made"
TARGET_ID = "f" * 64
IDS = 384  # candidates of a made-up distribution; more only lengthen its making


def prepare(folder: Path) -> None:
    """Build the dataset and write targets for all of its rows."""
    from datastore.build import build_dataset
    from datastore.data_config import DataConfig

    overrides = (
        f"source.files=[{_sources(folder)}]",
        "split.valid_fraction=0.05",
        f"seq_len={SEQ_LEN}",
        f"out={folder / 'data'}",
    )
    config = load_config(DataConfig, PROJECT_ROOT / "configs/data/demo.yaml", overrides)
    build_dataset(config, workers=1)
    write_targets(folder / "data")


def _sources(folder: Path) -> str:
    """Glob of the real rows where they are, else of sample rows made here."""
    real = Path(os.environ.get("VPMOE_SYNTH", PROJECT_ROOT.parent / "shared" / "synth"))
    if any(real.glob("synth_*.parquet")):
        return str(real / "synth_*.parquet")
    from demo.sample import write_sample

    write_sample(folder / "source", rows=3000, seed=0)
    return str(folder / "source" / "*.parquet")


def write_targets(data: Path) -> None:
    """A committed target store of a made-up teacher for every row."""
    dataset, order = Dataset.open(data), count_order(Dataset.open(data))
    folder = target_folder(data, SLUG)
    order.write(folder)
    files: dict[Any, list[Any]] = {split: [] for split in dataset.manifest.files}
    shard_budgets: dict[Any, list[Any]] = {split: [] for split in files}
    total = BudgetSums()
    for split, entries in dataset.manifest.files.items():
        for shard in range(len(entries)):
            sums, blobs = BudgetSums(), []
            for row in dataset.shard_rows(split, shard):
                documents: list[DocTarget | None] = [*made_documents(row, order)]
                blob = encode_blob(documents, row, order)
                sums = sums.merged(row_budget(documents, blob, row, order))
                blobs.append((row.row_hash, blob))
            entry = write_target_shard(folder, blobs, target_id=TARGET_ID, split=split, shard=shard)
            files[split].append(entry)
            shard_budgets[split].append(sums.budget().resolved())
            total = total.merged(sums)
    commit_manifest(folder, _manifest(dataset, files, order, total, shard_budgets))


def _manifest(
    dataset: Dataset,
    files: dict[Any, list[Any]],
    order: IdOrder,
    budget: BudgetSums,
    shard_budgets: dict[Any, list[Any]],
) -> TargetManifest:
    counts = dataset.manifest.counts
    return TargetManifest(
        format_version=FORMAT_VERSION,
        codec_version=CODEC_VERSION,
        target_id=TARGET_ID,
        dataset_fingerprint=dataset.manifest.fingerprint,
        teacher={},
        slug=SLUG,
        engine={},
        mode={"system": None, "reasoning": "high"},
        temperature=1.0,
        threshold=THRESHOLD,
        tokenizer=TokenizerInfo(),
        alignment={},
        selection={},
        quarantine=(),
        canary={},
        self_noise={},
        files={split: tuple(entries) for split, entries in files.items()},
        budget=budget.budget().model_dump(),
        counts={s: {"documents": c.documents, "tokens": c.tokens} for s, c in counts.items()},
        shard_budgets=shard_budgets,
        id_order_sha256=order.sha256,
    )


def made_documents(row: PackedRow, order: IdOrder) -> list[DocTarget]:
    """Targets of every document of a row, of distributions over IDS usual ids and the document's own."""
    return [_made(row.tokens_T[doc], row.spans_T[doc], order) for doc in row.documents()]


def _made(tokens_T: np.ndarray, spans_T: np.ndarray, order: IdOrder) -> DocTarget:
    positions_P = target_positions(tokens_T, spans_T)
    key = content_key(tokens_T)
    rng = np.random.default_rng(key)
    # Half of the candidates are usual everywhere, half are spread over the vocabulary: ids cost as those of a model.
    ranks = np.exp(rng.uniform(0, np.log(VOCAB_SIZE - 1), IDS)).astype(np.int64)
    ids_S = np.union1d(order.ids_V[ranks], tokens_T).astype(np.int32)
    realised_P = np.searchsorted(ids_S, tokens_T[positions_P + 1])
    sharp_P1 = rng.uniform(0.7, 2.3, (len(positions_P), 1))
    logits_PS = rng.normal(0, 1.6, (len(positions_P), len(ids_S))) * sharp_P1
    logits_PS[np.arange(len(positions_P)), realised_P] += rng.normal(7.3, 3.0, len(positions_P))
    logprobs_PS = logits_PS - np.log(np.exp(logits_PS).sum(axis=1, keepdims=True))
    uniforms_P = position_uniforms(key, positions_P)
    target = reduce_logprobs(logprobs_PS, realised_P, positions_P, uniforms_P, THRESHOLD)
    assert target.entropy_P is not None
    return DocTarget(
        content_key=key,
        target=replace(target, ids_E=ids_S[target.ids_E]),
        entropy_sums=entropy_sums(target.entropy_P, tokens_T, spans_T, positions_P),
    )


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
