from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import parse_config
from common.errors import ConfigError
from datastore.split import SplitConfig, split_bound, split_of


@given(st.integers(0, 10**9))
def test_the_bound_is_exact_for_every_decimal_fraction(billionths):
    fraction = billionths / 10**9
    assert split_bound(fraction) == math.floor(Fraction(billionths, 10**9) * 2**64)


def test_known_ids_split_by_their_hash():
    # From coreutils: printf %s ID | b2sum -l 64
    hashes = {
        "synth_1": 0x3E3D6BB3C351A6B3,
        "synth_2": 0xE12F351A2C590BC9,
        "é🙂": 0x05F266693E3EBADE,
    }
    for synth_id, value in hashes.items():
        assert split_of(synth_id, value) == "train"
        assert split_of(synth_id, value + 1) == "valid"


def test_no_fraction_holds_nothing_out_and_the_whole_everything():
    ids = [f"id-{n}" for n in range(1000)]
    assert {split_of(i, split_bound(0.0)) for i in ids} == {"train"}
    assert {split_of(i, split_bound(1.0)) for i in ids} == {"valid"}


def test_the_share_held_out_is_the_fraction():
    bound = split_bound(0.1)
    held_out = sum(split_of(f"id-{n}", bound) == "valid" for n in range(20_000))
    assert abs(held_out - 2000) < 5 * math.sqrt(20_000 * 0.1 * 0.9)


def test_a_fraction_outside_0_to_1_is_refused():
    with pytest.raises(ConfigError, match="valid_fraction"):
        parse_config(SplitConfig, {"valid_fraction": 1.5}, "test")
