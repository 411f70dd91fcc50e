"""Hints between processes: that something was committed, told through the broker.

    commit ──▶ Nudger ──▶ broker ──▶ Nudger ──▶ the store is looked at, at once

Nothing depends on a nudge. It says no more than that a look at the store is worth its while:
who hears one reads there what there is, as all do now and then without. So one that is lost
costs time, one too many costs a look, and whoever sends false ones can make others look, but
for nothing else. They are sent after the commit, by a task of their own that no command waits
for, and not more often than a look takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol

from cqrs_es.execution.retry import Retry
from cqrs_es.ports.broker import Nudge
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Generator

    from cqrs_es.ports.broker import Broker
    from cqrs_es.runtime.due import Timetable
    from cqrs_es.runtime.log_watcher import LogWatcher

log = get_logger("cqrs_es.runtime")

# Between two of a kind, sent or heard: those in between are one.
APART_SECONDS: Final = 0.005
# After a failure.
SILENT_SECONDS: Final = 5.0
# What was told at the end of a process has so long to get away.
CLOSING_SECONDS: Final = 1.0
# After something came of which nobody was told, others may come like that.
DOUBT_SECONDS: Final = 60.0


class Reliance:
    """Whether nudges tell of all that is new, so that a look without one can wait."""

    def __init__(self) -> None:
        self._feeds = 0
        self._doubted_until = -math.inf

    @property
    def justified(self) -> bool:
        """Whether nudges are heard, and nothing has come without one lately."""
        return self._feeds > 0 and _now() >= self._doubted_until

    @contextmanager
    def hearing(self) -> Generator[None]:
        """Hear nudges during the block."""
        self._feeds += 1
        try:
            yield
        finally:
            self._feeds -= 1

    def missed(self) -> None:
        """Note that something new was found by a look that no nudge had asked for.

        Its process may have died in between, be of an older version, or have another broker.
        """
        self._doubted_until = _now() + DOUBT_SECONDS


class Looker(Protocol):
    """Who looks at the store now and then, and at once when told."""

    reliance: Reliance

    def hint(self) -> None:
        """Look now: something has changed, or may have."""


class Nudger:
    """Has this process and the others look at the store when something was committed."""

    def __init__(self, broker: Broker | None, watcher: LogWatcher, timetable: Timetable) -> None:
        """Tell other processes by a broker; None where it is not to be reached."""
        self._broker = broker if broker is not None and broker.nudges else None
        self._watcher = watcher
        self._timetable = timetable
        self._untold: set[Nudge] = set()
        self._telling: asyncio.Task[None] | None = None
        self._failing = False

    def committed(self) -> None:
        """Tell that events were committed."""
        self._watcher.hint()
        self.tell(Nudge.EVENTS)

    def scheduled(self, partitions: Collection[int]) -> None:
        """Tell that commands were scheduled in these partitions."""
        if partitions:
            self._timetable.poke(partitions)
            self.tell(Nudge.DUE)

    def tell(self, nudge: Nudge) -> None:
        """Have other processes look, soon."""
        if self._broker is None:
            return
        self._untold.add(nudge)
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell_all(self._broker))

    async def _tell_all(self, broker: Broker) -> None:
        try:
            while self._untold:
                nudge = self._untold.pop()
                try:
                    await broker.nudge(nudge)
                    self._failing = False
                except Exception as exc:  # noqa: BLE001 - whatever it is, nobody depends on it
                    if not self._failing:
                        log.warning("nudges not sent", error=str(exc))
                    self._failing = True
                    await asyncio.sleep(SILENT_SECONDS)
                    self._untold.add(nudge)
                await asyncio.sleep(APART_SECONDS)
        finally:
            self._telling = None  # not by a callback: what comes before that would not be told

    async def close(self) -> None:
        """Tell what is not told yet, if that does not take long; then nothing more."""
        self._broker = None
        if self._telling is not None:
            await asyncio.wait({self._telling}, timeout=0 if self._failing else CLOSING_SECONDS)
        if self._telling is not None:
            await cancelled(self._telling)

    async def hear(self, nudge: Nudge, looker: Looker | None = None) -> None:
        """Look at the store whenever others tell so; for ever, where the broker takes nudges.

        Also when this begins to hear, and when it hears nothing for a while. Whoever looks for
        events and due rows is known.
        """
        if self._broker is None:
            return
        if looker is None:
            looker = self._watcher if nudge is Nudge.EVENTS else self._timetable
        retry = Retry(log, "nudges not heard", bears=Exception)
        while True:
            async with retry:
                feed = await self._broker.open_nudges(nudge)
                if feed is None:
                    return
                retry.over()
                try:
                    with looker.reliance.hearing():
                        while True:
                            looker.hint()
                            await asyncio.sleep(APART_SECONDS)
                            await feed.receive()
                            _end_if_cancelled()
                finally:
                    looker.hint()
                    with contextlib.suppress(Exception):  # it would stand for a cancellation
                        await feed.close()


def _end_if_cancelled() -> None:
    """End a task that waits on where its cancellation was swallowed.

    `asyncio.wait_for` does that before Python 3.12, where what it waits for comes at that moment.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _now() -> float:
    return asyncio.get_running_loop().time()
