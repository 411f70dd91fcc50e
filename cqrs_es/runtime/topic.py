"""The topic beside the log: how events go there, that it can't be ahead, and filling it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.cloudevents import event_at, to_cloudevent
from cqrs_es.ports.broker import OutgoingEvent
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import Broker
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import EventStore
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.relay")

REPUBLISHED_AT_ONCE: Final = 500


def topic_events(events: Iterable[StoredEvent], service: str, epoch: str) -> list[OutgoingEvent]:
    """Encode events of a service's log, which bear the log's epoch."""
    source = f"/{service}"
    return [
        OutgoingEvent(
            event.offset,
            event.key.type,
            event.event_type,
            to_cloudevent(event, source, epoch),
        )
        for event in events
    ]


async def topic_within_log(
    storage: Storage, broker: Broker, partition: int, *, mark: int = 0, seen: int = 0
) -> int | None:
    """Return the last offset of the topic, None where it keeps nothing.

    The store is asked where the head that was last `seen` does not prove it.

    Raises `BrokenLog` when that or `mark` is beyond the log's end: then the store was put
    back to an earlier state, and the next events would be taken for those already published.
    """
    end = await broker.topic_end(partition)
    if max(mark, end or 0) <= seen:
        return end
    head = (await storage.events.heads()).get(partition, 0)
    for what, offset in (("the relay's mark", mark), ("the topic", end or 0)):
        if offset > head:
            message = (
                f"partition {partition} of the log ends at {head}, but {what} is at {offset}:"
                " the store was restored, or somebody else writes there; run"
                " `cqrs-es init --new-epoch`"
            )
            raise errors.BrokenLog(message)
    return end


async def check_same_log(storage: Storage, broker: Broker, partition: int, epoch: str) -> None:
    """Compare the last event that was published with what the log has at its offset.

    Raises `BrokenLog` where that is another one: the store was put back to an earlier state,
    without a new epoch, and has gone on since. Raises `ConfigurationError` for an event of
    another store. Where the broker keeps none there is nothing to compare.
    """
    last = await broker.last_published(partition)
    if last is None:
        return
    try:
        published, its_epoch = event_at(partition, last.offset, last.body)
    except errors.UndecodableRow as exc:
        log.warning("last published event is foreign", partition=partition, error=exc.message)
        return
    if its_epoch != epoch:
        message = (
            f"the last event published of partition {partition} is of epoch {its_epoch}, the log of"
            f" {epoch}: another store publishes by this service's name, or an `init` was cut"
            " short; run `cqrs-es init` to have the topic follow this store"
        )
        raise errors.ConfigurationError(message)
    head = (await storage.events.heads()).get(partition, 0)
    if published.offset > head:
        ends = f"ends at {head}, but offset {published.offset} was published"
        raise errors.BrokenLog(f"partition {partition} of the log {ends}{_PUT_BACK}")
    (stored,) = await storage.events.read_log(partition, published.offset - 1, 1)
    if _identity(stored) != _identity(published):
        differs = (
            f"has {stored.key}/{stored.sequence} of command {stored.command_id} at offset"
            f" {stored.offset}, where {published.key}/{published.sequence} of command"
            f" {published.command_id} was published"
        )
        raise errors.BrokenLog(f"partition {partition} of the log {differs}{_PUT_BACK}")


_PUT_BACK: Final = (
    ": the store was put back to an earlier state; run `cqrs-es init --new-epoch`, which has"
    " the topic and all who read it begin again"
)


def _identity(event: StoredEvent) -> tuple[object, ...]:
    return event.key, event.sequence, event.command_id


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
        found = await events.read_log(partition, after, REPUBLISHED_AT_ONCE)
        return topic_events(found, process.service, epoch)

    return await process.broker.republish(partition, epoch, start, read)


async def _head(events: EventStore, partition: int) -> int:
    heads = await events.heads()
    if partition not in heads:
        message = f"there is no partition {partition}; there are 0 to {len(heads) - 1}"
        raise errors.ConfigurationError(message)
    return heads[partition]
