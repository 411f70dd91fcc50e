"""One reader of the log's heads for a whole process, so that its relays need not poll each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from cqrs_es import errors
from cqrs_es.execution.retry import backoff
from cqrs_es.runtime.waiting import within

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.store import EventStore
    from cqrs_es.runtime.leases import Assignment

log = structlog.get_logger("cqrs_es.runtime")


class LogWatcher:
    """Knows the log's heads, and wakes whoever waits for one to move."""

    def __init__(self, events: EventStore) -> None:
        self._events = events
        self._heads: Mapping[int, int] = {}
        self._poked = asyncio.Event()
        self._changed = asyncio.Condition()

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

    async def wait_beyond(self, partition: int, offset: int) -> int:
        """Wait until a partition's head lies beyond an offset; return the head."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.head(partition) > offset)
        return self.head(partition)

    async def run(self) -> None:
        """Watch for ever; meant to be cancelled. Raises `StoreUnusable`."""
        failures = 0
        while True:
            try:
                await self._look()
                failures = 0
            except errors.StoreUnusable:
                raise
            except errors.CqrsError as exc:
                failures += 1
                log.warning("heads unreadable", error=exc.message)
                await asyncio.sleep(backoff(failures))
            # Commits of this process are noticed at once.
            await within(self._events.look_seconds, self._poked.wait())
            self._poked.clear()

    async def _look(self) -> None:
        heads = await self._events.heads()
        if heads != self._heads:
            async with self._changed:
                self._heads = heads
                self._changed.notify_all()
