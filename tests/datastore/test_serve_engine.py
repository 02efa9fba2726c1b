"""The queue before the engine: turns, the bound on tokens, aborts, faults of a document, death and draining."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from common.errors import EngineError
from datastore.prompt import ScoreRequest
from datastore.serve_engine import Overloaded, ScoringQueue, Unavailable
from tests.datastore.line_engine import FATAL, IDENTITY, POISON, LineEngine, packed_rows
from tests.datastore.waiting import wait_until

_KEYS = itertools.count()


def request(length: int, *, first: int = 100, positions: list[int] | None = None) -> ScoreRequest:
    return ScoreRequest(
        prompt_T=np.arange(first, first + length, dtype=np.int32),
        positions_P=np.array(list(range(length - 1)) if positions is None else positions, np.int32),
        shift=0,
        content_key=next(_KEYS),
    )


@pytest.fixture
def started() -> Iterator[Callable[..., tuple[ScoringQueue, LineEngine]]]:
    queues: list[tuple[ScoringQueue, LineEngine]] = []

    def start(queue_tokens: int = 1000, batch_tokens: int = 10):
        engine = LineEngine(batch_tokens)
        queue = ScoringQueue(
            lambda: (engine, IDENTITY), queue_tokens=queue_tokens, batch_tokens=batch_tokens
        )
        queues.append((queue, engine))
        wait_until(lambda: queue.state == "ready")
        return queue, engine

    yield start
    for queue, engine in queues:
        engine.open.set()
        assert queue.stop(30)


def test_every_document_comes_back_to_its_place(started) -> None:
    queue, _ = started(queue_tokens=10_000)
    lengths = [5, 1, 19, 7, 3]
    sent = [[request(n, first=100 * k) for n in lengths] for k in range(1, 9)]
    tickets = [queue.submit(requests) for requests in sent]
    for ticket, requests in zip(tickets, sent, strict=True):
        packed = ticket.future.result(30)
        assert sorted(packed) == [0, 2, 3, 4]  # a document of one token has no position
        for index, rows in packed.items():
            np.testing.assert_array_equal(rows, packed_rows(requests[index]))
    figures = queue.figures()
    assert figures.tokens_in_flight == 0 and figures.documents_running == 0
    assert (figures.documents_done, figures.tokens_done) == (8 * 4, 8 * 34)


def test_a_request_without_positions_is_answered_at_once(started) -> None:
    queue, engine = started()
    assert queue.submit([request(1), request(9, positions=[])]).future.result(30) == {}
    assert engine.added == []


def test_requests_take_turns(started) -> None:
    """A short request behind a long one waits for what the engine holds, not for the long one's end."""
    queue, engine = started()
    engine.open.clear()
    long = queue.submit([request(10) for _ in range(40)])
    wait_until(lambda: len(engine.added) == 2)  # one beside the oldest makes a batch of 10 tokens
    short = queue.submit([request(5)])
    engine.open.set()
    short.future.result(30)
    done_before = queue.figures().documents_done
    long.future.result(30)
    place = engine.added.index(f"{short.number}.0")
    assert place <= 3, engine.added
    assert done_before < 40


def test_turns_are_counted_in_tokens(started) -> None:
    """Four documents of 10 tokens go in while one of 40 waits for its turn, and it is not put off for ever."""
    queue, engine = started(batch_tokens=8)
    engine.open.clear()
    queue.submit([request(9), request(9)])  # fills the engine
    wait_until(lambda: len(engine.added) == 2)
    long = queue.submit([request(40) for _ in range(3)])
    short = queue.submit([request(10) for _ in range(12)])
    engine.open.set()
    long.future.result(30)
    short.future.result(30)
    order = [int(request_id.split(".")[0]) for request_id in engine.added[2:]]
    places = [i for i, number in enumerate(order) if number == long.number]
    assert places == [3, 8, 13], order


def test_engine_is_kept_full_but_not_fuller(started) -> None:
    queue, engine = started(batch_tokens=35)
    engine.open.clear()
    queue.submit([request(10) for _ in range(9)])
    wait_until(lambda: queue.figures().documents_running > 0)
    figures = queue.figures()
    assert (figures.documents_running, figures.documents_waiting) == (5, 4)


def test_a_full_queue_refuses_and_says_when_to_come_again(started) -> None:
    queue, engine = started(queue_tokens=100)
    engine.open.clear()
    first = queue.submit([request(60)])
    queue.submit([request(40)])
    with pytest.raises(Overloaded, match=r"got 1 tokens beside 100 in flight, .* at most 100") as e:
        queue.submit([request(1)])
    assert 1 <= e.value.retry_sec <= 60
    engine.open.set()
    first.future.result(30)
    assert queue.wait_idle(30)
    assert queue.submit([request(100)]).future.result(30)


def test_a_cancelled_request_leaves_the_engine_and_the_queue(started) -> None:
    queue, engine = started()
    engine.open.clear()
    gone = queue.submit([request(10) for _ in range(5)])
    wait_until(lambda: len(engine.added) == 2)
    stays = queue.submit([request(10)])
    queue.cancel(gone)
    assert queue.figures().tokens_in_flight == 10
    engine.open.set()
    assert stays.future.result(30)
    assert engine.added == [f"{gone.number}.0", f"{gone.number}.1", f"{stays.number}.0"]
    assert set(engine.aborted) == {f"{gone.number}.0", f"{gone.number}.1"}
    assert not gone.future.done()


def test_the_fault_of_a_document_fails_its_request_alone(started) -> None:
    queue, engine = started()
    engine.open.clear()
    bad = queue.submit([request(9), request(9, first=POISON), request(9)])
    good = queue.submit([request(9)])
    engine.open.set()
    with pytest.raises(EngineError, match="NaN in a document"):
        bad.future.result(30)
    assert good.future.result(30)
    assert queue.state == "ready" and queue.figures().tokens_in_flight == 0


def test_a_dead_engine_fails_every_request_with_its_cause(started) -> None:
    queue, engine = started()
    engine.open.clear()
    tickets = [queue.submit([request(9)]), queue.submit([request(9, first=FATAL)])]
    tickets.append(queue.submit([request(9) for _ in range(9)]))
    engine.open.set()
    for ticket in tickets[1:]:
        with pytest.raises(Unavailable, match=r"the engine has failed: .*device lost"):
            ticket.future.result(30)
    with pytest.raises(EngineError, match="device lost"):
        queue.ended.result(30)
    with pytest.raises(Unavailable, match="device lost"):
        queue.submit([request(3)])
    assert queue.state == "failed"


def test_an_engine_that_does_not_start_is_dead() -> None:
    def start():
        raise EngineError("the canary disagrees")

    queue = ScoringQueue(start, queue_tokens=1, batch_tokens=1)
    with pytest.raises(EngineError, match="canary disagrees"):
        queue.ended.result(30)
    with pytest.raises(Unavailable, match="canary disagrees"):
        queue.require_open()
    assert queue.identity is None


def test_nothing_is_taken_while_it_starts() -> None:
    go = threading.Event()
    engine = LineEngine()

    def start():
        assert go.wait(30)
        return engine, IDENTITY

    queue = ScoringQueue(start, queue_tokens=100, batch_tokens=10)
    with pytest.raises(Unavailable, match="the engine is starting"):
        queue.submit([request(3)])
    go.set()
    wait_until(lambda: queue.state == "ready")
    assert queue.submit([request(3)]).future.result(30)
    assert queue.stop(30) and engine.closed


def test_draining_finishes_what_is_in_flight(started) -> None:
    queue, engine = started()
    engine.open.clear()
    ticket = queue.submit([request(10) for _ in range(5)])
    queue.drain()
    with pytest.raises(Unavailable, match="draining"):
        queue.submit([request(3)])
    assert not queue.wait_idle(0.05)
    engine.open.set()
    assert queue.wait_idle(30) and len(ticket.future.result(30)) == 5
    assert queue.stop(30) and engine.closed
    queue.ended.result(0)


def test_stopping_fails_what_is_left(started) -> None:
    queue, engine = started()
    engine.open.clear()
    ticket = queue.submit([request(10)])
    wait_until(lambda: engine.added == [f"{ticket.number}.0"])
    assert not queue.stop(0.05)  # the step still runs
    with pytest.raises(Unavailable, match="stopped"):
        ticket.future.result(0)
    engine.open.set()
    queue.ended.result(30)


def test_many_threads_at_once(started) -> None:
    queue, _ = started(queue_tokens=3000, batch_tokens=25)

    def work(seed: int) -> int:
        rng, done = np.random.default_rng(seed), 0
        for _ in range(20):
            requests = [request(int(n), first=200) for n in rng.integers(2, 9, 3)]
            ticket = queue.submit(requests)
            if rng.random() < 0.3:
                queue.cancel(ticket)
                continue
            packed = ticket.future.result(30)
            assert all(len(packed[i]) == len(r.positions_P) for i, r in enumerate(requests))
            done += 1
        return done

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 80
    assert queue.wait_idle(30)
    figures = queue.figures()
    assert (figures.documents_waiting, figures.documents_running) == (0, 0)
