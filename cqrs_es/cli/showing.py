"""Events and outcomes on stdout, as several verbs print them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqrs_es import wire
from cqrs_es.cli.output import print_fields, print_json, print_text, shown
from cqrs_es.cloudevents import timestamp, to_cloudevent

if TYPE_CHECKING:
    from collections.abc import Callable

    from cqrs_es.messages import Outcome, StoredEvent
    from cqrs_es.opened import OpenApplication


def print_outcome(found: Outcome, *, as_json: bool) -> None:
    """Print an outcome as it is sent, or its fields below each other."""
    if as_json:
        print_json(wire.encode_outcome(found))
    else:
        print_fields(wire.outcome_fields(found))


async def event_writer(opened: OpenApplication, *, as_json: bool) -> Callable[[StoredEvent], None]:
    """Make what prints an event: as a CloudEvent, or as a line for people."""
    epoch = (await opened.storage.info()).log_epoch
    source = f"/{opened.process.service}"

    def write(event: StoredEvent) -> None:
        if as_json:
            print_json(to_cloudevent(event, source, epoch))
        else:
            print_text(_line(event))

    return write


def _line(event: StoredEvent) -> str:
    position = f"{event.partition}:{event.offset}"
    name = f"{event.event_type} {event.event_version}"
    moment = timestamp(event.recorded_at)
    return f"{position:<8} {moment}  {event.key}/{event.sequence}  {name}  {shown(event.payload)}"
