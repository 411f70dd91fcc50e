"""What is stored, and what of it this code could not read; nothing is written.

For the proof before a deployment: `cqrs-es check --stored`. The log is read once, from end to
end, and of each kind of event some are tried; so are some snapshots, rows of views, and all
commands that wait.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import orjson

from cqrs_es import errors, wire
from cqrs_es.definitions import ViewDefinition
from cqrs_es.execution.baselines import first_page, replayed
from cqrs_es.execution.causes import ELAPSED
from cqrs_es.projection.generations import generations_of, taken_over
from cqrs_es.projector import physical_name
from cqrs_es.types import AggregateKey, text_of

if TYPE_CHECKING:
    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.messages import CommandMessage, StoredEvent
    from cqrs_es.ports.broker import Broker
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import EventStore
    from cqrs_es.registry import Registry

PAGE: Final = 1000
SAMPLE: Final = 100
# What of a timer's payload is not stored but told when it fires.
_MOMENTS: Final = {"due": "2000-01-01T00:00:00+00:00", "now": "2000-01-01T00:00:00+00:00"}
# Letters of commands that no code knew when they failed.
_NEVER_KNOWN: Final = ("unknown_command:", "unknown_aggregate_type:")


# --- The kinds of events, for whoever compares them with something ------------------


class Kind(NamedTuple):
    """What an event is called in the log."""

    aggregate_type: str
    event_type: str
    version: str


class Kept(msgspec.Struct):
    """How many events there are of a kind, and some of them: each is as likely as another."""

    count: int = 0
    samples: list[StoredEvent] = msgspec.field(default_factory=list["StoredEvent"])

    def add(self, event: StoredEvent, sample: int) -> None:
        """Count an event; keep it, perhaps in place of another [Waterman's algorithm R]."""
        self.count += 1
        if sample == 0 or len(self.samples) < sample:
            self.samples.append(event)
        elif (place := random.randrange(self.count)) < sample:  # noqa: S311 - no secret
            self.samples[place] = event


async def kinds_of_events(
    events: EventStore, partitions: int, sample: int = SAMPLE
) -> dict[Kind, Kept]:
    """Read the whole log; return what kinds of events it has, with `sample` of each, 0 for all."""
    kinds: dict[Kind, Kept] = {}
    for partition in range(partitions):
        async for event in _log(events, partition):
            kind = Kind(event.key.type, event.event_type, event.event_version)
            kinds.setdefault(kind, Kept()).add(event, sample)
    return kinds


async def _log(events: EventStore, partition: int) -> AsyncIterator[StoredEvent]:
    after = 0
    while page := await events.read_log(partition, after, PAGE):
        for event in page:
            yield event
        after = page[-1].offset


# --- What can't be read ---------------------------------------------------------


class Unreadable(msgspec.Struct, frozen=True):
    """Something that is stored and that this code could not read: how many, and why the first.

    What is not `lost` costs time only: a snapshot is made anew from the events.
    """

    what: str
    count: int
    reason: str
    lost: bool = True


class _Found(msgspec.Struct):
    """Gathers what can't be read, the first reason for each thing."""

    reasons: dict[str, str] = msgspec.field(default_factory=dict[str, str])
    counts: dict[str, int] = msgspec.field(default_factory=dict[str, int])

    def note(self, what: str, reason: str) -> None:
        self.reasons.setdefault(what, reason)
        self.counts[what] = self.counts.get(what, 0) + 1


class Examination:
    """Tries to read what a store and a broker hold with an application's code.

    `sample` events of each kind and rows of each view are tried, all for 0; and the aggregates that
    those events are of.
    """

    def __init__(self, registry: Registry, storage: Storage, sample: int = SAMPLE) -> None:
        self._registry = registry
        self._storage = storage
        self._sample = sample
        self._found = _Found()
        self.looked_at: dict[str, int] = {}

    async def run(self, broker: Broker | None = None) -> list[Unreadable]:
        """Look at everything; without a broker not at the queue."""
        info = await self._storage.info()
        kinds = await kinds_of_events(self._storage.events, info.partitions, self._sample)
        self.looked_at["events"] = sum(kept.count for kept in kinds.values())
        for kind, kept in kinds.items():
            self._events(kind, kept)
        await self._aggregates(kinds)
        await self._views()
        await self._scheduled()
        await self._dead_letters()
        if broker is not None:
            await self._queued(broker, info.partitions)
        counts = self._found.counts
        return [
            Unreadable(what, counts[what], reason, lost=not what.startswith("snapshot"))
            for what, reason in self._found.reasons.items()
        ]

    # --- Events and aggregates -----------------------------------------------

    def _events(self, kind: Kind, kept: Kept) -> None:
        what = _name(kind)
        definition = self._registry.aggregates.get(kind.aggregate_type)
        if definition is None:
            self._found.note(what, f"there is no aggregate type {kind.aggregate_type!r} here")
            return
        for event in kept.samples:
            try:
                definition.decode(event)
            except errors.UndecodableRow as exc:
                self._found.note(what, exc.message)

    async def _aggregates(self, kinds: dict[Kind, Kept]) -> None:
        """Load some aggregates as a worker would: from a snapshot, and through `apply`."""
        told = {k.aggregate_type for k in kinds if _name(k) in self._found.reasons}
        keys: dict[AggregateKey, None] = {}
        for kept in kinds.values():
            keys |= dict.fromkeys(event.key for event in kept.samples)
        self.looked_at["aggregates"] = len(keys)
        for key in keys:
            definition = self._registry.aggregates.get(key.type)
            if definition is not None:
                await self._load(definition, key, told=key.type in told)

    async def _load(
        self, definition: AggregateDefinition, key: AggregateKey, *, told: bool
    ) -> None:
        events = self._storage.events
        request = first_page(definition, key)
        (first,) = await events.load([request])
        if first.snapshot is not None:
            try:
                definition.state.decode_exactly(first.snapshot.payload)
            except ValueError as exc:
                self._found.note(f"snapshot of {key.type}", f"{key}: {exc}; it is made anew")
        try:
            await replayed(definition, key, first, events.load)
        except errors.UndecodableRow as exc:
            if not told:
                self._found.note(f"aggregate {key.type}", exc.message)
        except errors.Unavailable:
            raise
        except Exception as exc:  # noqa: BLE001 - an apply can raise anything
            self._found.note(f"aggregate {key.type}", f"{key}: apply raised {text_of(exc)}")

    # --- Rows of views -------------------------------------------------------

    async def _views(self) -> None:
        """Look at what this code reads; where there is nothing of its own, it is filled anew."""
        views = self._storage.views
        numbers = await views.generations()
        for name, definition in self._registry.projections.items():
            if isinstance(definition, ViewDefinition) and name in numbers:
                number = await taken_over(views, definition, generations_of(numbers, name))
                if number is not None:
                    await self._view(definition, physical_name(name, number))

    async def _view(self, definition: ViewDefinition, table: str) -> None:
        limit = PAGE if self._sample == 0 else self._sample
        after, read = "", 0
        while rows := await self._storage.views.page(table, after=after, limit=limit):
            for row in rows:
                try:
                    definition.state.decode(row.payload)
                except ValueError as exc:
                    reason = f"row {row.view_id!r}: {exc}; `cqrs-es rebuild {definition.name}`"
                    self._found.note(f"view {definition.name}", reason)
            after, read = rows[-1].view_id, read + len(rows)
            if self._sample:
                break
        self.looked_at[f"rows of {definition.name}"] = read

    # --- Commands ------------------------------------------------------------

    async def _scheduled(self) -> None:
        after, count = None, 0
        while page := await self._storage.events.list_scheduled(after, PAGE):
            for row in page:
                if row.partition >= 0:  # below it are those for other services
                    self._command("scheduled command", row.body)
            after, count = (page[-1].moment, page[-1].command_id), count + len(page)
        self.looked_at["scheduled commands"] = count

    async def _dead_letters(self) -> None:
        after, count = "", 0
        while page := await self._storage.dead_letters.page(after=after):
            for letter in page:
                whole = letter.body_length == len(letter.body)
                if whole and not letter.reason.startswith(_NEVER_KNOWN):
                    self._command("dead letter", letter.body, malformed=False)
            after, count = page[-1].id, count + len(page)
        self.looked_at["dead letters"] = count

    async def _queued(self, broker: Broker, partitions: int) -> None:
        count = 0
        for partition in range(partitions):
            bodies = await broker.peek(partition, self._sample)
            if bodies is None:
                return
            count += len(bodies)
            for body in bodies:
                self._command("queued command", body)
        self.looked_at["queued commands"] = count

    def _command(self, where: str, body: bytes, *, malformed: bool = True) -> None:
        """Try to read a command message; one that nobody could read is left to the workers."""
        try:
            message = _message_of(body)
        except errors.InvalidMessage as exc:
            if malformed:
                self._found.note(f"{where}, malformed", exc.message)
            return
        reason = self._unreadable(message)
        if reason is not None:
            version = "" if message.type.startswith("$") else f" {message.version}"
            what = f"{where} {message.type}{version} for {message.aggregate_type}"
            self._found.note(what, f"{message.id}: {reason}")

    def _unreadable(self, message: CommandMessage) -> str | None:
        definition = self._registry.aggregates.get(message.aggregate_type)
        if definition is None:
            return "there is no such aggregate type here"
        if not definition.takes(message.type):
            return "the aggregate has no such command"
        payload = message.payload
        if message.type == ELAPSED:
            payload = {**payload, **_MOMENTS}
        try:
            definition.read(message.type, payload, message.version)
        except errors.CqrsError as exc:
            return exc.message
        return None


def _name(kind: Kind) -> str:
    return f"event {kind.event_type} {kind.version} of {kind.aggregate_type}"


def _message_of(body: bytes) -> CommandMessage:
    """Read a message as a worker does, or that in a schedule envelope."""
    parsed: object = None
    if b'"schedule"' in body:
        try:
            parsed = orjson.loads(body)
        except ValueError:
            parsed = None
    if isinstance(parsed, dict) and "type" not in parsed and "schedule" in parsed:
        body = orjson.dumps(parsed["schedule"])
    return wire.parse_command(body, len(body), trusted=True)
