"""Damaged, foreign and forged blobs: an error of ours every time, never a number. Works on the golden blob."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import AlignmentError, FormatError
from datastore.codec import decode_blob, encode_blob
from datastore.target import position_uniforms, reduce_logprobs
from datastore.types import DocTarget, PackedRow, TargetSums
from tests.datastore.codec_cases import golden_row, row_of, some_order

GOLDEN = Path(__file__).parent / "golden"
BLOB = (GOLDEN / "blob.bin").read_bytes()
ARRAYS = dict(np.load(GOLDEN / "decoded.npz"))
ROW, ORDER = golden_row(ARRAYS), some_order()
DOCUMENTS = len(ARRAYS["content_keys"])
PREFIX, COUNTS = struct.Struct("<4sQ"), struct.Struct("<IIIIId")
HEADER_BYTES = PREFIX.size + COUNTS.size


def test_every_flipped_bit_is_refused():
    for bit in range(8 * len(BLOB)):
        damaged = bytearray(BLOB)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FormatError):
            decode_blob(bytes(damaged), ROW, ORDER)


def test_every_truncation_and_any_extra_byte_is_refused():
    for length in range(len(BLOB)):
        with pytest.raises(FormatError):
            decode_blob(BLOB[:length], ROW, ORDER)
    for extra in (b"\0", BLOB, zstandard.compress(b"")):
        with pytest.raises(FormatError):
            decode_blob(BLOB + extra, ROW, ORDER)


def test_another_row_is_refused_as_misaligned():
    fewer = replace(ROW, doc_ends_D=ROW.doc_ends_D[:2], doc_ids=ROW.doc_ids[:2])
    spans_T = ROW.spans_T.copy()
    spans_T[np.flatnonzero(spans_T)[-1]] = 0
    for other in (fewer, replace(ROW, spans_T=spans_T)):
        with pytest.raises(AlignmentError, match="do not belong"):
            decode_blob(BLOB, other, ORDER)


def parts_of(blob: bytes) -> tuple[list[int | float], bytes, bytes]:
    """The counts, the payload and the raw bits of a blob, laid out by docs/format.md."""
    counts = list(COUNTS.unpack_from(blob, PREFIX.size))
    frame, raw = blob[HEADER_BYTES : HEADER_BYTES + counts[4]], blob[HEADER_BYTES + counts[4] :]
    return counts, zstandard.ZstdDecompressor().decompress(frame), raw


def forge(
    blob: bytes,
    *,
    counts: list[int | float] | None = None,
    payload: bytes | None = None,
    raw: bytes | None = None,
    **zstd,
) -> bytes:
    """A blob with a right hash around other parts: what a faulty writer could leave."""
    found_counts, found_payload, found_raw = parts_of(blob)
    options = {"write_checksum": True, "write_content_size": True, **zstd}
    payload = found_payload if payload is None else payload
    frame = zstandard.ZstdCompressor(**options).compress(payload)
    counts = [*found_counts[:4], len(frame), found_counts[5]] if counts is None else counts
    body = COUNTS.pack(*counts) + frame + (found_raw if raw is None else raw)
    return PREFIX.pack(b"VPT2", xxhash.xxh3_64_intdigest(body)) + body


def test_a_forged_blob_without_a_lie_is_read():
    """So what the forgeries below are refused for is their lie."""
    found = decode_blob(forge(BLOB), ROW, ORDER)
    assert [document.content_key for document in found] == ARRAYS["content_keys"].tolist()


def test_the_header_stands_where_the_document_says():
    heads = sum(int(ARRAYS[f"{number}.num_head_P"].sum()) for number in range(DOCUMENTS))
    entries = sum(len(ARRAYS[f"{number}.ids_E"]) for number in range(DOCUMENTS))
    positions = sum(len(ARRAYS[f"{number}.positions_P"]) for number in range(DOCUMENTS))
    counts, payload, raw = parts_of(BLOB)
    magic, stored_hash = PREFIX.unpack_from(BLOB)
    assert (magic, stored_hash) == (b"VPT2", xxhash.xxh3_64_intdigest(BLOB[PREFIX.size :]))
    frame_bytes = len(BLOB) - HEADER_BYTES - len(raw)
    assert counts == [DOCUMENTS, positions, heads, entries - heads, frame_bytes, 1 / 50]
    assert payload[:DOCUMENTS] == bytes([1] * DOCUMENTS)
    keys = struct.unpack_from(f"<{DOCUMENTS}Q", payload, DOCUMENTS)
    assert keys == tuple(ARRAYS["content_keys"].tolist())
    sums = np.frombuffer(payload, "<f8", 3 * DOCUMENTS, 9 * DOCUMENTS).reshape(-1, 3)
    np.testing.assert_array_equal(sums, ARRAYS["entropy_sums"])


@pytest.mark.parametrize("flag", ["write_checksum", "write_content_size"])
def test_frames_without_checksum_or_size_are_refused(flag):
    with pytest.raises(FormatError, match="announces"):
        decode_blob(forge(BLOB, **{flag: False}), ROW, ORDER)


def test_a_zstd_bomb_is_refused_before_it_goes_off(monkeypatch):
    """64 MiB of zeros in 2 KB: refused by its announced size, the decompressor is never made."""
    bomb = forge(BLOB, payload=bytes(1 << 26))
    assert len(bomb) < 10_000

    def explode(*args, **kwargs):
        raise AssertionError("the bomb was decompressed")

    monkeypatch.setattr(zstandard, "ZstdDecompressor", explode)
    with pytest.raises(FormatError, match="announces 67108864 bytes"):
        decode_blob(bomb, ROW, ORDER)


def edits(content: bytes, most: int) -> st.SearchStrategy:
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))
    return st.lists(places, max_size=most).map(lambda found: edited(content, found))


def edited(content: bytes, places: list[tuple[int, int]]) -> bytes:
    changed = bytearray(content)
    for at, value in places:
        changed[at] = value
    return bytes(changed)


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_forged_content_never_gives_an_invalid_target(data):
    """Any bytes behind a right hash: an error of ours, or a target whose fields are all in range."""
    _, payload, raw = parts_of(BLOB)
    payload = data.draw(edits(payload, 4))
    payload = payload[: data.draw(st.integers(max(0, len(payload) - 3), len(payload)))]
    raw = data.draw(edits(raw, 4))
    raw = raw[: data.draw(st.integers(max(0, len(raw) - 1), len(raw)))]
    blob = forge(BLOB, payload=payload, raw=raw)
    header = data.draw(edits(blob[PREFIX.size : HEADER_BYTES], 1))
    body = header + blob[HEADER_BYTES:]
    blob = PREFIX.pack(b"VPT2", xxhash.xxh3_64_intdigest(body)) + body
    try:
        found = decode_blob(blob, ROW, ORDER)
    except (FormatError, AlignmentError):
        return
    for document in found:
        if document is None:
            continue
        target = document.target
        assert np.all((target.ids_E >= 0) & (target.ids_E < 201088))
        assert np.all((target.weights_E > 0) & (target.weights_E <= 1))
        assert np.all(np.isfinite(target.realised_logprob_P) & (target.realised_logprob_P <= 0))
        assert np.all(target.log_tail_mass_P <= 0)
        assert target.offsets_P1[-1] == len(target.ids_E) == len(target.weights_E)


def known_case() -> tuple[DocTarget, PackedRow]:
    """One position: head 0.4, 0.2 (realised), 0.1, and 15 draws of 100 ids of 0.003."""
    probs_V = np.array([0.4, 0.2, 0.1, *[0.3 / 100] * 100])
    position = np.array([3], dtype=np.int32)
    uniforms = position_uniforms(9, position)
    target = reduce_logprobs(np.log(probs_V)[None], np.array([1]), position, uniforms, 1 / 50)
    sums = TargetSums(reasoning=1.0, final=2.0, control=0.5)
    document = DocTarget(content_key=9, target=target, entropy_sums=sums)
    return document, row_of([position], [np.array([1])])


def test_forged_fields_are_refused():
    """A known position, laid out by docs/format.md: each field broken in turn."""
    document, row = known_case()
    blob = encode_blob([document], row, ORDER)
    _, payload, raw = parts_of(blob)
    heads, draws = 3, int(document.target.offsets_P1[1]) - 3
    sums_at = 9
    counts_at = sums_at + 24
    place_at = counts_at + 2
    steps_at = place_at + 1
    cells_at = steps_at + heads - 1
    draws_at = cells_at + heads - 1
    assert len(payload) == draws_at + draws
    assert payload[counts_at : steps_at + 2] == bytes([3, draws, 2, 11, 11])  # ln 2 * 16 = 11.1

    faults = [
        (0, b"\x02", "neither scored"),
        (0, b"\x00", "no document is scored"),
        (sums_at, struct.pack("<d", -1.0), "entropy sum"),
        (sums_at + 8, struct.pack("<d", math.nan), "entropy sum"),
        (counts_at, bytes([heads - 1]), "entries of its positions"),
        (counts_at + 1, bytes([draws + 1]), "entries of its positions"),
        (place_at, bytes([heads + 1]), "behind the end of its head"),
        (steps_at, bytes([200, 200]), "far below the threshold"),
        (steps_at, bytes([100, 0]), "below the threshold"),
        (cells_at, bytes([255]), "outside the vocabulary|raw bits"),
        (draws_at, bytes([255, 255]), "in no cell"),
        (draws_at, bytes([254]), "in no cell|outside the vocabulary|raw bits"),
    ]
    for at, value, message in faults:
        broken = payload[:at] + value + payload[at + len(value) :]
        with pytest.raises((FormatError, AlignmentError), match=message):
            decode_blob(forge(blob, payload=broken), row, ORDER)
    for broken, message in [(payload[:-1], "shorter"), (payload + b"\0", "announces|longer")]:
        with pytest.raises(FormatError, match=message):
            decode_blob(forge(blob, payload=broken), row, ORDER)
    for broken in (raw[:-1], raw + b"\0"):
        with pytest.raises(FormatError, match="raw bits"):
            decode_blob(forge(blob, raw=broken), row, ORDER)


def test_draws_that_do_not_rise_are_refused():
    """All draws in the cell of the first, with the raw bits of the first: one id drawn many times."""
    document, row = known_case()
    blob = encode_blob([document], row, ORDER)
    counts, payload, _ = parts_of(blob)
    draws = counts[3]
    broken = payload[:-draws] + bytes(draws)  # cell 0 holds one code and takes no raw bits
    for length in range(8):
        try:
            decode_blob(forge(blob, payload=broken, raw=bytes(length)), row, ORDER)
        except FormatError as error:
            if "rising order" in str(error):
                return
    raise AssertionError("no number of raw bytes made the forged draws readable")


def test_forged_counts_are_refused():
    counts, _, _ = parts_of(BLOB)
    for at, value in [
        (0, counts[0] + 1),
        (1, 0xFFFFFFFF),
        (1, counts[1] - 1),
        (2, 0xFFFFFFFF),
        (3, 0xFFFFFFFF),
        (2, counts[2] + 1),
        (3, counts[3] - 1),
        (4, 0xFFFFFFFF),
        (4, counts[4] - 1),
        (4, counts[4] + 1),
        (5, math.nan),
        (5, 0.0),
        (5, 1 / 255),
        (5, 1 / 25),
    ]:
        changed = [*counts[:at], value, *counts[at + 1 :]]
        with pytest.raises((FormatError, AlignmentError)):
            decode_blob(forge(BLOB, counts=changed), ROW, ORDER)
    with pytest.raises(FormatError, match="another format"):
        decode_blob(b"VPT1" + BLOB[4:], ROW, ORDER)


def test_an_order_of_another_dataset_gives_other_ids():
    """Why a target store names the hash of its order: the blob alone cannot tell."""
    other = type(ORDER).identity()
    found = decode_blob(BLOB, ROW, other)
    assert any(
        not np.array_equal(np.sort(d.target.ids_E), np.sort(ARRAYS[f"{n}.ids_E"]))
        for n, d in enumerate(found)
    )
