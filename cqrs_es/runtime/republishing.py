"""Publishing a part of the log again, for subscribers of a broker that lost data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.runtime.topic import topic_events

if TYPE_CHECKING:
    from cqrs_es.ports.broker import OutgoingEvent
    from cqrs_es.ports.store import EventStore
    from cqrs_es.runtime.process import Process

CHUNK: Final = 500


async def republish(process: Process, partition: int, start: int) -> int:
    """Publish from one offset up to the log's end; return that.

    Raises `NotFound` for a start beyond it, `ConfigurationError` for no partition.
    """
    events = process.storage.events
    head = await _head(events, partition)
    if start > head:
        message = f"partition {partition} ends at offset {head}, before {start}"
        raise errors.NotFound(message)
    epoch = (await process.storage.info()).log_epoch

    async def read(after: int) -> list[OutgoingEvent]:
        found = await events.read_log(partition, after, CHUNK)
        return topic_events(found, process.service, epoch)

    return await process.broker.republish(partition, epoch, start, read)


async def _head(events: EventStore, partition: int) -> int:
    heads = await events.heads()
    if partition not in heads:
        message = f"there is no partition {partition}; there are 0 to {len(heads) - 1}"
        raise errors.ConfigurationError(message)
    return heads[partition]
