"""The feed of an OPD run: what a step is given and on which rank, how far it samples ahead, where it goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import ResumeError
from datastore.reader import Dataset
from datastore.rollout_reader import RolloutReader
from tests.datastore.rollout_cases import filled, open_buffer
from tests.distributed.gloo import run_gloo
from tests.trainer.opd.served import served_teacher

SHARDS, ALONE = (
    3,
    ((1, 1), (1, 2), (2, 2), (3, 1), (4, 3)),
)  # micro-batch size and data-parallel ranks

pytestmark = pytest.mark.slow


def _cut(rank: int, folder: Path) -> dict[str, Any]:
    """Every step of a scored buffer as each rank of each layout is given it, and what a resume does."""
    from tests.trainer.opd.feeds import feed_config, feed_of, topology, write_data

    data, buffer = write_data(folder / "data"), RolloutReader.open_reader(folder / "buffer")
    found: dict[str, Any] = {"given": {}, "positions": {}, "refused": []}

    def config_of(micro: int) -> Any:
        return feed_config(batch={"rollouts": 6, "micro_batch_size": micro})

    for micro, ranks in ALONE:
        config = config_of(micro)
        for dp_rank in range(ranks):
            of = topology(0, 1, dp_rank=dp_rank, dp_size=ranks)
            feed = feed_of(config, of, data, buffer)
            for step in range(SHARDS):
                if step == 1:  # a run that was stopped here
                    feed = feed_of(config, of, data, buffer, stored=feed.state())
                batches = feed.next()
                found["given"][micro, ranks, step, dp_rank] = [
                    (batch.tokens_BT.numpy(), batch.sampled_BT.any(dim=1).numpy(), _trained(batch))
                    for batch in batches
                ]
                found["positions"][micro, ranks, step] = feed.positions()
                feed.finished()
    state = feed.state()
    for change in ({"step": SHARDS + 1}, {"buffer": "ab" * 32}, {"version": 0}):
        try:
            feed_of(config, of, data, buffer, stored=state | change)
        except ResumeError as error:
            found["refused"].append(str(error))
    return found


def _trained(batch: Any) -> np.ndarray:
    """Whether a row holds a position that is trained."""
    return (batch.label_spans_BT != 0).any(dim=1).numpy()


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("feed")
    filled(folder / "buffer", shards=SHARDS).close()
    return folder, run_gloo(_cut, 1, folder)[0]


def test_a_step_is_its_rollouts_then_anchors_then_padding_in_order_over_the_ranks(cut) -> None:
    folder, found = cut
    buffer = RolloutReader.open_reader(folder / "buffer")
    dataset = Dataset.open(folder / "data")
    train = [dataset.row("train", n).tokens_T.tobytes() for n in range(dataset.num_rows("train"))]
    for micro, ranks in ALONE:
        rollout_rows, anchors = 0, list[bytes]()
        for step in range(SHARDS):
            given = [found["given"][micro, ranks, step, rank] for rank in range(ranks)]
            assert len({len(of_rank) for of_rank in given}) == 1
            batches = [batch for of_rank in given for batch in of_rank]
            assert {len(tokens_BT) for tokens_BT, _, _ in batches} == {micro}
            rows = [row for tokens_BT, _, _ in batches for row in tokens_BT]
            sampled, trained = (np.concatenate([b[part] for b in batches]) for part in (1, 2))
            assert found["positions"][micro, ranks, step] == len(rows) * len(rows[0])
            scored = [row.row.tokens_T for row in buffer.rows(step)]
            assert [row.tolist() for row in rows[: len(scored)]] == [t.tolist() for t in scored]
            assert sampled.tolist() == [n < len(scored) for n in range(len(rows))]
            rollout_rows += len(scored)
            # 2 rows of the anchor for 3 of rollouts, counted from the first step on
            ended = len(scored) + 2 * rollout_rows // 3 - len(anchors)
            anchors += [row.astype(np.int32).tobytes() for row in rows[len(scored) : ended]]
            assert trained.tolist() == [n < ended for n in range(len(rows))]
            assert len(rows) - ended < micro * ranks
        epochs = [anchors[first : first + len(train)] for first in range(0, len(anchors), 7)]
        assert len(epochs[0]) == 7 or len(epochs) == 1
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) and set(epoch) <= set(train)


def test_every_layout_is_given_the_same_rows(cut) -> None:
    _, found = cut
    for step in range(SHARDS):
        of_layout = []
        for micro, ranks in ALONE:
            batches = [b for rank in range(ranks) for b in found["given"][micro, ranks, step, rank]]
            trained = np.concatenate([batch[2] for batch in batches])
            rows = np.concatenate([batch[0] for batch in batches])
            of_layout.append(rows[trained].tolist())
        assert all(rows == of_layout[0] for rows in of_layout)


def test_a_checkpoint_of_another_buffer_or_of_more_shards_is_refused(cut) -> None:
    _, found = cut
    shards, buffer, version = found["refused"]
    assert f"at least {SHARDS + 1} shards" in shards and f"shards {SHARDS};" in shards
    assert "ab" * 32 in buffer and "put the buffer of this run back" in buffer
    assert "'version': 0" in version


def _run(rank: int, folder: Path, url: str, staleness: int) -> list[Any]:
    """Steps of a run against a served teacher, stopped once in the middle."""
    from datastore.harmony import RenderConfig
    from tests.trainer.opd.feeds import feed_config, feed_of, topology, watched, write_data
    from trainer.opd.config import TeacherServerConfig
    from trainer.opd.scoring import Scoring
    from trainer.opd.teacher import TeacherLink

    data, config = write_data(folder / "data"), feed_config(staleness=staleness)
    found, stored = list[Any](), None
    with watched(of := topology(0, 1)) as watch:
        for last in (2, config.steps):
            link = TeacherLink(
                TeacherServerConfig(name="bigram", url=url), RenderConfig(), seq_len=512
            )
            link.open()
            buffer = open_buffer(folder / "buffer")
            scoring = Scoring(link, buffer.encoder())
            feed = feed_of(config, of, data, buffer, scoring=scoring, stored=stored)
            while feed.step < last:
                feed.ready(watch)
                batches = feed.next()
                values = feed.values()
                found.append((values["buffer/depth"], values["buffer/age"], values["opd/tokens"]))
                assert any(batch.sampled_BT.any() for batch in batches)
                feed.finished()
            stored = feed.state()
            found.append([(plan.shard, version) for plan, version in feed.producer.asked])
            feed.close()
    return found


@pytest.mark.parametrize("staleness", [0, 1])
def test_it_samples_as_far_ahead_as_it_may_and_nothing_twice(tmp_path, staleness) -> None:
    with served_teacher() as served:
        (found,) = run_gloo(_run, 1, tmp_path, served.url, staleness)
    *first, asked_first, third, fourth, asked_then = found
    asked = asked_first + asked_then
    assert asked == [(shard, max(0, shard - staleness)) for shard in range(4)]
    assert len(asked_first) == 2 + staleness
    steps = [*first, third, fourth]
    assert [age for _, age, _ in steps] == [min(step, staleness) for step in range(4)]
    ahead = [min(1 + staleness, 4 - step) for step in range(4)]
    assert [depth for depth, _, _ in steps] == ahead
    buffer = RolloutReader.open_reader(tmp_path / "buffer")
    assert buffer.num_scored == buffer.num_sampled == 4
    tokens = np.cumsum([buffer.counts(shard).tokens for shard in range(4)])
    assert [tokens_ for _, _, tokens_ in steps] == tokens.tolist()
    prompts = [sorted({one.prompt for one in buffer.rollouts(shard)}) for shard in range(4)]
    assert [n for of_shard in prompts for n in of_shard] == list(range(sum(map(len, prompts))))


def _encoder_lost(rank: int, folder: Path, url: str) -> list[str]:
    """Two ranks wait for targets whose encoder is killed."""
    from datastore.harmony import RenderConfig
    from tests.trainer.opd.feeds import feed_config, feed_of, topology, watched
    from trainer.opd.config import TeacherServerConfig
    from trainer.opd.scoring import Scoring
    from trainer.opd.teacher import TeacherLink
    from trainer.stops import DataStopped

    of, scoring, said = topology(rank, 2), None, []
    buffer: Any = RolloutReader.open_reader(folder / "buffer")
    if rank == 0:
        link = TeacherLink(TeacherServerConfig(name="bigram", url=url), RenderConfig(), seq_len=512)
        link.open()
        buffer = open_buffer(folder / "buffer")
        encoder = buffer.encoder()
        scoring = Scoring(link, encoder)
        os.kill(encoder.pid, signal.SIGKILL)
    with watched(of) as watch:
        feed = feed_of(feed_config(), of, folder / "data", buffer, scoring=scoring)
        try:
            feed.ready(watch)
        except DataStopped as stop:
            said.append(str(stop))
        feed.close()
    return said


def test_the_end_of_the_encoder_stops_every_rank(tmp_path) -> None:
    from tests.trainer.opd.feeds import write_data

    write_data(tmp_path / "data")
    open_buffer(tmp_path / "buffer").close()
    with served_teacher() as served:
        of_ranks = run_gloo(_encoder_lost, 2, tmp_path, served.url)
    assert of_ranks[0] == of_ranks[1]
    (said,) = of_ranks[0]
    assert said.startswith("rank 0 the process that stores targets died")
