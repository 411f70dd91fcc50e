"""The brokers under test: each a server that any number of processes can connect to."""

from __future__ import annotations

import os
import uuid
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import fakeredis
from redis.asyncio import Redis

from cqrs_es.brokers import broker_for
from cqrs_es.brokers.amqp import AmqpBroker, driver
from cqrs_es.brokers.amqp.consuming import PREFETCH
from cqrs_es.brokers.amqp.driver import Address
from cqrs_es.brokers.amqp.topology import Names, topology
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.brokers.redis import RedisBroker
from cqrs_es.brokers.redis.connection import RedisConnection
from cqrs_es.ports.broker import OutgoingCommand, OutgoingEvent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    import pytest

    from cqrs_es.brokers.amqp.driver import Channel
    from cqrs_es.ports.broker import Broker, CommandIntake, Delivery, EventFeed, TopicEvent

GIVEN_URL = os.environ.get("CQRS_ES_TEST_BROKER_URL", "")
"""Of a broker that another package has; a `GivenServer` says what it is taken for."""
GIVEN = ["given"] if GIVEN_URL else []

SERVICE = "bank"
PARTITIONS = 4
EPOCH = "5f0c0000-0000-4000-8000-000000000001"
NEW_EPOCH = "5f0c0000-0000-4000-8000-000000000002"
RETENTION = 100


class BrokerServer(ABC):
    """An empty broker server.

    `keeps_events`: the topic is a stream, which can be read from any offset and
    knows its end and its epoch. An exchange keeps nothing: it passes on to
    whoever is bound at the moment, as often as it is told to.

    `tells_pushed`: what an intake did not return from `receive` counts as never
    delivered. A broker that pushes can't tell it from what was handled.

    `settles_late`: what an intake received can be settled after another took
    over. A broker that binds deliveries to a channel has taken them back by then.

    `most_unsettled`: how many commands an intake gets before it settles some.
    """

    keeps_events = True
    tells_pushed = True
    settles_late = True
    most_unsettled = 1_000_000

    def __init__(self) -> None:
        self._opened = AsyncExitStack()

    @abstractmethod
    def connection(self) -> Broker:
        """Make a connection to it, not yet opened."""

    async def open(self) -> Broker:
        """Connect as one more process would."""
        broker = self.connection()
        await broker.open()
        self._opened.push_async_callback(broker.close)
        return broker

    async def close(self) -> None:
        """Close every connection that was opened."""
        await self._opened.aclose()

    def let_die(self, broker: Broker) -> None:
        """End the process that a connection stands for, without a word to anybody.

        There is nothing to do where the server does not know its clients.
        """
        del broker


class MemoryServer(BrokerServer):
    """The broker within the process: there is only ever one connection."""

    def __init__(self) -> None:
        super().__init__()
        self._broker = MemoryBroker(event_retention=RETENTION)

    def connection(self) -> Broker:
        return self._broker


class AnyRedisServer(BrokerServer):
    """A server that speaks Redis; `raw` is a client for looking behind the port."""

    raw: Any

    async def close(self) -> None:
        await super().close()
        await self.raw.aclose()


class FakeRedisServer(AnyRedisServer):
    """fakeredis, in this process."""

    def __init__(self) -> None:
        super().__init__()
        self._server = fakeredis.FakeServer()
        self.raw = self._client()

    def _client(self) -> Redis:
        return fakeredis.FakeAsyncRedis(server=self._server, protocol=2, socket_timeout=None)

    def connection(self) -> Broker:
        connection = RedisConnection(self._client(), self._client(), "fakeredis")
        return RedisBroker(connection, service=SERVICE, event_retention=RETENTION)


class RealRedisServer(AnyRedisServer):
    """A Redis server, reached over TCP."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.raw = Redis.from_url(url, protocol=2)  # pyright: ignore[reportUnknownMemberType]

    def connection(self) -> Broker:
        return broker_for(self.url, service=SERVICE, event_retention=RETENTION)

    @asynccontextmanager
    async def counting(self, what: str) -> AsyncGenerator[Counted]:
        """Count what the server does during the block, by its own statistics."""
        counted, before = Counted(), (await self.raw.info("stats"))[what]
        yield counted
        counted.count = (await self.raw.info("stats"))[what] - before - 1  # this very question


class Counted:
    """How often something was done."""

    count = 0


class GivenServer(BrokerServer):
    """A service of its own on a server that another package connects to; its topic is a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.service = f"test-{uuid.uuid4().hex[:12]}"

    def connection(self) -> Broker:
        return broker_for(GIVEN_URL, service=self.service, event_retention=RETENTION)


class RabbitMqServer(BrokerServer):
    """A service of its own on a RabbitMQ server."""

    keeps_events = False
    tells_pushed = False
    settles_late = False
    most_unsettled = PREFETCH

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.service = f"test-{uuid.uuid4().hex[:12]}"
        self.names = Names(self.service)

    def connection(self) -> Broker:
        return AmqpBroker(Address.of(self.url), service=self.service)

    def let_die(self, broker: Broker) -> None:
        assert isinstance(broker, AmqpBroker)
        for connection in (broker._connections._consuming, broker._connections._publishing):
            if connection._bridge is not None:
                connection._bridge.cut("the process was killed")

    @contextmanager
    def channel(self) -> Generator[Channel]:
        """Lend a channel for doing what other programs do."""
        connection = driver.connect(Address.of(self.url), "test")
        try:
            yield connection.channel()
            connection.close()
        finally:
            connection.collect()

    async def close(self) -> None:
        """Close what was opened, and drop what was declared."""
        await super().close()
        declared = topology(self.names, PARTITIONS)
        with self.channel() as channel:
            for queue in declared.queues:
                channel.queue_delete(queue.name)
            for exchange in declared.exchanges:
                channel.exchange_delete(exchange.name)


@asynccontextmanager
async def serving(kind: str, request: pytest.FixtureRequest) -> AsyncGenerator[BrokerServer]:
    """Give a test an empty server, and drop what it opened when it ends."""
    server = _server(kind, request)
    try:
        yield server
    finally:
        await server.close()


def _server(kind: str, request: pytest.FixtureRequest) -> BrokerServer:
    match kind:
        case "memory":
            return MemoryServer()
        case "fakeredis":
            return FakeRedisServer()
        case "given":
            return GivenServer()
        case "amqp":
            return RabbitMqServer(request.getfixturevalue("amqp_url"))
        case _:
            return RealRedisServer(request.getfixturevalue("redis_url"))


# --- Short ways to say what the suite does -----------------------------------


def command(body: str, partition: int = 0) -> OutgoingCommand:
    """Make a command that is known by its body."""
    return OutgoingCommand(partition, f"id-{body}", body.encode())


async def send(broker: Broker, *bodies: str | int, partition: int = 0) -> None:
    """Send commands known by their bodies."""
    await broker.send([command(str(body), partition) for body in bodies])


def bodies(deliveries: Sequence[Delivery | TopicEvent]) -> list[str]:
    """Say what was received."""
    return [delivery.body.decode() for delivery in deliveries]


async def take(intake: CommandIntake, count: int) -> list[Delivery]:
    """Receive so many commands, in as many calls as it takes."""
    taken: list[Delivery] = []
    while len(taken) < count:
        taken += await intake.receive(count - len(taken))
    return taken


async def work_off(intake: CommandIntake, count: int) -> list[Delivery]:
    """Receive so many commands, and settle them as they come."""
    worked_off: list[Delivery] = []
    while len(worked_off) < count:
        received = await intake.receive(count - len(worked_off))
        await intake.settle(received)
        worked_off += received
    return worked_off


def events(first: int, last: int) -> list[OutgoingEvent]:
    """Make the events with these offsets."""
    return [
        OutgoingEvent(offset, "account", "Happened", f"event {offset}".encode())
        for offset in range(first, last + 1)
    ]


async def follow(feed: EventFeed, count: int, limit: int = 1_000) -> list[TopicEvent]:
    """Receive so many events, in as many calls as it takes."""
    followed: list[TopicEvent] = []
    while len(followed) < count:
        followed += await feed.receive(min(limit, count - len(followed)))
    return followed


def offsets(followed: Sequence[TopicEvent]) -> list[int]:
    """Say which events were received."""
    return [event.offset for event in followed]
