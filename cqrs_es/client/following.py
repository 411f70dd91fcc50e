"""Reading a log as it grows, whole and in order, also while broker and store fail."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors
from cqrs_es.cloudevents import event_at
from cqrs_es.execution.retry import Retry
from cqrs_es.runtime.topic import check_same_log
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import Broker, EventFeed, TopicEvent
    from cqrs_es.ports.storage import Storage

log = get_logger("cqrs_es.client")

CHUNK: Final = 500
# Seconds without an event after which the log is asked what was missed.
QUIET_SECONDS: Final = 2.0
# How long, and how many events, are held back at a gap that only a relay can close.
HOLD_SECONDS: Final = 60.0
MOST_HELD: Final = 100_000


class Follower:
    """Puts events into `ready`, each offset of a partition once, in order, none left out.

    `epoch` is that of their log. When it changes, `ready` is
    emptied and every partition begins again.
    """

    def __init__(
        self, name: str, source: EventSource, epoch: str | None, reached: Mapping[int, int | None]
    ) -> None:
        self.epoch = epoch
        self.ready: deque[StoredEvent] = deque()
        self._log = log.bind(subscription=name)
        self._source = source
        self._order = Ordering(reached)
        self._left_epochs: set[str] = set()
        self._feed: EventFeed | None = None
        self._arrived: deque[TopicEvent] = deque()
        self._behind: set[int] = set()
        self._reread: set[tuple[int, int]] = set()
        self._held_since: float | None = None
        self._retry = Retry(self._log, "subscription waits")

    async def open(self) -> None:
        """Subscribe to the topic."""
        await self._opened_feed()

    async def close(self) -> None:
        """Unsubscribe."""
        feed, self._feed = self._feed, None
        if feed is not None:
            with contextlib.suppress(errors.BrokerUnavailable):
                await feed.close()

    async def get_more(self) -> None:
        """Take one step towards more events; wait a while when a server is away.

        Safe to cancel. Raises `EventsGone`, `BrokenLog`.
        """
        try:
            await self._step()
            self._retry.over()
        except errors.Unavailable as exc:
            if self._source.closed:
                raise
            await self.close()
            await self._retry.pause(exc)

    async def _step(self) -> None:
        feed = await self._opened_feed()
        if self._behind:
            await self._read_store(next(iter(self._behind)))
            return
        self._arrived.extend(await _received(feed))
        if self._arrived:
            await self._take_arrived()
        else:
            await self._look_around()
        await self._see_to_gaps()

    async def _opened_feed(self) -> EventFeed:
        if self._feed is None:
            self._feed = await self._source.feed(self._order.reached)
            await self._source.check(self.epoch)
            await self._find_behind()
        return self._feed

    # --- From the store ------------------------------------------------------

    async def _find_behind(self) -> None:
        """Note of which partitions the store has more: the topic may never deliver it."""
        if self._source.has_store:
            ends = await self._source.ends()
            await self._check_ends(ends)
            self._behind = {
                partition
                for partition, reached in self._order.reached.items()
                if (ends[partition] or 0) > (reached or 0)
            }

    async def _check_ends(self, ends: Mapping[int, int | None]) -> None:
        """Raise `BrokenLog` where the store ends before what was had of this very epoch."""
        ahead = [
            (partition, reached, ends[partition] or 0)
            for partition, reached in self._order.reached.items()
            if (reached or 0) > (ends[partition] or 0)
        ]
        if ahead and await self._source.log_epoch() == self.epoch:
            partition, reached, end = ahead[0]
            message = (
                f"partition {partition} of the log ends at {end}, but {reached} was read before:"
                " its store was put back to an earlier state; its operators run"
                " `cqrs-es init --new-epoch`"
            )
            raise errors.BrokenLog(message)

    async def _read_store(self, partition: int) -> None:
        after = self._order.reached[partition] or 0
        events = await self._source.read(partition, after, CHUNK)
        self.ready.extend(self._order.offer(events))
        if len(events) < CHUNK:
            self._behind.discard(partition)

    async def _look_around(self) -> None:
        """After a while without events, see whether the log was started again, or has more."""
        epoch = await self._source.log_epoch()
        if epoch is not None and epoch != self.epoch:
            await self._enter(epoch)
        await self._find_behind()

    # --- From the topic ------------------------------------------------------

    async def _take_arrived(self) -> None:
        while self._arrived:
            decoded = _decoded(self._arrived[0])
            if decoded is None:
                self._arrived.popleft()
                continue
            event, epoch = decoded
            if epoch != self.epoch and await self._is_new(epoch):
                await self._enter(epoch)
            elif epoch == self.epoch:
                self.ready.extend(self._order.offer([event]))
                self._arrived.popleft()
            else:
                self._arrived.popleft()

    async def _is_new(self, epoch: str) -> bool:
        """Tell a new epoch of the log from events of an old one that a queue still held."""
        present = await self._source.log_epoch()
        return epoch not in self._left_epochs if present is None else epoch == present

    async def _enter(self, epoch: str) -> None:
        """Begin again with another epoch of the log; what the topic can't repeat is kept."""
        repeats = await self._source.topic_repeats()
        left, self.epoch = self.epoch, epoch
        if left is None:  # nobody could tell until now
            return
        self._log.warning("log started again", epoch=epoch, epoch_left=left)
        self._left_epochs.add(left)
        self._order = Ordering(dict.fromkeys(self._source.partitions, 0))
        self._reread.clear()
        self.ready.clear()
        if repeats:
            self._arrived.clear()
            await self.close()

    # --- Gaps ----------------------------------------------------------------

    async def _see_to_gaps(self) -> None:
        """Have what is missing read from the store, or from the topic again, or wait for it."""
        gaps = self._order.gaps()
        if not gaps:
            self._held_since = None
        elif self._source.has_store:
            self._behind.update(gap.partition for gap in gaps)
        elif await self._source.topic_repeats():
            await self._read_again(gaps)
        else:
            self._hold(gaps[0])

    async def _read_again(self, gaps: Sequence[Gap]) -> None:
        for gap in gaps:
            if (gap.partition, gap.first) in self._reread:
                raise errors.EventsGone(f"{_gone(gap)}, or {_again(gap)}, then subscribe again")
        self._reread.update((gap.partition, gap.first) for gap in gaps)
        self._order.forget_held()
        await self.close()

    def _hold(self, gap: Gap) -> None:
        now = asyncio.get_running_loop().time()
        self._held_since = self._held_since or now
        if now - self._held_since > HOLD_SECONDS or self._order.held > MOST_HELD:
            raise errors.EventsGone(f"{_gone(gap)}, or {_again(gap)} while subscribed")


def _gone(gap: Gap) -> str:
    missing = f"offsets {gap.first} to {gap.last} of partition {gap.partition}"
    return f"the topic no longer holds {missing}; give the client store_url, to read them there"


def _again(gap: Gap) -> str:
    return f"run `cqrs-es republish {gap.partition} --from {gap.first}`"


def _decoded(arrived: TopicEvent) -> tuple[StoredEvent, str] | None:
    """Return an event and its epoch; None for what no relay wrote: a missing one is a gap."""
    place = (arrived.partition, arrived.offset)
    try:
        return event_at(*place, arrived.body)
    except errors.UndecodableRow as exc:
        log.warning("foreign entry on the topic", place=place, error=exc.message)
        return None


async def _received(feed: EventFeed) -> list[TopicEvent]:
    """Wait a while for events; return those there are, or none."""
    try:
        async with asyncio.timeout(QUIET_SECONDS):
            return await feed.receive(CHUNK)
    except TimeoutError:
        return []


# --- Order: each offset once, none left out ------------------------------------


class Gap(msgspec.Struct, frozen=True):
    """Offsets of a partition, first and last included, that later ones arrived before."""

    partition: int
    first: int
    last: int


class Ordering:
    """Passes events on in offset order per partition, and holds back what lies beyond a gap.

    `reached` has the last offset of each partition that was passed on; None
    says to begin with whatever comes first.
    """

    def __init__(self, reached: Mapping[int, int | None]) -> None:
        self._reached = dict(reached)
        self._held: dict[int, dict[int, StoredEvent]] = {partition: {} for partition in reached}

    @property
    def reached(self) -> Mapping[int, int | None]:
        """The last offset of each partition that was passed on."""
        return self._reached

    @property
    def held(self) -> int:
        """How many events are held back."""
        return sum(map(len, self._held.values()))

    def offer(self, events: Iterable[StoredEvent]) -> list[StoredEvent]:
        """Take events as they come; return those whose turn it is."""
        return [ready for event in events for ready in self._offer(event)]

    def _offer(self, event: StoredEvent) -> list[StoredEvent]:
        reached = self._reached[event.partition]
        if reached is None:
            reached = self._reached[event.partition] = event.offset - 1
        if event.offset <= reached:
            return []
        self._held[event.partition][event.offset] = event
        return self._release(event.partition, reached)

    def _release(self, partition: int, reached: int) -> list[StoredEvent]:
        held = self._held[partition]
        released: list[StoredEvent] = []
        while event := held.pop(reached + 1, None):
            released.append(event)
            reached += 1
        self._reached[partition] = reached
        return released

    def gaps(self) -> list[Gap]:
        """Return what is missing before the events held back, by partition."""
        return [
            Gap(partition, (self._reached[partition] or 0) + 1, min(held) - 1)
            for partition, held in self._held.items()
            if held
        ]

    def forget_held(self) -> None:
        """Drop what is held back: it will come again."""
        for held in self._held.values():
            held.clear()


# --- Where events come from ----------------------------------------------------


class EventSource:
    """Reads a service's events; `closed` says that its client was."""

    def __init__(self, broker: Broker, storage: Storage | None, partitions: int) -> None:
        self._broker = broker
        self._storage = storage
        self.partitions = range(partitions)
        self.closed = False

    @property
    def has_store(self) -> bool:
        """Whether every event there is can be read, not only what the topic still holds."""
        return self._storage is not None

    async def log_epoch(self) -> str | None:
        """Return the epoch that the log has now; None when nobody here can tell."""
        if self._storage is not None:
            return (await self._storage.info()).log_epoch
        topology = await self._broker.topology()
        return None if topology is None else topology.log_epoch

    async def ends(self) -> Mapping[int, int | None]:
        """Return the last offset of each partition; None where nobody here can tell."""
        if self._storage is not None:
            heads = await self._storage.events.heads()
            return {partition: heads.get(partition, 0) for partition in self.partitions}
        return {partition: await self._broker.topic_end(partition) for partition in self.partitions}

    async def topic_repeats(self) -> bool:
        """Tell whether a new feed delivers again what the topic holds; a queue would not."""
        return await self._broker.topic_end(0) is not None

    async def check(self, epoch: str | None) -> None:
        """Raise `BrokenLog` where the store is not the log that the topic was published from."""
        if self._storage is None or epoch is None or not await self.topic_repeats():
            return
        for partition in self.partitions:
            with contextlib.suppress(errors.ConfigurationError):  # it is of another epoch
                await check_same_log(self._storage, self._broker, partition, epoch)

    async def feed(self, reached: Mapping[int, int | None]) -> EventFeed:
        """Subscribe to the topic."""
        return await self._broker.subscribe(
            {partition: offset or 0 for partition, offset in reached.items()}
        )

    async def read(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read the store's log; only where there is a store."""
        assert self._storage is not None  # noqa: S101 - see has_store
        return await self._storage.events.read_log(partition, after, limit)
