"""The state that decisions start from: an aggregate's as it was last committed.

It is taken from a cache, or loaded: the snapshot if there is one, and the events
after it, page by page, so that a long stream takes bounded memory.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec

from cqrs_es import errors
from cqrs_es.ports.store import LoadedAggregate, LoadRequest
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from cqrs_es.definitions import AggregateDefinition, AnyAggregate
    from cqrs_es.execution.retry import Outage
    from cqrs_es.ports.store import EventStore, Snapshot, StoredEvent
    from cqrs_es.types import AggregateKey

log = get_logger("cqrs_es.execution")

# What an entry of the cache takes beside the encoded state: objects, key, links.
ENTRY_BYTES: Final = 600


class Baseline(msgspec.Struct, frozen=True):
    """An aggregate's state after event `sequence`: encoded, or itself where JSON can't hold it.

    `snapshot` is the number of its snapshot row, 0 for none; `mend_snapshot`
    says that the row can't be decoded and the next commit must replace it.
    """

    state: bytes | AnyAggregate
    sequence: int
    snapshot: int = 0
    mend_snapshot: bool = False

    def thaw(self, definition: AggregateDefinition) -> Any:
        """Return the state as an object of its own, which the caller may change."""
        if isinstance(self.state, bytes):
            return definition.state.decode(self.state)
        return copy.deepcopy(self.state)


def freeze(definition: AggregateDefinition, state: AnyAggregate) -> bytes | AnyAggregate:
    """Return what a baseline holds of a state, which must not be changed afterwards.

    A state that nothing ever stores need not fit JSON. Raises `NotStorable` for another.
    The bytes are a copy: those of orjson keep the 4 KB that they were written in.
    """
    try:
        return bytes(memoryview(definition.state.encode(state)))
    except errors.NotStorable:
        if definition.source.reads_snapshots:
            raise
        return state


class BaselineCache:
    """The most recently used baselines, as many as fit into `most_bytes`. Written after commits.

    Never trusted: what is decided on a stale one conflicts when it is
    appended, is dropped from here and decided again.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._baselines: OrderedDict[AggregateKey, Baseline] = OrderedDict()
        self._bytes = 0

    def get(self, key: AggregateKey) -> Baseline | None:
        """Return an aggregate's baseline if it is here."""
        baseline = self._baselines.get(key)
        if baseline is not None:
            self._baselines.move_to_end(key)
        return baseline

    def put(self, key: AggregateKey, baseline: Baseline) -> None:
        """Keep a baseline, dropping those used longest ago if there are too many."""
        if key in self._baselines:
            self.drop(key)
        if not isinstance(baseline.state, bytes):  # of unknown size
            return
        self._baselines[key] = baseline
        self._bytes += ENTRY_BYTES + len(baseline.state)
        while self._bytes > self._most_bytes:
            self.drop(next(iter(self._baselines)))

    def drop(self, key: AggregateKey) -> None:
        """Forget an aggregate's baseline."""
        baseline = self._baselines.pop(key, None)
        if baseline is not None and isinstance(baseline.state, bytes):
            self._bytes -= ENTRY_BYTES + len(baseline.state)


# --- Loading -----------------------------------------------------------------


class Replay:
    """An aggregate's state while its events are read, page by page."""

    def __init__(
        self, definition: AggregateDefinition, key: AggregateKey, snapshot: Snapshot | None
    ) -> None:
        """Begin with a snapshot, or with an aggregate that nothing has happened to."""
        self._definition = definition
        self._key = key
        self._state: AnyAggregate = definition.cls()
        self._number = 0
        self._mend = False
        self.sequence = 0
        if snapshot is not None:
            self._begin_with(snapshot)

    def _begin_with(self, snapshot: Snapshot) -> None:
        """Use a snapshot; begin with the first event where it does not fit the class today."""
        self._number = snapshot.number
        try:
            self._state = self._definition.state.decode_exactly(snapshot.payload)
        except ValueError as exc:
            log.warning(
                "snapshot unusable",
                aggregate=str(self._key),
                number=snapshot.number,
                error=str(exc),
            )
            self._mend = True
        else:
            self.sequence = snapshot.last_sequence

    def add(self, events: Iterable[StoredEvent]) -> None:
        """Apply the next events; raise `UnknownEvent` and `UndecodableRow` as decoding does."""
        for event in events:
            if event.sequence != self.sequence + 1:
                message = (
                    f"{event.key}: event {self.sequence + 1} is missing before {event.sequence}"
                )
                raise errors.BrokenLog(message)
            for data in self._definition.decode(event):
                self._state.apply(data)
            self.sequence = event.sequence

    @property
    def baseline(self) -> Baseline:
        """What has been read so far."""
        state = freeze(self._definition, self._state)
        return Baseline(state, self.sequence, self._number, self._mend)


def first_page(definition: AggregateDefinition, key: AggregateKey) -> LoadRequest:
    """Say what to read of an aggregate first."""
    return LoadRequest(key, snapshot=definition.source.reads_snapshots)


async def replayed(
    definition: AggregateDefinition,
    key: AggregateKey,
    first: LoadedAggregate,
    load: Callable[[Sequence[LoadRequest]], Awaitable[Sequence[LoadedAggregate]]],
) -> Baseline:
    """Return an aggregate's baseline, from its first page and those that `load` gives.

    Raises `UnknownEvent` and `UndecodableRow` as decoding does, what `apply` raises, and
    what `load` raises.
    """
    replay = Replay(definition, key, first.snapshot)
    page = first
    if first.snapshot is not None and replay.sequence != first.snapshot.last_sequence:
        (page,) = await load([LoadRequest(key)])  # the snapshot is unusable: all events are needed
    replay.add(page.events)
    while page.more:
        log.info("long stream", aggregate=str(key), read_to=replay.sequence)
        (page,) = await load([LoadRequest(key, after=replay.sequence)])
        replay.add(page.events)
    return replay.baseline


Found: TypeAlias = Baseline | LoadedAggregate | errors.UndecodableRow


class BaselineLoader:
    """Finds baselines in the cache or in the store; each may fail to load by itself."""

    def __init__(self, events: EventStore, cache: BaselineCache, outage: Outage) -> None:
        self._events = events
        self._cache = cache
        self._outage = outage

    async def find(
        self, wanted: Mapping[AggregateKey, AggregateDefinition]
    ) -> dict[AggregateKey, Found]:
        """Return baselines that are cached, and with one query the first page of all others.

        Raises `StoreUnavailable` when patience with the store is spent.
        """
        found: dict[AggregateKey, Found] = {}
        missing: list[LoadRequest] = []
        for key, definition in wanted.items():
            cached = self._cache.get(key)
            if cached is None:
                missing.append(first_page(definition, key))
            else:
                found[key] = cached
        if missing:
            found |= await self._first_pages(missing)
        return found

    async def _first_pages(self, requests: Sequence[LoadRequest]) -> dict[AggregateKey, Found]:
        try:
            pages = await self._load(requests)
        except errors.UndecodableRow as exc:
            if len(requests) == 1:
                return {requests[0].key: exc}
            found: dict[AggregateKey, Found] = {}
            for request in requests:
                found |= await self._first_pages([request])
            return found
        return {request.key: page for request, page in zip(requests, pages, strict=True)}

    async def baseline(
        self, definition: AggregateDefinition, key: AggregateKey, found: Found
    ) -> Baseline:
        """Make the baseline of what was found; raise as `replayed` does."""
        if isinstance(found, Baseline):
            return found
        if isinstance(found, errors.UndecodableRow):
            raise found
        return await replayed(definition, key, found, self._load)

    async def _load(self, requests: Sequence[LoadRequest]) -> Sequence[LoadedAggregate]:
        return await self._outage.wait_out(lambda: self._events.load(requests))
