"""From sampled shards to targets: a served teacher, the link's thread, the encoder's process, the buffer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from common.errors import VpmoeError
from datastore.rollouts import RolloutBuffer
from tests.datastore.rollout_cases import content, held_out, open_buffer, shard_of
from tests.datastore.served import Served
from tests.datastore.waiting import wait_until
from tests.trainer.opd.links import impatient as impatient
from tests.trainer.opd.links import linked, taken
from tests.trainer.opd.served import served_teacher
from trainer.opd.scoring import Scoring

SHARDS, SOON_SEC = 3, 60


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with served_teacher() as server:
        yield server


@pytest.fixture
def buffer(tmp_path) -> Iterator[RolloutBuffer]:
    with open_buffer(tmp_path / "buffer") as opened:
        for number in range(SHARDS):
            opened.append(shard_of(number))
        yield opened


def test_targets_become_durable_while_nobody_asks_and_are_those_of_add_targets(
    tmp_path, served, buffer
) -> None:
    with linked(served.url) as link:
        link.open()
        scoring = Scoring(link, buffer.encoder())
        for number in range(SHARDS):
            scoring.send(number, buffer.rollouts(number))
        wait_until(lambda: buffer.num_scored == SHARDS, SOON_SEC)
        assert all(scoring.sent(number) for number in range(SHARDS))

        def all_heard_of() -> bool:
            scoring.collect()
            return not any(scoring.sent(number) for number in range(SHARDS))

        wait_until(all_heard_of, SOON_SEC)
        assert scoring.trouble() is None
        assert scoring.values()["teacher/documents"] == SHARDS * 6
        with open_buffer(tmp_path / "at_once") as other:
            for number in range(SHARDS):
                other.append(shard_of(number))
                link.submit(number, other.score_documents(number))
                other.add_targets(*taken(link))
        scoring.close()
    assert content(tmp_path / "buffer") == content(tmp_path / "at_once")


def test_held_out_rollouts_come_back_and_leave_the_buffer_alone(tmp_path, served, buffer) -> None:
    with linked(served.url) as link:
        link.open()
        scoring, before = Scoring(link, buffer.encoder()), content(tmp_path)
        scoring.send_held_out(held_out())
        assert scoring.held_out() is None

        def is_there() -> bool:
            scoring.collect()
            return scoring.held_out() is not None

        wait_until(is_there, SOON_SEC)
        assert len(scoring.held_out()) == len(held_out())
        assert content(tmp_path) == before


def test_a_slow_and_then_dead_encoder_is_told(served, buffer) -> None:
    with linked(served.url) as link:
        link.open()
        scoring = Scoring(link, encoder := buffer.encoder())
        pid = encoder.pid
        os.kill(pid, signal.SIGSTOP)
        scoring.send(0, buffer.rollouts(0))

        def is_storing() -> bool:
            scoring.collect()
            return scoring.trouble() == "shard 0 is being stored"

        wait_until(is_storing, SOON_SEC)
        assert scoring.sent(0) and not buffer.is_scored(0)
        os.kill(pid, signal.SIGKILL)

        def is_told() -> bool:
            try:
                scoring.collect()
            except VpmoeError as error:
                return "stores targets died" in str(error)
            return False

        wait_until(is_told, SOON_SEC)
        assert buffer.num_sampled == SHARDS
