"""The bodies of the scoring server: lossless both ways, and every malformed one is refused with what was wrong."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import FormatError
from datastore.harmony import RenderConfig
from datastore.scoring_protocol import (
    ScoreDocument,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)
from datastore.types import SparseTarget

REQUEST = [
    pa.field("tokens", pa.list_(pa.int32())),
    pa.field("spans", pa.list_(pa.uint8())),
    pa.field("ranges", pa.list_(pa.int32())),
    pa.field("reasoning", pa.string()),
]
HEADER = '{"protocol": 1, "documents": %d, "render": null}'


def body(*rows: dict, header: str | None = None, schema: list[pa.Field] = REQUEST) -> bytes:
    """A request written with pyarrow alone."""
    stated = (header or HEADER % len(rows)).encode()
    table = pa.schema(schema).with_metadata({b"vpmoe": stated})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table) as writer:
        writer.write_table(pa.Table.from_pylist(list(rows), table))
    return sink.getvalue().to_pybytes()


def compressed_body() -> bytes:
    """A million tokens in a few hundred bytes."""
    table = pa.schema(REQUEST).with_metadata({b"vpmoe": (HEADER % 1).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, table, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        zeros = row(tokens=[0] * 1_000_000, spans=[0] * 999_999 + [1])
        writer.write_table(pa.Table.from_pylist([zeros], table))
    return sink.getvalue().to_pybytes()


def row(tokens=(5, 6, 7), spans=(0, 1, 2), ranges=None, reasoning=None) -> dict:
    return {"tokens": tokens, "spans": spans, "ranges": ranges, "reasoning": reasoning}


def test_a_request_written_by_hand_is_read() -> None:
    batch = decode_request(
        body(row(), row(tokens=range(9), spans=None, ranges=[0, 2, 5, 8], reasoning="low"))
    )
    first, second = batch.documents
    assert batch.render is None
    assert first.tokens_T.tolist() == [5, 6, 7] and first.tokens_T.dtype == np.int32
    assert first.positions().tolist() == [0, 1] and first.reasoning is None
    assert second.positions().tolist() == [0, 1, 5, 6, 7] and second.reasoning == "low"


def test_a_request_comes_back_as_it_was() -> None:
    render = RenderConfig(identity="You are ☃.", reasoning="medium")
    tokens_T = np.array([0, 201_087, 5], np.int32)
    documents = [
        ScoreDocument(tokens_T=tokens_T, spans_T=np.array([0, 2, 0], np.uint8)),
        ScoreDocument(
            tokens_T=tokens_T, ranges_R2=np.array([[0, 1], [1, 2]], np.int32), reasoning="high"
        ),
    ]
    batch = decode_request(encode_request(documents, render))
    assert batch.render == render
    for found, sent in zip(batch.documents, documents, strict=True):
        np.testing.assert_array_equal(found.tokens_T, sent.tokens_T)
        np.testing.assert_array_equal(found.positions(), sent.positions())
        assert found.reasoning == sent.reasoning
        assert found.content_key() == sent.content_key()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (b"", "no Arrow IPC stream"),
        (b"\0" * 100, "no Arrow IPC stream"),
        (b'{"tokens": [1, 2]}', "no Arrow IPC stream"),
        (body(), "got no documents"),
        (body(row(), header=HEADER % 2), "got 1; expected 2, as stated"),
        (body(row(), header="[]"), "a JSON object"),
        (body(row(), header="{"), "a JSON object"),
        (body(row(), header='{"documents": 1, "render": null}'), "'protocol' is required"),
        (body(row(), header='{"protocol": 2, "documents": 1, "render": null}'), "protocol"),
        (body(row(), header=HEADER[:-1] % 1 + ', "teacher": 1}'), "unknown key 'teacher'"),
        (body(row(), header='{"protocol": 1, "documents": 1, "render": {"data": 1}}'), "'date'"),
        (body({"tokens": [1]}, schema=REQUEST[:1]), "columns.*got tokens list<"),
        (body(row(), schema=REQUEST[::-1]), "columns of a scoring request"),
        (
            body(row(), schema=[pa.field("tokens", pa.list_(pa.int64())), *REQUEST[1:]]),
            "tokens list<item: int64>.*expected tokens list<item: int32>",
        ),
        (compressed_body(), "got compressed buffers"),
        (body(row(tokens=None)), "document 0; got null"),
        (body(row(), row(tokens=[1, None, 2])), "column tokens; got a null"),
        (body(row(spans=[0, None, 1])), "column spans; got a null"),
        (body(row(tokens=[], spans=[])), "no tokens"),
        (body(row(tokens=[5, -1, 7])), "got -1 to 7; expected 0 to 201087"),
        (body(row(), row(tokens=[5, 201_088, 7])), "document 1: .*got 5 to 201088"),
        (body(row(spans=[0, 3, 1])), "got 3; expected 0, 1 or 2"),
        (body(row(spans=[1, 1, 1])), "first token is a target"),
        (body(row(spans=[0, 1])), "got 2 spans; expected 3"),
        (body(row(ranges=[0, 1])), "got both spans and ranges"),
        (body(row(spans=None)), "got neither"),
        (body(row(spans=None, ranges=[0])), "got 1 numbers"),
        (body(row(spans=None, ranges=[0, None])), "column ranges; got a null"),
        (body(row(spans=None, ranges=[0, 3])), "within 0 to 2"),
        (body(row(spans=None, ranges=[-1, 1])), "within 0 to 2"),
        (body(row(spans=None, ranges=[1, 1])), "rising, disjoint"),
        (body(row(spans=None, ranges=[1, 2, 0, 1])), "rising, disjoint"),
        (body(row(reasoning="maximal")), "got 'maximal'; expected low, medium or high"),
    ],
)
def test_malformed_requests_are_refused(bad: bytes, said: str) -> None:
    with pytest.raises(FormatError, match=said):
        decode_request(bad)


def test_a_request_cut_anywhere_is_refused() -> None:
    whole = body(row(), row(tokens=range(100), spans=[0] * 50 + [1] * 50))
    end_marker = 8  # what is cut there holds no document
    for size in range(len(whole) - end_marker):
        with pytest.raises(FormatError):
            decode_request(whole[:size])


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damage_never_escapes_as_another_error(data: st.DataObject) -> None:
    """Bits are flipped anywhere: a wrong token may come of it, a crash or another kind of error may not."""
    damaged = bytearray(body(row(), row(spans=None, ranges=[0, 2], reasoning="low")))
    for bit in data.draw(st.lists(st.integers(0, len(damaged) * 8 - 1), max_size=4)):
        damaged[bit // 8] ^= 1 << bit % 8
    try:
        batch = decode_request(bytes(damaged))
    except FormatError:
        return
    assert all(0 <= d.tokens_T.min() <= d.tokens_T.max() <= 201_087 for d in batch.documents)


def random_targets(count: int) -> list[SparseTarget]:
    """Arrays of the right shapes with any float32 in them, zeros of both signs and -inf included."""
    rng = np.random.default_rng(0)
    targets = []
    for positions in [0, *rng.integers(1, 40, count - 1).tolist()]:
        counts_P = rng.integers(0, 6, positions)
        entries = int(counts_P.sum())
        tail_P = -rng.exponential(size=positions).astype(np.float32)
        tail_P[::3] = -math.inf
        targets.append(
            SparseTarget(
                threshold=1 / 50,
                positions_P=np.sort(rng.choice(1000, positions, replace=False)).astype(np.int32),
                num_head_P=(counts_P // 2).astype(np.int32),
                offsets_P1=np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64),
                ids_E=rng.integers(0, 201_088, entries).astype(np.int32),
                weights_E=rng.random(entries).astype(np.float32),
                realised_logprob_P=-rng.exponential(size=positions).astype(np.float32) * 0.0,
                log_tail_mass_P=tail_P,
                entropy_P=rng.random(positions).astype(np.float32),
            )
        )
    return targets


def test_a_response_is_lossless() -> None:
    targets = random_targets(7)
    keys = [0, 2**64 - 1, *range(5)]
    sent = encode_response(targets, keys, teacher_id="cd" * 32, threshold=1 / 50)
    batch = decode_response(sent)
    assert batch.teacher_id == "cd" * 32 and batch.content_keys == keys
    for found, target in zip(batch.targets, targets, strict=True):
        assert found.threshold == target.threshold
        for name in SparseTarget.__dataclass_fields__.keys() - {"threshold"}:
            ours, theirs = getattr(found, name), getattr(target, name)
            assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), name


def test_a_response_cut_anywhere_is_refused() -> None:
    whole = encode_response(random_targets(3), [1, 2, 3], teacher_id="a", threshold=0.02)
    for size in range(len(whole) - 8):
        with pytest.raises(FormatError):
            decode_response(whole[:size])


def test_a_response_whose_arrays_disagree_is_refused() -> None:
    targets = random_targets(2)
    targets[1].positions_P.resize(len(targets[1].positions_P) - 1, refcheck=False)
    bad = encode_response(targets, [1, 2], teacher_id="a", threshold=0.02)
    with pytest.raises(FormatError, match=r"document 1 .*do not fit each other"):
        decode_response(bad)
