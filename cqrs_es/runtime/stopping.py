"""How a process is stopped: by signals, and by a watchdog when its event loop is blocked (G10).

The first signal stops cleanly, the second cancels, the third exits at once.
The handlers are Python's own, not the event loop's: the third signal works
also while the loop is blocked.

A blocked loop renews no lease and settles nothing; others have taken over by
then, and only a new process helps. What holds Python's global lock all the
while, a C extension say, blocks the watchdog too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any, Final

from cqrs_es.runtime.waiting import cancelled, within
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from types import FrameType

log = get_logger("cqrs_es.runtime")

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
SIGNALLED: Final = 128
BLOCKED: Final = 1
# Looks, and reports of the loop, within the time that the loop may be blocked.
TICKS: Final = 20
LAST_LINE_SECONDS: Final = 5.0


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


# --- The watchdog ------------------------------------------------------------


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
        # Else the line has its time, also on a core that is shared with many.
        last = threading.Timer(max(self._seconds, LAST_LINE_SECONDS), os._exit, [BLOCKED])
        last.daemon = True
        last.start()
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 - there is no other way
        stack = "".join(traceback.format_stack(frame)) if frame else "the thread is gone"
        log.critical("event loop blocked", seconds=self._seconds, stack=stack)
        os._exit(BLOCKED)


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
