"""Publishing again on Redis: what a stream has lost is in it afterwards, for every reader."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from tests.contract.brokers import (
    EPOCH,
    NEW_EPOCH,
    PARTITIONS,
    RETENTION,
    AnyRedisServer,
    events,
    follow,
    offsets,
    serving,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.ports.broker import Broker, OutgoingEvent, ReadLog

STREAM = "bank:events:0"
CHUNK = 10


@pytest.fixture(params=["fakeredis", "redis"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[AnyRedisServer]:
    async with serving(request.param, request) as server:
        assert isinstance(server, AnyRedisServer)
        yield server


@pytest.fixture
async def broker(server: AnyRedisServer) -> Broker:
    """Connect, with offsets 1 to 50 of partition 0 published."""
    broker = await server.open()
    await broker.declare(PARTITIONS, EPOCH)
    await broker.publish(0, EPOCH, events(1, 50))
    return broker


def log_up_to(head: int) -> ReadLog:
    async def read(after: int) -> list[OutgoingEvent]:
        return events(after + 1, min(after + CHUNK, head))

    return read


async def held(server: AnyRedisServer) -> list[int]:
    """Return the offsets in the stream, having checked that each has its own event."""
    entries = await server.raw.xrange(STREAM)
    found = [int(entry_id.split(b"-")[0]) for entry_id, _ in entries]
    assert [fields[b"event"] for _, fields in entries] == [f"event {n}".encode() for n in found]
    return found


async def keys(server: AnyRedisServer) -> list[bytes]:
    return [key async for key in server.raw.scan_iter(match="bank:events:*")]


async def test_a_beginning_that_was_trimmed(server: AnyRedisServer, broker: Broker) -> None:
    """It is back; a feed from the start sees each offset once, in order."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
    assert await broker.republish(0, EPOCH, 1, log_up_to(50)) == 50
    feed = await broker.subscribe({0: 0})
    assert offsets(await follow(feed, 50)) == list(range(1, 51))
    assert await keys(server) == [STREAM.encode()]
    assert await server.raw.ttl(STREAM) == -1


async def test_a_hole_in_the_middle(server: AnyRedisServer, broker: Broker) -> None:
    """It is filled, and what lies before it stays."""
    await server.raw.xdel(STREAM, "20-0", "21-0", "30-0")
    assert await broker.republish(0, EPOCH, 20, log_up_to(50)) == 50
    assert await held(server) == list(range(1, 51))


async def test_only_what_is_asked_for(server: AnyRedisServer, broker: Broker) -> None:
    """What was trimmed below the given offset does not come back."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
    await broker.republish(0, EPOCH, 40, log_up_to(50))
    assert await held(server) == list(range(40, 51))


async def test_a_stream_trimmed_to_nothing(server: AnyRedisServer, broker: Broker) -> None:
    """It begins again where it is told to, and the relay goes on behind it."""
    await server.raw.xtrim(STREAM, maxlen=0, approximate=False)
    await broker.republish(0, EPOCH, 48, log_up_to(50))
    assert await broker.publish(0, EPOCH, events(51, 52)) == 52
    assert await held(server) == [48, 49, 50, 51, 52]


@pytest.mark.parametrize("start", [1, 20])
async def test_an_end_that_was_lost(server: AnyRedisServer, broker: Broker, start: int) -> None:
    """All that is missing is published, also what lies before the given offset."""
    await server.raw.delete(STREAM)
    await broker.publish(0, EPOCH, events(1, 10))
    assert await broker.republish(0, EPOCH, start, log_up_to(50)) == 50
    assert await held(server) == list(range(1, 51))


async def test_what_a_relay_publishes_meanwhile(server: AnyRedisServer, broker: Broker) -> None:
    """It is not lost, whether it came before the log's end was read or after."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)

    async def read(after: int) -> list[OutgoingEvent]:
        found = events(after + 1, min(after + CHUNK, 55))
        if after == 20:  # the relay is ahead of the reader
            await broker.publish(0, EPOCH, events(51, 53))
        if not found:  # and again, once the reader has seen the log's end
            await broker.publish(0, EPOCH, events(54, 60))
        return found

    assert await broker.republish(0, EPOCH, 1, read) == 60
    assert await held(server) == list(range(1, 61))


async def test_a_relay_that_is_far_ahead(server: AnyRedisServer, broker: Broker) -> None:
    """What the stream has trimmed away again meanwhile is read from the log after all."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
    head = 50

    async def read(after: int) -> list[OutgoingEvent]:
        nonlocal head
        if after == head == 50:
            head = 70
            await broker.publish(0, EPOCH, events(51, head))
            await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
            return []
        return events(after + 1, min(after + CHUNK, head))

    assert await broker.republish(0, EPOCH, 1, read) == 70
    assert await held(server) == list(range(1, 71))


async def test_a_subscriber_that_waits_meanwhile(server: AnyRedisServer, broker: Broker) -> None:
    """It is not disturbed, and gets what comes next."""
    feed = await broker.subscribe({0: 50})
    waiting = asyncio.create_task(follow(feed, 2))
    await asyncio.sleep(0)
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
    await broker.republish(0, EPOCH, 1, log_up_to(50))
    await broker.publish(0, EPOCH, events(51, 52))
    assert offsets(await waiting) == [51, 52]


async def read_as(server: AnyRedisServer, group: str, count: int) -> list[int]:
    found = await server.raw.xreadgroup(group, "me", {STREAM: ">"}, count=count)
    return [int(entry_id.split(b"-")[0]) for _, entries in found for entry_id, _ in entries]


async def test_consumer_groups_are_taken_over(server: AnyRedisServer, broker: Broker) -> None:
    """Each gets again what was asked for, and what it had not acknowledged; nothing is left out."""
    for group in ("behind", "ahead", "pending"):
        await server.raw.xgroup_create(STREAM, group, "0")
    await read_as(server, "behind", 5)
    await server.raw.xack(STREAM, "behind", *(f"{n}-0" for n in range(1, 6)))
    await read_as(server, "ahead", 50)
    await server.raw.xack(STREAM, "ahead", *(f"{n}-0" for n in range(1, 51)))
    await read_as(server, "pending", 50)
    await server.raw.xack(STREAM, "pending", *(f"{n}-0" for n in range(1, 30)))
    await broker.republish(0, EPOCH, 40, log_up_to(50))
    assert await read_as(server, "behind", 100) == list(range(6, 51))
    assert await read_as(server, "ahead", 100) == list(range(40, 51))
    assert await read_as(server, "pending", 100) == list(range(30, 51))


async def test_two_at_once(server: AnyRedisServer, broker: Broker) -> None:
    """What the one put back the other does not take away again."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)

    async def read(after: int) -> list[OutgoingEvent]:
        if after == 29:
            await broker.republish(0, EPOCH, 10, log_up_to(50))
        return events(after + 1, min(after + CHUNK, 50))

    with pytest.raises(errors.Conflict):
        await broker.republish(0, EPOCH, 30, read)
    assert await held(server) == list(range(10, 51))
    assert await keys(server) == [STREAM.encode()]


async def test_another_epoch(server: AnyRedisServer, broker: Broker) -> None:
    """Nothing of another life of the log gets into the topic, and nothing is left behind."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
    with pytest.raises(errors.LeaseLost):
        await broker.republish(0, NEW_EPOCH, 1, log_up_to(50))
    assert await held(server) == list(range(46, 51))
    assert await keys(server) == [STREAM.encode()]


async def test_more_than_the_topic_keeps(server: AnyRedisServer, broker: Broker) -> None:
    """It is refused: the relay's next event would trim it away again."""
    await broker.publish(0, EPOCH, events(51, RETENTION + 20))
    with pytest.raises(errors.ConfigurationError, match="CQRS_ES_EVENT_RETENTION"):
        await broker.republish(0, EPOCH, 1, log_up_to(RETENTION + 20))
    assert await keys(server) == [STREAM.encode()]


async def test_a_log_that_ends_before_the_topic(server: AnyRedisServer, broker: Broker) -> None:
    """Somebody restored the store without saying so: nothing is taken away."""
    await server.raw.xtrim(STREAM, maxlen=5, approximate=False)
    with pytest.raises(errors.BrokenLog, match="new-epoch"):
        await broker.republish(0, EPOCH, 1, log_up_to(30))
    assert await held(server) == list(range(46, 51))
