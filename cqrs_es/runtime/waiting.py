"""Waiting for one thing without missing another."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def unless(stopping: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """Await work that is safe to cancel; return None, with it cancelled, once `stopping` is set.

    What the work raises is raised.
    """
    stop = asyncio.create_task(stopping.wait())
    task = asyncio.create_task(work)
    try:
        await asyncio.wait({stop, task}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        stop.cancel()
        await cancelled(task)


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T | None:
    """Await work that is safe to cancel; return None, with it cancelled, after `seconds`."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return None


async def cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended, whatever it ends with.

    A cancellation of the caller gets through: awaiting the task itself, one
    could not tell it from the task's own.
    """
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # noted, or the event loop complains
