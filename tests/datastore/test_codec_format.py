"""The blob read again, entry by entry in plain Python, by the words of docs/format.md, "The blob (codec 2)"."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import zstandard

from datastore.codec import decode_blob, encode_blob
from datastore.id_order import IdOrder
from datastore.types import PackedRow
from tests.datastore.codec_cases import make_row, some_order

ORDER = some_order()
MASK = (1 << 64) - 1
Entry = tuple[int, float]
Position = tuple[list[Entry], set[int], float, float]  # head, draws, realised logprob, tail mass


def uniform(content_key: int, position: int) -> float:
    x = (content_key + 0x9E3779B97F4A7C15 * (position + 1)) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    x ^= x >> 31
    return (x >> 40) / 2**24


class Bits:
    """Values end to end, the lowest bit first."""

    def __init__(self, content: bytes) -> None:
        self.number, self.left = int.from_bytes(content, "little"), 8 * len(content)

    def take(self, width: int) -> int:
        value, self.number = self.number & ((1 << width) - 1), self.number >> width
        self.left -= width
        return value


def cell(number: int, resolution: int) -> tuple[int, int]:
    """(first code, raw bits) of a cell, by counting cells octave by octave."""
    octave = 0
    while number >= (parts := 2 ** min(octave, resolution)):
        number, octave = number - parts, octave + 1
    width = 2**octave // parts
    return 2**octave + number * width - 1, octave - min(octave, resolution)


class Text:
    """The ids of one document by code."""

    def __init__(self, tokens: list[int], order: IdOrder) -> None:
        self.order = order
        self.own = sorted(set(tokens), key=lambda token: int(order.ranks_V[token]))[:4096]

    def id(self, code: int) -> int:
        own = code < len(self.own)
        return self.own[code] if own else int(self.order.ids_V[code - len(self.own)])


class Reader:
    """The streams of a blob, taken from the front."""

    def __init__(self, blob: bytes) -> None:
        header = struct.unpack_from("<4sQIIIIId", blob)
        _, _, self.documents, self.positions, self.heads, self.draws, size, self.t = header
        self.payload = zstandard.ZstdDecompressor().decompress(blob[40 : 40 + size])
        self.bits = Bits(blob[40 + size :])

    def take(self, count: int) -> list[int]:
        values, self.payload = list(self.payload[:count]), self.payload[count:]
        return values


def slow_decode(blob: bytes, row: PackedRow, order: IdOrder) -> list[Position]:
    reader = Reader(blob)
    is_scored = reader.take(reader.documents)
    keys = struct.unpack(f"<{sum(is_scored)}Q", bytes(reader.take(8 * sum(is_scored))))
    reader.take(24 * sum(is_scored))
    scored = [doc for doc, flag in zip(row.documents(), is_scored, strict=True) if flag]
    places = []  # (text, realised id, u) of each position
    for doc, key in zip(scored, keys, strict=True):
        tokens, spans = row.tokens_T[doc].tolist(), row.spans_T[doc].tolist()
        text = Text(tokens, order)
        targets = [t for t in range(len(tokens) - 1) if spans[t + 1]]
        places += [(text, tokens[t + 1], uniform(key, t)) for t in targets]
    num = reader.positions
    assert num == len(places)
    h, k = reader.take(num), reader.take(num)
    place = spread(reader.take(sum(n > 0 for n in h)), [n > 0 for n in h])
    seconds = reader.take(sum(n > 1 for n in h))
    later = reader.take(sum(max(n - 2, 0) for n in h))
    stepped = [hp > 0 and kp < 2 for hp, kp in zip(h, k, strict=True)]
    tail_steps = spread(reader.take(sum(stepped)), stepped)
    head_cells = reader.take(sum(h) - sum(p > 0 for p in place))
    draw_cells = reader.take(sum(k))
    nats = spread(reader.take(place.count(0)), [p == 0 for p in place])
    assert reader.payload == b""

    head_codes = []
    for number in head_cells:
        base, width = cell(number, 1)
        head_codes.append(base + reader.bits.take(width))
    draw_ids: list[set[int]] = []
    for p in range(num):
        at, found = 0, set()
        for _ in range(k[p]):
            at += draw_cells.pop(0)
            base, width = cell(at, min(4, int(math.log2(k[p]))))
            found.add(places[p][0].id(base + reader.bits.take(width)))
        draw_ids.append(found)
    tails = [tail_of(reader, h[p], k[p], places[p][2], tail_steps[p]) for p in range(num)]

    found = []
    for p, (text, realised, _) in enumerate(places):
        below = [0] * min(h[p], 1) + [seconds.pop(0) for _ in range(h[p] > 1)]
        for _ in range(h[p] - 2):
            below.append(below[-1] + later.pop(0))
        shape = [math.exp(-steps / 16) for steps in below]
        weights = [w / sum(shape) * (1 - tails[p]) for w in shape]
        ids = [
            realised if place[p] == entry + 1 else text.id(head_codes.pop(0))
            for entry in range(h[p])
        ]
        logprob = realised_of(reader, h[p], k[p], place[p], weights, nats[p])
        found.append((list(zip(ids, weights, strict=True)), draw_ids[p], logprob, tails[p]))
    assert reader.bits.number == 0 and 0 <= reader.bits.left < 8
    return found


def spread(values: list[int], where: list[bool]) -> list[int]:
    """One value for each True, 0 elsewhere."""
    left = iter(values)
    return [next(left) if here else 0 for here in where]


def tail_of(reader: Reader, h: int, k: int, u: float, step: int) -> float:
    t = reader.t
    low, high = max((k - 1 + u) * t, 0), min((k + u) * t, 1 - h * t)
    high = max(high, low + t / 64)
    if h == 0:
        return 1.0
    if k < 2:
        nat = 4 if t <= 1 / 12 else 32
        return 0.0 if step == 255 else max(high * math.exp(-(step + 0.5) / nat), low)
    width = 4 if 1 - high < 4 * t else 2
    return low + (high - low) * (reader.bits.take(width) + 0.5) / 2**width


def realised_of(
    reader: Reader, h: int, k: int, place: int, weights: list[float], nats: int
) -> float:
    if place == 0:
        return math.log(reader.t) - nats - (reader.bits.take(5) + 0.5) / 32
    base = math.log(weights[place - 1])
    if (h, k) == (1, 0):
        return base
    return min(base + (reader.bits.take(2) - 1.5) / 32, 0.0)


@pytest.mark.parametrize("threshold", [1 / 100, 1 / 50, 1 / 12, 1 / 4])
@pytest.mark.parametrize("spread_of_logits", [0.0, 2.0, 5.0, 12.0])
def test_the_words_of_the_format_page_decode_a_blob(threshold, spread_of_logits):
    documents, row = make_row([9, 0, 25, 4], 11, threshold, spread_of_logits)
    blob = encode_blob([*documents[:3], None], row, ORDER)
    slow = slow_decode(blob, row, ORDER)
    decoded = [document.target for document in decode_blob(blob, row, ORDER) if document]
    at = 0
    for target in decoded:
        for p in range(len(target.positions_P)):
            start, end = target.offsets_P1[p : p + 2].tolist()
            middle = start + int(target.num_head_P[p])
            head, draws, logprob, tail = slow[at]
            assert [token for token, _ in head] == target.ids_E[start:middle].tolist()
            np.testing.assert_allclose([w for _, w in head], target.weights_E[start:middle], 1e-5)
            assert draws == set(target.ids_E[middle:end].tolist())
            assert logprob == pytest.approx(target.realised_logprob_P[p], rel=1e-5, abs=1e-6)
            assert tail == pytest.approx(math.exp(target.log_tail_mass_P[p]), rel=1e-5)
            at += 1
    assert at == len(slow) == 34
