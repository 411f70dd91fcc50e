"""Stopping on signals: the first stops cleanly, the second cancels, the third exits at once.

The handlers are Python's own, not the event loop's: the third signal works
also while the loop is blocked.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import structlog

from cqrs_es.runtime.waiting import cancelled, within

if TYPE_CHECKING:
    from types import FrameType

log = structlog.get_logger("cqrs_es.runtime")

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
SIGNALLED: Final = 128


class Stopping:
    """How urgently a process was asked to stop: `asked`, and then `hurried`."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._signals = 0
        self.asked = asyncio.Event()
        self.hurried = asyncio.Event()

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Take note of a signal; called between two instructions of the main thread."""
        self._signals += 1
        if self._signals == 1:
            self._loop.call_soon_threadsafe(self.asked.set)
        elif self._signals == 2:  # noqa: PLR2004 - the second of three
            self._loop.call_soon_threadsafe(self.hurried.set)
        else:
            os._exit(SIGNALLED + number)


@contextmanager
def stop_on_signals() -> Generator[Stopping]:
    """Listen for SIGINT and SIGTERM; only in the main thread, with the event loop running."""
    stopping = Stopping()
    before = {number: signal.signal(number, stopping.on_signal) for number in STOP_SIGNALS}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


async def run_until_stopped(
    work: Coroutine[Any, Any, None], stopping: Stopping, grace_seconds: float
) -> bool:
    """Run work that ends by itself soon after `asked`; return whether it did.

    Once asked it has `grace_seconds`, then it is cancelled; `hurried` cancels at once.
    """
    task = asyncio.create_task(work)
    deadline = asyncio.create_task(_patience_spent(stopping, grace_seconds))
    try:
        await asyncio.wait({task, deadline}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            log.warning("stopped before all in hand was finished", grace_seconds=grace_seconds)
            return False
        task.result()
        return True
    finally:
        await cancelled(deadline)
        await cancelled(task)


async def _patience_spent(stopping: Stopping, grace_seconds: float) -> None:
    await stopping.asked.wait()
    log.info("stopping", grace_seconds=grace_seconds)
    await within(grace_seconds, stopping.hurried.wait())
