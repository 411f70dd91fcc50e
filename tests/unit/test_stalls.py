"""Where work has stopped though there is some."""

from __future__ import annotations

from cqrs_es.runtime.health import Stalls
from cqrs_es.runtime.roles import Position


def patience(role: str) -> float:
    return 40.0 if role == "worker" else 10.0


def look(stalls: Stalls, now: float, *, role: str = "relay", at: int | None, backlog: int) -> None:
    stalls.look([Position(role, 3, at, backlog)], now)


def test_work_that_does_not_move_has_stopped() -> None:
    """After its role's patience, not before."""
    stalls = Stalls(patience)
    for now in range(11):
        look(stalls, now, at=7, backlog=2)
        assert not stalls.reasons
    look(stalls, 11, at=7, backlog=2)
    (reason,) = stalls.reasons
    assert reason.startswith("relay on partition 3: no progress for 11 s")


def test_a_worker_may_take_its_time() -> None:
    """Its handlers call other systems."""
    stalls = Stalls(patience)
    look(stalls, 0, role="worker", at=None, backlog=1)
    look(stalls, 39, role="worker", at=None, backlog=1)
    assert not stalls.reasons
    look(stalls, 41, role="worker", at=None, backlog=1)
    assert stalls.reasons


def test_any_progress_will_do() -> None:
    """However little, and with the backlog growing all the while."""
    stalls = Stalls(patience)
    for now in range(0, 100, 9):
        look(stalls, now, at=now, backlog=1000 * now + 1)
    assert not stalls.reasons


def test_idleness_is_no_stall() -> None:
    """The time counts from when there was something to do again."""
    stalls = Stalls(patience)
    look(stalls, 0, at=7, backlog=0)
    look(stalls, 1000, at=7, backlog=1)
    assert not stalls.reasons


def test_it_goes_on() -> None:
    """What moves again is no reason any more; nor is a partition that another process has now."""
    stalls = Stalls(patience)
    look(stalls, 0, at=7, backlog=1)
    look(stalls, 20, at=7, backlog=1)
    assert stalls.reasons
    look(stalls, 21, at=8, backlog=1)
    assert not stalls.reasons
    look(stalls, 50, at=8, backlog=1)
    assert stalls.reasons
    stalls.look([], 51)
    assert not stalls.reasons
