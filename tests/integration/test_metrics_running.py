"""Each metric, told by an application that runs."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import AsyncMock
from urllib.parse import urlsplit

import amqp
import pytest

from cqrs_es import Envelope, View, errors
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.cloudevents import timestamp
from cqrs_es.execution.policy import ExecutionPolicy
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.runtime.leases import LeaseKeeper, Membership
from cqrs_es.stores import storage_for
from cqrs_es.telemetry import metrics as catalogue
from cqrs_es.telemetry.metrics import Metrics
from cqrs_es.testing import FakeClock
from cqrs_es.types import utc_now
from tests.faulty import FaultyStorage
from tests.measured import Measured, measured
from tests.samples import Add, Added, Counter, Services, counting_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.ports.broker import Delivery
    from cqrs_es.runtime.leases import Assignment


@pytest.fixture
def storage() -> FaultyStorage:
    return FaultyStorage(storage_for("memory://"))


@pytest.fixture
async def running(storage: FaultyStorage) -> AsyncIterator[Measured]:
    async with measured(counting_app(), storage=storage) as app:
        yield app


# --- Commands ------------------------------------------------------------------


async def test_commands_by_outcome(running: Measured) -> None:
    """Each answer is counted once, by what the application calls it."""
    first = await running.send("Add")
    await running.send("Add", id=first)
    await running.send("AddUpTo", payload={"n": 5, "limit": 1})
    await running.send("Nothing")
    await running.send("Add", aggregate_type="nobody")
    await running.send("Add", payload={"n": "one"})
    await running.shows("commands_total", "unknown", "unknown", "failed", value=1)
    await running.shows("commands_total", "counter", "Add", "rejected", value=1)
    found = running.read()
    assert found["commands_total", "counter", "Add", "accepted"] == 1
    assert found["commands_total", "counter", "Add", "duplicate"] == 1
    assert found["commands_total", "counter", "AddUpTo", "rejected"] == 1
    assert found["commands_total", "counter", "unknown", "failed"] == 1


async def test_hostile_names_make_no_series(running: Measured) -> None:
    """A thousand types that nobody has registered add two series, not two thousand."""
    before = len(running.read())
    for number in range(500):
        await running.send(f"Evil{number}", aggregate_id=f"E{number}")
        await running.send("Add", aggregate_type=f"evil{number}")
    await running.shows("commands_total", "counter", "unknown", "failed", value=500)
    await running.shows("commands_total", "unknown", "unknown", "failed", value=500)
    assert len(running.read()) == before + 2


async def test_messages_without_an_outcome(running: Measured) -> None:
    """They are dead letters, and no commands."""
    await running.send_bytes(b"nonsense")
    await running.send_bytes(b'{"id": 3}')
    await running.shows("dead_messages_total", value=2)
    assert not any(value for key, value in running.read().items() if key[0] == "commands_total")


async def test_batches_and_their_phases(running: Measured) -> None:
    """Every command is in one batch, and each phase has been timed."""
    for number in range(20):
        await running.send("Add", aggregate_id=f"A{number}", reply_to="me")
    await running.shows("batch_commands_sum", value=20)
    await running.samples({("queue_commands", "0"): 0})
    found = running.read()
    assert 1 <= found["batch_commands_count",] <= 20
    for phase in ("lookup", "load", "append", "reply", "settle"):
        assert found["batch_phase_seconds_count", phase] >= 1, phase
        assert found["batch_phase_seconds_sum", phase] > 0, phase
    assert found["batch_phase_seconds_count", "decide"] == 20


async def test_a_slow_handler_shows_as_deciding(storage: FaultyStorage) -> None:
    """Its time counts, not that of those beside it."""
    services = Services()

    async def slow() -> None:
        await asyncio.sleep(0.3)

    services.hooks["slow"] = slow
    async with measured(counting_app(services), storage=storage) as running:
        await running.send("AddAfterCall", payload={"name": "slow", "n": 1})
        await running.send("Add", aggregate_id="B")
        await running.shows("batch_phase_seconds_count", "decide", value=2)
        found = running.read()
    assert 0.3 <= found["batch_phase_seconds_sum", "decide"] < 0.6
    assert found["batch_phase_seconds_bucket", "0.25", "decide"] == 1


async def test_conflicts(storage: FaultyStorage) -> None:
    """Two processes change one aggregate in turn: the second's cache is behind, and it sees it."""
    app = counting_app()
    async with (
        measured(app, storage=storage, roles=[]) as one,
        measured(app, storage=storage, roles=[]) as other,
    ):
        for running in (one, other, one):
            await running.opened.execute(Counter, "A", Add(1))
        assert one.read()["conflicts_total",] == 1
        assert other.read()["conflicts_total",] == 0


async def test_retries(storage: FaultyStorage) -> None:
    """Of a handler that raises, and of a store that is away."""
    policy = ExecutionPolicy(retry_delays=(0.0, 0.0))
    async with measured(counting_app(), storage=storage, policy=policy) as running:
        await running.send("AddThenCrash")
        await running.shows("commands_total", "counter", "AddThenCrash", "failed", value=1)
        storage.faults.before("find_outcomes", errors.StoreUnavailable())
        storage.faults.before("append", errors.StoreUnavailable())
        await running.send("Add")
        await running.shows("commands_total", "counter", "Add", "accepted", value=1)
        found = running.read()
    assert found["retries_total", "handler"] == 2
    assert found["retries_total", "store"] == 2


async def test_waiting_by_the_senders_word(running: Measured) -> None:
    """The broker in memory says nothing of times."""
    await running.send("Add", sent_at=timestamp(utc_now()))
    await running.send("Add")
    await running.send("Add", sent_at="once upon a time")
    await running.shows("commands_total", "counter", "Add", "accepted", value=3)
    found = running.read()
    assert found["queue_wait_seconds_count",] == 1
    assert found["queue_wait_seconds_sum",] < 10


@pytest.mark.parametrize("broker", ["redis", "amqp"])
async def test_waiting_by_the_brokers_word(broker: str, request: pytest.FixtureRequest) -> None:
    """On Redis the entry tells the time; on RabbitMQ the message's `sent_at` stands in."""
    url: str = request.getfixturevalue(f"{broker}_url")
    made = broker_for(url, service=f"waits-{broker}")
    await made.open()
    try:
        await made.declare(1, "epoch")
        await made.send([OutgoingCommand(0, "c", b"{}")])
        intake = await made.open_intake(0, "me")
        (delivery,) = await intake.receive(1)
        await intake.settle([delivery])
        await intake.close()
    finally:
        await made.close()
    if broker == "redis":
        assert delivery.queued_at == pytest.approx(time.time(), abs=10)
    else:
        assert delivery.queued_at is None


async def test_the_timestamp_of_a_message_on_rabbitmq(amqp_url: str) -> None:
    """The sender's, or the server's where it is told to set one; any number may stand there."""
    broker = broker_for(amqp_url, service="stamped")
    await broker.open()
    try:
        await broker.declare(1, "epoch")
        await asyncio.to_thread(publish_with_timestamps, amqp_url, [1_790_000_000, 2**63])
        intake = await broker.open_intake(0, "me")
        deliveries: list[Delivery] = []
        while len(deliveries) < 2:
            deliveries += await intake.receive(2)
        await intake.settle(deliveries)
        await intake.close()
    finally:
        await broker.close()
    assert [delivery.queued_at for delivery in deliveries] == [1_790_000_000.0, float(2**63)]


def publish_with_timestamps(url: str, timestamps: list[int]) -> None:
    """Send with pyamqp alone, as another service may."""
    parts = urlsplit(url)
    connection: Any = amqp.Connection(
        f"{parts.hostname}:{parts.port}",
        userid=parts.username or "guest",
        password=parts.password or "guest",
    )
    connection.connect()
    channel = connection.channel()
    channel.confirm_select()
    make: Any = amqp.Message
    for each in timestamps:
        channel.basic_publish_confirm(make(b"{}", timestamp=each), "stamped.commands", "0")
    connection.close()


# --- Events --------------------------------------------------------------------


async def test_events_published_and_projected(running: Measured) -> None:
    """Each event once, in both."""
    await running.send("AddEach", payload={"numbers": [1, 2, 3]})
    await running.send("Add")
    await running.shows("events_published_total", value=4)
    await running.shows("events_projected_total", "totals", value=4)


async def test_nothing_waits(running: Measured) -> None:
    """All gauges are at zero when all is done, not absent."""
    await running.send("Add")
    await running.samples(
        {
            ("queue_commands", "0"): 0,
            ("relay_lag_events", "0"): 0,
            ("relay_lag_seconds", "0"): 0,
            ("projector_lag_events", "0", "totals"): 0,
            ("projector_lag_seconds", "0", "totals"): 0,
            ("dead_letters",): 0,
            ("parked_aggregates", "totals"): 0,
        }
    )


async def test_the_depth_of_the_queue(storage: FaultyStorage) -> None:
    """What is in hand counts too, until it is settled."""
    services, called = Services(), asyncio.Event()

    async def slow() -> None:
        await called.wait()

    services.hooks["slow"] = slow
    async with measured(counting_app(services), storage=storage) as running:
        await running.send("AddAfterCall", payload={"name": "slow", "n": 1})
        await running.send("Add")
        await running.samples({("queue_commands", "0"): 2})
        called.set()
        await running.samples({("queue_commands", "0"): 0})


async def test_lag(storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many events, and how old the oldest is; only who holds a partition tells."""
    app = counting_app()
    async with measured(app, storage=storage, roles=["worker"]) as worker:
        for _ in range(3):
            await worker.opened.execute(Counter, "A", Add(1))
        await worker.samples({("dead_letters",): 0})
        assert not any("lag" in key[0] for key in worker.read())
    monkeypatch.setattr(MemoryBroker, "publish", AsyncMock(side_effect=errors.BrokerUnavailable))
    async with measured(app, storage=storage, roles=["relay", "projector:totals"]) as behind:
        await behind.samples({("relay_lag_events", "0"): 3})
        before = behind.read()["relay_lag_seconds", "0"]
        assert before > 0
        storage.faults.before("read_log", *[errors.StoreUnavailable()] * 10_000)
        await behind.sampler.look()
        assert behind.read()["relay_lag_seconds", "0"] > before  # known, though the store is away
        storage.faults.forgive("read_log")
        monkeypatch.undo()
        await behind.samples({("relay_lag_events", "0"): 0, ("relay_lag_seconds", "0"): 0})
        await behind.samples({("projector_lag_events", "0", "totals"): 0})
        assert ("dead_letters",) not in behind.read()


async def test_dead_letters(running: Measured) -> None:
    """As many as there are, also after one was dropped."""
    await running.send_bytes(b"nonsense")
    await running.send("Nothing")
    await running.samples({("dead_letters",): 2})
    letters = running.opened.storage.dead_letters
    (first, _) = await letters.page()
    await letters.drop(first.id)
    await running.samples({("dead_letters",): 1})


@dataclass
class Fragile(View[Added], name="fragile"):
    """Breaks at a negative number."""

    total: int = 0

    def update(self, event: Envelope[Added]) -> None:
        if event.data.n < 0:
            raise ValueError
        self.total += event.data.n


async def test_parked_aggregates(storage: FaultyStorage) -> None:
    """By view; parking an event counts it as projected, since the partition goes on."""
    async with measured(counting_app(view=Fragile), storage=storage) as running:
        await running.send("Add", -1)
        await running.send("Add", aggregate_id="B")
        await running.samples({("parked_aggregates", "fragile"): 1})
        await running.shows("events_projected_total", "fragile", value=2)


async def test_figures_that_cant_be_read_are_left_out(
    running: Measured, storage: FaultyStorage
) -> None:
    """Rather than shown as they were; the work goes on, and so do the other figures."""
    await running.samples({("parked_aggregates", "totals"): 0, ("dead_letters",): 0})
    storage.faults.before("list_parked", errors.StoreUnavailable(), RuntimeError("a bug"))
    for _ in range(2):
        await running.sampler.look()
        found = running.read()
        assert ("parked_aggregates", "totals") not in found
        assert found["dead_letters",] == 0
    await running.samples({("parked_aggregates", "totals"): 0})


# --- Leases --------------------------------------------------------------------


async def test_leases_lost() -> None:
    """Found out by the work itself, or told by the store because another process has it."""
    clock = FakeClock()
    storage = storage_for("memory://", clock=clock)
    metrics = Metrics(counting_app().registry, roles=["relay"])
    losing, stopping = asyncio.Event(), asyncio.Event()

    async def work(assignment: Assignment) -> None:
        if not losing.is_set():
            losing.set()
            raise errors.LeaseLost
        await assignment.stopping.wait()

    membership = Membership(role="relay", owner="a", partitions=1, lease_seconds=60.0)
    keeper = LeaseKeeper(storage.leases, clock, work, membership, metrics)

    async def held() -> bool:
        clock.advance_to_next(within=20.0)
        return bool(keeper.held)

    async def lost(times: int) -> bool:
        clock.advance_to_next(within=20.0)
        return metrics.counters[catalogue.LEASES_LOST]["relay",] == times

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(keeper.run(stopping))
        await eventually(lambda: lost(1))
        await eventually(held)
        clock.advance(61.0)
        assert await storage.leases.acquire("relay", "b", [0], 600.0)
        await eventually(lambda: lost(2))
        stopping.set()
        await keeping
