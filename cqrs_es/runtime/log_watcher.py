"""One reader of the log's heads for a whole process, so that its relays need not poll each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.execution.retry import Retry
from cqrs_es.runtime.waiting import within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.store import EventStore
    from cqrs_es.runtime.leases import Assignment

log = structlog.get_logger("cqrs_es.runtime")

# Seconds between looks for projectors, whom the topic tells of events sooner.
SELDOM_SECONDS: Final = 2.0
# The longest that a relay waits between looks when the log has not moved for a while, and
# the part of that while which it may wait.
QUIET_SECONDS: Final = 0.25
QUIET_PART: Final = 0.05


class LogWatcher:
    """Knows the log's heads, and wakes whoever waits for one to move.

    It looks as often as somebody needs it: for those who wait, each time the store
    allows (`EventStore.look_seconds`), less often when nothing has come for seconds;
    while nobody waits, every two seconds.
    """

    def __init__(self, events: EventStore) -> None:
        self._events = events
        self._heads: Mapping[int, int] = {}
        self._poked = asyncio.Event()
        self._changed = asyncio.Condition()
        self._waiting = 0
        self._one = asyncio.Lock()
        self._looked_at = self._moved_at = 0.0

    def poke(self) -> None:
        """Look at the heads now: something was committed."""
        self._poked.set()

    def head(self, partition: int) -> int:
        """Return a partition's head as it was last seen."""
        return self._heads.get(partition, 0)

    def backlog(self, assignment: Assignment) -> int:
        """Return how many events are before a reader's position, 1 where it has none yet."""
        if assignment.position is None:
            return 1
        return max(0, self.head(assignment.lease.partition) - assignment.position)

    @property
    def quiet(self) -> bool:
        """Whether the log has not moved for so long that it is looked at less often."""
        return (_now() - self._moved_at) * QUIET_PART >= QUIET_SECONDS

    async def wait_beyond(self, partition: int, offset: int) -> int:
        """Wait until a partition's head lies beyond an offset; return the head."""
        if not self._waiting and _now() - self._looked_at > self._events.look_seconds:
            self.poke()
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
                await self.look()
            # Commits of this process are noticed at once.
            await within(self._pause(), self._poked.wait())
            self._poked.clear()

    def _pause(self) -> float:
        least = self._events.look_seconds
        if not self._waiting:
            return max(least, SELDOM_SECONDS)
        quiet = (_now() - self._moved_at) * QUIET_PART
        return max(least, min(quiet, QUIET_SECONDS))

    async def look(self) -> None:
        """Read the heads."""
        heads = await self._events.heads()
        self._looked_at = _now()
        if heads != self._heads:
            self._moved_at = self._looked_at
            async with self._changed:
                self._heads = heads
                self._changed.notify_all()


def _now() -> float:
    return asyncio.get_running_loop().time()
