"""Which documents are scored: a nested share of whole rows, and filters within a row."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import parse_config
from common.errors import ConfigError
from datastore.selection import Selection, require_match, row_hash_of_ids
from datastore.types import PackedRow


def row(lengths=(3, 5), languages=(), exercises=(), ids=(1, 2)) -> PackedRow:
    total = sum(lengths)
    return PackedRow(
        tokens_T=np.zeros(total + 2, np.int32),
        spans_T=np.zeros(total + 2, np.uint8),
        doc_ends_D=np.cumsum(lengths).astype(np.int32),
        doc_ids=tuple(number.to_bytes(16, "big") for number in ids),
        row_hash=0,
        languages=languages,
        exercises=exercises,
    )


def rows(count: int) -> list[PackedRow]:
    return [row(ids=(2 * number, 2 * number + 1)) for number in range(count)]


def test_the_hash_is_that_of_coreutils() -> None:
    """printf 'aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbb' | b2sum -l 64"""
    assert row_hash_of_ids((b"a" * 16, b"b" * 16)) == 0x1F5DEBEFB763D906


def test_everything_is_the_default_and_selects_all() -> None:
    assert Selection().is_everything and Selection(fraction=1).is_everything
    assert Selection().documents(row()).tolist() == [True, True]
    for part in ({"fraction": 0.999}, {"languages": ["en"]}, {"exercises": [""]}):
        assert not Selection(**part).is_everything
    assert not Selection(min_tokens=1).is_everything and not Selection(max_tokens=9).is_everything


def test_a_row_is_chosen_whole_and_the_share_of_rows_is_the_fraction() -> None:
    chosen = [Selection(fraction=0.2).documents(each) for each in rows(20_000)]
    assert all(documents.all() or not documents.any() for documents in chosen)
    count = sum(bool(documents.all()) for documents in chosen)
    assert abs(count - 4000) < 5 * math.sqrt(20_000 * 0.2 * 0.8)


@given(st.floats(0.001, 1), st.floats(0.001, 1))
@settings(max_examples=40, deadline=None)
def test_a_larger_fraction_keeps_the_rows_of_a_smaller_one(one: float, other: float) -> None:
    small, large = (Selection(fraction=f) for f in sorted((one, other)))
    for each in rows(60):
        assert not (small.documents(each) & ~large.documents(each)).any()


def test_a_row_is_chosen_when_its_hash_lies_below_the_fraction() -> None:
    for value in sorted(row_hash_of_ids(each.doc_ids) for each in rows(400))[::40]:
        share = value / 2**64
        assert Selection(fraction=share * (1 + 1e-12)).documents(found(value)).all()
        assert not Selection(fraction=share * (1 - 1e-12)).documents(found(value)).any()


def found(value: int) -> PackedRow:
    return next(each for each in rows(400) if row_hash_of_ids(each.doc_ids) == value)


def test_filters_choose_documents_of_a_row() -> None:
    mixed = row((3, 5, 9), ("en", "fr", "en"), ("rag", "memorization", ""), (1, 2, 3))
    assert Selection(languages=["en"]).documents(mixed).tolist() == [True, False, True]
    assert Selection(languages=["fr", "de"]).documents(mixed).tolist() == [False, True, False]
    assert Selection(exercises=["rag", ""]).documents(mixed).tolist() == [True, False, True]
    assert Selection(min_tokens=5).documents(mixed).tolist() == [False, True, True]
    assert Selection(max_tokens=5).documents(mixed).tolist() == [True, True, False]
    both = Selection(languages=["en"], min_tokens=4)
    assert both.documents(mixed).tolist() == [False, False, True]


def test_filters_hold_within_the_chosen_rows() -> None:
    half = Selection(fraction=0.5, max_tokens=3)
    seen = set()
    for each in rows(50):
        documents = tuple(half.documents(each).tolist())
        whole = Selection(fraction=0.5).documents(each).all()
        assert documents == ((True, False) if whole else (False, False))
        assert half.passing(each).tolist() == [True, False]
        seen.add(documents)
    assert len(seen) == 2


def test_the_same_choice_is_written_in_one_way() -> None:
    one, other = Selection(languages=["fr", "en", "fr"]), Selection(languages=["en", "fr"])
    assert one == other and one.resolved() == other.resolved()


@pytest.mark.parametrize(
    "values",
    [
        {"fraction": 0},
        {"fraction": 1.01},
        {"fraction": float("nan")},
        {"min_tokens": 0},
        {"min_tokens": 9, "max_tokens": 8},
        {"language": ["en"]},
    ],
)
def test_what_selects_nothing_or_nonsense_is_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        parse_config(Selection, values, "test")


def test_a_label_that_no_document_has_is_named() -> None:
    rows = [row(languages=("en", "fr"), exercises=("rag", "math"))]
    require_match(Selection(languages=["fr"], exercises=["math"]), rows)
    with pytest.raises(ConfigError, match=r"names what no document .*'xx'"):
        require_match(Selection(languages=["fr", "xx"]), rows)
    with pytest.raises(ConfigError, match=r"matches no document.*'xx'"):
        require_match(Selection(exercises=["xx"]), rows)
    with pytest.raises(ConfigError, match=r"matches no document.*min_tokens"):
        require_match(Selection(min_tokens=1 << 20), rows)


def test_a_match_reads_no_more_rows_than_needed() -> None:
    rows = itertools.chain([row()], (pytest.fail("another row was read") for _ in "x"))
    require_match(Selection(), rows)


def test_labels_of_another_row_do_not_pass_for_absent_ones() -> None:
    """A row without labels cannot be filtered by them: a shape error, never a silent choice."""
    bare = dataclasses.replace(row(), languages=())
    with pytest.raises(ValueError):
        Selection(languages=["en"]).documents(bare)
