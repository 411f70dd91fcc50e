"""A whole service over RabbitMQ: commands in, replies and events out, dead letters home."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from cqrs_es.types import new_command_id, partition_of
from tests.command_line import cqrs_es
from tests.contract.brokers import RabbitMqServer
from tests.proxy import proxy_to
from tests.samples import Add, Counter, Refuse, Totals, counting_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import Broker
    from tests.proxy import Proxy
    from tests.servers import RabbitServer

PARTITIONS = 4
COUNTERS = [f"C{number}" for number in range(12)]
ADDITIONS = 40
PATIENCE_SECONDS = 60.0


@pytest.fixture
async def server(amqp_url: str) -> AsyncIterator[RabbitMqServer]:
    """Lend a service's name that nobody had before."""
    server = RabbitMqServer(amqp_url)
    yield server
    await server.close()


async def test_a_command_goes_all_the_way(server: RabbitMqServer) -> None:
    """Accepted and rejected, answered by reply, published, projected."""
    async with TestApp(counting_app(), broker=await server.open()) as t:
        assert (await t.send(Counter, "A", Add(5))).accepted
        rejected = await t.send(Counter, "A", Refuse())
        assert rejected.error is not None
        assert rejected.error.code == "refused"
        await t.drain()
        totals = await t.view(Totals, "A")
        assert totals == Totals(total=5, times=1)


async def test_what_the_broker_gives_up_comes_home(server: RabbitMqServer) -> None:
    """A command sent to no partition is among the dead letters, with the reason, and only there."""
    command_id = new_command_id()
    lost = orjson.dumps({"id": command_id, "type": "Add"})
    async with TestApp(counting_app(), broker=await server.open()) as t:
        sender = await server.open()
        await sender.send([OutgoingCommand(77, command_id, lost)])
        await sender.send([OutgoingCommand(77, "no-id", b"no command at all")])
        letters = t.opened.storage.dead_letters

        async def both_are_home() -> bool:
            return await letters.count() == 2

        await eventually(both_are_home)
        letter = await letters.get(command_id)
        assert letter is not None
        assert letter.body == lost
        assert letter.reason == "no partition has the routing key '77'"
        await t.drain()
    dead = await sender.open_dead_intake("a")
    assert dead is not None
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(dead.receive(1), 0.2)


def test_a_lost_queue_is_found(server: RabbitMqServer, sqlite_url: str) -> None:
    """`check` says that queues are missing, and what declares them; so does a client."""
    verb = partial(
        cqrs_es,
        CQRS_ES_APP="worker.app:app",
        CQRS_ES_SERVICE=server.service,
        CQRS_ES_STORE_URL=sqlite_url,
        CQRS_ES_BROKER_URL=server.url,
        CQRS_ES_PARTITIONS=str(PARTITIONS),
    )
    verb("init")
    assert verb("check").code == 0
    with server.channel() as channel:
        channel.queue_delete(server.names.queue(PARTITIONS - 1))
    check = verb("check", "--json")
    assert check.code == 2
    assert "the broker has 3 of 4 partitions: run `cqrs-es init`" in check.out
    with server.channel() as channel:
        channel.queue_delete(server.names.queue(1))
    check = verb("check", "--json")
    assert check.code == 3
    assert f"lost the queue {server.names.queue(1)}" in check.out
    verb("init")
    assert verb("check").code == 0


# --- With connections that are cut again and again -----------------------------


async def test_cut_connections_change_nothing(rabbitmq: RabbitServer) -> None:
    """Every command is decided once and in order, every event projected once."""
    server = RabbitMqServer(rabbitmq.url)
    try:
        async with proxy_to(rabbitmq.port) as proxy, _service(server, proxy) as opened:
            cutting = asyncio.create_task(_cut_forever(proxy))
            await _send_everything(await server.open())
            await _everything_handled(opened)
            cutting.cancel()
            await eventually(lambda: _projected(opened), within_seconds=PATIENCE_SECONDS)
    finally:
        await server.close()


@asynccontextmanager
async def _service(server: RabbitMqServer, proxy: Proxy) -> AsyncGenerator[OpenApplication]:
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
    broker = broker_for(url, service=server.service)
    settings = Settings(store_url="memory://", partitions=PARTITIONS, lease_seconds=2.0)
    app = counting_app()
    async with app.open(settings, broker=broker, initialise=True) as opened:
        async with opened.running():
            yield opened
        await broker.close()


async def _cut_forever(proxy: Proxy) -> None:
    while True:
        await asyncio.sleep(0.4)  # the fault's own rhythm, not a wait for something
        proxy.reset()


async def _send_everything(sender: Broker) -> None:
    for number in range(ADDITIONS):
        await sender.send([_addition(counter, number) for counter in COUNTERS])


def _addition(counter: str, number: int) -> OutgoingCommand:
    command_id = new_command_id()
    message = {
        "id": command_id,
        "type": "Add",
        "aggregate_type": "counter",
        "aggregate_id": counter,
        "payload": {"n": number},
    }
    partition = partition_of("counter", counter, PARTITIONS)
    return OutgoingCommand(partition, command_id, orjson.dumps(message))


async def _everything_handled(opened: OpenApplication) -> None:
    async def handled() -> bool:
        loaded = [await opened.load(Counter, counter) for counter in COUNTERS]
        return all(counter.sequence >= ADDITIONS for counter in loaded)

    await eventually(handled, within_seconds=PATIENCE_SECONDS)
    for counter in COUNTERS:
        events = [event async for event in _events(opened, counter)]
        assert events == list(range(ADDITIONS))


async def _events(opened: OpenApplication, counter: str) -> AsyncIterator[int]:
    async for event in opened.replay():
        if event.aggregate_id == counter:
            yield event.data.n


async def _projected(opened: OpenApplication) -> bool:
    expected = Totals(total=sum(range(ADDITIONS)), times=ADDITIONS)
    with contextlib.suppress(errors.NotFound):
        return all([await opened.view(Totals, counter) == expected for counter in COUNTERS])
    return False
