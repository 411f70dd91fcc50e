"""What the Redis broker adds to the port: the wire contract, and what Redis can do to it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.brokers.redis.commands import READ_BYTES
from cqrs_es.ports.broker import OutgoingReply, Topology
from tests.contract.brokers import (
    EPOCH,
    PARTITIONS,
    AnyRedisServer,
    RealRedisServer,
    bodies,
    events,
    follow,
    offsets,
    send,
    serving,
    take,
)
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from cqrs_es.ports.broker import Broker


@pytest.fixture(params=["fakeredis", "redis"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[AnyRedisServer]:
    """Run an empty server that speaks Redis."""
    async with serving(request.param, request) as server:
        assert isinstance(server, AnyRedisServer)
        yield server


@pytest.fixture
async def real_server(request: pytest.FixtureRequest) -> AsyncIterator[RealRedisServer]:
    """Run an empty Redis server."""
    async with serving("redis", request) as server:
        assert isinstance(server, RealRedisServer)
        yield server


@pytest.fixture
async def broker(server: AnyRedisServer) -> Broker:
    """Connect to the server and declare the topology."""
    return await _declared(server)


async def _declared(server: AnyRedisServer) -> Broker:
    broker = await server.open()
    await broker.declare(PARTITIONS, EPOCH)
    return broker


# --- What other programs rely on (docs/contract.md) ---------------------------


async def test_the_meta_hash_tells_partitions_and_epoch(
    server: AnyRedisServer, broker: Broker
) -> None:
    """A sender in any language finds P, and a subscriber the epoch."""
    assert broker.durable
    meta = await server.raw.hgetall("bank:meta")
    assert meta == {b"partitions": b"4", b"logepoch": EPOCH.encode()}


@pytest.mark.parametrize("partitions", ["banana", "0", "-1", "9" * 5_000])
async def test_a_meta_hash_that_another_program_wrote(
    server: AnyRedisServer, broker: Broker, partitions: str
) -> None:
    """It is named, with what to do, by whoever asks for the topology or the queues."""
    await server.raw.hset("bank:meta", "partitions", partitions)
    for asking in (broker.topology, broker.queue_depth):
        with pytest.raises(errors.ConfigurationError, match=r"bank:meta .* `cqrs-es init`"):
            await asking()


async def test_a_key_that_another_program_has(server: AnyRedisServer, broker: Broker) -> None:
    """What is no hash and no stream of ours is no outage, which would be waited for."""
    await server.raw.set("bank:commands:1", "theirs")
    await server.raw.delete("bank:meta")
    await server.raw.set("bank:meta", "theirs")
    for asking in (broker.topology, broker.queue_depth, lambda: send(broker, "{}", partition=1)):
        with pytest.raises(errors.ConfigurationError, match="give the service another name"):
            await asking()


async def test_any_client_can_send_a_command(server: AnyRedisServer, broker: Broker) -> None:
    """A plain XADD of the field `command` is all it takes."""
    intake = await broker.open_intake(3, "a")
    await server.raw.xadd("bank:commands:3", {"command": "{}"})
    assert bodies(await intake.receive(1)) == ["{}"]


async def test_commands_are_where_the_contract_says(server: AnyRedisServer, broker: Broker) -> None:
    """The stream, its field and its group; settled entries leave both together."""
    await send(broker, "{}", "{2}", partition=2)
    entries = await server.raw.xrange("bank:commands:2")
    assert [fields for _, fields in entries] == [{b"command": b"{}"}, {b"command": b"{2}"}]

    intake = await broker.open_intake(2, "a")
    await intake.settle(await intake.receive(1))
    await intake.receive(1)

    assert await server.raw.xlen("bank:commands:2") == 1
    pending = await server.raw.xpending("bank:commands:2", "workers")
    assert (pending["pending"], pending["min"]) == (1, entries[1][0])


async def test_the_group_is_read_from_its_start(server: AnyRedisServer) -> None:
    """Commands sent before anything was declared are not missed."""
    await server.raw.xadd("bank:commands:0", {"command": "early"})
    broker = await _declared(server)
    assert bodies(await (await broker.open_intake(0, "a")).receive(1)) == ["early"]


async def test_an_events_offset_is_its_entry_id(server: AnyRedisServer, broker: Broker) -> None:
    """A subscriber reads `<offset>-0` and the field `event`."""
    await broker.publish(1, EPOCH, events(1, 2))
    assert await server.raw.xrange("bank:events:1") == [
        (b"1-0", {b"event": b"event 1"}),
        (b"2-0", {b"event": b"event 2"}),
    ]


async def test_replies_expire_and_are_trimmed(server: AnyRedisServer, broker: Broker) -> None:
    """A stream of replies does not grow without bound and does not stay for ever."""
    await broker.reply([OutgoingReply("client-42", "id", b"{}")] * 3_000)
    assert 1_000 <= await server.raw.xlen("bank:replies:client-42") < 1_500
    assert 0 < await server.raw.ttl("bank:replies:client-42") <= 3_600
    newest = await server.raw.xrevrange("bank:replies:client-42", count=1)
    assert newest[0][1] == {b"outcome": b"{}"}


async def test_dead_consumers_leave_no_names_behind(server: AnyRedisServer, broker: Broker) -> None:
    """The group knows one consumer per partition, however often it changed hands."""
    for number in range(5):
        await broker.open_intake(0, f"worker-{number}")
    (consumer,) = await server.raw.xinfo_consumers("bank:commands:0", "workers")
    assert consumer["name"].startswith(b"worker-4")


# --- What senders and operators can do to a stream ---------------------------


async def test_an_entry_without_a_command_is_delivered_empty(
    server: AnyRedisServer, broker: Broker
) -> None:
    """A sender's mistake becomes a message that can be buried, not one that blocks."""
    await server.raw.xadd("bank:commands:0", {"cmd": "{}"})
    await send(broker, 1)
    assert bodies(await take(await broker.open_intake(0, "a"), 2)) == ["", "1"]


async def test_a_deleted_pending_entry_is_passed_over(
    server: AnyRedisServer, broker: Broker
) -> None:
    """An entry that an operator deletes while it is pending does not hold up the rest."""
    await send(broker, 1, 2, 3)
    await take(await broker.open_intake(0, "a"), 2)
    (first, _), *_ = await server.raw.xrange("bank:commands:0")
    await server.raw.xdel("bank:commands:0", first)
    assert bodies(await take(await broker.open_intake(0, "b"), 2)) == ["2", "3"]


async def test_a_read_whose_answer_was_lost_is_read_again(
    server: AnyRedisServer, broker: Broker
) -> None:
    """Entries that the server handed to a connection that broke come before new ones."""
    intake = await broker.open_intake(0, "a")
    await send(broker, 1, 2, 3, 4)
    assert bodies(await intake.receive(1)) == ["1"]
    (owner,) = await server.raw.xinfo_consumers("bank:commands:0", "workers")
    await server.raw.xreadgroup("workers", owner["name"], {"bank:commands:0": ">"}, count=2)
    received = await take(intake, 3)
    assert bodies(received) == ["2", "3", "4"]
    assert not any(delivery.redelivered for delivery in received)


async def test_a_deleted_entry_whose_answer_was_lost_is_passed_over(
    server: AnyRedisServer, broker: Broker
) -> None:
    """Redis shows a pending entry that is gone as one without fields; that is no command."""
    intake = await broker.open_intake(0, "a")
    await send(broker, 1, 2)
    (owner,) = await server.raw.xinfo_consumers("bank:commands:0", "workers")
    await server.raw.xreadgroup("workers", owner["name"], {"bank:commands:0": ">"}, count=1)
    (first, _), *_ = await server.raw.xrange("bank:commands:0")
    await server.raw.xdel("bank:commands:0", first)
    assert bodies(await intake.receive(10)) == ["2"]


# --- Losing everything (G6) ---------------------------------------------------


async def test_a_flushed_topic_is_filled_again(server: AnyRedisServer, broker: Broker) -> None:
    """After a flush, which keeps connections, publishing tells to go on from the start."""
    await broker.publish(0, EPOCH, events(1, 5))
    feed = await broker.subscribe({0: 3})
    assert offsets(await follow(feed, 2)) == [4, 5]

    await server.raw.flushall()

    assert await broker.publish(0, EPOCH, events(6, 8)) == 0
    assert await broker.publish(0, EPOCH, events(1, 8)) == 8
    held = await server.raw.xrange("bank:events:0")
    assert [entry_id for entry_id, _ in held] == [f"{n}-0".encode() for n in range(1, 9)]
    followed: list[int] = []
    while 8 not in followed:
        followed += offsets(await feed.receive(10))
    assert followed[-3:] == [6, 7, 8]
    assert await server.raw.hget("bank:meta", "partitions") == b"4"


async def test_a_read_is_bounded_in_bytes(broker: Broker) -> None:
    """However many commands there is room for: large ones come a few at a time, all in order."""
    intake = await broker.open_intake(0, "a")
    large = [f"{n:03}" + "x" * 100_000 for n in range(250)]
    await send(broker, *large)
    first = await intake.receive(2_000)
    # A read ends with the step that goes over 4 MiB, and a step is of 16 entries at most.
    assert READ_BYTES <= sum(len(one.body) for one in first) < READ_BYTES + 16 * len(large[0])
    rest = await take(intake, 250 - len(first))
    assert bodies([*first, *rest]) == large
    again = await broker.open_intake(0, "b")
    assert bodies(await take(again, 250)) == large


async def test_meta_that_makes_no_sense(server: AnyRedisServer, broker: Broker) -> None:
    """It is a matter of setting up, and says what to do."""
    await server.raw.hset("bank:meta", "partitions", "many")
    with pytest.raises(errors.ConfigurationError, match="run `cqrs-es init`"):
        await broker.topology()
    await broker.declare(PARTITIONS, EPOCH)
    assert await broker.topology() == Topology(PARTITIONS, EPOCH)


async def test_what_meta_lost_is_restored(server: AnyRedisServer, broker: Broker) -> None:
    """What it still has stays: another epoch is not for a relay to end."""
    await server.raw.hset("bank:meta", "logepoch", "another")
    await server.raw.hdel("bank:meta", "partitions")
    await broker.restore(PARTITIONS, EPOCH)
    meta = await server.raw.hgetall("bank:meta")
    assert meta == {b"partitions": b"4", b"logepoch": b"another"}


async def test_a_subscriber_of_a_flushed_topic_misses_nothing_new(
    server: AnyRedisServer, broker: Broker
) -> None:
    """A feed that is ahead of a topic that starts again goes back to its start."""
    await broker.publish(0, EPOCH, events(1, 50))
    feed = await broker.subscribe({0: 50})
    await server.raw.flushall()
    await broker.publish(0, EPOCH, events(1, 10))
    assert offsets(await follow(feed, 10)) == list(range(1, 11))


async def test_an_intake_survives_a_flush(server: AnyRedisServer, broker: Broker) -> None:
    """What is sent after a flush is received by the intake that was open before it."""
    intake = await broker.open_intake(0, "a")
    await send(broker, 1, 2)
    await intake.receive(1)
    await server.raw.flushall()
    await send(broker, 3, 4)
    assert bodies(await take(intake, 2)) == ["3", "4"]


async def test_a_waiting_intake_survives_a_flush(server: AnyRedisServer, broker: Broker) -> None:
    """So does one that was waiting when it happened."""
    intake = await broker.open_intake(0, "a")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(intake.receive(1))
        await _until_blocked(server)
        await server.raw.flushall()
        await send(broker, 1)
    assert bodies(waiting.result()) == ["1"]


# --- What it costs (only a real server counts it) ------------------------------


async def test_what_is_asked_for_at_once_goes_in_few_exchanges(
    real_server: RealRedisServer,
) -> None:
    """Fifty replies at once take no fifty reads of the server, and are in the order of asking."""
    broker = await _declared(real_server)
    replies = [OutgoingReply("client-42", "id", str(number).encode()) for number in range(50)]
    async with real_server.counting("total_reads_processed") as reads:
        await asyncio.gather(*(broker.reply([reply]) for reply in replies))
    assert reads.count < 10
    entries = await real_server.raw.xrange("bank:replies:client-42")
    assert [int(fields[b"outcome"]) for _, fields in entries] == list(range(50))


async def test_each_is_told_of_its_own_error_only(real_server: RealRedisServer) -> None:
    """One that the server refuses keeps nothing in the same exchange from being done."""
    broker = await _declared(real_server)
    await real_server.raw.set("bank:replies:bad", "theirs")
    answers = await asyncio.gather(
        *(broker.reply([OutgoingReply(to, "id", b"{}")] * 2) for to in ("one", "bad", "two")),
        return_exceptions=True,
    )
    assert [type(each) for each in answers] == [type(None), errors.ConfigurationError, type(None)]
    assert await real_server.raw.xlen("bank:replies:one") == 2
    assert await real_server.raw.xlen("bank:replies:two") == 2


async def test_a_command_that_comes_alone_is_taken_in_one_exchange(
    real_server: RealRedisServer,
) -> None:
    """Its owner waits, is woken, and has it."""
    broker = await _declared(real_server)
    intake = await broker.open_intake(0, "a")
    await send(broker, "first")
    await intake.receive(10)  # from then on the server knows the script
    receiving = asyncio.create_task(intake.receive(10))
    await _until_blocked(real_server)
    async with real_server.counting("total_reads_processed") as reads:
        await real_server.raw.xadd("bank:commands:0", {"command": "{}"})
        assert bodies(await receiving) == ["{}"]
    assert reads.count == 1  # that of the sender: what the owner asks was read when it began


# --- Trouble (only a real server makes it) -----------------------------------


async def test_killed_connections_are_reported_and_replaced(real_server: RealRedisServer) -> None:
    """Whoever waits is told that its connection broke; what comes next finds a new one."""
    broker = await _declared(real_server)
    await send(broker, 1, 2)
    intake = await broker.open_intake(0, "a")
    feed = await broker.subscribe({0: 0})
    await take(intake, 2)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_unavailable(intake.receive(1)))
        tasks.create_task(_unavailable(feed.receive(1)))
        await _until_blocked(real_server, 2)
        await real_server.raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    again = await broker.open_intake(0, "a")
    await send(broker, 3)
    assert bodies(await take(again, 3)) == ["1", "2", "3"]
    await broker.publish(0, EPOCH, events(1, 1))
    assert offsets(await feed.receive(1)) == [1]


async def test_a_full_server_leaves_no_hole(real_server: RealRedisServer) -> None:
    """Out of memory is a server to wait for; afterwards the log goes on without a gap."""
    broker = await _declared(real_server)
    await broker.publish(0, EPOCH, events(1, 2))
    await real_server.raw.config_set("maxmemory", "1mb")
    try:
        with pytest.raises(errors.BrokerUnavailable):
            await broker.publish(0, EPOCH, events(3, 5))
        with pytest.raises(errors.BrokerUnavailable):
            await send(broker, 1, 2)
    finally:
        await real_server.raw.config_set("maxmemory", "0")
    assert await broker.publish(0, EPOCH, events(3, 5)) == 5
    assert await real_server.raw.xlen("bank:events:0") == 5
    assert await real_server.raw.xlen("bank:commands:0") == 0


async def _until_blocked(server: AnyRedisServer, clients: int = 1) -> None:
    """Wait until so many reads are blocking in the server."""
    if isinstance(server, RealRedisServer):
        await eventually(lambda: _blocked(server, clients))


async def _blocked(server: RealRedisServer, clients: int) -> bool:
    info = await server.raw.info("clients")
    blocked: int = info["blocked_clients"]
    return blocked >= clients


async def _unavailable(receive: Awaitable[object]) -> None:
    with pytest.raises(errors.BrokerUnavailable):
        await receive


# --- Scripts ------------------------------------------------------------------


async def test_thousands_are_settled_at_once(real_server: RealRedisServer) -> None:
    """A batch may have ten thousand commands; Lua passes fewer values on."""
    broker = await _declared(real_server)
    await send(broker, *range(9_000))
    intake = await broker.open_intake(0, "me")
    await intake.settle(await take(intake, 9_000))
    assert (await broker.queue_depth())[0] == 0
    await intake.close()


async def test_a_reply_that_fails_keeps_no_other_back(
    server: AnyRedisServer, broker: Broker
) -> None:
    await server.raw.set("bank:replies:mine", "another program's")
    inbox = await broker.open_replies("yours")
    replies = [OutgoingReply(to, "id", b"outcome") for to in ("mine", "yours")]
    with pytest.raises(errors.ConfigurationError):
        await broker.reply(replies)
    assert await inbox.receive() == b"outcome"
    await inbox.close()
