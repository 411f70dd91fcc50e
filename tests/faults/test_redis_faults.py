"""A Redis server that dies, freezes, or wants a password or TLS."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest
from redis import Redis

from cqrs_es import errors
from cqrs_es.application import Application
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.redis import connection
from cqrs_es.runtime.roles import WORKER
from cqrs_es.settings import Settings
from tests.bank_data import PROJECT
from tests.certificates import self_signed
from tests.contract.brokers import EPOCH, PARTITIONS, bodies, events, send, take
from tests.proxy import proxy_to
from tests.samples import Counter, Services
from tests.servers import free_port, start_redis
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from cqrs_es.ports.broker import Broker
    from tests.servers import Server

SECRET = "p@ss:w/rd#1"  # noqa: S105 - of a server that lives for one test


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    """Start a server that the test may do anything to."""
    server = start_redis(tmp_path)
    yield server
    server.stop()


@pytest.fixture
async def broker(redis: Server) -> AsyncIterator[Broker]:
    """Connect to it and declare the topology."""
    broker = _broker(f"redis://127.0.0.1:{redis.port}/0")
    await broker.open()
    await broker.declare(PARTITIONS, EPOCH)
    yield broker
    await broker.close()


def _broker(url: str) -> Broker:
    return broker_for(url, service="bank")


async def test_a_server_that_dies_is_noticed_and_found_again(
    redis: Server, broker: Broker, tmp_path: Path
) -> None:
    """Everything that waits ends at once; the same broker goes on with the next server."""
    intake = await broker.open_intake(0, "a")
    waiting = asyncio.create_task(intake.receive(1))
    await asyncio.sleep(0)
    redis.process.kill()
    async with asyncio.timeout(1):
        with pytest.raises(errors.BrokerUnavailable):
            await waiting
    with pytest.raises(errors.BrokerUnavailable):
        await send(broker, 1)

    server = start_redis(tmp_path, port=redis.port)
    try:
        await broker.declare(PARTITIONS, EPOCH)
        await send(broker, 2)
        assert bodies(await (await broker.open_intake(0, "a")).receive(1)) == ["2"]
        assert await broker.publish(0, EPOCH, events(1, 1)) == 1
    finally:
        server.stop()


async def test_a_frozen_server_is_noticed(
    redis: Server, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call waits for ever for a server that accepts and never answers."""
    await send(broker, 1)
    intake = await broker.open_intake(0, "a")
    await intake.receive(1)
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.3)
    redis.process.send_signal(signal.SIGSTOP)
    async with asyncio.timeout(3):
        for call in (
            intake.receive(1),
            send(broker, 2),
            broker.publish(0, EPOCH, events(1, 1)),
            broker.open(),
        ):
            with pytest.raises(errors.BrokerUnavailable):
                await call
    redis.process.send_signal(signal.SIGCONT)

    again = await broker.open_intake(0, "a")
    received = bodies(await again.receive(10))
    assert received in (["1"], ["1", "2"])  # what was not answered may have landed all the same


@pytest.mark.parametrize("stale", ["yes", "no"])
async def test_a_primary_that_becomes_a_replica(
    redis: Server, tmp_path_factory: pytest.TempPathFactory, stale: str
) -> None:
    """Every connection to it is dropped, also those that only read: its name may have moved on."""
    heir = start_redis(tmp_path_factory.mktemp("heir"))
    async with proxy_to(redis.port) as proxy:
        broker = _broker(f"redis://127.0.0.1:{proxy.port}/0")
        await broker.open()
        await broker.declare(PARTITIONS, EPOCH)
        intake = await broker.open_intake(0, "a")
        waiting = asyncio.create_task(intake.receive(1))
        await send(broker, 1, partition=1)
        server: Any = Redis(port=redis.port)

        async def blocked() -> bool:
            return bool(server.info("clients")["blocked_clients"])

        with server:
            await eventually(blocked)  # or it would connect later, with the heir, and wait there
            server.config_set("replica-serve-stale-data", stale)
            server.replicaof("127.0.0.1", free_port())
        proxy.lead_to(heir.port)
        for call in (send(broker, 2), waiting):
            with pytest.raises(errors.BrokerUnavailable, match=r"replica|can't be reached"):
                await call
        await broker.declare(PARTITIONS, EPOCH)
        await send(broker, 3)
        assert bodies(await (await broker.open_intake(0, "a")).receive(1)) == ["3"]
        await broker.close()
    heir.stop()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("-LOADING Redis is loading the dataset in memory", "loading its data"),
        ("-MASTERDOWN Link with MASTER is down", "let CQRS_ES_BROKER_URL lead to the primary"),
        ("-READONLY You can't write against a read only replica.", "lead to the primary"),
        ("-MISCONF Redis is configured to save RDB snapshots", "make room"),
        ("-NOREPLICAS Not enough good replicas to write.", "min-replicas-to-write"),
        ("-OOM command not allowed when used memory > 'maxmemory'.", "raise maxmemory"),
        ("-ERR max number of clients reached", "raise maxclients"),
    ],
)
async def test_a_server_that_refuses_says_what_ends_that(answer: str, words: str) -> None:
    """It is there, so nobody is told that it can't be reached."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65_536):
            writer.write(f"{answer}\r\n".encode() * 8)
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        broker = _broker(f"redis://127.0.0.1:{port}/0")
        with pytest.raises(errors.BrokerUnavailable, match=words) as caught:
            await broker.open()
        await broker.close()
    assert "refuses for a time" in str(caught.value)


async def test_a_cancelled_call_does_not_confuse_the_next(redis: Server, broker: Broker) -> None:
    """An answer that nobody waited for is never taken for another's."""
    for partition in range(PARTITIONS):
        await broker.publish(partition, EPOCH, events(1, partition + 1))
    for _ in range(200):
        cut_short = [asyncio.create_task(broker.topic_end(number)) for number in (0, 1)]
        await asyncio.sleep(0)
        for task in cut_short:
            task.cancel()
        ends = await asyncio.gather(*(broker.topic_end(number) for number in range(PARTITIONS)))
        assert ends == [1, 2, 3, 4]
    assert redis.process.poll() is None


async def test_a_password_opens_and_is_never_shown(tmp_path: Path) -> None:
    """A password with special characters works percent-encoded; a wrong one is not repeated."""
    server = start_redis(tmp_path, "--requirepass", SECRET)
    try:
        broker = _broker(f"redis://:p%40ss%3Aw%2Frd%231@127.0.0.1:{server.port}")
        await broker.open()
        await broker.declare(PARTITIONS, EPOCH)
        await send(broker, 1)
        await broker.close()
        for wrong in (
            f"redis://:wr0ng@127.0.0.1:{server.port}",
            f"redis://127.0.0.1:{server.port}",
        ):
            refused = _broker(wrong)
            with pytest.raises(errors.SettingsError, match="check user and pass") as refusal:
                await refused.open()
            assert "wr0ng" not in str(refusal.value)
            await refused.close()
    finally:
        server.stop()


async def test_a_node_of_a_cluster_is_refused(tmp_path: Path) -> None:
    """A service's keys are in many slots, and a script may use those of one: said at once."""
    server = start_redis(tmp_path, "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
    broker = _broker(f"redis://127.0.0.1:{server.port}")
    try:
        with pytest.raises(errors.SettingsError, match="is a node of a cluster"):
            await broker.open()
    finally:
        await broker.close()
        server.stop()


async def test_tls(tmp_path: Path) -> None:
    """`rediss://` encrypts, and trusts only certificates that it can verify."""
    certificate, key = self_signed(tmp_path)
    port = free_port()
    tls = ("--tls-port", str(port), "--tls-cert-file", certificate, "--tls-key-file", key)
    server = start_redis(tmp_path, *tls, "--tls-auth-clients", "no")
    try:
        trusting = _broker(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}")
        await trusting.open()
        await trusting.declare(PARTITIONS, EPOCH)
        intake = await trusting.open_intake(0, "a")
        await send(trusting, *range(100))
        assert len(await take(intake, 100)) == 100
        await trusting.close()
        strict = _broker(f"rediss://127.0.0.1:{port}")
        with pytest.raises(errors.BrokerUnavailable, match="certificate"):
            await strict.open()
        await strict.close()
    finally:
        server.stop()


def test_the_queue_is_configured_as_the_page_says(redis: Server) -> None:
    """What `docs/durability.md` asks for is what a server with `config/redis.conf` does."""
    page = (PROJECT / "docs" / "durability.md").read_text()
    wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
    client: Any = Redis(port=redis.port, decode_responses=True)
    with client:
        for name, value in wanted.items():
            assert client.config_get(name) == {name: value}
            assert f"`{name} {value}`" in page


async def test_a_server_that_has_lost_everything_is_no_empty_queue(redis: Server) -> None:
    """What was sent since is still to be done, though the server has forgotten how many queues."""
    app = Application("bank")
    app.aggregate(Counter, services=lambda _: Services())
    settings = Settings(store_url="memory://", broker_url=f"redis://127.0.0.1:{redis.port}")
    async with app.open(settings, initialise=True) as opened:
        supervisor = opened.supervisor({WORKER})
        assert await supervisor.idle()
        client: Any = Redis(port=redis.port)
        with client:
            client.flushall()
        await send(opened.process.broker, 1)
        assert not await supervisor.idle()
