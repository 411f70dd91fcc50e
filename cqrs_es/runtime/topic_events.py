"""Stored events in the form in which the topic takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqrs_es.cloudevents import to_cloudevent
from cqrs_es.ports.broker import OutgoingEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.messages import StoredEvent


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
