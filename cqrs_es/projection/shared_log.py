"""Reading the log once for all who follow it side by side in one process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

if TYPE_CHECKING:
    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.store import EventStore

KEPT_SECONDS: Final = 1.0
MOST_KEPT_BYTES: Final = 1_048_576
"""Of payloads, for each partition; what is more is shared only with who waits for it already."""

_Place: TypeAlias = tuple[int, int]


class _Reading(msgspec.Struct, eq=False):
    """A read of the store, and how many wait for it."""

    place: _Place
    running: asyncio.Task[list[StoredEvent]]
    waiting: int = 0


class SharedLog:
    """Reads partitions for views and reactors that are about as far as each other.

    Who asks for what another is being given, or was a moment ago, gets the same events: they
    never change. Only where they are as many as were asked for: of fewer nobody knows whether
    the log still ends there, so everybody reads its end for himself.
    """

    def __init__(self, events: EventStore) -> None:
        self._events = events
        self._latest: dict[int, _Reading] = {}

    async def read_log(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read as `EventStore.read_log` does; the list is not the caller's alone."""
        latest = self._latest.get(partition)
        if latest is not None and latest.place == (after, limit):
            found = await self._wait(partition, latest)
            if len(found) == limit:
                return found
        read = self._events.read_log(partition, after, limit)
        reading = self._latest[partition] = _Reading((after, limit), asyncio.create_task(read))
        reading.running.add_done_callback(lambda _: self._keep(partition, reading))
        return await self._wait(partition, reading)

    async def _wait(self, partition: int, reading: _Reading) -> list[StoredEvent]:
        """Wait for a reading; the last one who gives up ends it."""
        reading.waiting += 1
        try:
            return await asyncio.shield(reading.running)
        finally:
            reading.waiting -= 1
            if not reading.waiting and not reading.running.done():
                self._forget(partition, reading)
                reading.running.cancel()

    def _keep(self, partition: int, reading: _Reading) -> None:
        """Have a reading that has ended be forgotten: soon, or at once if it is of no use."""
        seconds = KEPT_SECONDS if _is_worth_keeping(reading) else 0.0
        asyncio.get_running_loop().call_later(seconds, self._forget, partition, reading)

    def _forget(self, partition: int, reading: _Reading) -> None:
        if self._latest.get(partition) is reading:
            del self._latest[partition]


def _is_worth_keeping(reading: _Reading) -> bool:
    running, (_, limit) = reading.running, reading.place
    if running.cancelled() or running.exception() is not None:
        return False
    events = running.result()
    return len(events) == limit and sum(len(it.payload) for it in events) <= MOST_KEPT_BYTES
