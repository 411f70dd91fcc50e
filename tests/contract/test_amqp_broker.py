"""What the RabbitMQ broker adds to the port: the wire contract, and what senders can do to it."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import amqp
import pytest

from cqrs_es import errors
from cqrs_es.application import Application
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.amqp import broker as amqp_broker
from cqrs_es.brokers.amqp import consuming
from cqrs_es.brokers.amqp import topology as topologies
from cqrs_es.cli.preparing import check_everything
from cqrs_es.ports.broker import OutgoingCommand, OutgoingReply
from cqrs_es.settings import Settings
from tests.contract.brokers import (
    EPOCH,
    PARTITIONS,
    RabbitMqServer,
    bodies,
    command,
    events,
    follow,
    offsets,
    send,
    serving,
    take,
)
from tests.servers import free_port, start_rabbitmq
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from cqrs_es.brokers.amqp.driver import Channel, IncomingMessage
    from cqrs_es.ports.broker import Broker
    from tests.servers import RabbitServer


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[RabbitMqServer]:
    """Lend a service that nobody has declared anything for."""
    async with serving("amqp", request) as server:
        assert isinstance(server, RabbitMqServer)
        yield server


@pytest.fixture
async def broker(server: RabbitMqServer) -> Broker:
    """Connect and declare the topology."""
    return await _declared(server)


async def _declared(server: RabbitMqServer) -> Broker:
    broker = await server.open()
    await broker.declare(PARTITIONS, EPOCH)
    return broker


# --- What other programs rely on (docs/contract.md) ---------------------------


async def test_any_client_can_send_a_command(server: RabbitMqServer, broker: Broker) -> None:
    """A message to the exchange, with the partition as routing key, is all it takes."""
    assert broker.durable
    intake = await broker.open_intake(3, "a")
    _publish(server, f"{server.service}.commands", "3", b"{}")
    assert bodies(await intake.receive(1)) == ["{}"]


async def test_commands_are_sent_as_the_contract_says(
    server: RabbitMqServer, broker: Broker
) -> None:
    """Persistent JSON, with the command's id as message id."""
    with server.channel() as channel:
        tapped = _tap(channel, f"{server.service}.commands", "2")
        await send(broker, "{}", partition=2)
        message = _next(channel, tapped)
    assert message.body == b"{}"
    assert message.properties == {
        "message_id": "id-{}",
        "content_type": "application/json",
        "delivery_mode": 2,
    }


async def test_events_are_published_as_the_contract_says(
    server: RabbitMqServer, broker: Broker
) -> None:
    """The routing key tells type, event and partition, the message id partition and offset."""
    with server.channel() as channel:
        tapped = _tap(channel, f"{server.service}.events", "account.Happened.*")
        await broker.publish(3, EPOCH, events(7, 7))
        message = _next(channel, tapped)
    assert message.body == b"event 7"
    assert message.delivery_info["routing_key"] == "account.Happened.3"
    assert message.properties == {
        "message_id": "3-7",
        "content_type": "application/cloudevents+json",
        "delivery_mode": 2,
    }


async def test_replies_go_to_the_senders_queue(server: RabbitMqServer, broker: Broker) -> None:
    """By the default exchange, with the command's id as correlation id."""
    with server.channel() as channel:
        queue = f"{server.service}.replies.client-42"
        channel.queue_declare(queue, exclusive=True)
        await broker.reply([OutgoingReply("client-42", "id-1", b"outcome")])
        message = _next(channel, queue)
    assert (message.body, message.properties["correlation_id"]) == (b"outcome", "id-1")


async def test_an_inbox_outlives_its_connection(server: RabbitMqServer, broker: Broker) -> None:
    """Whoever reconnects gets no older replies; its queue is bounded and expires."""
    inbox = await broker.open_replies("client-42")
    await inbox.close()
    await broker.reply([OutgoingReply("client-42", "id-1", b"between")])
    await eventually(lambda: _waits(server, server.names.replies("client-42")))
    inbox = await (await server.open()).open_replies("client-42")
    await broker.reply([OutgoingReply("client-42", "id-2", b"after")])
    assert await inbox.receive() == b"after"


async def _waits(server: RabbitMqServer, queue: str) -> bool:
    with server.channel() as channel:
        return topologies.check_queue(channel, queue) == 1


async def test_something_else_by_that_name_is_an_error(server: RabbitMqServer) -> None:
    """A queue declared in another way is named, with what to do about it; the broker lives on."""
    broker = await server.open()
    queue = f"{server.service}.commands.1"
    with server.channel() as channel:
        channel.queue_declare(queue, durable=True)
    with pytest.raises(errors.ConfigurationError, match=rf"{queue}.*cqrs-es init"):
        await broker.declare(PARTITIONS, EPOCH)
    with server.channel() as channel:
        channel.queue_delete(queue)
    await broker.declare(PARTITIONS, EPOCH)


async def test_a_process_that_declared_nothing_finds_the_partitions(
    server: RabbitMqServer,
) -> None:
    """Queue depth needs no setting; before anything is declared there are no queues."""
    other = await server.open()
    assert await other.queue_depth() == {}
    await send(await _declared(server), 1, 2, partition=3)
    assert await other.queue_depth() == {0: 0, 1: 0, 2: 0, 3: 2}


async def test_nothing_is_declared_by_workers(server: RabbitMqServer) -> None:
    """Where nothing was declared, every call says so, and none of them breaks the connection."""
    broker = await server.open()
    for call in (
        broker.open_intake(0, "a"),
        broker.open_dead_intake("a"),
        broker.subscribe({0: 0}),
        broker.send([command("1")]),
        broker.publish(0, EPOCH, events(1, 1)),
    ):
        with pytest.raises(errors.BrokerUnavailable, match="NOT_FOUND"):
            await call
    await broker.declare(PARTITIONS, EPOCH)
    await send(broker, 1)
    assert bodies(await (await broker.open_intake(0, "a")).receive(1)) == ["1"]


# --- An exchange is no stream ------------------------------------------------


async def test_publishing_again_repeats(broker: Broker) -> None:
    """Every publishing is confirmed and passed on: subscribers drop by offset."""
    feed = await broker.subscribe({0: 0})
    assert await broker.publish(0, EPOCH, events(1, 3)) == 3
    assert await broker.publish(0, EPOCH, events(2, 4)) == 4
    assert offsets(await follow(feed, 6)) == [1, 2, 3, 2, 3, 4]
    assert await broker.topic_end(0) is None


async def test_a_feed_begins_when_it_is_opened(broker: Broker) -> None:
    """What was published before is not delivered; of other partitions, nothing ever."""
    await broker.publish(0, EPOCH, events(1, 5))
    feed = await broker.subscribe({0: 5})
    await broker.publish(1, EPOCH, events(1, 5))
    await broker.publish(0, EPOCH, events(6, 6))
    assert [(event.partition, event.offset) for event in await follow(feed, 1)] == [(0, 6)]


async def test_a_slow_subscriber_loses_the_oldest(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its queue is bounded and holds nobody up: it reads what it missed from the store."""
    monkeypatch.setattr(topologies, "FEED_LENGTH", 10)
    monkeypatch.setattr(consuming, "FEED_PREFETCH", 5)
    feed = await broker.subscribe({0: 0})
    assert await broker.publish(0, EPOCH, events(1, 100)) == 100
    followed = offsets(await follow(feed, 15))
    assert followed == [*range(1, 6), *range(91, 101)]


async def test_what_is_no_event_is_passed_over(server: RabbitMqServer, broker: Broker) -> None:
    """Only relays may publish to the topic; what somebody else does holds nobody up."""
    feed = await broker.subscribe({0: 0})
    for wrong in ("", "x-1", "1-2-3", "9" * 200):
        _publish(server, f"{server.service}.events", "a.b.0", b"?", message_id=wrong)
    await broker.publish(0, EPOCH, events(1, 1))
    assert offsets(await feed.receive(10)) == [1]


async def test_a_feed_leaves_no_queue_behind(
    server: RabbitMqServer, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed, or its process dead, its queue is gone."""
    monkeypatch.setattr("uuid.uuid4", lambda: uuid.UUID(int=7))
    queue = server.names.feed(uuid.UUID(int=7).hex)
    closed = await broker.subscribe({0: 0})
    assert await _refusal(server, queue) is amqp.ResourceLocked
    await closed.close()
    await eventually(lambda: _is_gone(server, queue))

    dead = await server.open()
    await dead.subscribe({0: 0})
    assert await _refusal(server, queue) is amqp.ResourceLocked
    server.let_die(dead)
    await eventually(lambda: _is_gone(server, queue))


async def _refusal(server: RabbitMqServer, queue: str) -> type[Exception]:
    """Say why another connection can't have a queue: somebody has it, or it is not there."""
    with server.channel() as channel, pytest.raises(amqp.ChannelError) as refusal:
        topologies.check_queue(channel, queue)
    return refusal.type


async def _is_gone(server: RabbitMqServer, queue: str) -> bool:
    return await _refusal(server, queue) is amqp.NotFound


# --- Takeovers ---------------------------------------------------------------


async def test_a_partition_has_one_active_consumer(server: RabbitMqServer, broker: Broker) -> None:
    """Another process gets nothing until the owner lets go; then what was left, first."""
    owner = await broker.open_intake(0, "owner")
    next_owner = await (await server.open()).open_intake(0, "next")
    await send(broker, *range(20))
    taken = await take(owner, 10)
    await owner.settle(taken[:5])
    waiting = asyncio.create_task(take(next_owner, 15))
    await eventually(lambda: _all_pushed_to(broker))
    assert not waiting.done()

    await owner.close()

    assert bodies(await waiting) == [str(number) for number in range(5, 20)]


async def _all_pushed_to(broker: Broker) -> bool:
    return (await broker.queue_depth())[0] == 15


async def test_order_holds_over_takeovers_between_processes(server: RabbitMqServer) -> None:
    """Owners that die one after another under load: nothing lost, each first seen in order."""
    sender = await _declared(server)
    count = 300
    first_seen: dict[str, None] = {}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_send_slowly(sender, count))
        while len(first_seen) < count:
            owner = await server.open()
            intake = await owner.open_intake(0, "owner")
            received = await intake.receive(40)
            first_seen |= dict.fromkeys(bodies(received))
            await intake.settle(received[: len(received) // 2])
            server.let_die(owner)
    assert list(first_seen) == [str(number) for number in range(count)]


async def _send_slowly(broker: Broker, count: int) -> None:
    for number in range(count):
        await send(broker, number)


async def test_an_intake_that_is_opened_in_vain_holds_nothing(broker: Broker) -> None:
    """Opening is safe to cancel at any moment: no consumer stays behind."""
    await send(broker, 1)
    for patience in range(20):
        opening = asyncio.create_task(broker.open_intake(0, "impatient"))
        for _ in range(patience):
            await asyncio.sleep(0)
        opening.cancel()
        await asyncio.wait([opening])
    intake = await broker.open_intake(0, "patient")
    async with asyncio.timeout(5):
        assert bodies(await intake.receive(1)) == ["1"]


async def test_deliveries_of_another_intake_settle_nothing(broker: Broker) -> None:
    """A tag counts within its channel: settled on another it would be another's message."""
    old = await broker.open_intake(0, "old")
    await send(broker, 1, 2)
    stale = await take(old, 2)
    await old.close()
    new = await broker.open_intake(0, "new")
    await take(new, 2)
    await new.settle(stale)
    await new.close()
    assert bodies(await take(await broker.open_intake(0, "newer"), 2)) == ["1", "2"]


async def test_one_refused_intake_costs_the_others_nothing(
    server: RabbitMqServer, broker: Broker
) -> None:
    """A queue that an operator deleted ends its own intake; its neighbours go on."""
    doomed = await broker.open_intake(1, "a")
    neighbour = await broker.open_intake(0, "a")
    with server.channel() as channel:
        channel.queue_delete(f"{server.service}.commands.1")
    with pytest.raises(errors.BrokerUnavailable, match="the queue is gone"):
        await doomed.receive(1)
    with pytest.raises(errors.BrokerUnavailable, match="NOT_FOUND"):
        await broker.open_intake(1, "a")
    await send(broker, 1)
    assert bodies(await neighbour.receive(1)) == ["1"]


# --- What the broker gives up ------------------------------------------------


async def test_an_unknown_routing_key_lands_among_the_dead(
    server: RabbitMqServer, broker: Broker
) -> None:
    """Nothing that the exchange takes is lost; the dead intake says why it is there."""
    await broker.send([OutgoingCommand(PARTITIONS, "id", b"lost")])
    _publish(server, f"{server.service}.commands", "nonsense", b"lost as well")
    dead = await broker.open_dead_intake("a")
    assert dead is not None
    received = await take(dead, 2)
    assert bodies(received) == ["lost", "lost as well"]
    assert "routing key '4'" in received[0].headers["reason"]
    assert "routing key 'nonsense'" in received[1].headers["reason"]


async def test_the_dead_are_kept_until_they_are_settled(broker: Broker) -> None:
    """What was not stored elsewhere yet comes again."""
    await broker.send([OutgoingCommand(99, "id", b"lost")])
    for _ in range(3):
        dead = await broker.open_dead_intake("a")
        assert dead is not None
        received = await dead.receive(1)
        assert bodies(received) == ["lost"]
        await dead.close()
    dead = await broker.open_dead_intake("a")
    assert dead is not None
    await dead.settle(await dead.receive(1))
    await broker.send([OutgoingCommand(99, "id", b"next")])
    again = await broker.open_dead_intake("a")
    assert again is not None
    await dead.close()
    assert bodies(await again.receive(1)) == ["next"]


async def test_a_command_delivered_too_often_is_among_the_dead(
    server: RabbitMqServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own limit, far above ours, moves a command instead of dropping it."""
    monkeypatch.setitem(topologies._QUORUM, "x-delivery-limit", 2)
    broker = await _declared(server)
    await send(broker, "poison")
    for _ in range(3):
        intake = await broker.open_intake(0, "a")
        assert bodies(await intake.receive(1)) == ["poison"]
        await intake.close()
    dead = await broker.open_dead_intake("a")
    assert dead is not None
    (letter,) = await dead.receive(1)
    assert letter.body == b"poison"
    assert "delivery_limit" in letter.headers["reason"]
    assert letter.headers["reason"].endswith(f"{server.service}.commands.0")


# --- What senders can do -----------------------------------------------------


@pytest.mark.parametrize(
    "properties",
    [
        pytest.param({"message_id": b"\xff\xfe"}, id="no-utf8"),
        pytest.param({"content_encoding": "utf-16"}, id="encoding"),
        pytest.param({"content_encoding": "no-such"}, id="unknown-encoding"),
        pytest.param({"application_headers": {"x": b"\xff"}}, id="binary-header"),
        pytest.param({"application_headers": {"x-delivery-count": "many"}}, id="false-count"),
        pytest.param({"application_headers": {"x-death": "not a list"}}, id="false-death"),
        pytest.param(
            {"application_headers": {str(number): "x" * 1_000 for number in range(50)}}, id="many"
        ),
    ],
)
async def test_a_messages_properties_harm_nobody(
    server: RabbitMqServer, broker: Broker, properties: dict[str, Any]
) -> None:
    """Whatever a sender puts beside the body, the body is delivered and so is the next one."""
    intake = await broker.open_intake(0, "a")
    _publish(server, f"{server.service}.commands", "0", b"\x00\xff", **properties)
    await send(broker, "next")
    odd, following = await take(intake, 2)
    assert (odd.body, following.body) == (b"\x00\xff", b"next")
    assert sum(len(name) + len(value) for name, value in odd.headers.items()) < 16_000
    assert all((name + value).isascii() for name, value in odd.headers.items())


async def test_an_empty_message_is_delivered(server: RabbitMqServer, broker: Broker) -> None:
    """A body of no bytes is one that can be buried; also with properties that can't be read."""
    intake = await broker.open_intake(0, "a")
    _publish(server, f"{server.service}.commands", "0", b"")
    _publish(server, f"{server.service}.commands", "0", b"", message_id=b"\xff")
    await send(broker, 1)
    assert bodies(await take(intake, 3)) == ["", "", "1"]


async def test_a_routing_key_that_is_no_text_harms_nobody(
    server: RabbitMqServer, broker: Broker
) -> None:
    """It reaches the dead letters, where it would otherwise end the connection for ever."""
    dead = await broker.open_dead_intake("a")
    assert dead is not None
    _publish(server, f"{server.service}.commands", b"\xff\xfe9", b"odd")
    (letter,) = await dead.receive(1)
    assert letter.body == b"odd"
    assert "routing key '??9'" in letter.headers["reason"]


async def test_a_queue_that_is_full_refuses(
    rabbitmq: RabbitServer,
) -> None:
    """An operator's limit makes sending fail, with the reason, and drops nothing that is there."""
    server = RabbitMqServer(rabbitmq.url)
    pattern = f"^{server.service}[.]commands[.]0$"
    rabbitmq.control("set_policy", server.service, pattern, '{"max-length": 3}')
    try:
        broker = await _declared(server)
        with pytest.raises(errors.BrokerUnavailable, match="the queue is full"):
            await _send_slowly(broker, 50)
        intake = await broker.open_intake(0, "a")
        kept = bodies(await take(intake, 3))
        assert kept == ["0", "1", "2"]
    finally:
        rabbitmq.control("clear_policy", server.service)
        await server.close()


async def test_a_message_over_the_servers_limit_fails_alone(broker: Broker) -> None:
    """The server closes the channel over it; the next message opens another."""
    intake = await broker.open_intake(0, "a")
    with pytest.raises(errors.BrokerUnavailable, match="PRECONDITION_FAILED"):
        await broker.send([OutgoingCommand(0, "id", bytes(17_000_000))])
    await send(broker, 1)
    assert bodies(await intake.receive(1)) == ["1"]


# --- Doing what other programs do --------------------------------------------


def _publish(
    server: RabbitMqServer, exchange: str, routing_key: str | bytes, body: bytes, **properties: Any
) -> None:
    """Publish as a program of any language may, and wait until the server has it."""
    make: Any = amqp.Message
    with server.channel() as channel:
        confirmed: list[tuple[object, ...]] = []
        channel.confirm_select()
        channel.events["basic_ack"].add(lambda *answer: confirmed.append(answer))
        publish: Any = channel.basic_publish
        publish(make(body, **properties), exchange=exchange, routing_key=routing_key)
        _drain_until(channel, confirmed)


def _tap(channel: Channel, exchange: str, routing_key: str) -> str:
    """Bind a queue of one's own to an exchange."""
    queue = f"tap.{exchange}"
    channel.queue_declare(queue, exclusive=True)
    channel.queue_bind(queue, exchange, routing_key)
    return queue


def _next(channel: Channel, queue: str) -> IncomingMessage:
    """Wait for a message of a queue."""
    arrived: list[IncomingMessage] = []
    channel.basic_consume(queue, callback=arrived.append, on_cancel=print)
    _drain_until(channel, arrived)
    return arrived[0]


def _drain_until(channel: Channel, happened: list[Any]) -> None:
    connection: Any = channel
    while not happened:
        connection.connection.drain_events(timeout=10)


# --- The buffer --------------------------------------------------------------


def test_headers_are_read_only_where_there_are_some() -> None:
    """A message without headers was not redelivered, unless the server flags it."""
    plain = consuming.Arrived(1, b"", "0", {}, flagged=False)
    counted = consuming.Arrived(
        1, b"", "0", {"application_headers": {"x-delivery-count": 2}}, flagged=False
    )
    flagged = consuming.Arrived(1, b"", "0", {}, flagged=True)
    assert [message.redelivered for message in (plain, counted, flagged)] == [False, True, True]


# --- Policies of an operator ---------------------------------------------------


@pytest.fixture
def managed(tmp_path: Path) -> Iterator[RabbitServer]:
    """Start a server whose management API can be asked."""
    server = start_rabbitmq(tmp_path, management=True)
    yield server
    server.stop()


async def test_a_policy_that_would_lose_commands(
    managed: RabbitServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said with what it costs, by `check`, and until it is fixed by the broker's trouble."""
    monkeypatch.setattr(amqp_broker, "EXAMINE_SECONDS", 0.0)
    broker = broker_for(managed.url, service="bank")
    await broker.open()
    await broker.declare(PARTITIONS, EPOCH)
    await eventually(lambda: sees(broker, "no policy acts"), within_seconds=30)
    assert not broker.trouble

    catch_all = '{"message-ttl": 60000, "expires": 3600000}'
    managed.control("set_policy", "catch-all", ".*", catch_all)
    await eventually(lambda: sees(broker, "policy catch-all"), within_seconds=30)
    words = "message-ttl 60000 on bank.commands.0 and 4 more: commands that wait longer are lost"
    assert words in str(broker.trouble)
    assert "expires 3600000" in str(broker.trouble)
    settings = Settings(store_url="memory://", broker_url=managed.url, service="bank")
    finding = (await check_everything(Application("bank"), settings))[-1]
    assert (finding.check, finding.code) == ("broker", 2)
    assert words in finding.detail

    own = ("--priority", "1", "own", "^bank.commands", '{"max-in-memory-length": 100000}')
    managed.control("set_policy", *own)
    await eventually(lambda: sees(broker, "no policy acts"), within_seconds=30)
    assert not broker.trouble
    await broker.close()


async def sees(broker: Broker, words: str) -> bool:
    """Tell whether a look at the policies finds this."""
    try:
        return words in await broker.examine()
    except errors.ConfigurationError as exc:
        return words in exc.message


async def test_policies_that_can_not_be_seen(managed: RabbitServer) -> None:
    """Without the management API, or the right to ask it, that is said and no trouble."""
    managed.control("add_user", "plain", "secret")
    refused = broker_for(managed.url.replace("guest:guest", "plain:secret"), service="bank")
    assert "the user has no tag `management`" in await refused.examine()
    nobody = broker_for(f"amqp://guest:guest@127.0.0.1:{free_port() - 10_000}/", service="bank")
    assert "does not answer" in await nobody.examine()
    assert refused.trouble is nobody.trouble is None


async def test_only_rabbitmq_is_told_the_password() -> None:
    """Somebody else may listen where its management API would be."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1] - 10_000
        broker = broker_for(f"amqp://guest:guest@127.0.0.1:{port}/", service="bank")
        assert "is no management API" in await broker.examine()
    assert len(heard) == 1
    assert b"authorization" not in heard[0].lower()
