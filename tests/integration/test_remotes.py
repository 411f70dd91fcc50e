"""Commands to other services: what is sent, in which order, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es import Envelope, Reactor, Send, errors, send
from cqrs_es.application import Application
from cqrs_es.brokers import EVENT_RETENTION
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.testing import TestApp
from cqrs_es.types import lane_of, partition_of_lane
from tests import remotes
from tests.remotes import Account, Basket, Charge, Charged, Order, Ordered, billing
from tests.waiting import eventually

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage


class Notifier(Reactor[Ordered], name="notifier"):
    """Names the command, whose class it does not have."""

    at: datetime | None = None

    def react(self, event: Envelope[Ordered], services: None) -> Iterator[Send]:  # noqa: ARG002
        payload = {"text": f"{event.data.amount} were ordered"}
        yield send("post:letter", event.aggregate_id, "Write", payload, at=self.at)


def shop(*reactors: type[Reactor[Any]]) -> Application:
    app = remotes.shop()
    for reactor in reactors:
        app.reactor(reactor)
    app.remote("post", url="redis://localhost:1/0")
    return app


@pytest.fixture
async def storage(store_url: str) -> AsyncIterator[Storage]:
    storage = storage_for(store_url)
    try:
        yield storage
    finally:
        await storage.close()


async def test_commands_reach_the_other_service_in_order(storage: Storage) -> None:
    """By a handler and by a reactor, with their class or by name; nothing is left here."""
    async with TestApp(shop(Notifier), storage=storage) as t:
        await t.drain()
        for amount in (1, 2, 3):
            await t.send(Basket, "b", Order(amount))
        await t.drain()
        sent = t.sent_to("billing")
        assert [each.payload for each in sent] == [{"amount": n} for n in (1, 2, 3)]
        assert {(each.type, str(each.key)) for each in sent} == {("Charge", "account/ada")}
        assert [each.metadata["causation_id"] for each in sent] == [
            f"basket/b/{number}" for number in (1, 2, 3)
        ]
        letters = t.sent_to("post")
        assert [each.payload["text"] for each in letters] == [
            f"{amount} were ordered" for amount in (1, 2, 3)
        ]
        lanes = t.opened.process.lanes
        assert await storage.events.list_scheduled(None, 10, None, lanes) == []


async def test_one_is_away_for_a_while(storage: Storage) -> None:
    """Its commands wait in their order, which operators see; those for others go on."""
    away = MemoryBroker(event_retention=EVENT_RETENTION)  # its queues are not declared yet
    async with TestApp(shop(Notifier), storage=storage, remotes={"billing": away}) as t:
        for amount in range(20):
            await t.send(Basket, f"b{amount % 2}", Order(amount))
        events, process = storage.events, t.opened.process

        async def post_has_all() -> bool:
            left = await events.list_scheduled(None, 50, None, process.lanes)
            return (len(left), len(t.sent_to("post"))) == (20, 20)

        await eventually(post_has_all)
        rows = await events.list_scheduled(None, 50, None, process.lanes)
        assert {str(row.key) for row in rows} == {"billing:account/ada"}
        assert sum((await events.count_due(process.lanes)).values()) == 20
        assert all(left <= 0 for left in (await events.next_due(process.lanes)).values())
        assert await events.next_due(range(process.partitions)) == {}
        assert away.queued() == []

        async with TestApp(billing(), broker=away) as other:
            await t.drain()
            await other.drain()
            charged = [each.data.amount for each in await other.events(Account, "ada")]
    assert sorted(charged) == list(range(20))
    for basket in (0, 1):
        assert [n for n in charged if n % 2 == basket] == list(range(basket, 20, 2))


async def test_what_is_sent_twice_is_decided_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that ends before it has deleted the rows: their ids are known there."""
    broker = MemoryBroker(event_retention=EVENT_RETENTION)
    async with (
        TestApp(billing(), broker=broker) as other,
        TestApp(shop(), remotes={"billing": broker}) as t,
    ):
        events = t.opened.storage.events
        kept = events.unschedule

        async def fail(_: object) -> set[str]:
            monkeypatch.setattr(events, "unschedule", kept)
            raise errors.StoreUnavailable

        monkeypatch.setattr(events, "unschedule", fail)
        await t.send(Basket, "b", Order(7))
        await t.drain()
        await other.drain()
        assert [each.data for each in await other.events(Account, "ada")] == [Charged(7)]
        assert t.opened.process.executor.counts.failed == 0


async def test_a_command_for_later_waits_here() -> None:
    """It is sent when it is due, by the store's clock; until then it can be cancelled."""

    class Tomorrow(Notifier, name="tomorrow"):
        at = datetime(2026, 1, 2, tzinfo=UTC)

    async with TestApp(shop(Tomorrow)) as t:
        await t.drain()
        await t.send(Basket, "b", Order(1))
        await t.send(Basket, "c", Order(2))
        await t.drain()
        assert t.sent_to("post") == []
        lanes = t.opened.process.lanes
        first, _ = await t.opened.storage.events.list_scheduled(None, 10, None, lanes)
        assert await t.opened.unschedule(first.command_id)
        await t.advance(timedelta(days=1))
        assert len(t.sent_to("post")) == 1


# --- What is refused -----------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (send("nobody:account", "a", Charge(1)), "there is no such service: app.remote('nobody'"),
        (send("billing", "a", Charge(1)), "<service>:<type> of another service"),
        (send("billing:a b", "a", Charge(1)), "<service>:<type> of another service"),
        (send("billing:" + "a" * 60, "a", Charge(1)), "at most 64 characters"),
        (send("billing:account", "", Charge(1)), "aggregate_id"),
        (send("billing:account", "a", "no name", {}), "type must match"),
        (send("billing:account", "a", "Charge", {"x": [[]] * 9}), None),
        (send("billing:account", "a", object()), "is no message"),
        (send("billing:account", "a", "Charge", {"x": "y" * 300_000}), "MAX_MESSAGE_BYTES"),
    ],
)
async def test_what_no_service_could_take_fails_here(sent: Send, said: str | None) -> None:
    """While somebody hears of it: there it would be a dead letter."""

    class Sending(Reactor[Ordered], name="sending"):
        def react(self, event: Envelope[Ordered], services: None) -> list[Send]:  # noqa: ARG002
            return [sent]

    async with TestApp(shop(Sending)) as t:
        await t.drain()
        with t.expect_failures():
            await t.send(Basket, "b", Order(1))
            await t.drain()
        parked = await t.parked()
        assert [said in marker.reason for marker in parked if said] == [True] * bool(said), parked


@pytest.mark.parametrize(
    ("service", "url", "said"),
    [
        ("bil ling", "CQRS_ES_BILLING_URL", "must match"),
        ("billing", "BILLING", "a URL, or a variable CQRS_ES_…_URL"),
    ],
)
def test_remotes_that_could_never_be_reached(service: str, url: str, said: str) -> None:
    """A slip in a name is found where it is made."""
    with pytest.raises(errors.DefinitionError, match=said):
        Application("shop").remote(service, url=url)


async def test_the_relay_needs_the_urls() -> None:
    """Nobody else does; one that is of no remote is a misspelt setting."""
    store = {"CQRS_ES_STORE_URL": "memory://"}
    async with shop().open(Settings.from_environment(store)) as opened:
        opened.supervisor({"worker"})
        with pytest.raises(errors.SettingsError, match="CQRS_ES_BILLING_URL is not set"):
            opened.supervisor()
    memory = Settings.from_environment(store | {"CQRS_ES_BILLING_URL": "memory://"})
    async with shop().open(memory) as opened:
        with pytest.raises(errors.SettingsError, match="a broker in memory does not reach it"):
            opened.supervisor({"relay"})
    misspelt = Settings.from_environment(store | {"CQRS_ES_BILING_URL": "redis://h:1/0"})
    with pytest.raises(errors.SettingsError, match="CQRS_ES_BILING_URL is no setting"):
        async with shop().open(misspelt):
            pass


def test_passwords_of_remotes_are_not_shown() -> None:
    """Nor where the settings are printed."""
    given = {"CQRS_ES_BILLING_URL": "amqp://shop:secret@host:5672/"}
    settings = Settings.from_environment(given)
    assert settings.remote_urls == given
    assert "secret" not in repr(settings)


def test_lanes_are_beside_partitions() -> None:
    """No lane is a partition, and each has the lock of the one that it is for."""
    lanes = {lane_of(name, number) for name in ("billing", "post") for number in range(1024)}
    assert len(lanes) == 2048
    assert -(2**31) < min(lanes) <= max(lanes) < 0
    assert {partition_of_lane(lane) for lane in lanes} == set(range(1024))
    assert partition_of_lane(7) == 7
