"""Reading the log as typed events: one aggregate's, one partition's, or all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final

from cqrs_es import errors
from cqrs_es.ports.store import LoadRequest

if TYPE_CHECKING:
    from cqrs_es.messages import Envelope, StoredEvent
    from cqrs_es.ports.store import EventStore
    from cqrs_es.registry import Registry
    from cqrs_es.types import AggregateKey

READ_LIMIT: Final = 500


async def stored_stream(events: EventStore, key: AggregateKey) -> AsyncIterator[StoredEvent]:
    """Read an aggregate's events, page by page."""
    after, more = 0, True
    while more:
        (page,) = await events.load([LoadRequest(key, after)])
        for event in page.events:
            yield event
            after = event.sequence
        more = page.more


async def stored_log(
    events: EventStore, partition: int, after: int, to: int
) -> AsyncIterator[StoredEvent]:
    """Read a partition's events above one offset up to another, all of them.

    Raises `BrokenLog` when the log ends before `to`: a replay that was cut is
    an error, never an ordinary end.
    """
    while after < to:
        found = await events.read_log(partition, after, min(READ_LIMIT, to - after))
        if not found:
            message = f"partition {partition} ends at offset {after}, before {to}: restore the log"
            raise errors.BrokenLog(message)
        for event in found:
            yield event
        after = found[-1].offset


async def replay(registry: Registry, events: EventStore) -> AsyncIterator[Envelope[Any]]:
    """Decode every event that is in the log now, upcast, partition by partition.

    Raises `UndecodableRow` for an event that does not fit its type.
    """
    for partition, head in sorted((await events.heads()).items()):
        async for event in stored_log(events, partition, 0, head):
            for envelope in registry.envelopes(event):
                yield envelope
