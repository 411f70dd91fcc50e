"""Rebuilds beside a live view: what they refuse, what they survive, and what may happen at once."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from cqrs_es import Envelope, View, errors
from cqrs_es.application import Application
from cqrs_es.projection.applying import Applier
from cqrs_es.projection.folding import folding_for
from cqrs_es.projection.generations import (
    begin_building,
    make_sure_of_tables,
    publish,
)
from cqrs_es.projection.rebuild import Rebuild, RebuildProgress, Switch
from cqrs_es.projector import Projector, SqlSession, physical_name
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.types import partition_of
from tests.faulty import Faults, FaultyStorage, FaultyViews
from tests.samples import Add, AddEach, Added, Counter, Services, Totals
from tests.stores import on_sql
from tests.tallies import Sums, check_complete, check_live, held_by, numbers_of, tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewStore

PARTITIONS = 3
NAMES = "abcdef"
VIEWS = ("totals", "sums")
LONG = 60.0


@dataclass
class Fragile(View[Added], name="fragile"):
    """A view that fails on the events of one counter from the third on."""

    bad = ""

    total: int = 0

    def update(self, event: Envelope[Added]) -> None:
        if event.aggregate_id == type(self).bad and event.sequence >= 3:
            message = "can't"
            raise RuntimeError(message)
        self.total += event.data.n


def fragile_app() -> Application:
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    app.view(Fragile)
    app.projector(Sums)
    return app


@asynccontextmanager
async def opened_on(
    url: str, app: Application | None = None, storage: Storage | None = None
) -> AsyncGenerator[OpenApplication]:
    """Open an application whose log holds 100 events of each of six counters, not projected."""
    settings = Settings(store_url=url, partitions=PARTITIONS)
    async with (app or tallying_app()).open(settings, storage=storage, initialise=True) as opened:
        for name in NAMES:
            await opened.execute(Counter, name, AddEach(list(range(1, 101))))
        yield opened


async def project(opened: OpenApplication) -> None:
    """Let the projectors see everything, then stop them."""
    async with opened.running() as supervisor:
        await eventually(supervisor.idle, within_seconds=LONG)


@asynccontextmanager
async def another(url: str, opened: OpenApplication) -> AsyncGenerator[Storage]:
    """Open the store as another process; what is in memory has only the one."""
    storage = opened.storage if url == "memory://" else storage_for(url)
    await storage.open()
    yield storage
    if storage is not opened.storage:
        await storage.close()


async def a_while(instants: int) -> None:
    """Let others run for so many turns of the event loop."""
    for _ in range(instants):
        await asyncio.sleep(0)


# --- Changing generations ----------------------------------------------------


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_to_the_next_generation_and_back(store_url: str, name: str) -> None:
    """The old one is kept, brought up to date before it is live again, then dropped for good."""
    async with opened_on(store_url) as opened:
        await project(opened)
        assert await opened.rebuild(name).run() == 2
        await opened.execute(Counter, "a", Add(1000))
        await project(opened)
        await opened.rebuild(name).switch_to(1)
        assert await check_complete(opened, name) == 1
        assert await opened.rebuild(name).run() == 3, "not 2 again"
        for number in (1, 2):
            await opened.rebuild(name).drop(number)
            with pytest.raises(errors.NotFound, match=f"no generation {number}"):
                await opened.rebuild(name).switch_to(number)
        await opened.execute(Counter, "a", Add(1000))
        await project(opened)
        assert await check_complete(opened, name) == 3


class Sides(Projector[Added], name="sides"):
    """A projector that has two tables, until its code has one less."""

    tables: ClassVar[Mapping[str, str]] = {
        "sides": "n BIGINT NOT NULL PRIMARY KEY",
        "OtherSides": "n BIGINT NOT NULL PRIMARY KEY",
    }

    async def project(self, events: Sequence[Envelope[Added]], sql: SqlSession) -> None:
        numbers = [{"n": n} for n in {event.data.n for event in events}]
        for name in self.tables:
            await sql.upsert(self.table(name), ["n"], numbers)


class OneSide(Sides, name="sides"):
    tables: ClassVar[Mapping[str, str]] = {"sides": Sides.tables["sides"]}


def folding(*views: type[View[Any] | Projector[Any]]) -> Application:
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    for view in views:
        if issubclass(view, View):
            app.view(view)
        else:
            app.projector(view)
    return app


async def test_a_view_that_the_code_has_no_more_is_removed(store_url: str) -> None:
    """All generations go, with all that is noted of them; as a new view it begins anew."""
    async with opened_on(store_url, folding(Totals)) as opened, another(store_url, opened) as store:
        await project(opened)
        await opened.rebuild("totals").run()
        with pytest.raises(errors.ConfigurationError, match="the application has Totals"):
            await opened.remove_view("Totals")
        settings = Settings(store_url=store_url)
        async with folding().open(settings, storage=store) as without:
            assert await without.remove_view("totals") == ["totals__1", "totals__2"]
            assert not [name for name in await store.views.list_tables() if "totals" in name]
            assert not [name for name in await store.views.generations() if "totals" in name]
            assert not any([await store.views.checkpoints(f"totals__{n}") for n in (1, 2)])
            with pytest.raises(errors.NotFound, match="nothing is left of a view or table totals"):
                await without.remove_view("totals")
        async with folding(Totals).open(settings, storage=store, initialise=True) as again:
            await project(again)
            assert await check_live(again, "totals") == 1


@on_sql
async def test_a_table_that_a_projector_has_no_more_is_removed(store_url: str) -> None:
    """The others stay, and so does a table that is called so itself, or ends in a date."""
    async with opened_on(store_url, folding(Sides)) as opened, another(store_url, opened) as store:
        await project(opened)
        await opened.rebuild("sides").run()
        settings = Settings(store_url=store_url)
        async with folding(OneSide).open(settings, storage=store) as smaller:
            await smaller.rebuild("sides").drop(1)
            await store.views.create_table("OtherSides__20261129")
            removed = await smaller.remove_view("OtherSides")
            assert [name.lower() for name in removed] == ["othersides__1", "othersides__2"]
            await store.views.create_table("OtherSides")
            left = {name.lower() for name in await store.views.list_tables() if "ides" in name}
            assert left - {"sides__3"} == {"sides__2", "othersides", "othersides__20261129"}
            await store.views.create_table("OtherSides__3")
            await smaller.remove_view("OtherSides")
            assert await store.views.count("OtherSides") == 0
            await project(smaller)
            assert await store.views.count("sides") == 100


async def test_a_view_whose_name_has_capitals(store_url: str) -> None:
    """It has its tables, whatever the database makes of their names: it opens and rebuilds."""

    @dataclass
    class Capitals(Totals, name="CapitalTotals"):
        pass

    async with opened_on(store_url, folding(Capitals)) as opened:
        await project(opened)
        assert await opened.rebuild("CapitalTotals").run() == 2
        await opened.initialise()
        await project(opened)
        assert await check_live(opened, "CapitalTotals") == 2


@on_sql
async def test_what_is_refused(store_url: str) -> None:
    """What is live or being built can't be dropped; what there never was can't be live."""
    Fragile.bad = "b"
    async with opened_on(store_url, fragile_app()) as opened:
        rebuild = opened.rebuild("fragile")
        with pytest.raises(errors.ConfigurationError, match="generation 1 of fragile is live"):
            await rebuild.drop(1)
        with pytest.raises(errors.NotFound, match="no rebuild of fragile is under way"):
            await rebuild.abort()
        with pytest.raises(errors.ViewFailed):
            await rebuild.run()
        with pytest.raises(errors.ConfigurationError, match="being built: `rebuild --abort`"):
            await rebuild.drop(2)
        for number in (3, 99):
            with pytest.raises(errors.NotFound, match=f"no generation {number}"):
                await rebuild.drop(number)
            with pytest.raises(errors.NotFound, match=f"no generation {number}; live is 1"):
                await rebuild.switch_to(number)
        assert await rebuild.abort() == 2
        assert await numbers_of(opened.storage.views, "fragile") == (1, None, 2)


@on_sql
async def test_progress_is_told(store_url: str) -> None:
    """How many events of how many, at which rate, and how long the rest takes."""
    seen: list[RebuildProgress] = []
    async with opened_on(store_url) as opened:
        await opened.rebuild("totals", seen.append).run()
    assert {state.generation for state in seen} == {2}
    assert (seen[0].done, seen[0].total, seen[0].share) == (0, 600, 0.0)
    assert seen[0].seconds_left is None
    assert [state.done for state in seen] == sorted(state.done for state in seen)
    last = seen[-1]
    assert (last.done, last.share, last.seconds_left) == (600, 1.0, 0.0)
    assert last.per_second > 0
    half = RebuildProgress(generation=2, done=50, total=200, per_second=10.0)
    assert (half.share, half.seconds_left) == (0.25, 15.0)


# --- A view that fails -------------------------------------------------------


@on_sql
async def test_a_view_that_fails_on_an_old_event(store_url: str) -> None:
    """The live generation is untouched and nothing is parked; fixed, the rebuild goes on."""
    Fragile.bad = ""
    async with opened_on(store_url, fragile_app()) as opened:
        await project(opened)
        before = await opened.view_rows("fragile")
        Fragile.bad = "b"
        with pytest.raises(errors.ViewFailed, match=r"fragile can't apply Added counter/b/3"):
            await opened.rebuild("fragile").run()
        assert await opened.view_rows("fragile") == before
        assert await numbers_of(opened.storage.views, "fragile") == (1, 2, 2)
        assert await opened.storage.views.list_parked() == []
        Fragile.bad = ""
        assert await opened.rebuild("fragile").run() == 2
        assert await check_complete(opened, "fragile") == 2


@on_sql
async def test_a_parked_aggregate_and_a_rebuild(store_url: str) -> None:
    """Not fixed, the rebuild fails too and the marker stays; fixed, it needs no marker."""
    Fragile.bad = "b"
    async with opened_on(store_url, fragile_app()) as opened:
        await project(opened)
        with pytest.raises(errors.ViewFailed):
            await opened.rebuild("fragile").run()
        (marker,) = await opened.parked("fragile")
        assert (marker.key.id, marker.from_sequence) == ("b", 3)
        Fragile.bad = ""
        assert await opened.rebuild("fragile").run() == 2
        assert await opened.parked("fragile") == []
        assert await check_complete(opened, "fragile") == 2
        assert await opened.retry_parked("fragile", marker), "the old generation's"
        assert await check_complete(opened, "fragile") == 2
        await opened.rebuild("fragile").switch_to(1)
        assert await check_complete(opened, "fragile") == 1


# --- At once -----------------------------------------------------------------


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_two_rebuilds_at_once(store_url: str, name: str) -> None:
    """They fill one generation together, or one after the other; no event counts twice."""
    async with opened_on(store_url) as opened, another(store_url, opened) as storage:
        for nth in range(6):
            other = Rebuild(opened.registry, storage, opened.projection(name))

            async def second(rebuild: Rebuild = other, instants: int = nth**3) -> int:
                await a_while(instants)
                return await rebuild.run()

            numbers = await asyncio.gather(opened.rebuild(name).run(), second())
            assert await check_complete(opened, name) == max(numbers)


class Overtaken(FaultyViews):
    """The views of a process that another overtakes just after it has listed the tables."""

    def __init__(self, inner: ViewStore, overtake: Callable[[], Awaitable[object]]) -> None:
        super().__init__(inner, Faults())
        self._overtake: Callable[[], Awaitable[object]] | None = overtake

    async def list_tables(self) -> list[str]:
        listed = await super().list_tables()
        overtake, self._overtake = self._overtake, None
        if overtake is not None:
            await overtake()
        return listed


async def test_tables_made_and_filled_by_another_meanwhile_are_not_lost() -> None:
    """They are there by the time that the checkpoints say what they hold."""
    async with opened_on("memory://") as opened:
        other = opened.rebuild("totals")
        number = await begin_building(opened.storage.views, opened.projection("totals"))
        folding = folding_for(opened.projection("totals"), number)
        await make_sure_of_tables(Overtaken(opened.storage.views, other.run), folding)
        assert await check_complete(opened, "totals") == number


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_a_rebuild_given_up_while_it_runs(store_url: str, name: str) -> None:
    """Whoever is first: the rebuild ends with the word that it was given up, or has switched."""
    given_up = 0
    async with opened_on(store_url) as opened, another(store_url, opened) as storage:
        for nth in range(8):
            slow = FaultyStorage(opened.storage)  # slower than memory, so that there is a while
            rebuild = Rebuild(opened.registry, slow, opened.projection(name))
            running = asyncio.create_task(rebuild.run())
            await a_while(nth**3 // 2)
            try:
                number = await Rebuild(opened.registry, storage, opened.projection(name)).abort()
            except errors.NotFound:
                assert await running == await check_complete(opened, name)
                continue
            given_up += 1
            with pytest.raises(errors.NotFound, match=rf"generation {number} of .* meanwhile"):
                await running
            assert await check_live(opened, name) < number
            await opened.rebuild(name).drop(number)
        assert await opened.rebuild(name).run() == await check_complete(opened, name)
    assert given_up > 0


@on_sql
async def test_a_rebuild_and_a_retry_at_once(store_url: str) -> None:
    """The parked events reach the generation that they are parked in, and no other twice."""
    async with opened_on(store_url, fragile_app()) as opened:
        for nth in range(10):
            Fragile.bad = "b"
            await opened.execute(Counter, "b", AddEach([1] * 10))
            await project(opened)
            (marker,) = await opened.parked("fragile")
            Fragile.bad = ""

            async def retry(instants: int = nth**3) -> bool:
                await a_while(instants)
                return await opened.retry_parked("fragile", marker)  # noqa: B023 - awaited at once

            _, caught_up = await asyncio.gather(opened.rebuild("fragile").run(), retry())
            assert caught_up
            assert await check_complete(opened, "fragile") == nth + 2


@on_sql
async def test_readers_are_never_put_back(store_url: str) -> None:
    """While commands arrive and views are rebuilt, who has seen a total never sees a lower one."""
    settings = Settings(store_url=store_url, partitions=PARTITIONS)
    async with tallying_app().open(settings, initialise=True) as opened, opened.running():
        done = asyncio.Event()

        async def write() -> None:
            while not done.is_set():
                for name in NAMES:
                    await opened.wait_for("totals", await opened.execute(Counter, name, Add(1)))

        async def read() -> None:
            seen = dict.fromkeys(NAMES, 0)
            while not done.is_set():
                for row, view in await opened.view_page(Totals):
                    assert view.total >= seen[row]
                    seen[row] = view.total
                # On one core a reader that never rests keeps Python's lock from the writer.
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as group:
            group.create_task(write())
            group.create_task(read())
            for number in range(2, 6):
                assert await opened.rebuild("totals").run() == number
                assert await opened.rebuild("sums").run() == number
            done.set()
        async with opened.running() as supervisor:
            await eventually(supervisor.idle, within_seconds=LONG)
        for name in VIEWS:
            assert await check_complete(opened, name) == 5


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_the_switch_applies_what_the_live_one_is_ahead(store_url: str, name: str) -> None:
    """Where that is little; else it changes nothing, and there is more to fill first."""
    settings = Settings(store_url=store_url, partitions=PARTITIONS)
    async with tallying_app().open(settings, initialise=True) as opened:
        for counter in NAMES:
            await opened.execute(Counter, counter, AddEach(list(range(1, 31))))
        await project(opened)
        views = opened.storage.views
        definition = opened.projection(name)
        folding = folding_for(definition, await begin_building(views, definition))
        await make_sure_of_tables(views, folding)
        switch = Switch(opened.registry, opened.storage, folding, building=True)

        await opened.execute(Counter, "a", AddEach([1] * 400))
        await project(opened)
        assert not await switch.attempt({})
        assert await numbers_of(views, name) == (1, 2, 2)
        applier = Applier(opened.registry, opened.storage, folding, partition_of("counter", "a", 3))
        await applier.catch_up(most=300)
        assert await switch.attempt({})
        assert await numbers_of(views, name) == (2, None, 2)
        await publish(views, opened.projection(name))
        assert await check_complete(opened, name) == 2


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_what_comes_after_the_fill_is_in_the_next_generation(
    store_url: str, name: str
) -> None:
    """What the live one has seen by the switch, then also what no projector has seen yet."""
    settings = Settings(store_url=store_url, partitions=PARTITIONS)
    async with tallying_app().open(settings, initialise=True) as opened:
        await opened.execute(Counter, "a", AddEach([1, 2, 3]))
        await project(opened)

        class Late(Rebuild):
            async def _attempt(self, switch: Switch, rate: int) -> bool:
                await opened.execute(Counter, "a", Add(10))
                await project(opened)
                await opened.execute(Counter, "b", Add(100))
                switched = await super()._attempt(switch, rate)
                assert await check_live(opened, name) == 2
                key = physical_name(name, 2)
                assert (await held_by(opened.storage, key))["a"] == 16
                return switched

        assert await Late(opened.registry, opened.storage, opened.projection(name)).run() == 2
        assert await check_complete(opened, name) == 2


# --- A store that goes away --------------------------------------------------


@on_sql
async def test_a_store_that_goes_away_is_waited_for(store_url: str) -> None:
    """Wherever it is lost, before a commit or after it, no event is, and none counts twice."""
    inner = storage_for(store_url)
    await inner.open()
    storage = FaultyStorage(inner)
    async with opened_on(store_url, storage=storage) as opened:
        for nth in range(8):
            lost = errors.RolledBack() if nth % 2 else errors.StoreUnavailable()
            storage.faults.before("transaction", *[None] * nth, lost)
            storage.faults.after("transaction", *[None] * (nth + 2), errors.StoreUnavailable())
            storage.faults.before("read_log", *[None] * (nth % 3), errors.StoreUnavailable())
            number = await opened.rebuild("sums").run()
            storage.faults.clear()
            assert await check_complete(opened, "sums") == number
    await inner.close()
