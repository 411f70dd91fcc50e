"""What projectors do when views are wrong, tables are gone, or the backlog is long."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pytest
from structlog.testing import capture_logs

from cqrs_es import Envelope, View, errors
from cqrs_es.application import Application
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.cli.preparing import check_everything
from cqrs_es.projection.folding import folding_for
from cqrs_es.projection.generations import make_sure_of_tables
from cqrs_es.projector import Projector, SqlSession
from cqrs_es.runtime import projection_loop
from cqrs_es.settings import Settings
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.testing import TestApp
from tests.faulty import FaultyStorage
from tests.samples import Add, AddEach, Added, Commit, Counter, Done, Services, Started, T, Totals
from tests.stores import on_sql, sql_of
from tests.tallies import check_complete, tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import EventFeed
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import LoadedAggregate, LoadRequest
    from cqrs_es.ports.views import ParkedAggregate, ViewTransaction

LONG = 60.0


def on(url: str, partitions: int = 3) -> Settings:
    return Settings(store_url=url, partitions=partitions)


def counting(*views: type[View[Added]]) -> Application:
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    for view in views:
        app.view(view)
    return app


async def project(opened: OpenApplication) -> None:
    async with opened.running() as supervisor:
        await eventually(supervisor.idle, within_seconds=LONG)


@dataclass
class Fragile(View[Added], name="fragile"):
    """A view that fails on the counters named, from some sequence on."""

    bad: ClassVar[frozenset[str]] = frozenset()
    first: ClassVar[int] = 1

    total: int = 0

    def update(self, event: Envelope[Added]) -> None:
        if event.aggregate_id in self.bad and event.sequence >= self.first:
            message = "can't"
            raise RuntimeError(message)
        self.total += event.data.n


@dataclass
class Twin(Fragile, View[Added], name="twin"):
    """The same under another name."""


@dataclass
class Mad(View[Added], name="mad"):
    """A view that raises, for the counter "bad", what no `except Exception` catches."""

    raises: ClassVar[BaseException] = SystemExit(3)

    total: int = 0

    def update(self, event: Envelope[Added]) -> None:
        if event.aggregate_id == "bad":
            raise self.raises
        self.total += event.data.n


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()])
async def test_g9_whatever_a_view_raises_parks_the_aggregate(error: BaseException) -> None:
    """It neither ends the process nor leaves a projector that does nothing, and others go on."""
    Mad.raises = error
    async with counting(Mad).open(on("memory://", 1), initialise=True) as opened:
        for name in ("bad", "good"):
            await opened.execute(Counter, name, Add(1))
        await project(opened)
        assert [marker.key.id for marker in await opened.parked()] == ["bad"]
        assert await opened.view(Mad, "good") == Mad(1)


@pytest.mark.parametrize("store_url", ["sqlite", "mysql", "postgres", "dynamodb"], indirect=True)
async def test_a_view_that_came_after_init_is_known(store_url: str) -> None:
    """Its projector makes what it needs; `check` and clients find it, before and after it fills."""
    app = counting(Totals) if store_url.startswith("dynamodb") else tallying_app()
    settings = on(store_url, 1)
    async with counting().open(settings, initialise=True) as opened:
        await opened.initialise()
    finding = next(f for f in await check_everything(app, settings) if f.check == "views")
    assert finding.code == 2
    assert "totals has no table totals__1 yet: run `cqrs-es init`" in finding.detail
    async with app.open(settings) as opened, opened.running() as supervisor:
        await opened.execute(Counter, "a", Add(1))
        await eventually(supervisor.idle, within_seconds=LONG)
        assert set(app.registry.projections) <= (await opened.storage.views.generations()).keys()
    finding = next(f for f in await check_everything(app, settings) if f.check == "views")
    assert finding.ok, finding.detail
    if store_url.startswith("postgres"):  # it refuses to drop what the published name shows
        return
    async with app.open(settings) as opened:
        await opened.storage.views.drop_table("totals__1")
    finding = next(f for f in await check_everything(app, settings) if f.check == "views")
    assert "run `cqrs-es rebuild totals`" in finding.detail


# --- The breaker -------------------------------------------------------------


@on_sql
async def test_g9_too_many_parks_stop_the_projector(store_url: str) -> None:
    """After 20 within a minute it stops for good: later, too, it parks no more."""
    names = [f"{number:02}" for number in range(30)]
    Fragile.bad, Fragile.first = frozenset(names), 1
    async with TestApp(counting(Fragile, Totals), settings=on(store_url, 1)) as t:
        with t.expect_failures():
            for name in names:
                await t.send(Counter, name, Add(1))
            supervisor = t._supervisor
            assert supervisor is not None

            async def stopped() -> bool:
                t.clock.advance_to_next(within=10.0)
                return supervisor.stuck is not None

            await eventually(stopped, within_seconds=LONG)
            for _ in range(3):
                t.clock.advance(61.0)
                with pytest.raises(errors.WaitTimeout):
                    await t.opened.wait_for("fragile", await t.send(Counter, "x", Add(1)), 0.1)
            assert isinstance(supervisor.stuck, errors.TooManyParked)
            assert "fragile failed on events of more than 20 aggregates" in str(supervisor.stuck)
            assert len(await t.parked()) == 20
            assert await t.view(Totals, names[-1]) == Totals(1, 1), "the other view goes on"
            assert any("fix the view" in trouble for trouble in supervisor.troubles)


async def test_g9_a_failure_of_one_place_has_its_traceback_logged_once() -> None:
    """Each parked aggregate has a line with its reason, also when it is tried again."""
    names = [f"{number}" for number in range(5)]
    Fragile.bad, Fragile.first = frozenset(names), 1
    async with counting(Fragile).open(on("memory://", 1), initialise=True) as opened:
        with capture_logs() as captured:
            for name in names:
                await opened.execute(Counter, name, Add(1))
            await project(opened)
            for marker in await opened.parked():
                assert not await opened.retry_parked("fragile", marker)
        for event in ("aggregate parked", "parked aggregate failed again"):
            lines = [line for line in captured if line["event"] == event]
            assert [line["aggregate"] for line in lines] == [f"counter/{name}" for name in names]
            assert all("RuntimeError: " in line["reason"] for line in lines)
            assert [line["exc_info"] is not None for line in lines] == [True] + [False] * 4


# --- Parked ------------------------------------------------------------------


@on_sql
async def test_g9_retries_at_once_apply_nothing_twice(store_url: str) -> None:
    """Of several retries with the same marker one applies the events."""
    async with counting(Fragile).open(on(store_url), initialise=True) as opened:
        Fragile.bad, Fragile.first = frozenset("b"), 3
        await opened.execute(Counter, "b", AddEach([1] * 1200))
        await project(opened)
        (marker,) = await opened.parked()
        Fragile.bad = frozenset()
        retries = [opened.retry_parked("fragile", marker) for _ in range(4)]
        assert await asyncio.gather(*retries) == [True] * 4
        assert await opened.view(Fragile, "b") == Fragile(1200)


@on_sql
async def test_g9_a_retry_stops_at_the_event_that_fails(store_url: str) -> None:
    """What comes before it is applied; the marker names it and counts the attempts."""
    async with counting(Fragile).open(on(store_url), initialise=True) as opened:
        Fragile.bad, Fragile.first = frozenset("b"), 3
        await opened.execute(Counter, "b", AddEach([1] * 1200))
        await project(opened)
        (marker,) = await opened.parked()
        Fragile.first = 1001
        assert not await opened.retry_parked("fragile", marker)
        (marker,) = await opened.parked()
        assert (marker.from_sequence, marker.attempts) == (1001, 2)
        assert await opened.view(Fragile, "b") == Fragile(1000)
        Fragile.bad = frozenset()
        assert await opened.retry_parked("fragile", marker)
        assert await opened.view(Fragile, "b") == Fragile(1200)


async def test_g9_parked_in_two_views(store_url: str) -> None:
    """Each view has a marker of its own: a retry for one leaves the other's."""
    async with counting(Fragile, Twin).open(on(store_url), initialise=True) as opened:
        Fragile.bad, Fragile.first = frozenset("b"), 1
        for name in "abc":
            await opened.execute(Counter, name, AddEach([1, 2, 3]))
        await project(opened)
        assert [m.projector for m in await opened.parked()] == ["fragile__1", "twin__1"]
        Fragile.bad = frozenset()
        (marker,) = await opened.parked("twin")
        assert await opened.retry_parked("twin", marker)
        assert [m.projector for m in await opened.parked()] == ["fragile__1"]
        assert (await opened.view(Twin, "b"), await opened.view(Fragile, "b")) == (Twin(6), None)


async def mended(opened: OpenApplication) -> ParkedAggregate:
    """Park an aggregate, mend the view, and add an event that the projector has not seen."""
    Fragile.bad, Fragile.first = frozenset("b"), 1
    await opened.execute(Counter, "b", AddEach([1, 2, 3]))
    await project(opened)
    (marker,) = await opened.parked()
    Fragile.bad = frozenset()
    await opened.execute(Counter, "b", Add(10))
    return marker


@on_sql
async def test_g9_a_retry_ends_with_all_that_was_passed_over(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the projector reaches while the retry reads is neither missed nor applied twice."""
    async with counting(Fragile).open(on(store_url), initialise=True) as opened:
        marker = await mended(opened)
        load, projecting = opened.storage.events.load, list[asyncio.Task[None]]()

        async def load_late(requests: Sequence[LoadRequest]) -> Sequence[LoadedAggregate]:
            """Give the projector time for the next event, which it has where nothing holds it."""
            loaded = await load(requests)
            if not projecting:
                projecting.append(asyncio.create_task(project(opened)))
                await asyncio.wait(projecting, timeout=0.5)
            return loaded

        monkeypatch.setattr(opened.storage.events, "load", load_late)
        assert await opened.retry_parked("fragile", marker)
        await projecting[0]
        await project(opened)
        assert await opened.parked() == []
        assert await opened.view(Fragile, "b") == Fragile(16)


@on_sql
async def test_g9_a_retry_goes_as_far_as_the_projector_is_when_it_begins(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the projector passed over just before the transaction is applied in it, too."""
    async with counting(Fragile).open(on(store_url), initialise=True) as opened:
        marker = await mended(opened)
        views = opened.storage.views
        begin = views.transaction

        @contextlib.asynccontextmanager
        async def begin_late() -> AsyncGenerator[ViewTransaction]:
            monkeypatch.setattr(views, "transaction", begin)
            await project(opened)
            async with begin() as transaction:
                yield transaction

        monkeypatch.setattr(views, "transaction", begin_late)
        assert await opened.retry_parked("fragile", marker)
        assert await opened.parked() == []
        assert await opened.view(Fragile, "b") == Fragile(16)


@pytest.mark.parametrize("lost", [errors.RolledBack(), errors.StoreError("refused")])
async def test_g9_a_retry_that_collides_is_tried_again(store_url: str, lost: Exception) -> None:
    """A deadlock, or a row that somebody else inserts, is no failure of the event."""
    Fragile.bad, Fragile.first = frozenset("b"), 1
    async with counting(Fragile).open(on(store_url), initialise=True) as opened:
        await opened.execute(Counter, "b", Add(7))
        await project(opened)
        (marker,) = await opened.parked()
        Fragile.bad = frozenset()
        storage = FaultyStorage(opened.storage)
        async with counting(Fragile).open(on(store_url), storage=storage) as other:
            storage.faults.before("transaction", lost, lost)
            assert await other.retry_parked("fragile", marker)
            storage.faults.before("transaction", errors.StoreUnavailable())
            with pytest.raises(errors.StoreUnavailable):
                await other.retry_parked("fragile", marker)
        assert await opened.view(Fragile, "b") == Fragile(7)


# --- Tables ------------------------------------------------------------------


async def lose_table(storage: Storage, name: str) -> None:
    """Drop the first generation's table behind the framework's back."""

    async def gone() -> bool:
        if isinstance(storage, SqlStorage):
            # PostgreSQL keeps a table that an SQL view shows; a projector that starts makes it.
            drop_view = f"DROP VIEW IF EXISTS {name}"
            await storage._database.run(lambda session: session.execute(drop_view))
        with contextlib.suppress(errors.StoreError):
            await storage.views.drop_table(f"{name}__1")
        return not await sql_of(storage.views).columns(f"{name}__1")

    await eventually(gone)


@on_sql
@pytest.mark.parametrize("name", ["totals", "sums"])
async def test_a_table_that_is_gone(store_url: str, name: str) -> None:
    """It is not made anew, empty, and nothing is parked for it; a rebuild brings it back."""
    async with tallying_app().open(on(store_url), initialise=True) as opened:
        await opened.execute(Counter, "a", AddEach([1, 2, 3]))
        async with opened.running() as supervisor:
            await eventually(supervisor.idle, within_seconds=LONG)
            await lose_table(opened.storage, name)
            await opened.execute(Counter, "a", Add(4))

            async def told() -> bool:
                return f"{name}__1 of the view {name} is gone" in " ".join(supervisor.troubles)

            await eventually(told, within_seconds=LONG)
            with pytest.raises(errors.ViewLost, match=f"cqrs-es rebuild {name}"):
                await opened.initialise()
            assert await opened.parked() == []
            await opened.rebuild(name).run()
            await eventually(supervisor.idle, within_seconds=LONG)
        assert await check_complete(opened, name) == 2


async def test_a_renamed_view_begins_anew(store_url: str) -> None:
    """The new name is filled from the whole log; what the old one left harms nobody."""
    storage_app = counting(Fragile)
    Fragile.bad = frozenset()
    async with storage_app.open(on(store_url), initialise=True) as before:
        await before.execute(Counter, "a", AddEach([1, 2, 3]))
        await project(before)
        renamed = counting(Twin)
        async with renamed.open(on(store_url), storage=before.storage, initialise=True) as after:
            await project(after)
            assert await after.view(Twin, "a") == Twin(6)
            with pytest.raises(errors.NotFound, match="the application's are twin"):
                after.projection("fragile")


# --- A long backlog ----------------------------------------------------------


class Pausing(Projector[Added], name="pausing"):
    """A projector that asks for a stop as soon as it has seen something."""

    tables: ClassVar[Mapping[str, str]] = {}
    stop: ClassVar[asyncio.Event] = asyncio.Event()

    async def project(self, events: Sequence[Envelope[Added]], sql: SqlSession) -> None:
        del events, sql
        self.stop.set()


@on_sql
async def test_g10_a_stop_within_a_long_backlog(store_url: str) -> None:
    """What is in hand is finished, not all that there is; the next projector goes on from there."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    app.projector(Pausing)
    Pausing.stop = asyncio.Event()
    async with app.open(on(store_url, 1), initialise=True) as opened:
        for _ in range(20):
            await opened.execute(Counter, "a", AddEach([1] * 500))
        await opened.supervisor(["projector:pausing"]).run(Pausing.stop)
        (reached,) = (await opened.storage.views.checkpoints("pausing__1")).values()
        assert 500 <= reached < 10_000
        await project(opened)
        assert await opened.storage.views.checkpoints("pausing__1") == {0: 10_000}


# --- Views over aggregates ---------------------------------------------------


@dataclass
class Board(View[Added | Started | Done], name="board"):
    """Rows by what happened, over two types of aggregates; some events belong to none."""

    counters: int = 0
    tasks: int = 0

    @classmethod
    def view_id(cls, event: Envelope[Added | Started | Done]) -> list[str] | str | None:
        match event.data:
            case Added(0):
                return None
            case Added(n):
                return ["all", "even" if n % 2 == 0 else "odd", "all"]
            case _:
                return "all"

    def update(self, event: Envelope[Added | Started | Done]) -> None:
        match event.data:
            case Added(n) if n == 13:
                self.delete()
            case Added(n):
                self.counters += n
            case Started() | Done():
                self.tasks += 1


def boards() -> Application:
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    app.aggregate(T)
    app.view(Board)
    return app


@on_sql
async def test_a_view_over_aggregates(store_url: str) -> None:
    """Rows that every partition writes to lose no event and count none twice, also rebuilt."""
    async with (
        boards().open(on(store_url, 8), initialise=True) as opened,
        opened.running() as supervisor,
    ):
        async with asyncio.TaskGroup() as group:
            for number in range(40):
                counting_up = opened.execute(Counter, f"c{number}", AddEach([0, 1, 2, 3]))
                group.create_task(counting_up)
                group.create_task(opened.execute(T, f"t{number}", Commit(["Started", "Done"])))
        await eventually(supervisor.idle, within_seconds=LONG)
        expected = [
            ("all", Board(counters=240, tasks=80)),
            ("even", Board(counters=80)),
            ("odd", Board(counters=160)),
        ]
        assert await opened.view_page(Board) == expected
        assert await opened.view_page(Board, after="all", limit=1) == expected[1:2]
        assert await opened.rebuild("board").run() == 2
        assert await opened.view_page(Board) == expected
        assert await opened.parked() == []


async def test_rows_deleted_by_the_view(store_url: str) -> None:
    """A deleted row is gone; the next event begins it anew, within a batch and after it."""
    async with boards().open(on(store_url, 1), initialise=True) as opened:
        for numbers, odd in [
            ([1, 13], None),
            ([3], Board(3)),
            ([5, 13, 7], Board(7)),
            ([13, 13], None),
            ([9], Board(9)),
        ]:
            await opened.execute(Counter, "c", AddEach(numbers))
            await project(opened)
            assert await opened.view(Board, "odd") == odd
        await opened.rebuild("board").run()
        assert await opened.view_page(Board) == [("all", Board(9)), ("odd", Board(9))]


@dataclass
class Misnamed(View[Added], name="misnamed"):
    """A view whose rows have no proper ids."""

    ids: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def view_id(cls, event: Envelope[Added]) -> Sequence[str]:
        del event
        return cls.ids

    def update(self, event: Envelope[Added]) -> None:
        pass


@pytest.mark.parametrize("view_id", ["", "x" * 256])
async def test_a_row_without_a_proper_id(store_url: str, view_id: str) -> None:
    """What one store could not hold parks its aggregate on all of them, with that reason."""
    Misnamed.ids = (view_id,)
    async with counting(Misnamed).open(on(store_url), initialise=True) as opened:
        await opened.execute(Counter, "a", Add(1))
        await project(opened)
        (marker,) = await opened.parked()
        assert marker.reason.startswith("ViewFailed: Misnamed.view_id gave")
        assert marker.reason.endswith("not text of 1 to 255 characters")


@on_sql
async def test_tables_are_made_where_nothing_was_written_yet(store_url: str) -> None:
    """A generation without checkpoints gets its tables; that is how every view begins."""
    async with tallying_app().open(on(store_url), initialise=True) as opened:
        folding = folding_for(opened.projection("sums"), 7)
        await make_sure_of_tables(opened.storage.views, folding)
        assert await sql_of(opened.storage.views).columns("sums__7") == ["counter", "total"]


# --- Where the topic keeps nothing --------------------------------------------


class Forgetful(MemoryBroker):
    """A topic without a past, like an exchange; something happens just before a subscription."""

    meanwhile: Callable[[], Awaitable[object]]

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        await self.meanwhile()
        now = {partition: await self.topic_end(partition) or 0 for partition in after}
        return await super().subscribe(now)


async def test_what_came_just_before_the_subscription_is_applied_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is read from the store, and does not wait for the next event or for quiet."""
    monkeypatch.setattr(projection_loop, "QUIET_SECONDS", 3600.0)
    broker = Forgetful(event_retention=100)
    async with counting(Totals).open(on("memory://", 1), broker=broker) as opened:

        async def published() -> bool:
            return await broker.topic_end(0) == 1

        async def meanwhile() -> None:
            await opened.execute(Counter, "c", Add(1))
            await eventually(published)

        broker.meanwhile = meanwhile
        async with opened.running():
            await eventually(lambda: _applied(opened))


async def _applied(opened: OpenApplication) -> bool:
    return await opened.view(Totals, "c") == Totals(1, 1)
