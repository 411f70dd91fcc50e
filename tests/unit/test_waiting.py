"""Waiting for one thing without missing another."""

from __future__ import annotations

import asyncio

import pytest

from cqrs_es.runtime.waiting import cancelled, unless, within


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
