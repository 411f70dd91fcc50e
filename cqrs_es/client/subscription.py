"""Following a service's events from where one was: at least once, in order per partition."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, Self, TypeAlias, TypeVar

import msgspec
import orjson

from cqrs_es import errors, registry
from cqrs_es.client.following import Follower
from cqrs_es.definitions import define_event, undecodable, unknown_event
from cqrs_es.messages import Envelope, StoredEvent
from cqrs_es.types import Version
from cqrs_es.upcasting import RawEvent, UpcasterChain

if TYPE_CHECKING:
    from cqrs_es.client.following import EventSource
    from cqrs_es.definitions import EventDefinition
    from cqrs_es.types import JsonObject
    from cqrs_es.upcasting import Upcaster

D = TypeVar("D")
Types: TypeAlias = "Collection[str] | Collection[type[Any]] | None"
Event: TypeAlias = Envelope[dict[str, Any]]
Begin: TypeAlias = Literal["start", "end"]

# The longest that handled events go unsaved while more are at hand.
SAVE_SECONDS: Final = 1.0
_NO_START: Final = (
    "this broker keeps no events from before a subscription, so it can't begin at the start of the"
    ' log: give the client store_url, or subscribe from_="end"'
)


class Subscription(Generic[D]):
    """A service's events, one after another, as `Client.subscribe` lends it.

    An event counts as handled when the next one is asked for, or the block
    ends without an error. How far that is, is saved to the cursor when nothing
    more is at hand, else every second, and at the end.
    """

    def __init__(self, follower: Follower, progress: Progress, reading: Reading) -> None:
        self._follower = follower
        self._progress = progress
        self._reading = reading
        self._in_hand: StoredEvent | None = None
        # What is left of the event in hand, where an upcaster has split it.
        self._parts: deque[Envelope[D]] = deque()

    @property
    def log_epoch(self) -> str | None:
        """The epoch of the log that events are of; when it changes, all of them come again.

        None before the first event, where neither broker nor store can tell.
        """
        return self._follower.epoch

    @property
    def offsets(self) -> Mapping[int, int]:
        """The last offset handled of each partition, as far as they are known."""
        return dict(self._progress.offsets)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Envelope[D]:
        """Wait for the next event; there is always one more.

        Safe to cancel. Raises `EventsGone` where some can no longer be had,
        `BrokenLog` where the store has lost some; `UnknownEvent` for one that newer code
        wrote than the class that was named, `UndecodableRow` for one that fits no class or
        breaks its upcaster. Such an event comes again until it is read.
        """
        if not self._parts:
            self.finish()
            await self._progress.save_if_due()
            while not self._take_next():
                await self._progress.save()
                await self._follower.get_more()
                self._progress.follow(self._follower.epoch)
        return self._parts.popleft()

    def finish(self) -> None:
        """Count the event in hand as handled, if all of it was asked for."""
        event, self._in_hand = self._in_hand, None
        if event is not None and not self._parts:
            self._progress.note(event)

    def _take_next(self) -> bool:
        """Take the next event that is wanted in hand; return whether there was one."""
        ready = self._follower.ready
        while ready:
            parts = self._reading.read(ready[0])
            event = ready.popleft()
            if parts:
                self._in_hand = event
                self._parts.extend(parts)
                return True
            self._progress.note(event)
        return False

    async def close(self) -> None:
        """Save how far it got, and unsubscribe."""
        try:
            await self._progress.save()
        finally:
            await self._follower.close()


class Reading:
    """What a subscriber wants to see of a stored event, and as what."""

    def __init__(self, types: Types, upcasters: Iterable[Upcaster]) -> None:
        """Raise `DefinitionError` for classes that are no events, or upcasters that end nowhere."""
        given: list[str | type[object]] = [types] if isinstance(types, str) else [*(types or ())]
        found = [define_event(each) for each in given if not isinstance(each, str)]
        self._classes = {definition.spec.name: definition for definition in found}
        self._wanted: frozenset[str] | None = None
        if types is not None:
            names = [each for each in given if isinstance(each, str)]
            self._wanted = frozenset([*self._classes, *names])
        current = {name: definition.version for name, definition in self._classes.items()}
        self._chain = UpcasterChain(upcasters, current)

    def read(self, event: StoredEvent) -> list[Envelope[Any]]:
        """Return what an event means today: itself, its parts, or nothing that is wanted."""
        if not self._chain.applies(event.event_type):
            if not self._wants(event.event_type):
                return []
            data: Any = orjson.loads(event.payload)
            if (known := self._classes.get(event.event_type)) is not None:
                version = Version.parse(event.event_version)
                data = self._data(known, RawEvent(event.event_type, version, data), event)
            return [registry.envelope_of(event, data)]
        try:
            payload: JsonObject = orjson.loads(event.payload)
            raw = RawEvent.of(event.event_type, event.event_version, payload)
            parts = self._chain.upcast(raw)
        except Exception as exc:
            raise undecodable(event, f"upcasting failed: {exc}") from exc
        return [self._envelope(part, event) for part in parts if self._wants(part.type)]

    def _wants(self, event_type: str) -> bool:
        return self._wanted is None or event_type in self._wanted

    def _envelope(self, raw: RawEvent, event: StoredEvent) -> Envelope[Any]:
        known = self._classes.get(raw.type)
        data: object = raw.payload if known is None else self._data(known, raw, event)
        version = str(raw.version) if known is None else known.spec.version
        envelope = registry.envelope_of(event, data)
        return replace(envelope, event_type=raw.type, event_version=version)

    @staticmethod
    def _data(known: EventDefinition, raw: RawEvent, event: StoredEvent) -> object:
        if raw.version > known.version:
            raise unknown_event(event, raw, known)
        try:
            return known.codec.convert(raw.payload)
        except ValueError as exc:
            raise undecodable(event, str(exc)) from exc


class Progress:
    """How far a subscriber has handled the log, and whether its cursor knows."""

    def __init__(
        self, cursor: Cursor | None, epoch: str | None, reached: Mapping[int, int | None]
    ) -> None:
        self.offsets = {
            partition: offset for partition, offset in reached.items() if offset is not None
        }
        self._cursor = cursor
        self._epoch = epoch
        self._saved = True
        self._saved_at = _now()

    def note(self, event: StoredEvent) -> None:
        """Count an event as handled."""
        self.offsets[event.partition] = event.offset
        self._saved = False

    def follow(self, epoch: str | None) -> None:
        """Begin again where the log did."""
        if epoch != self._epoch and self._epoch is not None:
            self.offsets = dict.fromkeys(self.offsets, 0)
            self._saved = False
        self._epoch = epoch

    async def save_if_due(self) -> None:
        """Save, unless that was done a moment ago."""
        if _now() - self._saved_at >= SAVE_SECONDS:
            await self.save()

    async def save(self) -> None:
        """Save what the cursor does not know yet."""
        if self._cursor is None or self._epoch is None or self._saved:
            return
        position = Position(self._epoch, dict(self.offsets))
        self._saved, self._saved_at = True, _now()
        try:
            await self._cursor.save(position)
        except BaseException:
            self._saved = False
            raise


async def subscription_to(
    name: str,
    source: EventSource,
    *,
    begin: Begin,
    cursor: Cursor | None,
    reading: Reading,
) -> Subscription[Any]:
    """Make a subscription that begins where its cursor is; at `begin` if that is new.

    In another epoch of the log than the cursor's it begins with the first event.
    Raises `EventsGone` for a `start` that nobody here can read from.
    """
    epoch = await source.log_epoch()
    position = await cursor.load() if cursor else None
    if position is None:
        if begin == "start" and not source.has_store and not await source.topic_repeats():
            raise errors.EventsGone(_NO_START)
        reached = await _first(source, begin)
    elif epoch in {None, position.log_epoch}:
        epoch = position.log_epoch
        reached = {**await _first(source, begin), **position.offsets}
    else:
        reached = await _first(source, "start")
    follower = Follower(name, source, epoch, reached)
    await follower.open()
    return Subscription(follower, Progress(cursor, epoch, reached), reading)


async def _first(source: EventSource, begin: Begin) -> dict[int, int | None]:
    if begin == "end":
        return dict(await source.ends())
    return dict.fromkeys(source.partitions, 0)


def _now() -> float:
    return asyncio.get_running_loop().time()


# --- Cursors: where subscribers keep how far they have got ---------------------


@dataclass(frozen=True, slots=True)
class Position:
    """How far a subscriber has got: the last offset it handled of each partition of a log."""

    log_epoch: str
    offsets: Mapping[int, int]


class Cursor(Protocol):
    """Where one subscriber keeps its position.

    To handle every event exactly once, write the position in the transaction
    that writes what the event means, from `event.partition`, `event.offset` and
    the subscription's `log_epoch`; let `load` read it, and `save` do nothing.
    """

    async def load(self) -> Position | None:
        """Return the position saved last, None before the first."""
        ...

    async def save(self, position: Position) -> None:
        """Keep a position durably; called after its events were handled."""
        ...


class FileCursor:
    """Keeps a position in a JSON file of its own, replaced as a whole."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._writing = threading.Lock()

    async def load(self) -> Position | None:
        """Read the file; None when there is none."""
        return await asyncio.to_thread(self._read)

    async def save(self, position: Position) -> None:
        """Replace the file and have it reach the disk."""
        content = {"log_epoch": position.log_epoch, "offsets": dict(position.offsets)}
        body = orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SORT_KEYS)
        await asyncio.to_thread(self._replace, body)

    def _read(self) -> Position | None:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Position)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            message = f"the cursor {self._path} can't be read ({exc}); fix it, or delete it"
            raise errors.ConfigurationError(f"{message} to begin anew") from exc

    def _replace(self, body: bytes) -> None:
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            with self._writing:
                _write_through(new, body)
                new.replace(self._path)
                _flush_folder(self._path.parent)
        except OSError as exc:
            message = f"the cursor {self._path} can't be written: {exc}"
            raise errors.ConfigurationError(message) from exc


def _write_through(path: Path, body: bytes) -> None:
    with path.open("wb") as file:
        file.write(body)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Make a renaming durable: it is the folder that it changed."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
