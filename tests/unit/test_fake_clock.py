"""The clock of the test kit."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from cqrs_es.testing import FakeClock


async def _sleeping(clock: FakeClock, *seconds: float) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(clock.sleep(length)) for length in seconds]
    await asyncio.sleep(0)
    return tasks


async def _awake(tasks: list[asyncio.Task[None]]) -> list[bool]:
    await asyncio.sleep(0)
    return [task.done() for task in tasks]


async def test_time_stands_still_until_it_is_advanced() -> None:
    """Both clocks move by what `advance` says, and by nothing else."""
    clock = FakeClock()
    start = clock.now()
    await clock.sleep(0)
    assert (clock.now(), clock.monotonic()) == (start, 0.0)
    clock.advance(90.5)
    assert (clock.now(), clock.monotonic()) == (start + timedelta(seconds=90.5), 90.5)


async def test_sleepers_wake_when_their_time_has_come() -> None:
    """Advancing wakes whoever slept until then, and nobody else."""
    clock = FakeClock()
    tasks = await _sleeping(clock, 3.0, 1.0, 2.0)
    clock.advance(2.0)
    assert await _awake(tasks) == [False, True, True]
    clock.advance(1.0)
    assert await _awake(tasks) == [True, True, True]


async def test_the_clock_can_be_set() -> None:
    """A moment in the future is reached exactly; the past is refused."""
    clock = FakeClock()
    moment = datetime(2026, 11, 23, 7, 0, 0, 123456, tzinfo=UTC)
    clock.set(moment)
    assert clock.now() == moment
    with pytest.raises(ValueError, match="does not go back"):
        clock.set(datetime(2026, 1, 1, tzinfo=UTC))


async def test_advance_to_the_next_sleeper() -> None:
    """Goes to the earliest sleeper who was not cancelled, if that is near enough."""
    clock = FakeClock()
    cancelled, near, far = await _sleeping(clock, 1.0, 2.0, 60.0)
    cancelled.cancel()
    await asyncio.sleep(0)
    assert clock.advance_to_next(within=10.0)
    assert clock.monotonic() == 2.0
    assert await _awake([near, far]) == [True, False]
    assert not clock.advance_to_next(within=10.0)
    assert clock.monotonic() == 2.0
    far.cancel()
