"""The client against a running bank, on every broker."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import orjson
import pytest
from redis.asyncio import Redis

from cqrs_es import Aggregate, command, errors
from cqrs_es.client import Client, FileCursor, SyncClient, new_command
from cqrs_es.client.sending import Replies, outgoing
from cqrs_es.messages import Status
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.settings import Settings
from cqrs_es.types import AggregateKey, new_command_id, partition_of
from cqrs_es.wire import encode_command
from domain.account import BankAccount, DepositMoney, OpenAccount
from tests.contract.brokers import EPOCH, PARTITIONS, SERVICE, serving
from tests.servers import start_redis
from tests.waiting import eventually
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cqrs_es.client import Event, Subscription
    from cqrs_es.messages import Outcome
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import Broker, OutgoingReply
    from tests.contract.brokers import BrokerServer


@dataclass
class Bank:
    """The bank, running on a SQLite file and the broker under test."""

    server: BrokerServer
    broker: Broker
    opened: OpenApplication
    store_url: str

    async def client(self, stack: AsyncExitStack, *, store: bool | None = None) -> Client:
        """Connect as another service would; with the store where the topic keeps nothing."""
        store = not self.server.keeps_events if store is None else store
        client = Client(
            broker=await self.server.open(),
            service=SERVICE,
            store_url=self.store_url if store else None,
        )
        return await stack.enter_async_context(client)

    async def settled(self) -> None:
        """Wait until the queue is empty."""

        async def empty() -> bool:
            return not await self.has_commands()

        await eventually(empty)

    async def has_commands(self) -> bool:
        """Tell whether anything is in the queue."""
        return bool(sum((await self.broker.queue_depth()).values()))


KEEPING_EVENTS = ["memory", "fakeredis", "redis"]


@pytest.fixture(params=[*KEEPING_EVENTS, "amqp"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[BrokerServer]:
    async with serving(request.param, request) as server:
        yield server


@pytest.fixture
async def idle(server: BrokerServer, sqlite_url: str) -> AsyncIterator[Bank]:
    """Open a bank that nobody works at."""
    broker = await server.open()
    settings = Settings(store_url=sqlite_url, partitions=PARTITIONS, lease_seconds=1)
    async with app.open(settings, broker=broker) as opened:
        yield Bank(server, broker, opened, sqlite_url)


@pytest.fixture
async def bank(idle: Bank) -> AsyncIterator[Bank]:
    """Open a bank with everybody at work."""
    async with idle.opened.running():
        yield idle


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
async def client(bank: Bank, stack: AsyncExitStack) -> Client:
    return await bank.client(stack)


async def take(events: Subscription[dict[str, Any]], count: int) -> list[Event]:
    """Take so many events."""
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(count)]


def what(events: list[Event]) -> list[str]:
    """Say of which aggregates and sequences the events are."""
    return [f"{event.aggregate_id}/{event.sequence}" for event in events]


async def deposits(client: Client, account: str, count: int) -> None:
    """Open an account and pay in 1, so often that it has `count` events."""
    opening = new_command("account", account, "OpenAccount", {"account_id": account})
    paying = [
        new_command("account", account, "DepositMoney", {"amount": "1"}) for _ in range(count - 1)
    ]
    await client.send_many([opening, *paying])


def drop_replies(bank: Bank, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Lose the next replies on their way."""
    lost = 0
    reply = bank.broker.reply

    async def losing(replies: list[OutgoingReply]) -> None:
        nonlocal lost
        kept = replies[count - lost :]
        lost += len(replies) - len(kept)
        await reply(kept)

    monkeypatch.setattr(bank.broker, "reply", losing)


# --- Sending -----------------------------------------------------------------


async def test_a_command_by_its_names(bank: Bank, client: Client) -> None:
    """A sender needs names and a payload, nothing of the domain."""
    command_id = await client.send(
        "account", "A1", "OpenAccount", {"account_id": "A1"}, metadata={"correlation_id": "o-17"}
    )
    await eventually(lambda: bank.opened.outcome(command_id))
    (event,) = await bank.opened.events(BankAccount, "A1")
    assert event.command_id == command_id
    assert event.metadata == {"correlation_id": "o-17"}


async def test_a_command_object(client: Client) -> None:
    """A sender that has the domain's classes may use them."""
    await client.execute(BankAccount, "A1", OpenAccount("A1"))
    outcome = await client.execute(BankAccount, "A1", DepositMoney(Decimal("5.00")))
    assert (outcome.status, outcome.sequence) == (Status.ACCEPTED, 2)
    assert [event.type for event in outcome.events] == ["CustomerDepositedMoney"]


async def test_a_command_for_later(bank: Bank, client: Client) -> None:
    """It is kept in the store, once however often it is sent, and decided when it is due."""
    opening = {"account_id": "A1"}
    later, soon = datetime.now(UTC) + timedelta(days=1), datetime.now(UTC) + timedelta(seconds=1)
    one = await client.send("account", "A1", "OpenAccount", opening, at=later)
    events = bank.opened.storage.events
    await eventually(lambda: events.find_scheduled([one]))
    await client.send("account", "A1", "OpenAccount", opening, at=soon, command_id=one)
    two = await client.send("account", "A2", "OpenAccount", {"account_id": "A2"}, at=soon)
    await eventually(lambda: bank.opened.outcome(two))
    assert datetime.now(UTC) >= soon
    key = AggregateKey("account", "A1")
    (row,) = await events.list_scheduled(None, 10, key)
    assert (row.command_id, row.due) == (one, later)
    assert await bank.opened.outcome(one) is None
    await events.hasten([one])
    await eventually(lambda: bank.opened.outcome(one))
    await client.send("account", "A1", "OpenAccount", opening, at=later, command_id=one)
    assert (await client.execute("account", "A1", "DepositMoney", {"amount": "1"})).accepted
    await bank.settled()
    assert await events.list_scheduled(None, 10, key) == []


async def test_a_malformed_envelope_is_a_dead_letter(bank: Bank, client: Client) -> None:
    """What can't be scheduled is buried with its reason; what comes behind it is decided."""
    command_id = new_command_id()
    message = encode_command(new_command("account", "A1", "OpenAccount", {"account_id": "A1"}))
    bad = orjson.dumps({"schedule": orjson.loads(message) | {"id": command_id}, "due": "tomorrow"})
    partition = partition_of("account", "A1", PARTITIONS)
    await bank.broker.send([OutgoingCommand(partition, command_id, bad)])
    assert (await client.execute("account", "A1", "OpenAccount", {"account_id": "A1"})).accepted
    await bank.settled()
    letter = await bank.opened.storage.dead_letters.get(command_id)
    assert letter is not None
    assert "due must be a moment such as 2027-01-01T00:00:00Z" in letter.reason
    assert letter.body == bad


async def test_an_impossible_moment_is_refused_at_once(idle: Bank, stack: AsyncExitStack) -> None:
    """Nothing is sent that no worker would take."""
    client = await idle.client(stack)
    for at in (datetime(2027, 1, 1), datetime(2020, 1, 1, tzinfo=UTC)):  # noqa: DTZ001
        with pytest.raises(errors.InvalidMessage, match=r"time zone|more than a day ago"):
            await client.send("account", "A1", "OpenAccount", {"account_id": "A1"}, at=at)
    assert not await idle.has_commands()


async def test_an_expectation_goes_with_the_command(client: Client) -> None:
    """`expected_sequence` is checked by the service."""
    await client.execute(BankAccount, "A1", OpenAccount("A1"))
    outcome = await client.execute(
        "account", "A1", "DepositMoney", {"amount": Decimal("1.50")}, expected_sequence=7
    )
    assert outcome.error is not None
    assert outcome.error.code == "conflict"


async def test_many_commands_keep_their_order(bank: Bank, client: Client) -> None:
    """Commands sent together for one aggregate are decided in that order."""
    await client.execute(BankAccount, "A1", OpenAccount("A1"))
    messages = [
        new_command("account", "A1", "DepositMoney", {"amount": f"{number}"})
        for number in range(1, 1200)
    ]
    ids = await client.send_many(messages)
    assert ids == [message.id for message in messages]

    await eventually(lambda: bank.opened.outcome(ids[-1]), within_seconds=30)

    events = await bank.opened.events(BankAccount, "A1")
    assert [event.command_id for event in events[1:]] == ids


async def test_nothing_is_sent_unless_all_is_valid(idle: Bank, stack: AsyncExitStack) -> None:
    """One bad message among many keeps all of them back."""
    client = await idle.client(stack)
    messages = [
        new_command("account", "A1", "DepositMoney", {"amount": "1"}),
        new_command("account", "A1", "DepositMoney", {"amount": "1"}, command_id="17"),
    ]
    with pytest.raises(errors.InvalidMessage, match="id must be a UUID"):
        await client.send_many(messages)
    assert not await idle.has_commands()


@command
class Late:
    at: datetime


BERLIN = datetime(2026, 1, 1, tzinfo=ZoneInfo("Europe/Berlin"))
INVALID: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    (("account", "", "DepositMoney", {}), {}, "aggregate_id must have 1 to 255"),
    (("bank account", "A1", "DepositMoney", {}), {}, "aggregate_type must match"),
    (("account", "A1", "Deposit Money", {}), {}, "type must match"),
    (("account", "A\ud800", "DepositMoney", {}), {}, "not JSON"),
    (("account", "A1", "DepositMoney", {"at": object()}), {}, "can't be written as JSON"),
    (("account", "A1", "DepositMoney", {"text": "x" * 300_000}), {}, "over the limit"),
    (("account", "A1", "DepositMoney", {}), {"metadata": {"Key": "x"}}, "metadata key"),
    (("account", "A1", "DepositMoney", {}), {"metadata": {"key": 1}}, "metadata.key"),
    (("account", "A1", "DepositMoney", {}), {"expected_sequence": -1}, "expected_sequence"),
    (("account", "A1", "DepositMoney", {}), {"reply_to": "../x"}, "reply_to must match"),
    (("account", "A1", DepositMoney(Decimal(1)), {}), {}, "is its own payload"),
    ((int, "A1", DepositMoney(Decimal(1))), {}, "is no aggregate"),
    ((Aggregate, "A1", DepositMoney(Decimal(1))), {}, "Aggregate has no type: declare it as class"),
    (("account", "A1", Late(BERLIN)), {}, "Late.at: must have a fixed offset from UTC, not the"),
]


@pytest.mark.parametrize(("arguments", "options", "reason"), INVALID)
async def test_what_no_worker_would_take_is_refused_at_once(
    idle: Bank, stack: AsyncExitStack, arguments: tuple[Any, ...], options: Any, reason: str
) -> None:
    """The sender is told the field and the reason; nothing reaches the queue."""
    client = await idle.client(stack)
    with pytest.raises(errors.InvalidMessage, match=reason):
        await client.send(*arguments, **options)
    assert not await idle.has_commands()


async def test_a_broker_that_is_gone(tmp_path: Path) -> None:
    """The sender is told what it was about to send, and that it may send it again."""
    redis = start_redis(tmp_path)
    url = f"redis://127.0.0.1:{redis.port}/0"
    async with Client(url, service=SERVICE, partitions=PARTITIONS) as client:
        redis.stop()
        command_id = new_command_id()
        with pytest.raises(errors.BrokerUnavailable, match=f"{command_id} may have arrived"):
            await client.send("account", "A1", "DepositMoney", {}, command_id=command_id)


# --- Outcomes ----------------------------------------------------------------


async def test_an_id_has_one_outcome(client: Client) -> None:
    """Executing again with an id gives the same outcome, marked."""
    await client.execute(BankAccount, "A1", OpenAccount("A1"))
    command_id = new_command_id()
    deposit = DepositMoney(Decimal(5))
    first = await client.execute(BankAccount, "A1", deposit, command_id=command_id)
    again = await client.execute(BankAccount, "A1", deposit, command_id=command_id.upper())
    assert (first.sequence, first.duplicate) == (2, False)
    assert (again.sequence, again.duplicate) == (2, True)


async def test_an_id_of_another_command_is_an_error(client: Client) -> None:
    """Whoever makes the ids has a fault: no outcome that might be passed over."""
    await client.execute(BankAccount, "A1", OpenAccount("A1"))
    command_id = new_command_id()
    await client.execute(BankAccount, "A1", DepositMoney(Decimal(5)), command_id=command_id)
    with pytest.raises(errors.IdReused, match="another content") as caught:
        await client.execute(BankAccount, "A1", DepositMoney(Decimal(6)), command_id=command_id)
    assert caught.value.command_id == command_id


async def test_many_wait_at_once(client: Client) -> None:
    """All commands of a client share an inbox, and each gets its own outcome."""
    accounts = [f"A{number}" for number in range(50)]
    outcomes = await asyncio.gather(
        *(client.execute(BankAccount, account, OpenAccount(account)) for account in accounts)
    )
    assert [outcome.aggregate_id for outcome in outcomes] == accounts
    assert all(outcome.accepted for outcome in outcomes)


async def test_two_wait_for_one_id(client: Client) -> None:
    """Whoever waits for the same id gets its outcome too."""
    command_id = new_command_id()
    outcomes = await asyncio.gather(
        *(
            client.execute(BankAccount, "A1", OpenAccount("A1"), command_id=command_id)
            for _ in range(3)
        )
    )
    assert [outcome.sequence for outcome in outcomes] == [1, 1, 1]


async def test_a_lost_reply_is_had_by_sending_again(
    bank: Bank, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half-way through its time the client sends again, and is answered from the store."""
    drop_replies(bank, monkeypatch, 1)
    outcome = await client.execute(BankAccount, "A1", OpenAccount("A1"), timeout=4)
    assert (outcome.status, outcome.duplicate) == (Status.ACCEPTED, True)
    assert len(await bank.opened.events(BankAccount, "A1")) == 1


async def test_without_replies_the_store_knows(
    bank: Bank, stack: AsyncExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that has the store looks there before it gives up."""
    drop_replies(bank, monkeypatch, 1000)
    client = await bank.client(stack, store=True)
    outcome = await client.execute(BankAccount, "A1", OpenAccount("A1"), timeout=3)
    assert (outcome.status, outcome.duplicate) == (Status.ACCEPTED, False)


async def test_a_reply_in_the_tick_of_its_time_out(bank: Bank, stack: AsyncExitStack) -> None:
    """Whoever has just given up takes no reply from who still waits, and the reading goes on."""
    broker = await bank.server.open()
    replies = Replies(broker)
    stack.push_async_callback(replies.close)
    await replies.opened()
    opening = new_command(BankAccount, "A1", OpenAccount("A1"), reply_to=replies.reply_to)
    with replies.expecting(opening.id) as late, replies.expecting(opening.id) as waiting:
        late.cancel()
        await broker.send([outgoing(opening, PARTITIONS)])
        assert (await asyncio.wait_for(waiting, 10)).accepted
    with replies.expecting(opening.id) as again:
        await broker.send([outgoing(opening, PARTITIONS)])
        assert (await asyncio.wait_for(again, 10)).duplicate


async def test_giving_up_is_safe(idle: Bank, stack: AsyncExitStack) -> None:
    """Without a worker the wait ends; the same id gives the outcome once there is one."""
    client = await idle.client(stack, store=True)
    command_id = new_command_id()
    with pytest.raises(errors.WaitTimeout, match=f"{command_id}.*same id is safe") as raised:
        await client.execute(
            BankAccount, "A1", OpenAccount("A1"), command_id=command_id, timeout=0.2
        )
    assert raised.value.__suppress_context__  # what the wait was made of tells nobody anything
    async with idle.opened.running():
        outcome = await client.execute(BankAccount, "A1", OpenAccount("A1"), command_id=command_id)
    assert outcome.accepted
    assert len(await idle.opened.events(BankAccount, "A1")) == 1


async def test_a_cancelled_wait_leaves_nothing_behind(idle: Bank, stack: AsyncExitStack) -> None:
    """Whoever stops waiting is forgotten."""
    client = await idle.client(stack)
    waiting = asyncio.create_task(client.execute(BankAccount, "A1", OpenAccount("A1")))
    await eventually(idle.has_commands)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert waiting.cancelled()
    assert client._replies._waiting == {}


async def test_what_only_the_store_knows(bank: Bank, stack: AsyncExitStack) -> None:
    """With the store at hand, outcomes can be looked up and views waited for."""
    client = await bank.client(stack, store=True)
    outcome = await client.execute(BankAccount, "A1", OpenAccount("A1"))
    assert await client.outcome(outcome.command_id.upper()) == outcome
    assert await client.outcome(new_command_id()) is None
    await client.wait_for_view("account_query", outcome)
    (row,) = await bank.opened.view_rows("account_query")
    assert row.view_id == "A1"
    with pytest.raises(errors.NotFound, match="no view 'nonsense'"):
        await client.wait_for_view("nonsense", outcome)


async def test_a_view_that_nobody_keeps(idle: Bank, stack: AsyncExitStack) -> None:
    """Waiting for a view ends when its projector does not run."""
    client = await idle.client(stack, store=True)
    outcome = await idle.opened.execute(BankAccount, "A1", OpenAccount("A1"))
    with pytest.raises(errors.WaitTimeout, match="is its projector running"):
        await client.wait_for_view("account_query", outcome, 0.1)


async def test_without_the_store_it_can_not_be_asked(idle: Bank, stack: AsyncExitStack) -> None:
    """The message says what is missing."""
    client = await idle.client(stack, store=False)
    with pytest.raises(errors.ConfigurationError, match="give the client store_url"):
        await client.outcome(new_command_id())


# --- Events ------------------------------------------------------------------


async def test_every_event_once_in_order(client: Client) -> None:
    """A subscriber gets each aggregate's events in order, as objects with their data."""
    async with client.subscribe("test") as events:
        await asyncio.gather(*(deposits(client, f"A{number}", 20) for number in range(10)))
        taken = await take(events, 200)
    for number in range(10):
        of_one = [event for event in taken if event.aggregate_id == f"A{number}"]
        assert [event.sequence for event in of_one] == list(range(1, 21))
    last = max(taken, key=lambda event: (event.aggregate_id, event.sequence))
    assert last.event_type == "CustomerDepositedMoney"
    assert last.data == {"amount": "1", "balance": "19"}
    assert last.command_id is not None


async def test_only_some_types(client: Client) -> None:
    """A subscriber may leave types out."""
    await deposits(client, "A1", 3)
    await deposits(client, "A2", 3)
    async with client.subscribe("test", types={"AccountOpened"}) as events:
        assert {event.aggregate_id for event in await take(events, 2)} == {"A1", "A2"}
    async with client.subscribe("test", types="AccountOpened") as events:
        assert len(await take(events, 2)) == 2


async def test_from_the_end(client: Client) -> None:
    """A subscriber may begin with what happens from now on."""
    await deposits(client, "A1", 5)
    async with client.subscribe("first") as events:
        await take(events, 5)
    async with client.subscribe("test", from_="end") as events:
        await client.execute(BankAccount, "A1", DepositMoney(Decimal(7)))
        assert what(await take(events, 1)) == ["A1/6"]


async def test_a_cursor_goes_on_where_it_was(client: Client, tmp_path: Path) -> None:
    """What was handled does not come again; what was not, does."""
    cursor = FileCursor(tmp_path / "test.json")
    await deposits(client, "A1", 6)
    async with client.subscribe("test", cursor=cursor) as events:
        assert what(await take(events, 2)) == ["A1/1", "A1/2"]  # the block ends well: handled
    with pytest.raises(ZeroDivisionError):
        await _fail_on_the_next(client, FileCursor(tmp_path / "test.json"))
    async with client.subscribe("test", cursor=FileCursor(tmp_path / "test.json")) as events:
        assert what(await take(events, 4)) == ["A1/3", "A1/4", "A1/5", "A1/6"]


async def _fail_on_the_next(client: Client, cursor: FileCursor) -> None:
    async with client.subscribe("test", cursor=cursor) as events:
        async for _ in events:
            raise ZeroDivisionError


async def test_a_cursor_passes_over_other_types(client: Client, tmp_path: Path) -> None:
    """Events that are left out are handled too."""
    path = tmp_path / "test.json"
    await deposits(client, "A1", 6)
    async with client.subscribe("test", cursor=FileCursor(path), types=["Nothing"]) as events:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await anext(events)
    assert sum(orjson.loads(path.read_bytes())["offsets"].values()) == 6


async def test_a_new_cursor_may_begin_at_the_end(client: Client, tmp_path: Path) -> None:
    """`from_` is for cursors that have no position yet, and for those only."""
    path = tmp_path / "test.json"
    await deposits(client, "A1", 2)
    async with client.subscribe("first") as events:
        await take(events, 2)
    async with client.subscribe("test", cursor=FileCursor(path), from_="end") as events:
        await client.execute(BankAccount, "A1", DepositMoney(Decimal(1)))
        assert what(await take(events, 1)) == ["A1/3"]
    await client.execute(BankAccount, "A1", DepositMoney(Decimal(1)))
    async with client.subscribe("test", cursor=FileCursor(path), from_="end") as events:
        assert what(await take(events, 1)) == ["A1/4"]


async def test_impatience_loses_nothing(client: Client) -> None:
    """Waits for events may be cut short at any time."""
    taken: list[Event] = []
    async with client.subscribe("test") as events:
        sending = asyncio.create_task(deposits(client, "A1", 90))
        async with asyncio.timeout(30):
            while len(taken) < 90:
                try:
                    async with asyncio.timeout(0.002):
                        taken.append(await anext(events))
                except TimeoutError:
                    pass
        await sending
    assert [event.sequence for event in taken] == list(range(1, 91))


@pytest.mark.parametrize("server", ["amqp"], indirect=True)
async def test_the_start_of_a_topic_that_keeps_nothing(idle: Bank, stack: AsyncExitStack) -> None:
    """Without the store it can't be had, which is said at once."""
    client = await idle.client(stack, store=False)
    async with asyncio.timeout(5):
        with pytest.raises(errors.EventsGone, match="give the client store_url"):
            async with client.subscribe("test"):
                pass
        async with client.subscribe("test", from_="end"):
            pass


@pytest.mark.parametrize("server", KEEPING_EVENTS, indirect=True)
async def test_what_the_topic_has_dropped(idle: Bank, stack: AsyncExitStack) -> None:
    """Without the store a subscriber is told what is missing; with the store it misses nothing."""
    without, having = await idle.client(stack), await idle.client(stack, store=True)
    await deposits(without, "A1", 500)  # of which the topic keeps about 100
    async with idle.opened.running(), having.subscribe("test") as events:
        assert [event.sequence for event in await take(events, 500)] == list(range(1, 501))
        async with without.subscribe("test", from_="end") as newest:
            await deposits(having, "A1", 2)
            assert len(await take(newest, 1)) == 1
        with pytest.raises(errors.EventsGone, match=r"offsets 1 to .*give the client store_url"):
            async with without.subscribe("test") as holed:
                await take(holed, 1)


async def test_a_log_that_starts_again(idle: Bank, stack: AsyncExitStack, tmp_path: Path) -> None:
    """After `init --new-epoch` everything comes again, to those who listen and to cursors."""
    client = await idle.client(stack)
    path = tmp_path / "test.json"
    async with client.subscribe("listening") as listening:
        async with idle.opened.running():
            await deposits(client, "A1", 3)
            async with client.subscribe("test", cursor=FileCursor(path)) as events:
                assert len(await take(events, 3)) == 3
            assert len(await take(listening, 3)) == 3
            epoch = listening.log_epoch
        await idle.opened.initialise(new_epoch=True)
        async with idle.opened.running():
            assert what(await take(listening, 3)) == ["A1/1", "A1/2", "A1/3"]
            assert listening.log_epoch != epoch
            async with client.subscribe("test", cursor=FileCursor(path)) as events:
                assert what(await take(events, 3)) == ["A1/1", "A1/2", "A1/3"]
    assert orjson.loads(path.read_bytes())["log_epoch"] == listening.log_epoch


# --- Connecting --------------------------------------------------------------


async def test_a_service_that_is_not_there(server: BrokerServer) -> None:
    """A client must know the number of partitions: from broker, store or caller."""
    broker = await server.open()
    with pytest.raises(errors.ConfigurationError, match=r"`cqrs-es init` it, or give partitions="):
        await Client(broker=broker, service=SERVICE).open()


@pytest.mark.parametrize("server", KEEPING_EVENTS, indirect=True)
async def test_a_service_that_is_not_there_yet(server: BrokerServer) -> None:
    """Told the number of partitions, a client may send to a service that is still to come."""
    broker = await server.open()
    async with Client(broker=broker, service=SERVICE, partitions=PARTITIONS) as client:
        await client.send("account", "A1", "OpenAccount", {"account_id": "A1"})
        await broker.declare(PARTITIONS, EPOCH)
        assert sum((await broker.queue_depth()).values()) == 1


async def test_a_wrong_number_of_partitions(idle: Bank) -> None:
    """A number that is not the service's is refused."""
    client = Client(broker=idle.broker, service=SERVICE, partitions=PARTITIONS + 1)
    with pytest.raises(errors.PartitionsMismatch, match="has 4 partitions, not 5"):
        await client.open()


async def test_a_client_that_is_closed(client: Client) -> None:
    """Closing twice is no error, and nothing works afterwards, until it is opened again."""
    await client.close()
    await client.close()
    with pytest.raises(errors.ConfigurationError, match="the client is not open"):
        await client.send("account", "A1", "OpenAccount", {"account_id": "A1"})
    await client.open()
    assert (await client.execute(BankAccount, "A1", OpenAccount("A1"))).accepted


async def test_closing_ends_subscriptions(bank: Bank) -> None:
    """Who still waits for events when the client is closed is told so."""
    async with AsyncExitStack() as stack:
        client = await bank.client(stack)
        events = await stack.enter_async_context(client.subscribe("test"))
        waiting = asyncio.create_task(take(events, 1))
        await asyncio.sleep(0)
        await client.close()
        await bank.server.close()
        with pytest.raises(errors.BrokerUnavailable):
            await waiting


def test_a_client_needs_a_broker() -> None:
    with pytest.raises(errors.SettingsError, match="give broker_url"):
        Client(service="bank")
    with pytest.raises(errors.InvalidMessage, match="service must match"):
        Client("memory://", service="the bank")


# --- Without asyncio ---------------------------------------------------------


@pytest.fixture
async def real(redis_url: str, sqlite_url: str) -> AsyncIterator[tuple[str, str]]:
    """Run the bank on a Redis server; name the broker and the store."""
    settings = Settings(store_url=sqlite_url, broker_url=redis_url, partitions=PARTITIONS)
    async with app.open(settings, initialise=True) as opened, opened.running():
        yield redis_url, sqlite_url


async def test_plain_methods(real: tuple[str, str], tmp_path: Path) -> None:
    """Threads without an event loop can do all that tasks can."""
    await asyncio.to_thread(_use_plain_methods, *real, tmp_path / "test.json")


def _use_plain_methods(broker_url: str, store_url: str, path: Path) -> None:
    with SyncClient(broker_url, service="bank", store_url=store_url) as client:
        opening = client.execute("account", "A1", "OpenAccount", {"account_id": "A1"})
        assert opening.accepted
        paying = new_command("account", "A1", "DepositMoney", {"amount": "1"})
        client.send_many([paying])
        client.send("account", "A1", "DepositMoney", {"amount": "2"})
        with client.subscribe("test", cursor=FileCursor(path)) as events:
            assert [next(events).sequence for _ in range(3)] == [1, 2, 3]
            assert events.log_epoch is not None
        outcome = client.outcome(paying.id)
        assert outcome is not None
        assert outcome.sequence == 2
        client.wait_for_view("account_query", outcome)
        with pytest.raises(ZeroDivisionError):
            _fail_within_a_block(client)
    assert sum(orjson.loads(path.read_bytes())["offsets"].values()) == 3
    with pytest.raises(errors.ConfigurationError, match="not open"):
        client.outcome(paying.id)


def _fail_within_a_block(client: SyncClient) -> None:
    with client.subscribe("test") as events:
        for _ in events:
            raise ZeroDivisionError


async def test_closing_ends_waits_in_other_threads(real: tuple[str, str]) -> None:
    """A thread that waits for an event is not left hanging."""
    broker_url, _ = real
    client = SyncClient(broker_url, service="nobody", partitions=1)
    await asyncio.to_thread(client.open)
    waiting = asyncio.create_task(
        asyncio.to_thread(client.execute, "a", "1", "C", {}, timeout=60.0)
    )
    await eventually(lambda: _expects(client))
    await asyncio.to_thread(client.close)
    async with asyncio.timeout(10):
        await asyncio.wait([waiting])
    with pytest.raises(errors.BrokerUnavailable, match="closed meanwhile"):
        await waiting


async def _expects(client: SyncClient) -> bool:
    return bool(client._client._replies._waiting)


async def test_after_a_fork(real: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that was made before a fork refuses instead of hanging."""
    client = SyncClient(real[0], service="bank")
    await asyncio.to_thread(client.open)
    with monkeypatch.context() as forked:
        forked.setattr(os, "getpid", lambda: -1)
        with pytest.raises(errors.ConfigurationError, match="do not survive a fork"):
            client.outcome(new_command_id())
    await asyncio.to_thread(client.close)


def test_a_broker_that_is_away_from_the_start() -> None:
    """Opening fails at once, and leaves no thread behind."""
    client = SyncClient("redis://127.0.0.1:1/0", service="bank")
    with pytest.raises(errors.BrokerUnavailable):
        client.open()
    with pytest.raises(errors.ConfigurationError, match="not open"):
        client.outcome(new_command_id())


# --- Trouble with the server -------------------------------------------------


def connected(url: str) -> Any:
    """Make a client for looking behind the port."""
    return Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]


async def test_a_killed_connection_loses_nothing(real: tuple[str, str]) -> None:
    """Subscribers and those who wait for outcomes connect again by themselves."""
    broker_url, _ = real
    async with (
        connected(broker_url) as raw,
        Client(broker_url, service=SERVICE) as client,
        client.subscribe("test") as events,
    ):
        await deposits(client, "A1", 2)
        await client.execute(BankAccount, "A1", DepositMoney(Decimal(1)))
        assert len(await take(events, 3)) == 3
        waiting = asyncio.create_task(take(events, 2))
        await asyncio.sleep(0)
        await raw.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        outcomes = [
            await patiently(client, BankAccount, "A1", DepositMoney(Decimal(1))) for _ in range(2)
        ]
        assert [outcome.sequence for outcome in outcomes] == [4, 5]
        assert what(await waiting) == ["A1/4", "A1/5"]


async def patiently(client: Client, *arguments: Any) -> Outcome:
    """Execute a command again, with the same id, until the broker takes it."""
    command_id = new_command_id()
    while True:
        try:
            return await client.execute(*arguments, command_id=command_id, timeout=4)
        except errors.BrokerUnavailable:
            await asyncio.sleep(0.01)


async def test_a_flushed_broker_repeats_nothing(real: tuple[str, str]) -> None:
    """When the topic is filled again from the store, only what is new comes through."""
    broker_url, _ = real
    async with (
        connected(broker_url) as raw,
        Client(broker_url, service=SERVICE) as client,
        client.subscribe("test") as events,
    ):
        await deposits(client, "A1", 5)
        assert len(await take(events, 5)) == 5
        await raw.execute_command("FLUSHALL")
        outcome = await patiently(client, BankAccount, "A1", DepositMoney(Decimal(1)))
        assert outcome.sequence == 6
        assert what(await take(events, 1)) == ["A1/6"]
