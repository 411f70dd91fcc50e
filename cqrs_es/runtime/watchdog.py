"""A thread that ends the process when its event loop is blocked (G10).

A blocked loop renews no lease and settles nothing; others have taken over by
then, and only a new process helps. What holds Python's global lock all the
while, a C extension say, blocks this thread too.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import structlog

log = structlog.get_logger("cqrs_es.runtime")

EXIT_CODE: Final = 1
# Looks, and reports of the loop, within the time that the loop may be blocked.
TICKS: Final = 20


class Watchdog:
    """Counts the ticks in which the loop has not run.

    Ticks of its own, not seconds: a process that was frozen as a whole, loop
    and thread alike, is not blamed for the time it was frozen.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._tick = seconds / TICKS
        self._loop_thread = threading.get_ident()
        self._ended = threading.Event()
        self._silent_ticks = 0

    async def show_life(self) -> None:
        """Tell the thread that the loop runs, for ever; meant to be cancelled."""
        while True:
            self._silent_ticks = 0
            await asyncio.sleep(self._tick)

    def watch(self) -> None:
        """Look after the loop until `end`; the thread's own work."""
        while not self._ended.wait(self._tick):
            self._silent_ticks += 1
            if self._silent_ticks > TICKS:
                self._bite()

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _bite(self) -> None:
        # What blocks the loop may be stderr itself, which nobody reads: then this blocks too.
        threading.Timer(self._tick, os._exit, [EXIT_CODE]).start()
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - there is no other way
        stack = "".join(traceback.format_stack(frame)) if frame else "the thread is gone"
        log.critical("event loop blocked", seconds=self._seconds, stack=stack)
        os._exit(EXIT_CODE)


@asynccontextmanager
async def watched(seconds: float) -> AsyncGenerator[None]:
    """End the process when its event loop is blocked for longer than `seconds`."""
    watchdog = Watchdog(seconds)
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    showing = asyncio.create_task(watchdog.show_life())
    thread.start()
    try:
        yield
    finally:
        watchdog.end()
        showing.cancel()
