"""Bytes a position of stored targets: ours by the real codec, others by their own formula and by a coder as good.

Coded bytes give every scheme the same ideal static coder and no overhead: an id costs the entropy of its rank's class
(eight classes an octave of the frequency rank, as the store's id order has it) and the bits inside the class; entries
that are drawn form a set, which saves log2(n!); entries with a logprob stand by falling value, each a gap in steps of
1/16 nat from the one before, at the entropy of the gaps; the number of entries of a position costs its entropy.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from benchmarks.smollm import SEQ_LEN, Teacher
from benchmarks.target_schemes import GHOST, IID, POLYNOMIAL, SYSTEMATIC, Entries
from common.tokenizer import VOCAB_SIZE
from datastore.codec import decode_blob, encode_blob
from datastore.id_order import IdOrder
from datastore.packing import PackConfig, pack_documents
from datastore.target import content_key, entropy_sums
from datastore.types import DocTarget, SparseTarget

ID_BITS = math.ceil(math.log2(VOCAB_SIZE))
CLASSES_AN_OCTAVE, STEPS_A_NAT = 8, 16
POLYNOMIAL_BITS = 16 + 3 * 32  # one bf16, three fp32 terms


def id_order(teacher: Teacher) -> IdOrder:
    """Ids by falling count in documents that are not scored here."""
    return IdOrder.of(np.argsort(-teacher.counts_W, kind="stable"))


def stored(teacher: Teacher, targets: list[SparseTarget]) -> tuple[float, list[SparseTarget]]:
    """Bytes a position of the blobs of packed rows, and what a reader gets back, a target a document.

    targets: one a document of the teacher, ids being columns of its vocabulary, as in what is given back.
    """
    order = id_order(teacher)
    by_id = {
        document.doc_id: (number, _document_target(teacher, number, target))
        for number, (document, target) in enumerate(zip(teacher.documents, targets, strict=True))
    }
    num_bytes, back = 0, dict.fromkeys(range(len(targets)))
    for row in pack_documents(teacher.documents, seq_len=SEQ_LEN, config=PackConfig()):
        numbers, documents = zip(*(by_id[doc_id] for doc_id in row.doc_ids), strict=True)
        blob = encode_blob(list(documents), row, order)
        num_bytes += len(blob)
        decoded = [document.target for document in decode_blob(blob, row, order)]
        back.update(zip(numbers, decoded, strict=True))
    num_positions = sum(len(target.positions_P) for target in targets)
    return num_bytes / num_positions, [
        _with_ids(back[n], np.searchsorted(teacher.ids_V, back[n].ids_E)) for n in range(len(back))
    ]


def _document_target(teacher: Teacher, number: int, target: SparseTarget) -> DocTarget:
    document = teacher.documents[number]
    tokens_T, spans_T = document.tokens_T, document.spans_T
    return DocTarget(
        content_key=content_key(tokens_T),
        target=_with_ids(target, teacher.ids_V[target.ids_E]),
        entropy_sums=entropy_sums(target.entropy_P, tokens_T, spans_T, target.positions_P),
    )


def _with_ids(target: SparseTarget, ids_E: np.ndarray) -> SparseTarget:
    fields = {name: getattr(target, name) for name in SparseTarget.__dataclass_fields__}
    return SparseTarget(**{**fields, "ids_E": ids_E.astype(np.int32)})


def formula_bytes(family: str, size: int, entries: Entries, num_positions: int) -> float:
    """Bytes a position as the scheme's own source counts them, at 201,088 ids.

    Draws: 24 bits an entry, id and count (arXiv 2503.16870; a count above 63 takes a bit more). Ghost bucket: 5 bytes
    an entry (Megatron-LM's cached logits). Polynomial: DistillKit's total_bits, one bf16 and three fp32 terms. Top-k
    renormalised: bit-packed id and a 16-bit logprob.
    """
    entries_a_position = len(entries.rows_E) / num_positions
    if family in (IID, SYSTEMATIC):
        return entries_a_position * (ID_BITS + math.ceil(math.log2(size + 1))) / 8
    if family == POLYNOMIAL:
        return math.ceil(size * ID_BITS / 8) + POLYNOMIAL_BITS / 8
    if family == GHOST:
        return 5.0 * size
    return entries_a_position * (ID_BITS + 16) / 8


def coded_bytes(
    family: str, entries: Entries, ids_V: np.ndarray, order: IdOrder, num_positions: int
) -> float:
    """Bytes a position under the ideal coder of this module's docstring."""
    rows_E, counts_E = entries.rows_E.numpy(), entries.counts_E.numpy()
    drawn_E = counts_E > 0
    num_exact_P = np.bincount(rows_E[~drawn_E], minlength=num_positions)
    num_drawn_P = np.bincount(rows_E[drawn_E], minlength=num_positions)
    bits = _id_bits(order.ranks_V[ids_V[entries.columns_E.numpy()]])
    bits += _entropy_bits(num_exact_P) + _entropy_bits(num_drawn_P)
    bits += _entropy_bits(counts_E[drawn_E]) - _set_saving(num_drawn_P)
    if family == POLYNOMIAL:
        bits += POLYNOMIAL_BITS * num_positions
    else:
        bits += _value_bits(rows_E[~drawn_E], entries.weights_E.numpy()[~drawn_E])
    return bits / 8 / num_positions


def _id_bits(ranks_E: np.ndarray) -> float:
    """Bits of all ids by the classes of their ranks."""
    edges = np.unique(np.floor(2.0 ** (np.arange(18 * CLASSES_AN_OCTAVE + 1) / CLASSES_AN_OCTAVE)))
    class_E = np.searchsorted(edges, ranks_E + 1, side="right") - 1
    widths = np.diff(np.append(edges, VOCAB_SIZE + 1))
    return _entropy_bits(class_E) + float(np.log2(widths[class_E]).sum())


def _entropy_bits(values: np.ndarray) -> float:
    """Bits of all values under their own frequencies."""
    _, counts = np.unique(values, return_counts=True)
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def _set_saving(numbers_P: np.ndarray) -> float:
    factorials = np.cumsum(np.log2(np.maximum(np.arange(numbers_P.max() + 1), 1)))
    return float(factorials[numbers_P].sum())


def _value_bits(rows_E: np.ndarray, weights_E: np.ndarray) -> float:
    """Bits of logprobs, as gaps in steps from the next larger one of the position (the first one from 0)."""
    order_E = np.lexsort((-weights_E, rows_E))
    rows_E, logs_E = rows_E[order_E], np.log(weights_E[order_E].astype(np.float64))
    steps_E = np.rint(-logs_E * STEPS_A_NAT)
    is_first_E = np.ones(len(rows_E), dtype=bool)
    is_first_E[1:] = rows_E[1:] != rows_E[:-1]
    gaps_E = np.diff(steps_E, prepend=0.0)
    return _entropy_bits(steps_E[is_first_E]) + _entropy_bits(gaps_E[~is_first_E])


def restored(entries: Entries, decoded: list[SparseTarget]) -> Entries:
    """`entries` with the weights that a reader gets, documents end to end. An id that moved is a bug: ValueError."""
    counts_P = np.concatenate([np.diff(target.offsets_P1) for target in decoded])
    rows_E = np.repeat(np.arange(len(counts_P)), counts_P)
    columns_E = np.concatenate([target.ids_E for target in decoded])
    weights_E = np.concatenate([target.weights_E for target in decoded])
    back_E = np.lexsort((columns_E, rows_E))
    mine_E = np.lexsort((entries.columns_E.numpy(), entries.rows_E.numpy()))
    same_rows = np.array_equal(rows_E[back_E], entries.rows_E.numpy()[mine_E])
    if not same_rows or not np.array_equal(columns_E[back_E], entries.columns_E.numpy()[mine_E]):
        raise ValueError("the codec gave back other entries than were stored")
    weights_back_E = np.empty_like(weights_E)
    weights_back_E[mine_E] = weights_E[back_E]
    return replace(entries, weights_E=torch.from_numpy(weights_back_E))
