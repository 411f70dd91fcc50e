"""Following a topic that has holes, repeats itself, or starts again."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import pytest

from cqrs_es import errors
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.client import Client, Position, following
from cqrs_es.cloudevents import to_cloudevent
from cqrs_es.ports.broker import EventFeed, OutgoingEvent, TopicEvent
from tests.unit.test_client_parts import event
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from cqrs_es.client import Cursor, Subscription
    from cqrs_es.ports.broker import Topology

EPOCH, NEW_EPOCH = "epoch-1", "epoch-2"


class Queues(MemoryBroker):
    """A topic of queues: it can't tell where it ends, and delivers nothing twice by itself."""

    def __init__(self) -> None:
        super().__init__(event_retention=1000)
        self.queues: list[_Queue] = []

    async def topology(self) -> Topology | None:
        return None

    async def topic_end(self, partition: int) -> int | None:
        del partition
        return None

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        del after
        self.queues.append(_Queue())
        return self.queues[-1]

    def deliver(self, *offsets: int, epoch: str = EPOCH) -> None:
        for offset in offsets:
            body = to_cloudevent(event(offset), "/bank", epoch)
            self.queues[-1].waiting.put_nowait(TopicEvent(0, offset, body))


class _Queue(EventFeed):
    def __init__(self) -> None:
        self.waiting: asyncio.Queue[TopicEvent | None] = asyncio.Queue()

    async def receive(self, limit: int) -> list[TopicEvent]:
        del limit
        found = await self.waiting.get()
        if found is None:
            raise errors.BrokerUnavailable
        return [found]

    async def close(self) -> None:
        pass


class Remembered:
    """A cursor in memory."""

    def __init__(self, position: Position | None = None) -> None:
        self.position = position

    async def load(self) -> Position | None:
        return self.position

    async def save(self, position: Position) -> None:
        self.position = position


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "QUIET_SECONDS", 0.05)


@pytest.fixture
def queues() -> Queues:
    return Queues()


@asynccontextmanager
async def subscribed(
    queues: MemoryBroker, cursor: Cursor | None = None, from_: Literal["start", "end"] = "start"
) -> AsyncGenerator[Subscription[dict[str, Any]]]:
    """Subscribe; to queues, which have no start, as one who has handled nothing so far."""
    if cursor is None and isinstance(queues, Queues):
        cursor = Remembered(Position(EPOCH, {0: 0}))
    async with (
        Client(broker=queues, service="bank", partitions=1) as client,
        client.subscribe("test", cursor=cursor, from_=from_) as events,
    ):
        yield events


async def offsets(events: Subscription[dict[str, Any]], count: int) -> list[int]:
    async with asyncio.timeout(5):
        return [(await anext(events)).offset for _ in range(count)]


# --- Queues ------------------------------------------------------------------


async def test_queues_have_no_start(queues: Queues) -> None:
    """Who asks for it without a store is told at once, not when events turn out to be missing."""
    with pytest.raises(errors.EventsGone, match=r'give the client store_url, or .* from_="end"'):
        async with subscribed(queues, Remembered()):
            pass


async def test_a_gap_is_held_until_it_is_resent(queues: Queues) -> None:
    """What lies beyond a gap waits for the relay to publish again."""
    async with subscribed(queues) as events:
        queues.deliver(1, 2, 5, 6)
        assert await offsets(events, 2) == [1, 2]
        waiting = asyncio.create_task(offsets(events, 4))
        await eventually(lambda: _drained(queues))
        assert not waiting.done()
        queues.deliver(3, 4, 5, 6)
        assert await waiting == [3, 4, 5, 6]


async def test_what_no_relay_wrote_is_passed_by(queues: Queues) -> None:
    """A subscriber does not fail on it, once or again; what it stood in for is still awaited."""
    async with subscribed(queues) as events:
        queues.deliver(1)
        elsewhere = to_cloudevent(event(7), "/bank", EPOCH)
        for offset, body in ((2, b"garbage"), (2, elsewhere), (1_700_000_000_000, b"{}")):
            queues.queues[-1].waiting.put_nowait(TopicEvent(0, offset, body))
        queues.deliver(2, 3)
        assert await offsets(events, 3) == [1, 2, 3]


async def _drained(queues: Queues) -> bool:
    return queues.queues[-1].waiting.empty()


async def test_a_gap_that_nobody_closes(queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while the subscriber is told how to close it."""
    monkeypatch.setattr(following, "HOLD_SECONDS", 0.2)
    async with subscribed(queues) as events:
        queues.deliver(1, 4)
        assert await offsets(events, 1) == [1]
        with pytest.raises(errors.EventsGone, match="`cqrs-es republish 0 --from 2`"):
            await anext(events)


async def test_a_gap_holds_only_so_much(queues: Queues, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded."""
    monkeypatch.setattr(following, "MOST_HELD", 3)
    async with subscribed(queues) as events:
        queues.deliver(2, 3, 4, 5)
        with pytest.raises(errors.EventsGone, match="offsets 1 to 1 of partition 0"):
            await anext(events)


async def test_the_end_of_queues_is_whatever_comes_next(queues: Queues) -> None:
    """Where nobody can tell the end of the log, the first event that arrives is it."""
    cursor = Remembered()
    async with subscribed(queues, cursor, from_="end") as events:
        assert (events.log_epoch, events.offsets) == (None, {})
        queues.deliver(17, 18)
        assert await offsets(events, 2) == [17, 18]
    assert cursor.position == Position(EPOCH, {0: 18})


async def test_queues_that_hold_two_lives_of_a_log(queues: Queues) -> None:
    """The new life begins at once; what comes late of the old one is dropped."""
    cursor = Remembered(Position(EPOCH, {0: 0}))
    async with subscribed(queues, cursor) as events:
        queues.deliver(1, 2, 3)
        assert await offsets(events, 3) == [1, 2, 3]
        queues.deliver(1, epoch=NEW_EPOCH)
        queues.deliver(4)
        queues.deliver(2, epoch=NEW_EPOCH)
        assert await offsets(events, 2) == [1, 2]
        assert events.log_epoch == NEW_EPOCH
    assert cursor.position == Position(NEW_EPOCH, {0: 2})


async def test_a_lost_connection_is_made_again(queues: Queues) -> None:
    """The subscriber waits for the broker and goes on."""
    async with subscribed(queues) as events:
        queues.deliver(1)
        assert await offsets(events, 1) == [1]
        queues.queues[-1].waiting.put_nowait(None)
        waiting = asyncio.create_task(offsets(events, 2))
        await eventually(lambda: _connected_again(queues))
        queues.deliver(1, 2, 3)
        assert await waiting == [2, 3]


async def _connected_again(queues: Queues) -> bool:
    return len(queues.queues) == 2


# --- Streams -----------------------------------------------------------------


async def publish(broker: MemoryBroker, first: int, last: int, epoch: str = EPOCH) -> None:
    outgoing = [
        OutgoingEvent(offset, "account", "Happened", to_cloudevent(event(offset), "/bank", epoch))
        for offset in range(first, last + 1)
    ]
    await broker.publish(0, epoch, outgoing)


async def test_a_cursor_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be saved is saved by the next attempt."""
    broker = MemoryBroker(event_retention=1000)
    await broker.declare(1, EPOCH)
    await publish(broker, 1, 3)
    cursor = Remembered()
    save = cursor.save
    failures = [OSError("disk")]

    async def failing(position: Position) -> None:
        if failures:
            raise failures.pop()
        await save(position)

    monkeypatch.setattr(cursor, "save", failing)
    async with subscribed(broker, cursor) as events:
        assert await offsets(events, 3) == [1, 2, 3]
        with pytest.raises(OSError, match="disk"):
            await anext(events)
    assert cursor.position == Position(EPOCH, {0: 3})


async def test_long_handling_is_saved_on_the_way() -> None:
    """While more events are at hand, those handled are saved once a second."""
    broker = MemoryBroker(event_retention=1000)
    await broker.declare(1, EPOCH)
    await publish(broker, 1, 100)
    cursor = Remembered()
    async with subscribed(broker, cursor) as events:
        assert await offsets(events, 50) == list(range(1, 51))
        assert await cursor.load() is None
        events._progress._saved_at -= 60
        assert await offsets(events, 1) == [51]
        assert await cursor.load() == Position(EPOCH, {0: 50})


async def test_a_log_that_starts_again_in_silence() -> None:
    """A new life of the log is noticed also when nothing beyond the old one happens."""
    broker = MemoryBroker(event_retention=1000)
    await broker.declare(1, EPOCH)
    await publish(broker, 1, 3)
    async with subscribed(broker) as events:
        assert await offsets(events, 3) == [1, 2, 3]
        await broker.declare(1, NEW_EPOCH)
        await publish(broker, 1, 2, NEW_EPOCH)
        assert await offsets(events, 2) == [1, 2]
        assert events.log_epoch == NEW_EPOCH
