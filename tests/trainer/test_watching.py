"""When a rank counts as lost, from beats and a clock made by hand."""

from __future__ import annotations

from trainer.watching import Beat, Peers, places


def _beat(rank: int, number: int, **changes) -> Beat:
    values = {"rank": rank, "number": number, "pid": 100 + rank, "place": "here", "node": 0}
    return Beat(**values | {"step": 4, "phase": "step 5", "phase_sec": 1.0} | changes)


def _nobody(beat: Beat) -> bool:
    return False


def test_a_beat_survives_the_wire() -> None:
    beat = _beat(3, 7, left="it's over")
    assert Beat.of_json(beat.to_json()) == beat


def test_the_same_beat_again_is_silence_and_a_new_one_is_not() -> None:
    peers = Peers(silent_sec=10)
    peers.hear([_beat(0, 1), _beat(2, 1)], 0.0)
    peers.hear([_beat(0, 2), _beat(2, 1)], 9.0)
    assert peers.fault(10.0, _nobody) is None
    assert peers.fault(11.0, _nobody) == "rank 2 (node 0, pid 102) has not been heard for 11 s"
    peers.hear([_beat(0, 2), _beat(2, 2)], 11.0)
    assert peers.fault(12.0, _nobody) is None
    two = peers.fault(30.0, _nobody)
    assert two == (
        "rank 0 (node 0, pid 100) and rank 2 (node 0, pid 102) have not been heard for 21 s"
    )


def test_a_process_that_is_gone_is_known_at_once_and_before_silence() -> None:
    peers = Peers(silent_sec=10)
    peers.hear([_beat(0, 1), _beat(1, 1)], 0.0)
    assert peers.fault(0.0, lambda beat: beat.rank == 1) == "rank 1 (node 0, pid 101) died"
    assert peers.fault(50.0, lambda beat: beat.rank == 1) == "rank 1 (node 0, pid 101) died"
    assert peers.running(lambda beat: beat.rank == 1) == [0]


def test_a_rank_that_left_is_never_silent_but_its_error_is_told_when_nobody_shares_it() -> None:
    peers = Peers(silent_sec=10)
    peers.hear([_beat(0, 5, left=""), _beat(1, 5, left="disk full.")], 0.0)
    assert peers.fault(9.0, lambda beat: True) is None
    assert peers.fault(11.0, lambda beat: True) == (
        "rank 1 (node 0, pid 101) ended alone: disk full"
    )
    assert peers.running(_nobody) == []


def test_places_join_ranks_of_the_same_phase() -> None:
    beats = [_beat(0, 1), _beat(1, 1, phase_sec=9.0), _beat(2, 1, phase="evaluation")]
    assert places(beats) == "rank 0 and rank 1: step 5 for 9 s, rank 2: evaluation for 1 s"
    assert places(beats[:2]) == "every rank: step 5 for 9 s"
