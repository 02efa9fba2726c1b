"""The link to a teacher that is absent, busy, killed, replaced or silent, and the end of a link that waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from common.errors import AlignmentError, EngineError
from datastore.harmony import Renderer
from datastore.scoring_client import ScoreDocument
from tests.datastore.served import Served
from tests.datastore.waiting import wait_until
from tests.trainer.opd.links import (
    RENDER,
    asked,
    assert_scored,
    linked,
    raised,
    shard_of,
    taken,
)
from tests.trainer.opd.links import impatient as impatient
from tests.trainer.opd.served import (
    ServerProcess,
    free_port,
    served_teacher,
)
from trainer.opd import teacher as teacher_module
from trainer.opd.teacher import TeacherLink


def test_a_server_that_is_absent_at_open_is_waited_for(caplog) -> None:
    port, asks = free_port(), []
    opened = threading.Event()

    def poll() -> None:
        asks.append(link.trouble())
        if any(asks):
            opened.set()

    with contextlib.ExitStack() as stack, caplog.at_level("INFO"):
        link = stack.enter_context(linked(f"http://127.0.0.1:{port}"))

        def serve_later() -> None:
            assert opened.wait(30)
            stack.enter_context(served_teacher(port=port))

        starter = threading.Thread(target=serve_later)
        starter.start()
        assert link.open(poll)["teacher"] == "bigram"
        starter.join(30)
        told = [line for line in asks if line]
        assert "does not answer for 0 s (ConnectError: " in told[0]
        assert link.trouble() is None and link.figures().away_sec > 0
        link.close()
    assert any("; waiting" in message for message in caplog.messages)
    assert any("answers again" in message for message in caplog.messages)


def test_what_poll_raises_ends_the_wait() -> None:
    class Stopped(Exception): ...

    def poll() -> None:
        raise Stopped

    with linked(f"http://127.0.0.1:{free_port()}") as link, pytest.raises(Stopped):
        link.open(poll)


def test_a_full_queue_is_waited_for() -> None:
    with served_teacher(queue_tokens=4300) as server, linked(server.url) as link:
        link.open()
        server.engine.open.clear()
        with linked(server.url) as other:
            other.open()
            long = ScoreDocument(
                tokens_T=np.concatenate([Renderer(RENDER).prefix_T, np.full(4000, 99, np.int32)]),
                ranges_R2=np.array([[2000, 2001]], np.int32),
            )
            other.submit(0, [long])
            wait_until(lambda: server.queue.figures().tokens_in_flight > 4000)
            documents = [asked(number) for number in range(5)]
            link.submit(0, documents)
            wait_until(lambda: link.trouble() is not None)
            assert "is busy for" in str(link.trouble()) and "queue is full" in str(link.trouble())
            assert link.take() is None
            server.engine.open.set()
            assert_scored(taken(link)[1], documents)
            assert link.trouble() is None and link.figures().away_sec > 0
            taken(other)


@pytest.mark.slow
def test_a_server_killed_in_a_request_costs_nothing() -> None:
    """SIGKILL while it scores, then the same command on the same port: every shard once, in order."""
    with ServerProcess("--seconds", "1") as server, linked(server.url) as link:
        link.open()
        shards = {shard: shard_of(shard) for shard in range(4)}
        for shard, documents in shards.items():
            link.submit(shard, documents)
        answered = [taken(link)]
        wait_until(lambda: server.metric("vpmoe_serve_tokens_in_flight") > 0)
        server.kill()
        wait_until(lambda: "does not answer" in str(link.trouble()))
        assert link.take() is None
        server.start()
        answered += [taken(link) for _ in range(3)]
        for (number, targets), shard in zip(answered, shards, strict=True):
            assert number == shard
            assert_scored(targets, shards[shard])
        assert link.take() is None and link.trouble() is None
        assert link.figures().documents == 12


@pytest.mark.slow
def test_another_teacher_on_the_same_port_is_refused() -> None:
    with ServerProcess() as server, linked(server.url) as link:
        link.open()
        server.kill()
        link.submit(0, shard_of(0))
        wait_until(lambda: link.trouble() is not None)
        server.start("--weights", "second")
        error = raised(link)
        assert isinstance(error, AlignmentError)
        assert "another teacher than the one that this run began with; got teacher_id" in str(error)
        link.submit(1, shard_of(1))
        assert raised(link) is error  # and it stays refused


def test_a_teacher_that_was_swapped_between_shards_is_refused() -> None:
    """Nothing is in flight when it happens, so that no request is seen to break."""
    with linked_to_restarted({}, {"weights": "second"}) as link:
        link.submit(1, shard_of(1))
        assert isinstance(raised(link), AlignmentError)
        assert link.figures().documents == 3


def test_engine_versions_may_change(caplog) -> None:
    with linked_to_restarted({}, {"engine": {"device": "cpu", "versions": {"vllm": "9"}}}) as link:
        link.submit(1, shard_of(1))
        assert_scored(taken(link)[1], shard_of(1))
        assert link.served["engine"]["versions"] == {"vllm": "9"}
    assert any("engine is {'device': 'cpu', 'versions': {'vllm'" in m for m in caplog.messages)


@contextlib.contextmanager
def linked_to_restarted(first: dict, second: dict) -> Iterator[TeacherLink]:
    """A link that had shard 0 scored by one server and has another on the same port."""
    port = free_port()
    with linked(f"http://127.0.0.1:{port}") as link:
        with served_teacher(port=port, **first):
            link.open()
            link.submit(0, shard_of(0))
            taken(link)
        with served_teacher(port=port, **second):
            yield link


def hanging(link: TeacherLink, server: Served) -> None:
    server.engine.open.clear()
    link.submit(0, shard_of(0))
    wait_until(lambda: server.queue.figures().tokens_in_flight > 0)


def test_close_does_not_wait_for_a_request_that_hangs() -> None:
    with served_teacher() as server, linked(server.url) as link:
        link.open()
        hanging(link, server)
        link.close()
        assert not link._thread.is_alive()
        # The connection is gone too: the server has dropped the documents.
        wait_until(lambda: server.queue.figures().tokens_in_flight == 0)


def test_close_while_the_server_is_away() -> None:
    with linked(f"http://127.0.0.1:{free_port()}") as link:
        with pytest.raises(EngineError):
            link.open(link.close)
        link.close()
        assert not link._thread.is_alive()


def test_a_request_that_hangs_is_told_and_asked_again(monkeypatch) -> None:
    monkeypatch.setattr(teacher_module, "_SLOW_SEC", 0.0)
    with served_teacher() as server, linked(server.url, request_sec=0.5) as link:
        link.open()
        hanging(link, server)
        assert "has been at shard 0, rollout 0 of 3 for" in str(link.trouble())
        wait_until(lambda: "does not answer" in str(link.trouble()))
        assert "ReadTimeout" in str(link.trouble())
        server.engine.open.set()
        assert_scored(taken(link)[1], shard_of(0))
