"""Work of rank 0 that others wait for: its value and its errors reach every rank, polls keep them in step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from common.errors import FormatError, VpmoeError
from tests.distributed.gloo import run_gloo

pytestmark = pytest.mark.slow


def _together(rank: int, world: int) -> dict[str, Any]:
    from tests.trainer.opd.feeds import topology, watched
    from trainer.opd.together import work_of_first

    of, found = topology(rank, world), dict[str, Any]()
    polled = []

    def work(poll: Callable[[], None]) -> dict[str, int]:
        for _ in range(3):
            poll()
            polled.append(rank)
        return {"made_by": rank}

    def refused(poll: Callable[[], None]) -> None:
        poll()
        raise FormatError("the teacher", got="nothing", remedy="ask again")

    def called_to_end(poll: Callable[[], None]) -> None:
        """Rank 0 has a signal: `poll` raises it on every rank, and nothing is told twice."""
        import os
        import signal

        os.kill(os.getpid(), signal.SIGUSR1)
        while True:
            poll()

    with watched(of) as watch:
        found["from_first"] = of.from_first({"rank": rank})
        found["value"] = work_of_first(None if rank else work, of, watch)
        found["nothing"] = work_of_first(None if rank else lambda poll: None, of, watch)
        for name, fails in (("refused", refused), ("signal", called_to_end)):
            try:
                work_of_first(None if rank else fails, of, watch)
            except VpmoeError as error:
                found[name] = type(error).__name__, str(error)
        found["polled"] = len(polled)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_every_rank_has_what_the_first_has(world: int) -> None:
    of_ranks = run_gloo(_together, world, world)
    first = of_ranks[0]
    assert first["polled"] == 3
    who = "rank 0 " if world > 1 else ""
    for found in of_ranks:
        assert found["from_first"] == {"rank": 0}
        assert found["value"] == {"made_by": 0} and found["nothing"] is None
        kind, message = found["refused"]
        assert kind == "DataStopped"
        assert message.startswith(f"{who}the teacher; got nothing; ask again")
        kind, message = found["signal"]
        assert kind == "SignalledStop" and "SIGUSR1" in message
