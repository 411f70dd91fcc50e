"""B: what the original gets wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cqrs_es import Envelope, View, errors, upcaster
from cqrs_es.aggregate import AggregateSourced, SnapshotEvery
from cqrs_es.application import Application
from cqrs_es.projection.replay import stored_log
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.testing import TestApp
from tests.raw import deposit, opened, raw, sent
from tests.samples import (
    Add,
    AddEach,
    Added,
    AddThenCrash,
    AddUpTo,
    Counter,
    Services,
    Totals,
    counting_app,
)
from tests.stores import on_dynamodb, on_sql
from worker.app import app as bank

if TYPE_CHECKING:
    from cqrs_es.aggregate import SourceOfTruth
    from cqrs_es.types import JsonObject


def on(url: str) -> Settings:
    return Settings(store_url=url, partitions=1)


async def total_after(url: str, source: SourceOfTruth, *commands: Add | AddEach) -> int:
    """Execute commands, then load the counter by an application that cached nothing."""
    storage = storage_for(url)
    await storage.open()
    try:
        async with counting_app(source=source).open(on(url), storage=storage, initialise=True) as a:
            for command in commands:
                (await a.execute(Counter, "c", command)).ensure_accepted()
        async with counting_app(source=source).open(on(url), storage=storage) as b:
            return (await b.load(Counter, "c")).state.total
    finally:
        await storage.close()


async def test_b1_an_event_is_applied_once(store_url: str) -> None:
    """An aggregate-sourced state holds each event once."""
    assert await total_after(store_url, AggregateSourced(), Add(10)) == 10


async def test_b2_snapshots_count_once(store_url: str) -> None:
    """A snapshot at a boundary, then a reload."""
    assert await total_after(store_url, SnapshotEvery(2), Add(10), Add(100)) == 110


async def test_b3_one_command_across_a_boundary(store_url: str) -> None:
    """A command whose events cross a snapshot boundary."""
    assert await total_after(store_url, SnapshotEvery(2), AddEach([1, 10, 100])) == 111


async def test_b6_a_view_write_fails_once(store_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view whose store fails once still reaches the truth."""
    async with TestApp(counting_app(), settings=on(store_url)) as t:
        views = t.opened.storage.views
        whole = views.transaction
        failures = [errors.StoreUnavailable()]

        def once_failing() -> object:
            if failures:
                raise failures.pop()
            return whole()

        monkeypatch.setattr(views, "transaction", once_failing)
        await t.send(Counter, "c", Add(10))
        await t.send(Counter, "c", Add(5))
        await t.drain()
        assert not failures
        assert await t.view(Totals, "c") == Totals(total=15, times=2)


def test_b9_no_snapshot_every_0() -> None:
    """A snapshot every 0 events is refused when it is written down."""
    with pytest.raises(errors.DefinitionError, match="every 1 or more"):
        SnapshotEvery(0)


async def test_b10_a_cut_replay_is_an_error(store_url: str) -> None:
    """A log that ends before its head is no ordinary end."""
    async with counting_app().open(on(store_url), initialise=True) as a:
        await a.execute(Counter, "c", AddEach([1, 2, 3]))
        with pytest.raises(errors.BrokenLog):
            [event async for event in stored_log(a.storage.events, 0, 0, 4)]


async def test_b14_options_keep_each_other() -> None:
    """Source of truth and upcasters are both kept."""

    @upcaster("Added", to="1.0")
    def same(payload: JsonObject) -> JsonObject:
        return payload

    app = Application("tests")
    app.aggregate(
        Counter,
        services=lambda _: Services(),
        source=SnapshotEvery(7),
        upcasters=[same],
        handler_timeout=3.0,
    )
    definition = app.registry.aggregates["counter"]
    assert definition.source == SnapshotEvery(7)
    assert definition.handler_timeout == 3.0
    assert definition.upcasters.applies("Added")


@on_sql
async def test_b15_a_thousand_events(store_url: str) -> None:
    """A command that yields 1,000 events is committed whole."""
    async with counting_app().open(on(store_url), initialise=True) as a:
        outcome = await a.execute(Counter, "c", AddEach([1] * 1000))
        assert outcome.sequence == 1000
        assert (await a.load(Counter, "c")).state.total == 1000


@on_dynamodb
async def test_b15_a_thousand_events_on_dynamodb(store_url: str) -> None:
    """They fit in no transaction of DynamoDB: the command fails, and nothing is written."""
    async with counting_app().open(on(store_url), initialise=True) as a:
        outcome = await a.execute(Counter, "c", AddEach([1] * 1000))
        assert outcome.error is not None
        assert (outcome.status, outcome.error.code) == ("failed", "internal_error")
        assert "fewer or smaller events" in outcome.error.message
        assert await a.events(Counter, "c") == []
        assert await a.storage.events.heads() == {0: 0}
        assert (await a.execute(Counter, "c", AddEach([1] * 90))).sequence == 90


async def test_b16_events_before_a_crash_are_gone(store_url: str) -> None:
    """A handler that yields, then raises, leaves nothing behind."""
    async with TestApp(counting_app(), settings=on(store_url)) as t:
        with t.expect_failures():
            outcome = await t.send(Counter, "c", AddThenCrash(5))
        assert outcome.status == "failed"
        assert await t.opened.events(Counter, "c") == []
        assert (await t.opened.load(Counter, "c")).state.total == 0


async def test_b19_a_rejection_is_final(store_url: str) -> None:
    """A rejected command that comes again gets the rejection, though it would pass now."""
    async with TestApp(bank, settings=on(store_url)) as t:
        await sent(t, opened())
        withdraw = raw("WithdrawMoney", {"amount": "5", "atm_id": "x"})
        first = await sent(t, withdraw)
        assert first.error
        assert first.error.code == "funds_not_available"
        await sent(t, deposit("100"))
        again = await sent(t, withdraw)
        assert (again.status, again.error, again.duplicate) == ("rejected", first.error, True)


async def test_b20_a_stale_cache_never_decides(store_url: str) -> None:
    """A worker that cached an old state decides on the new one."""
    storage = storage_for(store_url)
    await storage.open()
    async with (
        counting_app().open(on(store_url), storage=storage, initialise=True) as a,
        counting_app().open(on(store_url), storage=storage) as b,
    ):
        await a.execute(Counter, "c", AddUpTo(0, limit=0))
        await b.execute(Counter, "c", Add(100))
        refused = await a.execute(Counter, "c", AddUpTo(1, limit=100))
        accepted = await a.execute(Counter, "c", AddUpTo(60, limit=160))
        assert (refused.status, refused.sequence) == ("rejected", 2)
        assert (accepted.status, accepted.sequence) == ("accepted", 3)
    await storage.close()


async def test_g9_an_event_that_fails_parks_its_aggregate(store_url: str) -> None:
    """The other aggregates' rows go on; after fixing, a retry makes the parked one right."""
    broken = {"b"}

    @dataclass
    class Fragile(View[Added], name="fragile"):
        total: int = 0

        def update(self, event: Envelope[Added]) -> None:
            if event.aggregate_id in broken:
                message = "can't"
                raise RuntimeError(message)
            self.total += event.data.n

    async with TestApp(counting_app(view=Fragile), settings=on(store_url)) as t:
        with t.expect_failures():
            for _ in range(3):
                for name in ("a", "b", "c"):
                    await t.send(Counter, name, Add(1))
            await t.drain()
        (marker,) = await t.opened.parked("fragile")
        assert (marker.key.id, marker.from_sequence) == ("b", 1)
        assert [await t.view(Fragile, name) for name in "abc"] == [Fragile(3), None, Fragile(3)]
        assert not await t.opened.retry_parked("fragile", marker)
        (marker,) = await t.opened.parked("fragile")
        assert marker.attempts == 2
        broken.clear()
        assert await t.opened.retry_parked("fragile", marker)
        await t.send(Counter, "b", Add(1))
        await t.drain()
        assert await t.view(Fragile, "b") == Fragile(4)
        assert await t.opened.parked("fragile") == []


async def test_b7_a_rebuild_counts_the_same(store_url: str) -> None:
    """A rebuilt view that counts has the same count as before, and goes on counting."""
    async with TestApp(counting_app(), settings=on(store_url)) as t:
        for _ in range(5):
            await t.send(Counter, "c", Add(2))
        await t.drain()
        before = await t.view(Totals, "c")
        assert await t.opened.rebuild("totals").run() == 2
        assert await t.view(Totals, "c") == before == Totals(total=10, times=5)
        t.clock.advance(2.0)
        await t.send(Counter, "c", Add(2))
        await t.drain()
        assert await t.view(Totals, "c") == Totals(total=12, times=6)
