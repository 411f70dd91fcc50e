"""A RabbitMQ server that dies, freezes, runs out of memory, or is behind a bad network."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.amqp import connection, publishing
from cqrs_es.ports.broker import OutgoingCommand, OutgoingReply
from tests.certificates import self_signed
from tests.contract.brokers import (
    EPOCH,
    PARTITIONS,
    bodies,
    command,
    events,
    follow,
    offsets,
    send,
    take,
    work_off,
)
from tests.proxy import proxy_to
from tests.servers import free_port, start_rabbitmq
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Iterator

    from cqrs_es.ports.broker import Broker
    from tests.proxy import Proxy
    from tests.servers import RabbitServer

SECRET = "p@ss:w/rd#1"  # noqa: S105 - of a server that lives for one session
SERVER_SECONDS = 15.0  # for a server to notice that a process or a connection is gone


@pytest.fixture
def service() -> str:
    """Name a service that nobody had before."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
async def proxy(rabbitmq: RabbitServer) -> AsyncIterator[Proxy]:
    """Put a network between the broker and its server."""
    async with proxy_to(rabbitmq.port) as proxy:
        yield proxy


@pytest.fixture
async def broker(proxy: Proxy, service: str) -> AsyncIterator[Broker]:
    """Connect through it and declare the topology."""
    broker = _broker(proxy.port, service)
    await broker.open()
    await broker.declare(PARTITIONS, EPOCH)
    yield broker
    proxy.heal()
    await broker.close()


def _broker(port: int, service: str, user: str = "guest:guest") -> Broker:
    return broker_for(f"amqp://{user}@127.0.0.1:{port}/", service=service)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let deadlines pass sooner."""
    monkeypatch.setattr(publishing, "CONFIRM_SECONDS", 1.0)
    monkeypatch.setattr(connection, "CALL_SECONDS", 1.0)
    monkeypatch.setattr(connection, "OPEN_SECONDS", 1.0)
    monkeypatch.setattr(connection, "CLOSE_SECONDS", 0.5)


async def _raises_unavailable(call: Awaitable[object]) -> str:
    with pytest.raises(errors.BrokerUnavailable) as failure:
        await call
    return str(failure.value)


# --- Connections that die ----------------------------------------------------


async def test_a_killed_connection_ends_everything_on_it(proxy: Proxy, broker: Broker) -> None:
    """Whatever waits is told at once; a call tried again connects, and nothing is lost."""
    await send(broker, 1, 2, 3)
    intake = await broker.open_intake(0, "a")
    taken = await take(intake, 3)
    feed = await broker.subscribe({0: 0})
    inbox = await broker.open_replies("client-42")
    async with asyncio.timeout(5), asyncio.TaskGroup() as waiting:
        for receive in (intake.receive(1), feed.receive(1), inbox.receive()):
            waiting.create_task(_raises_unavailable(receive))
        await asyncio.sleep(0)
        proxy.reset()
    await _raises_unavailable(intake.settle(taken))

    await eventually(lambda: _sends(broker, 4))  # the other connection may end a little later
    again = await broker.open_intake(0, "a")
    received = await take(again, 4)
    assert bodies(received) == ["1", "2", "3", "4"]
    assert [delivery.redelivered for delivery in received] == [True, True, True, False]
    feed = await broker.subscribe({0: 0})
    assert await broker.publish(0, EPOCH, events(1, 1)) == 1
    assert offsets(await feed.receive(1)) == [1]


async def test_connections_closed_by_an_operator(rabbitmq: RabbitServer, broker: Broker) -> None:
    """The operator's reason is in the error; the broker connects again."""
    intake = await broker.open_intake(0, "a")
    waiting = asyncio.create_task(_raises_unavailable(intake.receive(1)))
    await asyncio.to_thread(rabbitmq.control, "close_all_connections", "house keeping")
    assert "house keeping" in await waiting
    await eventually(lambda: _sends(broker))
    assert bodies(await (await broker.open_intake(0, "a")).receive(1)) == ["1"]


async def _sends(broker: Broker, number: int = 1) -> bool:
    with contextlib.suppress(errors.BrokerUnavailable):
        await send(broker, number)
        return True
    return False


async def test_a_connection_killed_under_load_causes_duplicates_only(
    proxy: Proxy, broker: Broker
) -> None:
    """Whoever sends again what was not confirmed loses nothing, and gets it in order."""
    count = 2_000
    sent = asyncio.create_task(_send_all(broker, count))
    first_seen: dict[str, None] = {}
    cuts = 0
    while len(first_seen) < count:
        with contextlib.suppress(errors.BrokerUnavailable):
            intake = await broker.open_intake(0, "a")
            while len(first_seen) < count:
                received = await intake.receive(100)
                first_seen |= dict.fromkeys(bodies(received))
                await intake.settle(received)
                if cuts < 5 and len(first_seen) > (cuts + 1) * 300:
                    cuts += 1
                    proxy.reset()
    await sent
    assert cuts == 5
    assert list(first_seen) == [str(number) for number in range(count)]


async def _send_all(broker: Broker, count: int) -> None:
    for first in range(0, count, 50):
        chunk = range(first, first + 50)
        while True:
            with contextlib.suppress(errors.BrokerUnavailable):
                await send(broker, *chunk)
                break


async def test_a_killed_connection_leaves_no_hole_in_the_topic(
    proxy: Proxy, broker: Broker, rabbitmq: RabbitServer, service: str
) -> None:
    """A relay that goes on from its mark repeats events; subscribers elsewhere miss none."""
    subscriber = _broker(rabbitmq.port, service)
    await subscriber.open()
    feed = await subscriber.subscribe({0: 0})
    relaying = asyncio.create_task(_relay(broker, 2_000))
    seen: list[int] = []
    while not seen or seen[-1] < 2_000:
        for offset in offsets(await feed.receive(100)):
            assert offset <= (seen[-1] if seen else 0) + 1
            seen.append(offset)
            if offset in {300, 700, 1_100} and seen.count(offset) == 1:
                proxy.reset()
    await relaying
    assert sorted(set(seen)) == list(range(1, 2_001))
    await subscriber.close()


async def _relay(broker: Broker, last: int) -> None:
    mark = 0
    while mark < last:
        with contextlib.suppress(errors.BrokerUnavailable):
            mark = await broker.publish(0, EPOCH, events(mark + 1, min(mark + 50, last)))


# --- Silence -----------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_a_stalled_network_is_noticed(proxy: Proxy, broker: Broker) -> None:
    """No call waits for ever, none succeeds without an answer; healed, everything goes on."""
    intake = await broker.open_intake(0, "a")
    proxy.stall()
    async with asyncio.timeout(20):
        for call in (
            send(broker, 1),
            broker.publish(0, EPOCH, events(1, 1)),
            broker.reply([OutgoingReply("client-42", "id", b"outcome")]),
            broker.open_intake(1, "a"),
            broker.subscribe({0: 0}),
            broker.queue_depth(),
        ):
            await _raises_unavailable(call)
        await _raises_unavailable(intake.receive(1))
    proxy.heal()
    proxy.reset()  # what was stalled for so long is not believed in any more
    await send(broker, 2)
    again = await broker.open_intake(0, "a")
    async with asyncio.timeout(SERVER_SECONDS):
        while bodies(await again.receive(1)) != ["2"]:
            pass  # the first may have landed all the same


@pytest.mark.usefixtures("impatient")
async def test_closing_does_not_wait_for_a_stalled_network(proxy: Proxy, broker: Broker) -> None:
    """A process can always stop; its threads end."""
    intake = await broker.open_intake(0, "a")
    proxy.stall()
    async with asyncio.timeout(5):
        await intake.close()
        await broker.close()
    await eventually(_no_threads)


async def _no_threads() -> bool:
    return not any(thread.name.startswith("amqp-") for thread in threading.enumerate())


async def test_a_peer_that_is_silent_for_long_is_given_up(
    proxy: Proxy, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats tell a silent queue from a dead connection."""
    monkeypatch.setattr("cqrs_es.brokers.amqp.driver.HEARTBEAT_SECONDS", 1)
    await broker.close()
    await broker.open()
    intake = await broker.open_intake(0, "a")
    waiting = asyncio.create_task(_raises_unavailable(intake.receive(1)))
    proxy.stall()
    async with asyncio.timeout(10):
        assert "heartbeats missed" in await waiting


# --- Servers that die --------------------------------------------------------


async def test_a_killed_server_and_its_restart(
    tmp_path_factory: pytest.TempPathFactory, service: str
) -> None:
    """Confirmed commands are there again, in order; what was not settled is marked."""
    server = start_rabbitmq(tmp_path_factory.mktemp("mortal"))
    broker = _broker(server.port, service)
    try:
        await broker.open()
        await broker.declare(PARTITIONS, EPOCH)
        await send(broker, *range(100))
        intake = await broker.open_intake(0, "a")
        await intake.settle((await take(intake, 100))[:5])
        waiting = asyncio.create_task(_raises_unavailable(intake.receive(1)))
        await asyncio.to_thread(server.kill)
        async with asyncio.timeout(5):
            await waiting
            for call in (send(broker, 1), broker.open_intake(0, "a"), broker.queue_depth()):
                await _raises_unavailable(call)

        server = await asyncio.to_thread(server.start_again)
        await eventually(lambda: _opens(broker), within_seconds=SERVER_SECONDS)
        again = await broker.open_intake(0, "a")
        received = await take(again, 95)
        while bodies(received)[-1] != "99":
            received += await again.receive(100)  # the settlement did not get there
        assert bodies(received)[-95:] == [str(number) for number in range(5, 100)]
        assert all(delivery.redelivered for delivery in received)
        await send(broker, 100)
        assert bodies(await again.receive(1)) == ["100"]
    finally:
        await broker.close()
        server.stop()


async def _opens(broker: Broker) -> bool:
    with contextlib.suppress(errors.BrokerUnavailable):
        await broker.queue_depth()
        await broker.open()
        return True
    return False


@pytest.mark.usefixtures("impatient")
async def test_a_frozen_server_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, service: str
) -> None:
    """It accepts connections and never answers; thawed, it is found again."""
    server = start_rabbitmq(tmp_path_factory.mktemp("frozen"))
    broker = _broker(server.port, service)
    try:
        await broker.open()
        await broker.declare(PARTITIONS, EPOCH)
        server.signal(signal.SIGSTOP)
        async with asyncio.timeout(20):
            await _raises_unavailable(send(broker, 1))
            await _raises_unavailable(broker.open_intake(0, "a"))
            await _raises_unavailable(broker.open())
        server.signal(signal.SIGCONT)
        await eventually(lambda: _opens(broker), within_seconds=SERVER_SECONDS)
        await send(broker, 2)
        assert (
            "2" in bodies(await work_off(await broker.open_intake(0, "a"), 1))
            or (await broker.queue_depth())[0]
        )
    finally:
        await broker.close()
        server.stop()


# --- Servers that refuse -----------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_want_of_memory_is_never_success(rabbitmq: RabbitServer, broker: Broker) -> None:
    """Nothing is confirmed while the server takes nothing; consuming and settling go on."""
    await send(broker, *range(10))
    intake = await broker.open_intake(0, "a")
    await asyncio.to_thread(rabbitmq.control, "set_vm_memory_high_watermark", "0.00001")
    try:
        async with asyncio.timeout(30):
            assert "memory" in await _raises_unavailable(send(broker, "refused"))
            await _raises_unavailable(broker.publish(0, EPOCH, events(1, 1)))
            await eventually(lambda: _drops_replies(broker))
            assert "takes no messages" in (broker.trouble or "")
            await intake.settle(await take(intake, 10))
            assert await broker.queue_depth() == {0: 0, 1: 0, 2: 0, 3: 0}
    finally:
        await asyncio.to_thread(rabbitmq.control, "set_vm_memory_high_watermark", "0.4")
    await eventually(lambda: _sends(broker), within_seconds=SERVER_SECONDS)
    assert broker.trouble is None
    async with asyncio.timeout(10):
        assert set(bodies(await work_off(intake, 1))) <= {"refused", "1"}
        assert await broker.publish(0, EPOCH, events(1, 1)) == 1


async def _drops_replies(broker: Broker) -> bool:
    """Tell whether it says so; the first reply on a connection is how it finds out."""
    with contextlib.suppress(errors.BrokerUnavailable):
        await broker.reply([OutgoingReply("me", "id", b"outcome")])
        return False
    return True


async def test_a_password_is_needed_and_not_shown(rabbitmq: RabbitServer, service: str) -> None:
    """Characters that mean something in a URL are percent-encoded; no error shows a password."""
    control: Any = rabbitmq.control
    await asyncio.to_thread(control, "add_user", service, SECRET)
    await asyncio.to_thread(control, "set_permissions", service, ".*", ".*", ".*")
    allowed = _broker(rabbitmq.port, service, f"{service}:p%40ss%3Aw%2Frd%231")
    await allowed.open()
    await allowed.declare(PARTITIONS, EPOCH)
    await send(allowed, 1)
    await allowed.close()
    refused = _broker(rabbitmq.port, service, f"{service}:wr0ng")
    with pytest.raises(errors.SettingsError) as refusal:
        await refused.open()
    reason = refusal.value.message
    assert "ACCESS_REFUSED" in reason
    assert "wr0ng" not in reason
    assert f"127.0.0.1:{rabbitmq.port}" in reason
    await refused.close()


async def test_what_a_user_may_not_do_is_said(
    rabbitmq: RabbitServer, broker: Broker, service: str
) -> None:
    """Permissions that are missing fail the call that needs them, and no other."""
    control: Any = rabbitmq.control
    await asyncio.to_thread(control, "add_user", service, "sender")
    pattern = f"^{service}[.]commands$"
    await asyncio.to_thread(control, "set_permissions", service, "^$", pattern, "^$")
    sender = _broker(rabbitmq.port, service, f"{service}:sender")
    await sender.open()
    await sender.send([command("1")])
    assert "ACCESS_REFUSED" in await _raises_unavailable(sender.publish(0, EPOCH, events(1, 1)))
    assert "ACCESS_REFUSED" in await _raises_unavailable(sender.open_intake(0, "a"))
    await sender.send([OutgoingCommand(0, "id", b"2")])
    await sender.close()
    assert bodies(await take(await broker.open_intake(0, "a"), 2)) == ["1", "2"]


async def test_a_server_that_is_away_is_unavailable() -> None:
    """At once, with its address and without the password; then it can be closed."""
    port = free_port()
    broker = _broker(port, "bank", "user:hunter2")
    reason = await _raises_unavailable(broker.open())
    assert f"127.0.0.1:{port}" in reason
    assert "hunter2" not in reason
    await broker.close()
    assert "was closed" in await _raises_unavailable(broker.send([]))


@pytest.mark.usefixtures("impatient")
async def test_a_server_that_never_answers_is_given_up() -> None:
    """Whoever waits for the connection shares one attempt, and its deadline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        broker = _broker(silent.getsockname()[1], "bank")
        async with asyncio.timeout(3):
            reasons = await asyncio.gather(
                *(_raises_unavailable(broker.open_intake(number, "a")) for number in range(16))
            )
        assert all("did not let us in" in reason for reason in reasons)
        await broker.close()


@pytest.fixture
def strict_rabbitmq(rabbitmq: RabbitServer) -> Iterator[RabbitServer]:
    """Have the server end new channels that hold a message for a second."""

    def limit(timeout: int, looks_every: int) -> None:
        for name, milliseconds in (
            ("consumer_timeout", timeout),
            ("channel_tick_interval", looks_every),
        ):
            rabbitmq.control("eval", f"application:set_env(rabbit, {name}, {milliseconds}).")

    limit(1_000, 200)
    yield rabbitmq
    limit(10_800_000, 60_000)


async def test_a_command_held_for_too_long_goes_back(
    strict_rabbitmq: RabbitServer, service: str
) -> None:
    """The server ends the intake by its own limit, says so, and delivers it again, in order."""
    broker = _broker(strict_rabbitmq.port, service)
    await broker.open()
    await broker.declare(PARTITIONS, EPOCH)
    await send(broker, 1, 2, 3)
    intake = await broker.open_intake(0, "a")
    held = await take(intake, 3)
    async with asyncio.timeout(SERVER_SECONDS):
        assert "consumer_timeout" in await _raises_unavailable(intake.receive(1))
    assert "consumer_timeout" in await _raises_unavailable(intake.settle(held))
    again = await take(await broker.open_intake(0, "a"), 3)
    assert bodies(again) == ["1", "2", "3"]
    assert all(delivery.redelivered for delivery in again)
    await broker.close()


# --- TLS ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """Run a server that speaks TLS; lend its port and who vouches for it."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = self_signed(folder)
    port = free_port()
    server = start_rabbitmq(
        folder,
        f"listeners.ssl.1 = 127.0.0.1:{port}",
        f"ssl_options.cacertfile = {certificate}",
        f"ssl_options.certfile = {certificate}",
        f"ssl_options.keyfile = {key}",
    )
    yield port, certificate
    server.stop()


async def test_tls(tls: tuple[int, str], service: str) -> None:
    """`amqps://` encrypts; bytes that TLS holds back are not forgotten."""
    port, certificate = tls
    url = f"amqps://guest:guest@127.0.0.1:{port}/?cacertfile={certificate}"
    broker = broker_for(url, service=service)
    await broker.open()
    await broker.declare(PARTITIONS, EPOCH)
    feed = await broker.subscribe({0: 0})
    intake = await broker.open_intake(0, "a")
    async with asyncio.timeout(20):
        await broker.send([OutgoingCommand(0, "id", bytes(size)) for size in (1, 300_000, 17)])
        assert [len(got.body) for got in await take(intake, 3)] == [1, 300_000, 17]
        await send(broker, *range(500))
        assert bodies(await take(intake, 500)) == [str(number) for number in range(500)]
        await broker.publish(0, EPOCH, events(1, 500))
        assert offsets(await follow(feed, 500)) == list(range(1, 501))
    await broker.close()


async def test_tls_trusts_only_what_it_can_verify(tls: tuple[int, str]) -> None:
    """Neither a certificate that nobody vouches for, nor one of another host."""
    port, certificate = tls
    for url in (
        f"amqps://127.0.0.1:{port}/",
        f"amqps://localhost:{port}/?cacertfile={certificate}",
    ):
        strict = broker_for(url, service="bank")
        assert "certificate" in (await _raises_unavailable(strict.open())).lower()
        await strict.close()
