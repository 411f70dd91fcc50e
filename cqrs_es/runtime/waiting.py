"""Waiting for one thing without missing another."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from cqrs_es import errors

T = TypeVar("T")


class Home:
    """The process and the event loop where something is open: elsewhere, waits for it never end."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._loop = asyncio.get_running_loop()
        self._process = os.getpid()
        self.left = False

    def check(self) -> None:
        """Raise `ConfigurationError` in another process or event loop, and after the end."""
        if self.left:
            remedy = "is closed; use it within its `async with` block"
        elif self._process != os.getpid():
            remedy = "does not survive a fork; open it in each process, after the fork"
        elif asyncio._get_running_loop() not in {None, self._loop}:  # noqa: SLF001 - raises nothing
            remedy = (
                "is open in another event loop; await it there, or from a thread:"
                " asyncio.run_coroutine_threadsafe(…, loop).result()"
            )
        else:
            return
        raise errors.ConfigurationError(f"{self._what} {remedy}")


class Recent(Generic[T]):
    """What was read a while ago at most: one read serves all who ask meanwhile."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._reading = asyncio.Lock()
        self._last: tuple[T, float] | None = None

    async def get(self, seconds: float) -> T:
        """Return what was read at most so many seconds ago, by a new read if need be."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if self._last is None or now - self._last[1] >= seconds:
                self._last = await self._read(), now
            return self._last[0]


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
    """Await work that is safe to cancel; return None, with it cancelled, after `seconds`.

    Not by `asyncio.wait_for`, which before Python 3.12 forgets that its caller was cancelled
    where the work ends at that moment: whoever waits for the caller to end waits for ever.
    """
    try:
        async with asyncio.timeout(seconds):
            return await work
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
