"""Train or valid, by the row's identity alone: independent of row order, shard and worker. Pure."""

from __future__ import annotations

import hashlib
from decimal import ROUND_FLOOR, Decimal, localcontext

from pydantic import Field

from common.config import Config
from datastore.types import Split

SPLIT_RULE = "blake2b-64(synth_id, UTF-8), big-endian < floor(valid_fraction * 2^64) -> valid"


class SplitConfig(Config):
    """valid_fraction: share of documents held out, as the decimal number that the config file shows."""

    valid_fraction: float = Field(default=0.001, ge=0.0, le=1.0)


def split_bound(valid_fraction: float) -> int:
    """The exclusive upper bound of valid hashes: 0 .. 2^64.

    `repr` gives back the decimal digits of the config, so 0.001 means 1/1000 and not its nearest double.
    """
    with localcontext(prec=60):  # 17 digits times 20 digits is exact; the default 28 would round
        exact = Decimal(repr(valid_fraction)) * (1 << 64)
        return int(exact.to_integral_value(rounding=ROUND_FLOOR))


def split_of(synth_id: str, bound: int) -> Split:
    """The split of a row under `split_bound(...)`."""
    digest = hashlib.blake2b(synth_id.encode(), digest_size=8).digest()
    return "valid" if int.from_bytes(digest, "big") < bound else "train"
