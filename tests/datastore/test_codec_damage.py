"""Damaged, foreign and forged blobs: an error of ours every time, never a number. Works on the golden blob."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AlignmentError, FormatError
from datastore.codec import decode_blob, encode_blob
from datastore.target import reduce_logprobs
from datastore.types import DocTarget, TargetSums

GOLDEN = Path(__file__).parent / "golden"
BLOB = (GOLDEN / "blob.bin").read_bytes()
ARRAYS = dict(np.load(GOLDEN / "decoded.npz"))
DOCUMENTS = len(ARRAYS["content_keys"])
POSITIONS = [ARRAYS[f"{number}.positions_P"] for number in range(DOCUMENTS)]
PREFIX_BYTES, HEADER_BYTES = 12, 40


def test_every_flipped_bit_is_refused():
    for bit in range(8 * len(BLOB)):
        damaged = bytearray(BLOB)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_blob(bytes(damaged), POSITIONS)


def test_every_truncation_and_any_extra_byte_is_refused():
    for length in range(len(BLOB)):
        with pytest.raises(FormatError):
            decode_blob(BLOB[:length], POSITIONS)
    for extra in (b"\0", BLOB, zstandard.compress(b"")):
        with pytest.raises(FormatError):
            decode_blob(BLOB + extra, POSITIONS)


def test_another_row_is_refused_as_misaligned():
    for wrong in (
        POSITIONS[:2],
        [*POSITIONS, POSITIONS[0]],
        [p[:-1] for p in POSITIONS],
        POSITIONS[::-1],
    ):
        with pytest.raises(AlignmentError, match="do not belong"):
            decode_blob(BLOB, wrong)


def forge(
    blob: bytes, *, header: bytes | None = None, payload: bytes | None = None, **zstd
) -> bytes:
    """A blob with a right hash around another header or payload: what a faulty writer could leave."""
    header = blob[PREFIX_BYTES:HEADER_BYTES] if header is None else header
    frame = blob[HEADER_BYTES:]
    if payload is not None:
        options = {"write_checksum": True, "write_content_size": True, **zstd}
        frame = zstandard.ZstdCompressor(**options).compress(payload)
    body = header + frame
    return b"VPT1" + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)) + body


def payload_of(blob: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(blob[HEADER_BYTES:])


def test_the_header_stands_where_the_document_says():
    heads = sum(int(ARRAYS[f"{number}.num_head_P"].sum()) for number in range(DOCUMENTS))
    entries = sum(len(ARRAYS[f"{number}.ids_E"]) for number in range(DOCUMENTS))
    assert struct.unpack("<4sQIIIIId", BLOB[:HEADER_BYTES]) == (
        b"VPT1",
        xxhash.xxh3_64_intdigest(BLOB[PREFIX_BYTES:]),
        *(DOCUMENTS, sum(map(len, POSITIONS)), heads, entries - heads, 64, 1 / 50),
    )
    keys = struct.unpack_from(f"<{DOCUMENTS}Q", payload_of(BLOB))
    assert keys == tuple(ARRAYS["content_keys"].tolist())


@pytest.mark.parametrize("flag", ["write_checksum", "write_content_size"])
def test_frames_without_checksum_or_size_are_refused(flag):
    with pytest.raises(FormatError, match="announces"):
        decode_blob(forge(BLOB, payload=payload_of(BLOB), **{flag: False}), POSITIONS)


def test_a_zstd_bomb_is_refused_before_it_goes_off(monkeypatch):
    """64 MiB of zeros in 2 KB: refused by its announced size, the decompressor is never made."""
    bomb = forge(BLOB, payload=bytes(1 << 26))
    assert len(bomb) < 10_000

    def explode(*args, **kwargs):
        raise AssertionError("the bomb was decompressed")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", explode)
    with pytest.raises(FormatError, match="announces 67108864 bytes"):
        decode_blob(bomb, POSITIONS)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_forged_content_never_gives_an_invalid_target(data):
    """Any bytes behind a right hash: an error of ours, or a target whose fields are all in range."""
    header, payload = bytearray(BLOB[PREFIX_BYTES:HEADER_BYTES]), bytearray(payload_of(BLOB))
    edits = st.tuples(st.integers(0, len(payload) - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(edits, max_size=4)):
        payload[at] = value
    edits = st.tuples(st.integers(0, len(header) - 1), st.integers(0, 255))
    for at, value in data.draw(st.lists(edits, max_size=2)):
        header[at] = value
    payload = payload[: data.draw(st.integers(max(0, len(payload) - 3), len(payload)))]
    try:
        found = decode_blob(forge(BLOB, header=bytes(header), payload=bytes(payload)), POSITIONS)
    except (FormatError, AlignmentError):
        return
    for document in found:
        target = document.target
        assert np.all((target.ids_E >= 0) & (target.ids_E < 201088))
        assert np.all((target.weights_E > 0) & (target.weights_E <= 1))
        assert np.all(np.isfinite(target.realised_logprob_P) & (target.realised_logprob_P <= 0))
        assert np.all(target.log_tail_mass_P <= 0)
        assert target.offsets_P1[-1] == len(target.ids_E) == len(target.weights_E)


def test_forged_fields_are_refused():
    """One position with three heads and 15 draws, laid out by docs/format.md: each field broken in turn."""
    probs_V = np.array([0.4, 0.2, 0.1, *[0.3 / 100] * 100])
    position = np.array([3], dtype=np.int32)
    target = reduce_logprobs(np.log(probs_V)[None], position - 3, position, np.array([0.5]), 1 / 50)
    sums = TargetSums(reasoning=1.0, final=2.0, control=0.5)
    blob = encode_blob([DocTarget(content_key=9, target=target, entropy_sums=sums)])
    payload, heads, draws = payload_of(blob), 3, 15
    sums_at, counts_at, ids_at = 12, 36, 38
    first_at = ids_at + 3 * heads
    below_at = first_at + 2
    draws_at = below_at + heads - 1
    realised_at = draws_at + 3 * draws
    tail_at = realised_at + 2
    assert len(payload) == tail_at + 2

    not_a_number, above_zero, minus_infinity = b"\x00\x7e", b"\x00\x3c", b"\x00\xfc"
    faults = [
        (8, struct.pack("<I", 2), "do not belong"),
        (sums_at, struct.pack("<d", -1.0), "entropy sum"),
        (sums_at + 8, struct.pack("<d", math.nan), "entropy sum"),
        (counts_at, bytes([heads - 1]), "entries of its positions"),
        (counts_at + 1, bytes([draws + 1]), "entries of its positions"),
        (ids_at + 2 * heads, b"\x04", "outside the vocabulary"),
        (first_at, not_a_number, "above 0 or not a number"),
        (first_at, above_zero, "above 0 or not a number"),
        (below_at, bytes([90, 40]), "not sorted"),
        (below_at, bytes([40, 255]), "below the threshold"),
        (below_at, bytes([0, 0]), "mass do not add up"),
        (draws_at, bytes(3 * draws), "ascending"),
        (draws_at + 3 * draws - 1, b"\x04", "outside the vocabulary"),
        (realised_at, minus_infinity, "not finite"),
        (tail_at, not_a_number, "above 0 or not a number"),
        (tail_at, minus_infinity, "mass do not add up"),
    ]
    for at, value, message in faults:
        broken = payload[:at] + value + payload[at + len(value) :]
        with pytest.raises((FormatError, AlignmentError), match=message):
            decode_blob(forge(blob, payload=broken), [position])


def test_forged_headers_are_refused():
    fields = list(struct.unpack("<IIIIId", BLOB[PREFIX_BYTES:HEADER_BYTES]))
    for at, value in [
        (2, 0xFFFFFFFF),
        (3, 0xFFFFFFFF),
        (2, fields[2] + 1),
        (3, fields[3] - 1),
        (4, 32),
        (4, 0),
        (5, math.nan),
        (5, 0.0),
        (5, 1 / 255),
        (5, 1 / 25),
    ]:
        changed = [*fields[:at], value, *fields[at + 1 :]]
        with pytest.raises(FormatError):
            decode_blob(forge(BLOB, header=struct.pack("<IIIIId", *changed)), POSITIONS)
    with pytest.raises(FormatError, match="another format"):
        decode_blob(b"VPT2" + BLOB[4:], POSITIONS)
