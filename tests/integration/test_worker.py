"""The command worker when things go wrong that are no fault of the commands (G1, G9)."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from cqrs_es import errors, renames, wire
from cqrs_es.application import Application
from cqrs_es.brokers import broker_for
from cqrs_es.messages import Status
from cqrs_es.ports.broker import Delivery, OutgoingCommand
from cqrs_es.ports.store import ScheduledCommand
from cqrs_es.runtime import consumer, redelivery
from cqrs_es.runtime.leases import Assignment
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.testing import FakeClock, TestApp
from cqrs_es.testing.app import LEASE_SECONDS
from cqrs_es.types import AggregateKey, new_command_id
from tests.apps import people
from tests.contract.building import accepted, chain, commit, event
from tests.faulty import FaultyStorage
from tests.samples import Add, Counter, Services, counting_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.execution.stages import Answer
    from cqrs_es.messages import CommandMessage
    from cqrs_es.ports.broker import Broker


@pytest.fixture
def storage() -> FaultyStorage:
    return FaultyStorage(storage_for("memory://"))


@pytest.fixture
async def t(storage: FaultyStorage) -> AsyncIterator[TestApp]:
    async with TestApp(counting_app(), storage=storage) as app:
        yield app


def added(n: int, **fields: object) -> bytes:
    """Write a message as another program would."""
    message = {
        "id": new_command_id(),
        "type": "Add",
        "aggregate_type": "counter",
        "aggregate_id": "A",
        "payload": {"n": n},
    }
    return orjson.dumps(message | fields)


async def let_time_pass(t: TestApp, rounds: int) -> None:
    """Go through so many waits of whoever waits for a retry."""
    for _ in range(rounds):

        async def waited() -> bool:
            return t.clock.advance_to_next(within=10.0)

        await eventually(waited)


async def test_a_store_that_refuses_condemns_no_command(t: TestApp, storage: FaultyStorage) -> None:
    """The commands stay in the queue and are accepted, in order, once the store takes them."""
    storage.faults.before("append", *[errors.StoreError()] * 12)
    await t.enqueue(*(added(n) for n in range(5)))
    await t.drain()
    assert await t.dead_letters() == []
    assert [e.data.n for e in await t.events(Counter, "A")] == list(range(5))


async def _left_by_a_dead_worker(count: int) -> tuple[Broker, list[str]]:
    """Return a broker with commands that a worker had when it died, and their ids."""
    broker = broker_for("memory://", service="tests")
    messages = [added(n) for n in range(count)]
    await broker.send([OutgoingCommand(0, "", message) for message in messages])
    intake = await broker.open_intake(0, "dead")
    await intake.receive(count)
    await intake.close()
    return broker, [orjson.loads(message)["id"] for message in messages]


async def test_g9_what_is_redelivered_goes_alone_first(storage: FaultyStorage) -> None:
    """While there is time for it each attempt is made alone, and recorded before it is made."""
    broker, ids = await _left_by_a_dead_worker(20)
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(20))
        assert storage.faults.calls["record_attempts"] == 20
    assert await storage.events.find_attempts(ids) == {}


async def test_g9_many_go_together(storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of what was out when a worker died is innocent: the time for going alone is bounded."""
    broker, ids = await _left_by_a_dead_worker(100)
    monkeypatch.setattr(redelivery, "MANY", 70)
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(100))
        assert storage.faults.calls["record_attempts"] == 2
    assert await storage.events.find_attempts(ids) == {}


async def test_g9_many_near_two_deaths_are_fewer_the_next_time(storage: FaultyStorage) -> None:
    """Who was among many when a worker died again goes with few, so that less is suspected."""
    broker, ids = await _left_by_a_dead_worker(300)
    await storage.events.record_attempts(dict.fromkeys(ids[:200], redelivery.AMONG_MANY))
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(300))
        assert storage.faults.calls["record_attempts"] == 1 + 4 + 1  # the first is the test's
    assert await storage.events.find_attempts(ids) == {}


async def test_g9_those_near_two_deaths_go_alone(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who was among few when a worker died again is attempted alone, and only those are."""
    monkeypatch.setattr(redelivery, "ALONE_SECONDS", 0.0)
    broker, ids = await _left_by_a_dead_worker(20)
    await storage.events.record_attempts(dict.fromkeys(ids[5:8], 0))
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(20))
        assert storage.faults.calls["record_attempts"] == 1 + 3 + 2  # the first is the test's
    assert await storage.events.find_attempts(ids) == {}


@pytest.mark.parametrize("died", [True, False])
async def test_g9_due_rows_are_suspected_after_a_death_alone(
    storage: FaultyStorage, *, died: bool
) -> None:
    """Who has let go of a partition is alive: its rows go on at once, with no attempt recorded."""
    await storage.leases.acquire("worker", "other", [0], 0.0)
    if not died:
        await storage.leases.release("worker", "other", [0])
    messages = [wire.parse_command(added(n)) for n in range(100)]
    async with TestApp(counting_app(), storage=storage) as t:
        now = t.clock.now()
        rows = [
            ScheduledCommand.of(message, now - timedelta(seconds=100 - n), 1)
            for n, message in enumerate(messages)
        ]
        await storage.events.schedule(rows)
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(100))
        assert storage.faults.calls["record_attempts"] == died
    assert await storage.events.find_attempts([message.id for message in messages]) == {}


async def test_g9_a_lost_answer_counts_no_second_attempt(storage: FaultyStorage) -> None:
    """A record that was made though its answer was lost is made again, and is the same."""
    broker, ids = await _left_by_a_dead_worker(3)
    storage.faults.after("record_attempts", *[errors.StoreUnavailable()] * 5)
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:
        await t.drain()
        assert await t.dead_letters() == []
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(3))
    assert await storage.events.find_attempts(ids) == {}


async def test_g9_a_second_attempt_waits_for_the_process_to_live(storage: FaultyStorage) -> None:
    """A process that dies anyway dies before it counts: others go on meanwhile."""
    broker, ids = await _left_by_a_dead_worker(1)
    await storage.events.record_attempts({ids[0]: 1})
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:

        async def waits() -> bool:
            return await t.opened.process.broker.queue_depth() == {0: 1} and t.clock.sleepers > 0

        await eventually(waits)
        assert (await t.opened.execute(Counter, "B", Add(1))).status is Status.ACCEPTED
        assert await storage.events.find_attempts(ids) == {ids[0]: 1}
        await t.drain()
        assert await t.dead_letters() == []
    assert t.clock.monotonic() >= redelivery.WAIT_SECONDS


async def test_g9_who_has_lived_for_long_makes_a_second_attempt_at_once(
    storage: FaultyStorage,
) -> None:
    """It does not die anyway: where it takes over from one that died, nobody waits again."""
    async with TestApp(counting_app(), storage=storage) as t:
        process, attempts = t.opened.process, list[int]()

        def submit(suspect: redelivery.Redelivered, attempt: int, _: str | None) -> Answer:
            attempts.append(attempt)
            return process.executor.submit(suspect.message)

        again = redelivery.Redelivery(process, redelivery.Gate(process), submit)
        await t.advance(timedelta(seconds=redelivery.WAIT_SECONDS))
        message = wire.parse_command(added(7))
        await storage.events.record_attempts({message.id: 1})
        await asyncio.wait_for(again.take([(Delivery(0, b"", "1"), message)]), 10)
        assert attempts == [2]
        assert [e.data.n for e in await t.events(Counter, "A")] == [7]


async def test_g9_only_its_aggregate_waits_with_what_a_process_died_of(
    storage: FaultyStorage,
) -> None:
    """Where processes live for less than the wait, what came after it is decided all the same."""
    broker = broker_for("memory://", service="tests")
    bodies = [added(0), added(1), added(2, aggregate_id="B"), added(3)]
    await broker.send([OutgoingCommand(0, "", body) for body in bodies])
    await (await broker.open_intake(0, "dead")).receive(len(bodies))
    deadly = orjson.loads(bodies[0])["id"]
    behind = orjson.loads(bodies[1])["id"]
    await storage.events.record_attempts({deadly: 1, behind: redelivery.AMONG_MANY})
    with capture_logs() as lines:
        await _decided_but_for_a_waiting_one(storage, broker)
    said = [line["command_id"] for line in lines if line["event"] == "a process died of a command"]
    assert said == [deadly]


async def _decided_but_for_a_waiting_one(storage: FaultyStorage, broker: Broker) -> None:
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:

        async def others_are_decided() -> bool:
            return len(await t.events(Counter, "B")) == 1

        await eventually(others_are_decided)
        assert t.clock.monotonic() < redelivery.WAIT_SECONDS
        assert await t.events(Counter, "A") == []
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == [0, 1, 3]
        assert await t.dead_letters() == []


async def test_g9_a_command_that_processes_died_of_fails(storage: FaultyStorage) -> None:
    """What two processes died of alone is not tried again, and those behind it are."""
    broker, ids = await _left_by_a_dead_worker(3)
    await storage.events.record_attempts({ids[0]: 2})
    async with TestApp(counting_app(), storage=storage, broker=broker) as t:
        await t.drain()
        (letter,) = await t.dead_letters()
        assert (letter.id, letter.attempts) == (ids[0], 2)
        assert [e.data.n for e in await t.events(Counter, "A")] == [1, 2]
    assert await storage.events.find_attempts(ids) == {}


class Waiting:
    """A handler's call that goes on only when it is let."""

    def __init__(self) -> None:
        self.called, self.released = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> None:
        self.called.set()
        await self.released.wait()

    @property
    def app(self) -> Application:
        """The counting application whose call waits."""
        return counting_app(Services({"wait": self}))


@pytest.mark.parametrize("before", [None, 0, 1])
async def test_g9_a_stop_before_the_end_counts_nothing(before: int | None) -> None:
    """A process that is cut short takes back what it recorded: it has not died of anything."""
    clock = FakeClock()
    storage = storage_for("memory://", clock=clock)
    broker = broker_for("memory://", service="tests")
    slow = added(0, type="AddAfterCall", payload={"name": "wait", "n": 0})
    others = [added(n) for n in range(1, 4)]
    ids = [orjson.loads(body)["id"] for body in (slow, *others)]
    await broker.send([OutgoingCommand(0, "", body) for body in (slow, *others)])
    await (await broker.open_intake(0, "dead")).receive(4)
    recorded = {} if before is None else {ids[0]: before}
    await storage.events.record_attempts(recorded)
    for _ in range(3):
        waiting = Waiting()
        with suppress(asyncio.CancelledError):
            async with TestApp(waiting.app, storage=storage, broker=broker, clock=clock):

                async def called() -> bool:
                    clock.advance_to_next(within=10.0)
                    return waiting.called.is_set()  # noqa: B023 - called at once

                await eventually(called)
                assert await storage.events.find_attempts(ids) == {ids[0]: (before or 0) + 1}
                raise asyncio.CancelledError
        assert await storage.events.find_attempts(ids) == recorded
        clock.advance(LEASE_SECONDS + 1)


async def test_g9_what_could_not_be_taken_back_is_looked_at_again(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt that was recorded but not made is over once the same process decides the row."""
    monkeypatch.setattr(redelivery, "WAIT_SECONDS", 0.0)
    message = wire.parse_command(added(7))
    async with counting_app().open(Settings(store_url="memory://"), storage=storage) as opened:
        await storage.leases.acquire("worker", "dead", [0], 0.0)
        await storage.events.schedule([ScheduledCommand.of(message, opened.process.clock.now(), 1)])
        storage.faults.after("record_attempts", *[errors.StoreUnavailable("it is away")] * 1000)
        worker = consumer.CommandWorker(opened.process)

        async def attempts() -> dict[str, int]:
            return await storage.events.find_attempts([message.id])

        async def decided() -> bool:
            return not await storage.events.find_scheduled([message.id])

        async def consuming() -> asyncio.Task[None]:
            (lease,) = await storage.leases.acquire("worker", opened.process.owner, [0], 60.0)
            return asyncio.create_task(worker.run_partition(Assignment(lease)))

        watching = asyncio.create_task(worker.watch())
        first = await consuming()
        await eventually(attempts)
        storage.faults.before("forget_attempts", errors.StoreError("it is away"))
        await _cancelled(first)
        assert await attempts() == {message.id: 1}
        storage.faults.forgive("record_attempts")
        storage.faults.before("due", errors.StoreError("no row was looked at"))
        with pytest.raises(errors.StoreError, match="no row"):
            await (await consuming())
        last = await consuming()
        await eventually(decided)
        await _cancelled(last, watching)
        assert (await opened.load(Counter, "A")).sequence == 1
        assert await attempts() == {}


async def _cancelled(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_cancelled_answer_settles_nothing(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that got no outcome stays in the queue, and is delivered again."""
    waiting = Waiting()
    async with TestApp(waiting.app, storage=storage) as t:
        executor = t.opened.process.executor
        submit = executor.submit
        answers: list[Answer] = []

        def submit_watched(message: CommandMessage, **options: Any) -> Answer:
            answers.append(submit(message, **options))
            return answers[-1]

        monkeypatch.setattr(executor, "submit", submit_watched)
        await t.enqueue(added(7, type="AddAfterCall", payload={"name": "wait", "n": 7}))
        await waiting.called.wait()
        answers[0].cancel()

        async def delivered_again() -> bool:
            t.clock.advance_to_next(within=10.0)
            return len(answers) > 1

        depth = t.opened.process.broker.queue_depth
        assert await depth() == {0: 1}
        waiting.released.set()
        await eventually(delivered_again)
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == [7]
        assert await depth() == {0: 0}


@pytest.mark.parametrize("error", [errors.StoreFull(), errors.StoreReadOnly()])
async def test_a_full_disk_condemns_no_command(
    error: errors.StoreError,
) -> None:
    """However often the service is started and ends of it, the commands are still in the queue."""
    clock = FakeClock()
    storage = FaultyStorage(storage_for("memory://", clock=clock))
    broker = broker_for("memory://", service="tests")
    await broker.send([OutgoingCommand(0, "", added(n)) for n in range(5)])
    for _ in range(5):
        storage.faults.before("append", error)
        with pytest.raises(ExceptionGroup):
            async with TestApp(counting_app(), storage=storage, broker=broker, clock=clock) as t:
                await t.drain()
        clock.advance(LEASE_SECONDS + 1)
    async with TestApp(counting_app(), storage=storage, broker=broker, clock=clock) as t:
        await t.drain()
        assert await t.dead_letters() == []
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(5))


async def test_a_store_locked_for_long_condemns_no_command(
    t: TestApp, storage: FaultyStorage
) -> None:
    """Also when patience with it is spent again and again."""
    storage.faults.before("append", *[errors.StoreLocked()] * 60)
    await t.enqueue(*(added(n) for n in range(5)))
    await t.drain()
    assert await t.dead_letters() == []
    assert [e.data.n for e in await t.events(Counter, "A")] == list(range(5))


async def test_d10_events_of_newer_code_fail_no_command(t: TestApp, storage: FaultyStorage) -> None:
    """The command waits, for as long as it takes, and the process says why."""
    key = AggregateKey("counter", "A")
    newer = event(1, "Multiplied")
    await commit(storage, replace(chain(key, 0, accepted(key, 0, [newer])), partition=0))
    command_id = new_command_id()
    await t.enqueue(added(1, id=command_id))
    await let_time_pass(t, 20)
    assert await t.outcome(command_id) is None
    assert await t.dead_letters() == []


async def test_a_very_deep_array_is_buried(t: TestApp) -> None:
    """It is JSON, and deep enough to break what would show it to somebody."""
    await t.enqueue(b"[" * 1000 + b"]" * 1000, added(1))
    await t.drain()
    assert len(await t.dead_letters()) == 1
    assert [e.data.n for e in await t.events(Counter, "A")] == [1]


async def test_a_broken_message_does_not_replace_a_failed_command(t: TestApp) -> None:
    """What failed can still be decided again when somebody reuses its id for nonsense."""
    command_id = new_command_id()
    failed = added(1, id=command_id, type="Unheard")
    await t.enqueue(failed)
    await t.drain()
    await t.enqueue(added(1, id=command_id, payload=None))
    await t.drain()
    assert failed in [letter.body for letter in await t.dead_letters()]
    assert len(await t.dead_letters()) == 2


async def test_a_lost_reply_is_had_again_by_resending(t: TestApp) -> None:
    """The second reply says what the first would have, and that it is a duplicate."""
    first = await t.send(Counter, "A", Add(1))
    again = await t.send(Counter, "A", Add(1), command_id=first.command_id)
    assert again.duplicate
    assert (again.status, again.events) == (Status.ACCEPTED, first.events)


async def test_replies_that_fail_hold_up_nothing(
    t: TestApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands are settled although nobody can be answered."""

    async def unavailable(*_: object) -> None:
        await asyncio.sleep(0)
        raise errors.BrokerUnavailable

    monkeypatch.setattr(t.opened.process.broker, "reply", unavailable)
    await t.enqueue(*(added(n, reply_to=t.reply_to) for n in range(5)))
    await t.drain()
    assert len(await t.events(Counter, "A")) == 5


async def test_large_messages_stay_in_the_queue(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker has in hand is bounded in bytes: a flood must not become its memory."""
    monkeypatch.setattr(consumer, "MOST_BYTES_IN_HAND", 3_000)
    waiting = Waiting()
    async with TestApp(waiting.app, storage=storage) as t:
        payload = {"name": "wait", "n": 1}
        await t.enqueue(added(1, type="AddAfterCall", payload=payload, note="x" * 1_000))
        await waiting.called.wait()
        await t.enqueue(*(added(n) for n in range(5)))
        for _ in range(100):
            await asyncio.sleep(0)
        assert t.opened.process.executor.pending == 1
        waiting.released.set()
        await t.drain()
        assert len(await t.events(Counter, "A")) == 6


async def test_due_rows_are_read_by_the_batch(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many are due, a look reads a batch beside what is in hand: it holds up the others."""
    events, asked = storage.events, list[int]()
    read = events.due

    async def due(partition: int, limit: int) -> list[ScheduledCommand]:
        asked.append(limit)
        return await read(partition, limit)

    monkeypatch.setattr(events, "due", due)
    messages = [wire.parse_command(added(n)) for n in range(200)]
    async with TestApp(counting_app(), settings=Settings(batch_size=10), storage=storage) as t:
        first = t.clock.now() - timedelta(hours=1)
        moments = [first + timedelta(seconds=n) for n in range(200)]
        rows = [ScheduledCommand.of(*each, 1) for each in zip(messages, moments, strict=True)]
        await storage.events.schedule(rows)
        await t.drain()
        assert [e.data.n for e in await t.events(Counter, "A")] == list(range(200))
    assert max(asked) <= 20


async def test_what_comes_before_a_newer_command_is_decided(t: TestApp) -> None:
    """The command itself, and what is behind it, waits for newer code; other partitions go on."""
    bodies = [added(1, reply_to="x"), added(2), added(4, version="1.1"), added(8)]
    await t.enqueue(*bodies)

    async def waits() -> bool:
        events = [e.data.n for e in await t.events(Counter, "A")]
        return events == [1, 2] and bool(t.opened.process.executor.pending == 0)

    await eventually(waits)
    await let_time_pass(t, 2)
    assert [e.data.n for e in await t.events(Counter, "A")] == [1, 2]
    assert await t.dead_letters() == []


async def test_who_scheduled_a_command_is_answered_although_its_partition_is_given_up() -> None:
    """The row is gone when it is decided: nobody could answer later."""
    waiting = Waiting()
    async with TestApp(waiting.app) as t:
        slow = orjson.loads(added(1, type="AddAfterCall", payload={"name": "wait", "n": 1}))
        slow["reply_to"] = t.reply_to
        await t.enqueue(orjson.dumps({"schedule": slow, "due": t.clock.now().isoformat()}))
        async with asyncio.timeout(10):
            await waiting.called.wait()
        await t.enqueue(added(2, version="1.1", aggregate_id="B"))
        for _ in range(100):
            await asyncio.sleep(0)
        waiting.released.set()
        assert (await t.reply(slow["id"])).accepted


async def test_a_dead_letter_and_a_due_row_are_upcast_when_they_are_decided() -> None:
    """They were written by older code; what they are is told by what they say."""
    storage = storage_for("memory://")
    command = {"type": "Register", "aggregate_type": "person", "payload": {"name": "A B"}}
    late = orjson.loads(added(0)) | command | {"aggregate_id": "P"}
    async with TestApp(people.old, storage=storage) as t:
        later = {"schedule": late, "due": (t.clock.now() + timedelta(hours=1)).isoformat()}
        await t.enqueue(added(0, **command | {"type": "Arrive"}), orjson.dumps(later))
        await t.drain()
        (letter,) = await t.dead_letters()
    fixed = Application("people")
    renamed = renames("Arrive", "Register")
    fixed.aggregate(people.NewPerson, command_upcasters=[people.split_name, renamed])
    async with TestApp(fixed, storage=storage) as t:
        assert (await t.opened.retry_dead_letter(letter.id)).accepted
        await t.advance(timedelta(hours=2))
        for person in ("A", "P"):
            (registered,) = await t.events(people.NewPerson, person)
            assert registered.data == people.Registered("A", "B")
