"""What every broker promises: the docstrings of `cqrs_es.ports.broker`, each as a test."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.ports.broker import Nudge, OutgoingCommand, OutgoingReply, Topology
from cqrs_es.runtime.waiting import within
from tests.contract.brokers import (
    EPOCH,
    GIVEN,
    NEW_EPOCH,
    PARTITIONS,
    RETENTION,
    bodies,
    events,
    follow,
    offsets,
    send,
    serving,
    take,
    work_off,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable

    from cqrs_es.ports.broker import Broker, CommandIntake, Delivery, NudgeFeed
    from tests.contract.brokers import BrokerServer


@pytest.fixture(params=["memory", "fakeredis", "redis", "amqp", *GIVEN])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[BrokerServer]:
    """Run an empty server of each kind."""
    async with serving(request.param, request) as server:
        yield server


@pytest.fixture
async def broker(server: BrokerServer) -> Broker:
    """Connect to the server and declare the topology."""
    broker = await server.open()
    await broker.declare(PARTITIONS, EPOCH)
    return broker


@pytest.fixture(params=["memory", "fakeredis", "redis", *GIVEN])
async def stream(request: pytest.FixtureRequest) -> AsyncIterator[Broker]:
    """Connect to a server that keeps events: an exchange has no replay, end, epoch or refusal."""
    async with serving(request.param, request) as server:
        assert server.keeps_events
        stream = await server.open()
        await stream.declare(PARTITIONS, EPOCH)
        yield stream


# --- Commands ----------------------------------------------------------------


async def test_commands_arrive_in_the_order_sent(broker: Broker) -> None:
    """One partition's commands are delivered in the order in which they were sent."""
    intake = await broker.open_intake(0, "a")
    await send(broker, 1, 2, 3)
    await send(broker, 4)
    assert bodies(await take(intake, 4)) == ["1", "2", "3", "4"]


async def test_receive_returns_at_most_what_was_asked_for(broker: Broker) -> None:
    """A receive is bounded, and the next goes on where it ended, settled or not."""
    intake = await broker.open_intake(0, "a")
    await send(broker, 1, 2, 3, 4, 5)
    received = await intake.receive(2)
    await intake.settle(received)
    sizes = [len(received)]
    while len(received) < 5:
        more = await intake.receive(2)
        sizes.append(len(more))
        received += more
    assert set(sizes) <= {1, 2}
    assert bodies(received) == ["1", "2", "3", "4", "5"]


async def test_receive_takes_few_large_messages_at_once(broker: Broker) -> None:
    """A receive is bounded in bytes too; one message it returns however large it is."""
    intake = await broker.open_intake(0, "a")
    large = [bytes([number]) * 100_000 for number in range(40)]
    await broker.send([OutgoingCommand(0, "id", body) for body in large])
    received: list[bytes] = []
    while len(received) < len(large):
        some = await intake.receive(100, 1_000)
        assert len(some) == 1
        received += [delivery.body for delivery in some]
        await intake.settle(some)
    assert received == large


async def test_commands_can_be_looked_at_without_being_taken(broker: Broker) -> None:
    """Where the broker can show them at all: the first ones, or every one that is not settled."""
    assert await broker.peek(0, 0) in ([], None)
    await send(broker, 1, 2, 3)
    if await broker.peek(0, 0) is None:
        return
    assert await broker.peek(0, 2) == [b"1", b"2"]
    intake = await broker.open_intake(0, "a")
    received = await take(intake, 2)
    await intake.settle(received[:1])
    assert await broker.peek(0, 0) == [b"2", b"3"]
    assert bodies(await take(intake, 1)) == ["3"]


async def test_partitions_are_apart(broker: Broker) -> None:
    """An intake delivers its own partition only."""
    await send(broker, "zero", partition=0)
    await send(broker, "one", partition=1)
    intake = await broker.open_intake(1, "a")
    await send(broker, "one again", partition=1)
    received = await take(intake, 2)
    assert bodies(received) == ["one", "one again"]
    assert {delivery.partition for delivery in received} == {1}


async def test_bodies_are_any_bytes(broker: Broker) -> None:
    """A body arrives as it was sent: zero bytes, no text, or large."""
    intake = await broker.open_intake(0, "a")
    awkward = [b"\0\xff\r\n$3\r\n", '{"é": "🏦"}'.encode(), b"x" * 300_000]
    await broker.send([OutgoingCommand(0, "id", body) for body in awkward])
    assert [delivery.body for delivery in await take(intake, 3)] == awkward


async def test_what_is_not_settled_comes_again_in_order(
    server: BrokerServer, broker: Broker
) -> None:
    """What an intake left goes to the next one first, in order and marked; the rest does not."""
    await send(broker, 1, 2, 3, 4, 5)
    first = await broker.open_intake(0, "a")
    taken = await take(first, 4)
    await first.settle([taken[1]])
    await first.close()
    await send(broker, 6)

    again = await take(await broker.open_intake(0, "b"), 5)

    assert bodies(again) == ["1", "3", "4", "5", "6"]
    pushed = not server.tells_pushed
    assert [delivery.redelivered for delivery in again] == [True, True, True, pushed, False]


async def test_first_deliveries_are_not_marked(broker: Broker) -> None:
    """A message that nobody saw before is not marked as redelivered."""
    await send(broker, 1)
    intake = await broker.open_intake(0, "a")
    await send(broker, 2)
    assert not any(delivery.redelivered for delivery in await take(intake, 2))


async def test_redelivery_goes_on_until_it_is_settled(broker: Broker) -> None:
    """Every next intake gets the message, also of a consumer by the same name."""
    await send(broker, 1)
    for _ in range(3):
        intake = await broker.open_intake(0, "a")
        received = await intake.receive(10)
        assert bodies(received) == ["1"]
        await intake.close()
    last = await broker.open_intake(0, "a")
    await last.settle(await last.receive(1))
    await send(broker, 2)
    assert bodies(await (await broker.open_intake(0, "a")).receive(10)) == ["2"]


async def test_settled_is_for_good(broker: Broker) -> None:
    """What was settled never comes again; settling nothing, or twice, is no error."""
    intake = await broker.open_intake(0, "a")
    await send(broker, 1, 2)
    received = await take(intake, 2)
    await intake.settle(received)
    await intake.settle(received)
    await intake.settle([])
    await send(broker, 3)
    assert bodies(await (await broker.open_intake(0, "b")).receive(10)) == ["3"]


async def test_a_dead_consumers_commands_are_taken_over(server: BrokerServer) -> None:
    """A process that died without closing anything holds nothing back."""
    sender, dead = await server.open(), await server.open()
    await sender.declare(PARTITIONS, EPOCH)
    await send(sender, *range(2_500))
    await take(await dead.open_intake(0, "dead"), min(2_499, server.most_unsettled))
    server.let_die(dead)

    survivor = await (await server.open()).open_intake(0, "survivor")

    assert bodies(await work_off(survivor, 2_500)) == [str(number) for number in range(2_500)]


async def test_the_old_owner_of_a_partition_gets_nothing_more(broker: Broker) -> None:
    """Once a later intake is open, the earlier one is told so, and takes nothing away."""
    old = await broker.open_intake(0, "old")
    await send(broker, 1, 2, 3)
    await old.receive(1)
    new = await broker.open_intake(0, "new")
    with pytest.raises(errors.LeaseLost):
        await old.receive(1)
    assert bodies(await take(new, 3)) == ["1", "2", "3"]


async def test_an_old_owner_that_waits_takes_nothing_from_the_new(broker: Broker) -> None:
    """A receive that was under way when another took over gets nothing, and ends."""
    old = await broker.open_intake(0, "old")
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(_refused(old))
        await asyncio.sleep(0)
        new = await broker.open_intake(0, "new")
        await send(broker, 1, 2)
        assert bodies(await take(new, 2)) == ["1", "2"]
    assert waiting.result() is errors.LeaseLost


async def test_an_old_owner_may_settle_what_it_did(server: BrokerServer, broker: Broker) -> None:
    """What is done with is done with, whoever says so; or it is refused and comes again."""
    old = await broker.open_intake(0, "old")
    await send(broker, 1, 2)
    taken = await take(old, 2)
    await broker.open_intake(0, "new")
    if server.settles_late:
        await old.settle(taken[:1])
    else:
        with pytest.raises(errors.LeaseLost):
            await old.settle(taken[:1])
    left = ["2"] if server.settles_late else ["1", "2"]
    newer = await broker.open_intake(0, "newer")
    assert bodies(await take(newer, len(left))) == left


async def test_a_cancelled_receive_takes_nothing(broker: Broker) -> None:
    """What comes after a receive was cancelled goes to the next receive."""
    intake = await broker.open_intake(0, "a")
    waiting = asyncio.create_task(intake.receive(10))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    await send(broker, 1, 2)
    assert bodies(await take(intake, 2)) == ["1", "2"]


async def test_no_command_is_lost_however_receives_are_cut_short(broker: Broker) -> None:
    """Receives cancelled at random moments under load: everything comes once, in order."""
    intake = await broker.open_intake(0, "a")
    count = 1_000
    chance = random.Random(14)
    received: list[Delivery] = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_send_slowly(broker, count))
        while len(received) < count:
            patience = asyncio.timeout(chance.uniform(0, 0.003))
            try:
                async with patience:
                    received += await intake.receive(7)
            except TimeoutError:
                assert patience.expired()
    assert bodies(received) == [str(number) for number in range(count)]


async def test_order_holds_however_often_a_partition_changes_hands(broker: Broker) -> None:
    """Owners that replace each other at random under load: none lost, each first seen in order."""
    count, chance = 500, random.Random(16)
    first_seen: dict[str, None] = {}
    settled: set[str] = set()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_send_slowly(broker, count))
        while len(settled) < count:
            intake = await broker.open_intake(0, f"owner-{chance.random()}")
            received = await intake.receive(9)
            first_seen |= dict.fromkeys(bodies(received))
            done = received[: chance.randrange(len(received) + 1)]
            await intake.settle(done)
            settled.update(bodies(done))
    assert list(first_seen) == [str(number) for number in range(count)]
    assert (await broker.queue_depth())[0] == 0


async def test_a_closed_intake_is_dead(broker: Broker) -> None:
    """Closing twice is fine; receiving from a closed intake is not."""
    intake = await broker.open_intake(0, "a")
    await intake.close()
    await intake.close()
    with pytest.raises(errors.BrokerUnavailable):
        await intake.receive(1)


async def test_queue_depth_counts_what_is_not_settled(broker: Broker) -> None:
    """Commands count until they are settled, in every declared partition."""
    await send(broker, 1, 2, 3)
    await send(broker, 4, partition=2)
    intake = await broker.open_intake(0, "a")
    await intake.settle(await intake.receive(1))
    await intake.receive(1)
    assert await broker.queue_depth() == {0: 2, 1: 0, 2: 1, 3: 0}


async def test_sending_nothing_is_no_error(broker: Broker) -> None:
    """An empty batch is sent at once."""
    await broker.send([])
    assert sum((await broker.queue_depth()).values()) == 0


# --- Topic -------------------------------------------------------------------


async def test_events_arrive_in_offset_order(broker: Broker) -> None:
    """A subscriber gets each partition's events in offset order, with their bodies."""
    feed = await broker.subscribe({0: 0, 1: 0})
    assert await broker.publish(0, EPOCH, events(1, 3)) == 3
    assert await broker.publish(1, EPOCH, events(1, 2)) == 2
    assert await broker.publish(0, EPOCH, events(4, 4)) == 4
    followed = await follow(feed, 6)
    assert offsets([event for event in followed if event.partition == 0]) == [1, 2, 3, 4]
    assert offsets([event for event in followed if event.partition == 1]) == [1, 2]
    assert all(event.body == f"event {event.offset}".encode() for event in followed)


async def test_a_feed_is_bounded(broker: Broker) -> None:
    """A receive returns at most what was asked for, of all partitions together."""
    feed = await broker.subscribe(dict.fromkeys(range(PARTITIONS), 0))
    for partition in range(PARTITIONS):
        await broker.publish(partition, EPOCH, events(1, 5))
    sizes: list[int] = []
    while sum(sizes) < 5 * PARTITIONS:
        sizes.append(len(await feed.receive(3)))
    assert max(sizes) <= 3


async def test_a_feed_begins_above_the_given_offset(stream: Broker) -> None:
    """Only the partitions asked for, only above their offsets."""
    await stream.publish(0, EPOCH, events(1, 5))
    await stream.publish(1, EPOCH, events(1, 5))
    feed = await stream.subscribe({1: 3})
    assert [(event.partition, event.offset) for event in await follow(feed, 2)] == [(1, 4), (1, 5)]


async def test_every_subscriber_gets_everything(broker: Broker) -> None:
    """Subscribers don't take events from each other."""
    feeds = [await broker.subscribe({0: 0}) for _ in range(2)]
    await broker.publish(0, EPOCH, events(1, 3))
    assert [offsets(await follow(feed, 3)) for feed in feeds] == [[1, 2, 3]] * 2


async def test_a_waiting_subscriber_is_woken(broker: Broker) -> None:
    """A receive that began before the event was published returns it."""
    feed = await broker.subscribe({0: 0})
    async with asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(feed.receive(10))
        await asyncio.sleep(0)
        await broker.publish(0, EPOCH, events(1, 1))
    assert offsets(waiting.result()) == [1]


async def test_publishing_again_changes_nothing(stream: Broker) -> None:
    """Events that the topic has are confirmed again, wholly or in part, and stored once."""
    assert await stream.publish(0, EPOCH, events(1, 4)) == 4
    assert await stream.publish(0, EPOCH, events(1, 4)) == 4
    assert await stream.publish(0, EPOCH, events(2, 3)) == 4  # that is how far the topic is
    assert await stream.publish(0, EPOCH, events(3, 6)) == 6
    feed = await stream.subscribe({0: 0})
    assert offsets(await follow(feed, 6)) == [1, 2, 3, 4, 5, 6]
    assert await stream.topic_end(0) == 6


async def test_a_gap_is_refused(stream: Broker) -> None:
    """Events that don't follow on are not stored; the answer says where to go on from."""
    assert await stream.publish(0, EPOCH, events(3, 5)) == 0
    await stream.publish(0, EPOCH, events(1, 2))
    assert await stream.publish(0, EPOCH, events(4, 6)) == 2
    assert await stream.publish(0, EPOCH, events(3, 6)) == 6
    feed = await stream.subscribe({0: 0})
    assert offsets(await follow(feed, 6)) == [1, 2, 3, 4, 5, 6]


async def test_the_topics_end_is_known(stream: Broker) -> None:
    """The end is the last offset published, 0 before the first."""
    assert await stream.topic_end(1) == 0
    await stream.publish(1, EPOCH, events(1, 7))
    assert await stream.topic_end(1) == 7
    assert await stream.topic_end(0) == 0


async def test_a_relay_of_another_epoch_is_refused(stream: Broker) -> None:
    """Once the log has a new epoch, who still publishes the old one is stopped."""
    await stream.publish(0, EPOCH, events(1, 2))
    await stream.declare(PARTITIONS, NEW_EPOCH)
    with pytest.raises(errors.LeaseLost):
        await stream.publish(0, EPOCH, events(3, 3))
    assert await stream.topic_end(0) == 0


async def test_a_new_epoch_starts_the_topic_again(stream: Broker) -> None:
    """The topic is empty after a new epoch, and subscribers get it from its start."""
    await stream.publish(0, EPOCH, events(1, 5))
    feed = await stream.subscribe({0: 0})
    await follow(feed, 5)
    await stream.declare(PARTITIONS, NEW_EPOCH)
    assert await stream.publish(0, NEW_EPOCH, events(1, 2)) == 2
    assert offsets(await follow(feed, 2)) == [1, 2]


async def test_declaring_again_keeps_everything(server: BrokerServer, broker: Broker) -> None:
    """Declaring what is there loses neither events nor commands."""
    await broker.publish(0, EPOCH, events(1, 2))
    await send(broker, 1)
    await broker.declare(PARTITIONS, EPOCH)
    assert await broker.topic_end(0) == (2 if server.keeps_events else None)
    assert bodies(await (await broker.open_intake(0, "a")).receive(10)) == ["1"]


async def test_a_new_epoch_keeps_the_commands(broker: Broker) -> None:
    """Commands that wait belong to no epoch."""
    await send(broker, 1)
    await broker.declare(PARTITIONS, NEW_EPOCH)
    assert bodies(await (await broker.open_intake(0, "a")).receive(10)) == ["1"]


async def test_the_topic_holds_about_its_retention(stream: Broker) -> None:
    """Old events go, the newest stay without a gap, and publishing goes on."""
    last = 10 * RETENTION
    for first in range(1, last, RETENTION):
        await stream.publish(0, EPOCH, events(first, first + RETENTION - 1))
    feed = await stream.subscribe({0: 0})
    held = offsets(await feed.receive(1))
    while held[-1] < last:
        held += offsets(await feed.receive(1_000))
    assert held == list(range(held[0], last + 1))
    assert RETENTION <= len(held) <= 3 * RETENTION
    assert await stream.publish(0, EPOCH, events(last + 1, last + 1)) == last + 1


async def test_a_cancelled_subscriber_loses_nothing(broker: Broker) -> None:
    """Receives cancelled at random moments: every event comes once, in order."""
    feed = await broker.subscribe({0: 0})
    chance = random.Random(15)
    followed: list[int] = []
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_publish_slowly(broker, RETENTION))
        while len(followed) < RETENTION:
            patience = asyncio.timeout(chance.uniform(0, 0.003))
            try:
                async with patience:
                    followed += offsets(await feed.receive(7))
            except TimeoutError:
                assert patience.expired()
    assert followed == list(range(1, RETENTION + 1))


async def test_a_closed_feed_is_dead(broker: Broker) -> None:
    """Closing twice is fine; receiving from a closed feed is not."""
    feed = await broker.subscribe({0: 0})
    await feed.close()
    await feed.close()
    with pytest.raises(errors.BrokerUnavailable):
        await feed.receive(1)


# --- Replies -----------------------------------------------------------------


async def test_replies_reach_their_sender(broker: Broker) -> None:
    """An inbox gets the replies to its name, in order, and no others."""
    inbox = await broker.open_replies("client-42")
    await broker.reply(
        [
            OutgoingReply("client-43", "id-0", b"not mine"),
            OutgoingReply("client-42", "id-1", b"first"),
            OutgoingReply("client-42", "id-2", b"second"),
        ]
    )
    await broker.reply([])
    await broker.reply([OutgoingReply("client-42", "id-3", b"third")])
    assert [await inbox.receive() for _ in range(3)] == [b"first", b"second", b"third"]


async def test_an_inbox_begins_when_it_is_opened(broker: Broker) -> None:
    """Replies from before are not delivered."""
    await broker.reply([OutgoingReply("client-42", "id-1", b"before")])
    inbox = await broker.open_replies("client-42")
    await broker.reply([OutgoingReply("client-42", "id-2", b"after")])
    assert await inbox.receive() == b"after"


async def test_a_cancelled_inbox_loses_nothing(broker: Broker) -> None:
    """A reply that comes after a receive was cancelled goes to the next."""
    inbox = await broker.open_replies("client-42")
    waiting = asyncio.create_task(inbox.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await broker.reply([OutgoingReply("client-42", "id-1", b"outcome")])
    assert await inbox.receive() == b"outcome"


async def test_a_closed_inbox_is_dead(broker: Broker) -> None:
    """Closing twice is fine; receiving from a closed inbox is not."""
    inbox = await broker.open_replies("client-42")
    await inbox.close()
    await inbox.close()
    with pytest.raises(errors.BrokerUnavailable):
        await inbox.receive()


# --- The broker itself -------------------------------------------------------


async def test_what_was_declared_can_be_read_back(server: BrokerServer) -> None:
    """A sender learns P and the epoch from the broker; before they are declared, nothing."""
    broker = await server.open()
    assert await broker.topology() is None
    await broker.declare(PARTITIONS, EPOCH)
    epoch, new_epoch = (EPOCH, NEW_EPOCH) if server.keeps_events else (None, None)
    assert await broker.topology() == Topology(PARTITIONS, epoch)
    await broker.declare(PARTITIONS, NEW_EPOCH)
    assert await (await server.open()).topology() == Topology(PARTITIONS, new_epoch)


async def test_closing_a_broker_ends_what_waits_on_it(server: BrokerServer) -> None:
    """Receives that are under way end with an error; closing twice is fine."""
    broker = await server.open()
    await broker.declare(PARTITIONS, EPOCH)
    intake = await broker.open_intake(0, "a")
    feed = await broker.subscribe({0: 0})
    inbox = await broker.open_replies("client-42")
    async with asyncio.timeout(10), asyncio.TaskGroup() as tasks:
        for receive in (intake.receive(1), feed.receive(1), inbox.receive()):
            tasks.create_task(_unavailable(receive))
        await asyncio.sleep(0)
        await broker.close()
        await broker.close()


async def test_messages_outlive_the_broker_object(server: BrokerServer) -> None:
    """A broker that is closed and opened again finds what was not settled."""
    broker = await server.open()
    await broker.declare(PARTITIONS, EPOCH)
    await send(broker, 1, 2)
    intake = await broker.open_intake(0, "a")
    await intake.settle(await intake.receive(1))
    await broker.close()

    await broker.open()

    assert bodies(await (await broker.open_intake(0, "a")).receive(10)) == ["2"]


async def _send_slowly(broker: Broker, count: int) -> None:
    for number in range(count):
        await send(broker, number)


async def _publish_slowly(broker: Broker, count: int) -> None:
    for offset in range(1, count + 1):
        await broker.publish(0, EPOCH, events(offset, offset))


async def _refused(intake: CommandIntake) -> type[Exception]:
    with pytest.raises(errors.LeaseLost) as refusal:
        await intake.receive(10)
    return refusal.type


async def _unavailable(receive: Awaitable[object]) -> None:
    with pytest.raises(errors.BrokerUnavailable):
        await receive


# --- Nudges --------------------------------------------------------------------


@pytest.fixture(params=["fakeredis", "redis", "amqp"])
async def nudging(request: pytest.FixtureRequest) -> AsyncIterator[BrokerServer]:
    """Run a server that takes nudges, with its topology declared."""
    async with serving(request.param, request) as server:
        await (await server.open()).declare(PARTITIONS, EPOCH)
        yield server


async def listener(server: BrokerServer, nudge: Nudge) -> NudgeFeed:
    """Listen as one more process."""
    feed = await (await server.open()).open_nudges(nudge)
    assert feed is not None
    return feed


async def test_a_nudge_reaches_all_who_listen_for_its_kind(nudging: BrokerServer) -> None:
    """Each of them hears it, those of the other kind don't; several at a time are one."""
    feeds = [await listener(nudging, Nudge.EVENTS) for _ in range(2)]
    other = await listener(nudging, Nudge.DUE)
    broker = await nudging.open()
    for _ in range(2):
        for _ in range(20):
            await broker.nudge(Nudge.EVENTS)
        async with asyncio.timeout(10):
            for feed in feeds:
                await feed.receive()
    assert await within(0.2, _heard(other)) is None
    await broker.nudge(Nudge.DUE)
    assert await within(10, _heard(other))


async def _heard(feed: NudgeFeed) -> bool:
    await feed.receive()
    return True


@pytest.mark.parametrize("nudging", ["redis"], indirect=True)  # which is asked whether it is there
async def test_nudges_of_a_silent_time_are_still_heard(nudging: BrokerServer) -> None:
    """A feed that has heard nothing for seconds is as good as a new one."""
    feed, broker = await listener(nudging, Nudge.EVENTS), await nudging.open()
    assert await within(4.5, _heard(feed)) is None
    await broker.nudge(Nudge.EVENTS)
    assert await within(10, _heard(feed))


async def test_nobody_needs_to_hear_a_nudge(nudging: BrokerServer) -> None:
    """Without a listener it is dropped; who listens later hears only what comes later."""
    broker = await nudging.open()
    await broker.nudge(Nudge.EVENTS)
    feed = await listener(nudging, Nudge.EVENTS)
    assert await within(0.2, _heard(feed)) is None
    await feed.close()
    await broker.nudge(Nudge.EVENTS)
    assert await broker.topology() is not None


async def test_a_feed_ends_with_its_connection(nudging: BrokerServer) -> None:
    """Who listens is told when nothing more can be heard."""
    broker = await nudging.open()
    feed = await broker.open_nudges(Nudge.EVENTS)
    assert feed is not None
    await broker.close()
    with pytest.raises(errors.BrokerUnavailable):
        await within(10, _heard(feed))
    await feed.close()
