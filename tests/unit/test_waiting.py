"""Waiting for one thing without missing another."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
import structlog
from structlog.testing import capture_logs

from cqrs_es import errors
from cqrs_es.execution.retry import Retry
from cqrs_es.runtime.waiting import cancelled, unless, within
from cqrs_es.testing import FakeClock
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


async def crash() -> int:
    await asyncio.sleep(0)
    message = "it crashed"
    raise ValueError(message)


async def linger(ended: asyncio.Event | None = None) -> int:
    """Take a while to be cancelled."""
    try:
        await asyncio.Event().wait()
    finally:
        for _ in range(5):
            await asyncio.sleep(0)
        if ended is not None:
            ended.set()
    return 42


@pytest.mark.parametrize("turns", range(5))
async def test_within_forgets_no_cancellation(turns: int) -> None:
    """Not even where the work ends just before: who stops a loop waits until it has ended."""
    due = asyncio.Event()

    async def look_for_ever() -> None:
        while True:
            due.clear()
            await within(60, due.wait())

    looking = asyncio.create_task(look_for_ever())
    for _ in range(5):
        await asyncio.sleep(0)
    due.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    looking.cancel()
    done, _ = await asyncio.wait({looking}, timeout=2)
    assert done
    assert looking.cancelled()


async def test_unless_returns_what_the_work_returns() -> None:
    """Also when it is told to stop later."""
    assert await unless(asyncio.Event(), answer()) == 42


async def test_unless_raises_what_the_work_raises() -> None:
    """As if it had been awaited."""
    with pytest.raises(ValueError, match="crashed"):
        await unless(asyncio.Event(), crash())


async def test_unless_stops() -> None:
    """The work is cancelled, and has ended when it returns."""
    stopping, ended = asyncio.Event(), asyncio.Event()
    stopping.set()
    assert await unless(stopping, linger(ended)) is None
    assert ended.is_set()


async def test_within_its_time() -> None:
    """The result in time, else None."""
    assert await within(10.0, answer()) == 42
    assert await within(0.0, asyncio.Event().wait()) is None


async def test_cancelled_waits_for_the_end() -> None:
    """The task has ended, whether by the cancellation or by an error on the way."""
    for work in (linger(), crash()):
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        await cancelled(task)
        assert task.done()


async def test_whoever_waits_for_a_cancelled_task_can_be_cancelled() -> None:
    """Their own cancellation is not taken for the task's."""
    lingering = asyncio.create_task(linger())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(cancelled(lingering))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


# --- Trying again ------------------------------------------------------------


async def _tries(retry: Retry, clock: FakeClock, answers: Iterator[Exception | int]) -> int:
    """Call what gives these answers until it succeeds, with the clock moved on at each wait."""

    async def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    task = asyncio.create_task(retry.wait_out(call))
    async with asyncio.timeout(5):
        while not task.done():
            clock.advance_to_next(within=60)
            await asyncio.sleep(0)
    return task.result()


async def test_what_is_away_is_tried_again_ever_later_until_it_succeeds() -> None:
    """Each failure is logged with what it was; a success ends the series."""
    clock = FakeClock()
    retry = Retry(structlog.get_logger(), "broker away", clock=clock)
    away = errors.BrokerUnavailable("gone")
    with capture_logs() as lines:
        assert await _tries(retry, clock, iter([away] * 5 + [7])) == 7
        assert await _tries(retry, clock, iter([away, 8])) == 8
    assert [line["failures"] for line in lines] == [1, 2, 3, 4, 5, 1]
    assert {(line["event"], line["error"]) for line in lines} == {("broker away", "gone")}
    waits = [line["retry_in"] for line in lines]
    assert waits[4] > waits[2] > waits[0]
    assert (retry.failures, retry.reason) == (0, None)


@pytest.mark.parametrize("error", [errors.StoreLocked(), errors.NotFound("x"), ValueError("x")])
async def test_only_what_a_retry_is_for_is_tried_again(error: Exception) -> None:
    """Other errors, and those it is told never to bear, are raised at once."""
    clock = FakeClock()
    retry = Retry(structlog.get_logger(), "away", never=errors.StoreLocked, clock=clock)
    with pytest.raises(type(error)):
        await _tries(retry, clock, iter([error]))
    assert clock.monotonic() == 0


async def test_a_retry_can_be_cancelled_while_it_waits() -> None:
    """A cancellation is no failure."""
    clock = FakeClock()
    retry = Retry(structlog.get_logger(), "away", clock=clock)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise errors.BrokerUnavailable

    async def waits() -> bool:
        return clock.sleepers == 1

    task = asyncio.create_task(retry.wait_out(fail))
    await eventually(waits)
    await cancelled(task)
    assert task.cancelled()
    assert retry.failures == 1
