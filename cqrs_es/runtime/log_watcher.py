"""One reader of the log's heads for a whole process, so that its relays need not look each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.execution.retry import Retry
from cqrs_es.runtime.nudging import Reliance
from cqrs_es.runtime.waiting import within
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.store import EventStore
    from cqrs_es.runtime.leases import Assignment

log = get_logger("cqrs_es.runtime")

# Seconds between looks, at least and at most, where something else tells of events: nudges
# the relay, the topic a projector, for which only a figure depends on it. In between they are a
# part of how long the log has not moved.
SELDOM_SECONDS: Final = 2.0
SELDOM_MOST_SECONDS: Final = 5.0
NOBODY_WAITS_MOST_SECONDS: Final = 20.0
SELDOM_PART: Final = 0.2
# The same of a relay that hears no nudges; there the store says how long it waits at least.
QUIET_MOST_SECONDS: Final = 0.25
QUIET_PART: Final = 0.05


class LogWatcher:
    """Knows the log's heads, and wakes whoever waits for one to move.

    It looks when it is told of a commit, and else as often as somebody needs it: where nudges
    tell of every commit, or nobody waits, every few seconds; else each time the store allows
    (`EventStore.look_seconds`), less often when nothing has come for seconds.
    """

    def __init__(self, events: EventStore) -> None:
        self._events = events
        self._heads: Mapping[int, int] = {}
        self.reliance = Reliance()
        self._poked = asyncio.Event()
        self._hinted = True
        self._changed = asyncio.Condition()
        self._waiting = 0
        self._one = asyncio.Lock()
        self._looked_at = self._moved_at = 0.0

    def hint(self) -> None:
        """Look at the heads now: something was committed, or may have been."""
        self._hinted = True
        self._poked.set()

    def head(self, partition: int) -> int:
        """Return a partition's head as it was last seen."""
        return self._heads.get(partition, 0)

    def backlog(self, assignment: Assignment) -> int:
        """Return how many events are before a reader's position, 1 where it has none yet."""
        if assignment.position is None:
            return 1
        return max(0, self.head(assignment.lease.partition) - assignment.position)

    async def wait_beyond(self, partition: int, offset: int) -> int:
        """Wait until a partition's head lies beyond an offset; return the head."""
        if not self._waiting and _now() - self._looked_at > self._events.look_seconds:
            self._poked.set()
        self._waiting += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self.head(partition) > offset)
        finally:
            self._waiting -= 1
        return self.head(partition)

    async def run(self) -> None:
        """Watch for ever; meant to be cancelled. Raises `StoreUnusable`.

        Where it runs already, wait until that is cancelled, then go on in its place.
        """
        async with self._one:
            await self._watch()

    async def _watch(self) -> None:
        retry = Retry(log, "heads unreadable", bears=errors.CqrsError)
        while True:
            async with retry:
                hinted, self._hinted = self._hinted, False
                if await self.look() and not hinted:
                    self.reliance.missed()
            await within(self._pause(), self._poked.wait())
            self._poked.clear()

    def _pause(self) -> float:
        quiet, least = _now() - self._moved_at, self._events.look_seconds
        if self._waiting and not self.reliance.justified:
            return max(least, min(quiet * QUIET_PART, QUIET_MOST_SECONDS))
        most = SELDOM_MOST_SECONDS if self._waiting else NOBODY_WAITS_MOST_SECONDS
        return max(least, SELDOM_SECONDS, min(quiet * SELDOM_PART, most))

    async def look(self) -> bool:
        """Read the heads; return whether they have moved."""
        heads = await self._events.heads()
        self._looked_at = _now()
        if heads == self._heads:
            return False
        self._moved_at = self._looked_at
        async with self._changed:
            self._heads = heads
            self._changed.notify_all()
        return True


def _now() -> float:
    return asyncio.get_running_loop().time()
