"""A view whose code changes while processes of both versions run, and after that.

Each test on one or two kinds of store; on every one by `make deploys`.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import types
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
import pytest

from cqrs_es import Envelope, View, errors
from cqrs_es.cli.preparing import check_everything
from cqrs_es.definitions import define_projector, define_view
from cqrs_es.projection.generations import read_generations
from cqrs_es.projection.replay import stored_log
from cqrs_es.runtime import health, projection_loop
from cqrs_es.runtime.consumer import CommandWorker
from cqrs_es.runtime.health import Probes
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.serverless.pump import Pump
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from tests.faulty import FaultyStorage
from tests.samples import Add, AddEach, Added, Counter
from tests.stores import SQL_STORES, STORES, sql_of
from tests.versions import NewDays, NewTally, OldDays, OldTally, version
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewStore
    from cqrs_es.projector import Projector

PARTITIONS = 2
NAMES = "abcd"
LONG = 60.0
EVERY_STORE = bool(os.environ.get("CQRS_ES_TEST_DEPLOYS"))


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have generations looked at more often, so that no test waits for the next look."""
    monkeypatch.setattr(projection_loop, "GENERATION_SECONDS", 0.2)
    monkeypatch.setattr(health, "VIEWS_SECONDS", 0.2)


OLD, NEW = (OldTally, OldDays), (NewTally, NewDays)


def on(*stores: str, of: tuple[str, ...] = SQL_STORES) -> pytest.MarkDecorator:
    """Run a test on some kinds of stores, or on every one that it may run on."""
    return pytest.mark.parametrize("store_url", of if EVERY_STORE else stores, indirect=True)


@asynccontextmanager
async def process(
    url: str, *views: type[View[Any] | Projector[Any]], storage: Storage | None = None
) -> AsyncGenerator[OpenApplication]:
    """Open an application as a process with code of its own does; `storage` is in memory."""
    seconds = 20 if url.startswith("dynamodb") else 2  # moto has one thread
    settings = Settings(store_url=url, partitions=PARTITIONS, lease_seconds=seconds)
    async with version(*views).open(settings, storage=storage, initialise=True) as opened:
        yield opened


@asynccontextmanager
async def stored(url: str) -> AsyncGenerator[Storage | None]:
    """Keep what is in memory for several processes."""
    storage = storage_for(url) if url == "memory://" else None
    if storage is not None:
        await storage.open()
    yield storage
    if storage is not None:
        await storage.close()


async def project(opened: OpenApplication) -> None:
    """Let the projectors do everything, then stop them."""
    async with opened.running() as supervisor:
        await eventually(supervisor.idle, within_seconds=LONG)


async def expected(opened: OpenApplication) -> dict[str, int]:
    """Fold the log."""
    totals: dict[str, int] = {}
    for partition, head in (await opened.storage.events.heads()).items():
        async for event in stored_log(opened.storage.events, partition, 0, head):
            totals[event.key.id] = totals.get(event.key.id, 0) + orjson.loads(event.payload)["n"]
    return totals


async def tallied(opened: OpenApplication, cls: type[OldTally | NewTally]) -> dict[str, int]:
    """Read the totals of the view as this code has it."""
    return {name: int(view.total) for name, view in await opened.view_page(cls)}


async def days_of(opened: OpenApplication, column: str) -> dict[str, int]:
    """Read the totals of the projector's table as this code has it."""
    rows = await sql_of(opened.storage.views).query(
        f"SELECT counter, {column} FROM {await opened.table('days')}"  # noqa: S608 - ours
    )
    return {str(name): int(total) for name, total in rows}


async def live(views: ViewStore, name: str) -> int:
    return (await read_generations(views, name)).live


async def add(opened: OpenApplication, times: int = 25) -> None:
    for name in NAMES:
        await opened.execute(Counter, name, AddEach(list(range(1, times + 1))))


# --- One version after the other ---------------------------------------------


@on("mysql")
async def test_new_code_fills_a_generation_of_its_own_and_old_code_finds_its_own_again(
    store_url: str,
) -> None:
    """Nothing is parked; what is live is what the code that runs makes."""
    async with stored(store_url) as storage:
        async with process(store_url, *OLD, storage=storage) as old:
            await add(old)
            await project(old)
        for number, views in ((2, NEW), (1, OLD)):
            async with process(store_url, *views, storage=storage) as opened:
                assert set(await opened.views_behind()) == {"tally", "days"}, "none, or far behind"
                await add(opened, times=30)
                await project(opened)
                assert await opened.views_behind() == []
                total = await expected(opened)
                assert await tallied(opened, views[0]) == total
                assert await days_of(opened, "amount" if number == 2 else "total") == total
                for name in ("tally", "days"):
                    assert await live(opened.storage.views, name) == number
                    assert await opened.generation(name) == number
                rows = await sql_of(opened.storage.views).query("SELECT * FROM days")
                assert {len(row) for row in rows} == {number + 1}, "its own name shows it"
                assert await opened.storage.views.list_parked() == []
        async with process(store_url, *NEW, storage=storage) as opened:
            assert await sql_of(opened.storage.views).count_indexes("days__2") == 2


@on("sqlite", of=STORES)
async def test_a_json_view_on_every_store(store_url: str) -> None:
    """The same without SQL: the old rows stay, and the new ones are read once they are filled."""
    async with stored(store_url) as storage, process(store_url, OldTally, storage=storage) as old:
        await add(old, times=3)
        await project(old)
        async with process(store_url, NewTally, storage=old.storage) as new:
            assert await new.views_behind() == ["tally"]
            with pytest.raises(errors.ViewBehind, match="no projector has filled"):
                await new.view(NewTally, "a")
            with pytest.raises(errors.ViewBehind, match="no projector has filled"):
                await new.view_row("tally", "a")  # as the gateway reads it
            with pytest.raises(errors.ViewBehind, match="no projector has filled"):
                await new.view_rows("tally")
            await project(new)
            assert await new.views_behind() == []
            assert await tallied(new, NewTally) == await expected(new)
            await old.execute(Counter, "a", Add(1))
            await project(old)
            assert await tallied(old, OldTally) == await expected(old)


@on("memory", of=STORES)
async def test_a_version_says_that_rows_mean_something_else(store_url: str) -> None:
    """The same row type, but a version: the rows are made anew."""

    @dataclass
    class Doubled(OldTally, name="tally", version="2"):
        def update(self, event: Envelope[Added]) -> None:
            self.total += 2 * event.data.n

    async with stored(store_url) as storage:
        async with process(store_url, OldTally, storage=storage) as old:
            await add(old, times=2)
            await project(old)
        async with process(store_url, Doubled, storage=storage) as new:
            await project(new)
            doubled = {name: 2 * total for name, total in (await expected(new)).items()}
            assert await tallied(new, Doubled) == doubled


def test_what_is_another_fingerprint() -> None:
    """Fields, their types and defaults, columns, indexes and version are; names of classes not."""

    def made(total: object, default: object, version: str = "") -> int:
        space = {"__annotations__": {"total": total}, "total": default, "update": OldTally.update}
        given = {"name": "tally", "version": version}
        cls: type[View[Any]] = types.new_class(
            "Tally", (View[Added],), given, lambda n: n.update(space)
        )
        return define_view(dataclass(cls)).fingerprint

    same = {made(int, 0), define_view(OldTally).fingerprint}
    assert len(same) == 1
    others = [made(int, 1), made(str, ""), made(Decimal, Decimal(0)), made(int, 0, "2")]
    assert len({*same, *others}) == 1 + len(others)

    class Indexed(OldDays, name="days"):
        indexes: ClassVar[Mapping[str, Sequence[str]]] = {"days": ["total"]}

    class Reindented(OldDays, name="days"):
        tables: ClassVar[Mapping[str, str]] = {
            "days": "counter VARCHAR(40)  NOT NULL\n PRIMARY KEY, total BIGINT NOT NULL"
        }

    days = [define_projector(cls).fingerprint for cls in (OldDays, Reindented, NewDays, Indexed)]
    assert days[0] == days[1]
    assert len(set(days)) == 3

    class Mistaken(OldDays, name="days"):
        indexes: ClassVar[Mapping[str, Sequence[str]]] = {"days": ["totl"]}

    with pytest.raises(errors.DefinitionError, match="days has no column 'totl'"):
        define_projector(Mistaken)


# --- Both at once ------------------------------------------------------------


@on("postgres")
async def test_two_versions_side_by_side(store_url: str) -> None:
    """Each keeps and reads its own; the new one is live when the last old one has left."""
    async with (
        stored(store_url) as storage,
        process(store_url, *OLD, storage=storage) as old,
    ):
        await add(old)
        async with process(store_url, *NEW, storage=storage) as new:
            async with new.running() as newer:
                async with old.running() as older:
                    for supervisor in (older, newer):
                        await eventually(supervisor.idle, within_seconds=LONG)
                    await add(old)
                    for supervisor in (older, newer):
                        await eventually(supervisor.idle, within_seconds=LONG)
                    total = await expected(new)
                    assert await tallied(old, OldTally) == await tallied(new, NewTally) == total
                    assert await days_of(old, "total") == await days_of(new, "amount") == total
                    assert [await live(new.storage.views, n) for n in ("tally", "days")] == [1, 1]

                async def switched() -> bool:
                    views = new.storage.views
                    return [await live(views, n) for n in ("tally", "days")] == [2, 2]

                await eventually(switched, within_seconds=LONG)
            assert await new.storage.views.list_parked() == []


@on("sqlite")
async def test_readers_keep_their_view_while_versions_change(store_url: str) -> None:
    """A reader of either version sees its rows at any moment, and never fewer than before."""

    async def watch(opened: OpenApplication, cls: type[OldTally | NewTally]) -> None:
        seen: dict[str, int] = {}
        while True:
            try:
                found = await tallied(opened, cls)
            except errors.ViewBehind:
                assert not seen, "it had its rows before"
                found = {}
            assert all(found.get(name, 0) >= total for name, total in seen.items())
            seen = found
            await asyncio.sleep(0.005)

    async def write(opened: OpenApplication) -> None:
        while True:
            for name in NAMES:
                await opened.execute(Counter, name, Add(1))
            await asyncio.sleep(0.01)

    async with (
        stored(store_url) as storage,
        process(store_url, *OLD, storage=storage) as old,
    ):
        await add(old)
        await project(old)
        async with process(store_url, *NEW, storage=storage) as new, asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(work)
                for work in (watch(old, OldTally), watch(new, NewTally), write(old))
            ]
            async with new.running():
                async with old.running():

                    async def filled() -> bool:
                        return not await new.views_behind()

                    await eventually(filled, within_seconds=LONG)

                async def switched() -> bool:
                    return await live(new.storage.views, "tally") == 2

                await eventually(switched, within_seconds=LONG)
            for task in tasks:
                task.cancel()
        assert await old.storage.views.list_parked() == []


@on("dynamodb", of=STORES)
async def test_a_pump_fills_and_promotes_too(store_url: str) -> None:
    """Where nothing runs unless it is invoked."""

    async def pump(opened: OpenApplication) -> None:
        assert (await Pump(opened.process, CommandWorker(opened.process)).run(LONG)).idle

    async with stored(store_url) as storage:
        for code in (OldTally, NewTally, OldTally):
            async with process(store_url, code, storage=storage) as opened:
                await opened.execute(Counter, "a", AddEach([1, 2]))
                await pump(opened)
                assert await opened.views_behind() == []
                assert [k.state for k in await opened.generations() if k.own] == ["live"]
                assert await tallied(opened, code) == await expected(opened)


# --- What goes wrong ---------------------------------------------------------


@on("sqlite")
async def test_a_fill_that_fails_on_an_old_event(store_url: str) -> None:
    """The old generation stays live, nothing is parked, and the reason names the event."""
    async with (
        stored(store_url) as storage,
        process(store_url, OldTally, storage=storage) as old,
    ):
        await add(old, times=3)
        await project(old)
        before = await tallied(old, OldTally)
        NewTally.bad = "c"
        try:
            async with process(store_url, NewTally, storage=storage) as new:
                async with new.running() as supervisor:

                    async def is_stuck() -> bool:
                        return supervisor.stuck is not None

                    await eventually(is_stuck, within_seconds=LONG)
                    assert isinstance(supervisor.stuck, errors.ViewFailed)
                    assert "tally can't apply Added counter/c/1" in supervisor.stuck.message
                assert await live(new.storage.views, "tally") == 1
                assert await new.storage.views.list_parked() == []
                assert await tallied(old, OldTally) == before
                NewTally.bad = ""
                await project(new)
                assert await tallied(new, NewTally) == await expected(new)
        finally:
            NewTally.bad = ""


async def test_a_file_that_gets_full_while_a_view_is_filled(tmp_path: Path) -> None:
    """That ends the process, as every write that finds no room; with room it goes on from there."""
    url = f"sqlite:///{tmp_path}/store.db"
    async with process(url, OldTally) as old:
        for number in range(400):
            await old.execute(Counter, f"counter {number}", Add(1))
        await project(old)
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    with pytest.raises(ExceptionGroup) as caught:
        async with process(f"{url}?max_pages={pages + 6}", NewTally) as new, new.running():
            await asyncio.sleep(LONG)
    assert caught.value.subgroup(errors.StoreFull) is not None
    async with process(url, NewTally) as new:
        assert await live(new.storage.views, "tally") == 1
        assert await new.views_behind() == ["tally"]
        await project(new)
        assert await live(new.storage.views, "tally") == 2
        assert (
            dict(await new.view_page(NewTally, limit=1000)).keys() == (await expected(new)).keys()
        )
        assert await new.storage.views.list_parked() == []


@on("sqlite")
async def test_a_store_without_room_while_a_view_is_filled(store_url: str) -> None:
    """It is waited for; the old generation stays live meanwhile."""
    inner = storage_for(store_url)
    await inner.open()
    storage = FaultyStorage(inner)
    async with process(store_url, OldTally, storage=storage) as old:
        await add(old)
        await project(old)
    async with process(store_url, NewTally, storage=storage) as new:
        storage.faults.before("read_log", *[errors.StoreRefusing("its disk is full")] * 12)
        async with new.running() as supervisor:

            async def refused() -> bool:
                return any("disk is full" in trouble for trouble in supervisor.troubles)

            await eventually(refused, within_seconds=LONG)
            assert await live(inner.views, "tally") == 1
            storage.faults.clear()
            await eventually(supervisor.idle, within_seconds=LONG)
        assert await live(inner.views, "tally") == 2
        assert await tallied(new, NewTally) == await expected(new)
    await inner.close()


@on("postgres")
async def test_a_row_that_does_not_fit_parks_nothing(store_url: str) -> None:
    """Somebody has changed rows or a table: the projector says so, and stops there."""
    async with (
        stored(store_url) as storage,
        process(store_url, *OLD, storage=storage) as old,
    ):
        await add(old, times=1)
        await project(old)
        sql = sql_of(old.storage.views)
        async with old.storage.views.transaction() as transaction:
            await sql_of(transaction).execute(
                "UPDATE tally__1 SET payload = ? WHERE view_id = ?", ('{"total": "x"}', "a")
            )
        await sql.unpublish("days")
        await old.storage.views.drop_table("days__1")
        await sql.create("days__1", "counter VARCHAR(40) NOT NULL PRIMARY KEY")
        await old.execute(Counter, "a", Add(1))
        async with old.running() as supervisor:

            async def both_say_so() -> bool:
                text = " ".join(supervisor.troubles)
                return "row 'a' of tally is not as OldTally" in text and "days__1 has other" in text

            await eventually(both_say_so, within_seconds=LONG)
        assert await old.storage.views.list_parked() == []


@on("sqlite")
async def test_a_store_of_before_there_were_fingerprints(store_url: str) -> None:
    """What is live is taken over by the code that it is of, and is left alone by other code."""
    for views, number in ((OLD, 1), (NEW, 2)):
        async with stored(store_url) as storage:
            async with process(store_url, *OLD, storage=storage) as old:
                await add(old, times=1)
                await project(old)
                async with old.storage.views.transaction() as transaction:
                    for key in await transaction.generations():
                        if key.startswith(("$fits:", "$filled:")):
                            await transaction.forget(key)
            async with process(store_url, *views, storage=storage) as opened:
                await project(opened)
                assert await opened.generation("tally") == await opened.generation("days") == number
                assert await tallied(opened, views[0]) == await expected(opened)


# --- What operators see ------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "roles", "waits"),
    [
        ("true", ["relay"], True),
        ("", ["relay"], False),
        ("", [], True),  # a gateway, which is there for readers
        ("false", [], False),
    ],
)
async def test_ready_waits_for_views(
    tmp_path: Path, asked: str, roles: list[str], *, waits: bool
) -> None:
    """Then a deploy does not go on before the new code has its views."""
    url = f"sqlite:///{tmp_path}/store.db"
    async with process(url, OldTally) as old:
        await add(old, times=2)
        await project(old)
    given = {"STORE_URL": url, "HEALTH_PORT": "0"} | ({"WAIT_FOR_VIEWS": asked} if asked else {})
    settings = Settings.from_environment({f"CQRS_ES_{name}": it for name, it in given.items()})
    app, stopping = version(NewTally), asyncio.Event()
    probes = Probes(app.registry, settings, "tests", roles, stopping)
    async with app.open(settings, initialise=True) as opened:
        supervisor = opened.supervisor()
        following = asyncio.create_task(probes.follow(opened.process, supervisor))

        async def reasons() -> list[str]:
            return [reason for reason in probes.health.reasons() if "view_behind" in reason]

        async def says_so() -> bool:
            return await reasons() == ["view_behind: tally is not up to date for this code"]

        async def is_content() -> bool:
            return await reasons() == []

        await eventually(says_so if waits else is_content, within_seconds=LONG)
        await project(opened)
        await eventually(is_content, within_seconds=LONG)
        await cancelled(following)


@on("memory")
async def test_generations_are_listed_and_pruned(store_url: str) -> None:
    """What is live, of this code, or in use stays; what is no more goes with all its tables."""

    async def listed(opened: OpenApplication) -> list[tuple[str, int, str, bool]]:
        return [(k.view, k.number, k.state, k.own) for k in await opened.generations()]

    async with stored(store_url) as storage, process(store_url, *OLD, storage=storage) as old:
        await add(old, times=2)
        await project(old)
        async with process(store_url, NewTally, storage=old.storage) as new:
            assert [k async for k in new.prune_views(dry_run=True) if k.view == "tally"] == []
            await project(new)
            assert await listed(new) == [
                ("days", 1, "removed", False),
                ("tally", 1, "filled", False),
                ("tally", 2, "live", True),
            ]
            async with old.running():

                async def both_project() -> bool:
                    return all(k.members for k in await new.generations() if k.number == 1)

                await eventually(both_project, within_seconds=LONG)
                assert [k async for k in new.prune_views()] == [], "old code uses them"
                with pytest.raises(errors.ConfigurationError, match="stop that first"):
                    await new.rebuild("tally").drop(1)
            await project(new)
            dropped = [k async for k in new.prune_views()]
            assert [(k.view, k.number) for k in dropped] == [("days", 1), ("tally", 1)]
            assert await listed(new) == [("tally", 2, "live", True)]
            left = {name for name in await new.storage.views.list_tables() if "__" in name}
            assert left == {"tally__2"}
            assert await tallied(new, NewTally) == await expected(new)
        await project(old)
        assert await live(old.storage.views, "tally") == 3, "what was dropped is not filled again"
        assert await tallied(old, OldTally) == await expected(old)


async def test_check_says_what_will_be_filled_anew(tmp_path: Path) -> None:
    """And about how long that takes; it is no error, and `check` changes nothing."""
    url = f"sqlite:///{tmp_path}/store.db"
    async with process(url, *OLD) as old:
        await add(old)
        await project(old)
    settings = Settings(store_url=url)
    details: list[str] = []
    for views in (OLD, NEW):
        findings = {f.check: f for f in await check_everything(version(*views), settings)}
        assert findings["views"].ok
        details.append(findings["views"].detail)
    assert details[0] == "2 with their tables"
    assert details[1].startswith("0 with their tables; tally will be filled anew by its projectors")
    assert "days will be filled anew by its projectors in about 0:00:01 (100 events" in details[1]
    async with process(url, *OLD) as old:
        assert [k.number for k in await old.generations()] == [1, 1]
