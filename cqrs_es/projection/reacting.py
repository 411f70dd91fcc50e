"""What a batch of events makes reactors send, and where a reactor begins.

A reactor is a follower of the log as a view is: its checkpoint moves in the
transaction that adds its rows to `outgoing_commands`. Its code has run before that
transaction begins, which therefore waits for no other system. It has no
generations: nothing replays it.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from cqrs_es import errors
from cqrs_es.execution.causes import MOST_COMMANDS, cause_of
from cqrs_es.execution.handling import take_all
from cqrs_es.intents import Send
from cqrs_es.messages import CommandContext
from cqrs_es.projection.folding import Folding, guarded, relevant
from cqrs_es.projection.generations import FIRST
from cqrs_es.projector import physical_name
from cqrs_es.reactor import reactor_role
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.definitions import ReactorDefinition
    from cqrs_es.execution.causes import Causes
    from cqrs_es.messages import Envelope, StoredEvent
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.ports.views import ViewStore, ViewTransaction
    from cqrs_es.registry import Registry


class ReactorFolding(Folding):
    """Turns events into rows of `outgoing_commands`."""

    def __init__(self, definition: ReactorDefinition, causes: Causes, seconds: float) -> None:
        """Give asynchronous code so many seconds for one event."""
        super().__init__(reactor_role(definition.name), definition.event_classes, FIRST)
        self._definition = definition
        self._causes = causes
        self._seconds = seconds
        # What events that are not committed yet have caused, by offset.
        self._caused: dict[int, list[ScheduledCommand]] = {}
        self.scheduled: set[int] = set()
        """The partitions that rows were added to, until somebody clears it."""

    @property
    def tables(self) -> dict[str, str | None]:
        """None."""
        return {}

    async def prepare(
        self, registry: Registry, views: ViewStore, events: Sequence[StoredEvent]
    ) -> None:
        """React to events, but for those of parked aggregates, and to none of them again."""
        first = events[0].offset
        self._caused = {at: rows for at, rows in self._caused.items() if at >= first}
        new = [
            (event.offset, envelopes)
            for event in events
            if event.offset not in self._caused and (envelopes := relevant(registry, self, event))
        ]
        if not new:
            return
        parked = {marker.key for marker in await views.list_parked(self.key)}
        for offset, envelopes in new:
            if _key(envelopes[0]) not in parked:
                self._caused[offset] = await guarded(self.name, self._caused_by(envelopes))

    async def fold(self, events: Sequence[Envelope[Any]], transaction: ViewTransaction) -> None:
        """Add the rows that events have caused."""
        rows: list[ScheduledCommand] = []
        for offset, group in groupby(events, key=lambda event: event.offset):
            caused = self._caused.get(offset)
            rows += await self._caused_by(list(group)) if caused is None else caused
        if rows:
            await transaction.schedule(rows)
            self.scheduled.update(row.partition for row in rows)

    # --- One event -----------------------------------------------------------

    async def _caused_by(self, envelopes: Sequence[Envelope[Any]]) -> list[ScheduledCommand]:
        """React to what one stored event means."""
        react = self._react if self._definition.process is None else self._route
        rows = [row for event in envelopes for row in await react(event)]
        if len(rows) > MOST_COMMANDS:
            message = (
                f"{self.name} sends {len(rows)} commands for one event; at most {MOST_COMMANDS}"
                " are allowed: have it send one that goes on by itself"
            )
            raise errors.DefinitionError(message)
        return rows

    async def _react(self, event: Envelope[Any]) -> list[ScheduledCommand]:
        reactor = self._definition.reactor
        assert reactor is not None  # noqa: S101 - see `ReactorDefinition`
        cause = cause_of(event)
        services = self._definition.services(
            CommandContext(
                command_id=cause.id,
                aggregate_type=event.aggregate_type,
                aggregate_id=event.aggregate_id,
                metadata=event.metadata,
                received_at=event.recorded_at,
            )
        )
        yielded: list[object] = []
        await take_all(reactor.react(event, services), yielded.append, self._seconds)
        return [self._causes.sent(self._checked(each), cause) for each in yielded]

    def _checked(self, yielded: object) -> Send:
        if isinstance(yielded, Send):
            return yielded
        message = f"{self.name} yields {yielded!r}: a reactor only sends, yield send(…)"
        raise errors.DefinitionError(message)

    async def _route(self, event: Envelope[Any]) -> list[ScheduledCommand]:
        """Give an event to the instance that has caused it, else to that which the class names."""
        process = self._definition.process
        assert process is not None  # noqa: S101 - `_caused_by` asks
        instance = self._causes.instance(process, event)
        return [] if instance is None else [self._causes.event(instance, event)]


def _key(event: Envelope[Any]) -> AggregateKey:
    return AggregateKey(event.aggregate_type, event.aggregate_id)


async def make_sure_of_beginning(storage: Storage, definition: ReactorDefinition) -> None:
    """Note where a reactor begins that was never there before: where the log ends now."""
    name = reactor_role(definition.name)
    if name in await storage.views.generations():
        return
    heads: Mapping[int, int] = {}
    if definition.since == "now":
        heads = await storage.events.heads()
    async with storage.views.transaction() as transaction:
        if name in await transaction.generations():
            return
        key = physical_name(name, FIRST)
        for partition, head in heads.items():
            if head:
                await transaction.advance(key, partition, 0, head)
        await transaction.set_generation(name, FIRST)
