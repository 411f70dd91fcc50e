"""What a projector's transaction promises: all or nothing, locks, compare-and-set (G7)."""
# ruff: noqa: PT012, S608 - blocks that fail are the subject; the tables are constants

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.ports.views import ParkedAggregate, ViewRow
from tests.contract.building import account
from tests.stores import in_sql, on_sql, sql_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import SqlValue, ViewTransaction
    from tests.contract.conftest import Database

TABLE = "ledger__1"
OWN_TABLE = "totals__1"
PROJECTOR = "ledger__1"
MARKER = ParkedAggregate(PROJECTOR, account(), 3, 1, "it did not fit")


def most_rows(storage: Storage) -> int:
    """Return how many to write: DynamoDB takes a hundred items at a time."""
    return 600 if storage.views.sql else 99


def most_at_once(storage: Storage) -> int:
    """Return for how many to race: without locks who comes second tries again, mostly in vain."""
    return 20 if storage.views.sql else 5


class RuleBrokenError(Exception):
    """Something that goes wrong in a projector."""


@pytest.fixture
async def storage(storage: Storage) -> Storage:
    """Prepare a view's table and a table of a projector's own."""
    await storage.views.create_table(TABLE)
    columns = "name VARCHAR(40) PRIMARY KEY, total BIGINT NOT NULL"
    if storage.views.sql:
        await sql_of(storage.views).create(OWN_TABLE, columns)
    return storage


def row(view_id: str, version: int = 1, **content: object) -> ViewRow:
    return ViewRow(view_id, version, orjson.dumps(content))


async def save(storage: Storage, *rows: ViewRow) -> None:
    async with storage.views.transaction() as transaction:
        await transaction.save(TABLE, rows)


async def write_everything(transaction: ViewTransaction, *, sql: bool) -> None:
    """Write once in every way that there is, over what `save_something` left."""
    await transaction.advance(PROJECTOR, 0, 5, 9)
    await transaction.advance(PROJECTOR, 1, 0, 9)
    await transaction.save(TABLE, [row("kept", 2, changed=True), row("new")])
    await transaction.delete(TABLE, ["doomed"])
    await transaction.park(MARKER)
    if sql:
        await sql_of(transaction).execute(f"INSERT INTO {OWN_TABLE} VALUES (?, ?)", ("new", 1))
    await transaction.set_generation("ledger", 2)


async def save_something(storage: Storage) -> None:
    async with storage.views.transaction() as transaction:
        await transaction.advance(PROJECTOR, 0, 0, 5)
        await transaction.save(TABLE, [row("kept"), row("doomed")])


async def assert_untouched(storage: Storage) -> None:
    """Check that nothing is there but what `save_something` left."""
    assert await storage.views.checkpoints(PROJECTOR) == {0: 5}
    found = await storage.views.page(TABLE)
    assert [(r.view_id, r.version) for r in found] == [("doomed", 1), ("kept", 1)]
    assert await storage.views.list_parked() == []
    assert await storage.views.generations() == {}
    if storage.views.sql:
        assert await sql_of(storage.views).query(f"SELECT name FROM {OWN_TABLE}") == []


# --- All or nothing ----------------------------------------------------------


async def test_g7_block_that_ends_commits(storage: Storage) -> None:
    """Everything that a transaction wrote is there when its block has ended."""
    await save_something(storage)
    async with storage.views.transaction() as transaction:
        await write_everything(transaction, sql=storage.views.sql is not None)
    assert await storage.views.checkpoints(PROJECTOR) == {0: 9, 1: 9}
    found = await storage.views.page(TABLE)
    assert [(r.view_id, r.version) for r in found] == [("kept", 2), ("new", 1)]
    assert await storage.views.list_parked() == [MARKER]
    if storage.views.sql:
        totals = await sql_of(storage.views).query(f"SELECT name, total FROM {OWN_TABLE}")
        assert [tuple(total) for total in totals] == [("new", 1)]


async def test_g7_error_rolls_back(storage: Storage) -> None:
    """An error in the block leaves it as it is, and of what was written no trace."""
    await save_something(storage)
    with pytest.raises(RuleBrokenError):
        async with storage.views.transaction() as transaction:
            await write_everything(transaction, sql=storage.views.sql is not None)
            raise RuleBrokenError
    await assert_untouched(storage)
    await save(storage, row("kept", 2))


async def test_g7_cancellation_rolls_back(storage: Storage) -> None:
    """A cancelled block leaves no trace, and the store can be used on."""
    await save_something(storage)
    written = asyncio.Event()

    async def project() -> None:
        async with storage.views.transaction() as transaction:
            await write_everything(transaction, sql=storage.views.sql is not None)
            written.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(project())
    await written.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_untouched(storage)
    await save(storage, row("kept", 2))


async def test_g7_cancellation_at_any_instant(storage: Storage) -> None:
    """Wherever a transaction is cancelled, it has happened whole or not at all."""

    async def project(nth: int) -> None:
        async with storage.views.transaction() as transaction:
            await transaction.advance(PROJECTOR, nth, 0, 1)
            await transaction.save(TABLE, [row(f"{nth:03}")])
            if storage.views.sql:
                insert = f"INSERT INTO {OWN_TABLE} VALUES (?, ?)"
                await sql_of(transaction).execute(insert, (f"{nth:03}", nth))

    for nth in range(30):
        task = asyncio.create_task(project(nth))
        for _ in range(nth * nth):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled() or task.exception() is None
    advanced = sorted(await storage.views.checkpoints(PROJECTOR))
    assert [int(r.view_id) for r in await storage.views.page(TABLE)] == advanced
    if storage.views.sql:
        numbers = await sql_of(storage.views).query(f"SELECT total FROM {OWN_TABLE} ORDER BY name")
        assert [number for (number,) in numbers] == advanced


async def test_g7_conflict_rolls_everything_back(storage: Storage) -> None:
    """A conflict at the end undoes what the transaction wrote before it."""
    await save_something(storage)
    with pytest.raises(errors.Conflict):
        async with storage.views.transaction() as transaction:
            await write_everything(transaction, sql=storage.views.sql is not None)
            await transaction.advance(PROJECTOR, 2, 1, 2)
    await assert_untouched(storage)


async def test_g7_others_never_see_what_is_rolled_back(
    database: Database, storage: Storage
) -> None:
    """A reader outside a transaction sees committed rows only, whether or not it waits for them."""
    await save_something(storage)
    other = await database.open()
    readers: list[asyncio.Task[ViewRow | None]] = []
    with pytest.raises(RuleBrokenError):
        async with storage.views.transaction() as transaction:
            await write_everything(transaction, sql=storage.views.sql is not None)
            readers += [
                asyncio.create_task(views.get(TABLE, "new"))
                for views in (storage.views, other.views)
            ]
            await asyncio.wait(readers, timeout=0.1)
            raise RuleBrokenError
    assert await asyncio.gather(*readers) == [None, None]


# --- Its own writes ----------------------------------------------------------


async def test_transaction_sees_its_own_writes(storage: Storage) -> None:
    """Inside the block every kind of read shows what the block has written."""
    await save_something(storage)
    async with storage.views.transaction() as transaction:
        await write_everything(transaction, sql=storage.views.sql is not None)
        assert await transaction.checkpoint(PROJECTOR, 0) == 9
        assert await transaction.checkpoint(PROJECTOR, 1) == 9
        rows = await transaction.load(TABLE, ["kept", "doomed", "new"])
        assert {r.view_id: r.version for r in rows.values()} == {"kept": 2, "new": 1}
        assert await transaction.parked(PROJECTOR, [account()]) == {account(): MARKER}
        if storage.views.sql:
            found = await sql_of(transaction).fetch(f"SELECT total FROM {OWN_TABLE}")
            assert [tuple(total) for total in found] == [(1,)]


async def test_load_finds_the_rows_there_are(storage: Storage) -> None:
    """Loading returns the rows that exist, by id."""
    most = most_rows(storage)
    await save(storage, *(row(f"{n}", n=n) for n in range(most)))
    async with storage.views.transaction() as transaction:
        found = await transaction.load(TABLE, [f"{n}" for n in range(most - 1, most + 9)] + ["0"])
        assert await transaction.load(TABLE, []) == {}
        await transaction.save(TABLE, [])
    assert found.keys() == {"0", f"{most - 1}"}
    assert orjson.loads(found[f"{most - 1}"].payload) == {"n": most - 1}


async def test_rows_loaded_by_awkward_case(storage: Storage) -> None:
    """Loading one id does not load its neighbours by case, accent or trailing space."""
    await save(storage, *(row(view_id) for view_id in ("a", "A", "á", "a ")))
    async with storage.views.transaction() as transaction:
        assert list(await transaction.load(TABLE, ["A"])) == ["A"]
        await transaction.delete(TABLE, ["a"])
    assert [r.view_id for r in await storage.views.page(TABLE)] == ["A", "a ", "á"]


# --- Compare-and-set ---------------------------------------------------------


async def test_g7_checkpoint_moves_from_where_it_is(storage: Storage) -> None:
    """A checkpoint is 0 at first and moves only from where it is expected."""
    async with storage.views.transaction() as transaction:
        assert await transaction.checkpoint(PROJECTOR, 1) == 0
        await transaction.advance(PROJECTOR, 1, 0, 5)
    for expected in (0, 4, 6):
        with pytest.raises(errors.Conflict):
            async with storage.views.transaction() as transaction:
                await transaction.advance(PROJECTOR, 1, expected, 7)
    assert await storage.views.checkpoints(PROJECTOR) == {1: 5}
    async with storage.views.transaction() as transaction:
        await transaction.advance(PROJECTOR, 1, 5, 7)
        await transaction.advance(PROJECTOR, 1, 7, 8)
    assert await storage.views.checkpoints(PROJECTOR) == {1: 8}


async def test_g7_first_advance_expects_zero(storage: Storage) -> None:
    """A checkpoint that is not there is at 0 and nowhere else."""
    with pytest.raises(errors.Conflict):
        async with storage.views.transaction() as transaction:
            await transaction.advance(PROJECTOR, 1, 3, 5)
    assert set((await storage.views.checkpoints(PROJECTOR)).values()) <= {0}


@pytest.mark.parametrize("stale", [row("1", 1), row("1", 2), row("1", 4), row("none", 2)])
async def test_a25_stale_row_conflicts(storage: Storage, stale: ViewRow) -> None:
    """A row is written over its version minus one only; otherwise it is left as it was."""
    await save(storage, row("1", n=1))
    await save(storage, row("1", 2, n=2))
    with pytest.raises(errors.Conflict):
        await save(storage, row("fresh"), stale)
    [stored] = await storage.views.page(TABLE)
    assert (stored.view_id, stored.version) == ("1", 2)
    assert orjson.loads(stored.payload) == {"n": 2}


async def test_many_rows_in_one_save(storage: Storage) -> None:
    """Hundreds of rows, new ones and others, are saved at once, or none when one is stale."""
    most = most_rows(storage)
    await save(storage, *(row(f"{n:03}") for n in range(0, most, 2)))
    mixed = [row(f"{n:03}", 1 if n % 2 else 2) for n in range(most)]
    with pytest.raises(errors.Conflict):
        await save(storage, *mixed, row("000", 9))
    await save(storage, *mixed)
    found = await storage.views.page(TABLE, limit=1000)
    assert [(r.view_id, r.version) for r in found] == [(r.view_id, r.version) for r in mixed]


async def test_deleted_row_begins_anew(storage: Storage) -> None:
    """A row deleted is gone, also for the same transaction, and begins at version 1 again."""
    await save(storage, row("1"))
    async with storage.views.transaction() as transaction:
        await transaction.delete(TABLE, ["1", "never there"])
        await transaction.delete(TABLE, [])
        assert await transaction.load(TABLE, ["1"]) == {}
        await transaction.save(TABLE, [row("1", again=True)])
    stored = await storage.views.get(TABLE, "1")
    assert stored is not None
    assert stored.version == 1


@pytest.mark.parametrize("store_url", ["sqlite", "mysql", "postgres"], indirect=True)
async def test_rows_that_were_loaded_are_not_read_again(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saving asks the database only for the versions of rows that it has not locked yet."""
    await save(storage, row("old"), row("unloaded"), row("doomed"))
    queries: list[str] = []
    async with storage.views.transaction() as transaction:
        session: Any = vars(transaction)["_lent"]
        fetch: Callable[..., Awaitable[object]] = session.fetch

        def noting(sql: str, *arguments: object, **options: object) -> Awaitable[object]:
            queries.append(sql)
            return fetch(sql, *arguments, **options)

        monkeypatch.setattr(session, "fetch", noting)
        loaded = await transaction.load(TABLE, ["old", "new", "doomed"])
        assert loaded.keys() == {"old", "doomed"}
        await transaction.save(TABLE, [row("old", 2), row("new")])
        await transaction.save(TABLE, [row("old", 3), row("new", 2)])
        await transaction.delete(TABLE, ["doomed"])
        await transaction.save(TABLE, [row("doomed")])
        assert len(queries) == 1
        await transaction.save(TABLE, [row("unloaded", 2)])
        assert len(queries) == 2
    found = [(r.view_id, r.version) for r in await storage.views.page(TABLE)]
    assert found == [("doomed", 1), ("new", 2), ("old", 3), ("unloaded", 2)]


# --- Locks -------------------------------------------------------------------


async def retrying(work: Callable[[int], Awaitable[None]], nth: int) -> None:
    """Do a transaction again as long as it conflicts, as a projector does."""
    while True:
        try:
            return await work(nth)
        except errors.Conflict:
            continue


async def locking(storage: Storage, work: Callable[[int], Awaitable[None]], nth: int) -> None:
    """Do a transaction that never conflicts where there are locks to wait for."""
    if storage.views.sql:
        await work(nth)
    else:
        await retrying(work, nth)


async def test_g7_loaded_rows_are_locked(database: Database, storage: Storage) -> None:
    """No update is lost and nothing deadlocks when transactions load the same rows in any order."""
    names = [f"{n}" for n in range(5)]
    await save(storage, *(row(name, total=0) for name in names))
    storages = [storage, await database.open()]

    async def add_one(nth: int) -> None:
        ids = names if nth % 2 else names[::-1]
        async with storages[nth % 2].views.transaction() as transaction:
            rows = await transaction.load(TABLE, ids)
            await asyncio.sleep(0)
            await transaction.save(TABLE, [added(r) for r in rows.values()])

    def added(r: ViewRow) -> ViewRow:
        return row(r.view_id, r.version + 1, total=orjson.loads(r.payload)["total"] + 1)

    async with asyncio.TaskGroup() as group:
        for nth in range(most_at_once(storage)):
            group.create_task(locking(storage, add_one, nth))
    found = await storage.views.page(TABLE)
    assert [orjson.loads(r.payload) for r in found] == [{"total": most_at_once(storage)}] * 5


async def test_g7_checkpoint_is_locked(database: Database, storage: Storage) -> None:
    """Who has read a checkpoint has it to itself until its transaction ends."""
    storages = [storage, await database.open()]
    async with storage.views.transaction() as transaction:
        await transaction.advance(PROJECTOR, 1, 0, 1)

    async def step(nth: int) -> None:
        async with storages[nth % 2].views.transaction() as transaction:
            at = await transaction.checkpoint(PROJECTOR, 1)
            await asyncio.sleep(0)
            await transaction.advance(PROJECTOR, 1, at, at + 1)

    async with asyncio.TaskGroup() as group:
        for nth in range(most_at_once(storage)):
            group.create_task(locking(storage, step, nth))
    assert await storage.views.checkpoints(PROJECTOR) == {1: most_at_once(storage) + 1}


async def test_g7_racing_for_the_first_checkpoint(database: Database, storage: Storage) -> None:
    """Where there is no checkpoint yet, racing transactions conflict rather than both count."""
    storages = [storage, await database.open()]

    async def step(nth: int) -> None:
        async with storages[nth % 2].views.transaction() as transaction:
            at = await transaction.checkpoint(PROJECTOR, 1)
            await asyncio.sleep(0)
            await transaction.advance(PROJECTOR, 1, at, at + 1)

    async with asyncio.TaskGroup() as group:
        for nth in range(6):
            group.create_task(retrying(step, nth))
    assert await storage.views.checkpoints(PROJECTOR) == {1: 6}


async def test_g7_racing_for_a_new_row(database: Database, storage: Storage) -> None:
    """Of transactions that create the same row one wins; the others conflict and see it."""
    storages = [storage, await database.open()]

    async def add_one(nth: int) -> None:
        async with storages[nth % 2].views.transaction() as transaction:
            rows = await transaction.load(TABLE, ["1"])
            await asyncio.sleep(0)
            version = rows["1"].version if rows else 0
            await transaction.save(TABLE, [row("1", version + 1)])

    async with asyncio.TaskGroup() as group:
        for nth in range(6):
            group.create_task(retrying(add_one, nth))
    stored = await storage.views.get(TABLE, "1")
    assert stored is not None
    assert stored.version == 6


async def test_generations_are_locked(database: Database, storage: Storage) -> None:
    """Who has read which generations are live may change that before anybody else reads it."""
    storages = [storage, await database.open()]
    async with storage.views.transaction() as transaction:
        await transaction.set_generation("ledger", 1)

    async def step(nth: int) -> None:
        async with storages[nth % 2].views.transaction() as transaction:
            numbers = await transaction.generations("ledger")
            live = numbers["ledger"]
            assert len(numbers) == live, "what others have added while it waited is seen"
            await asyncio.sleep(0)
            await transaction.set_generation(f"$fits:ledger__{live}", live)
            await transaction.set_generation("ledger", live + 1)

    async with asyncio.TaskGroup() as group:
        for nth in range(most_at_once(storage)):
            group.create_task(locking(storage, step, nth))
    noted = await storage.views.generations()
    assert noted["ledger"] == len(noted) == most_at_once(storage) + 1


# --- Markers -----------------------------------------------------------------


async def test_g9_parking_and_unparking(storage: Storage) -> None:
    """A marker is found by its projector and aggregate, replaced, and cleared."""
    other = account("other")
    again = ParkedAggregate(PROJECTOR, account(), 3, 1, "still not", attempts=2)
    async with storage.views.transaction() as transaction:
        assert await transaction.parked(PROJECTOR, [account()]) == {}
        await transaction.park(MARKER)
        await transaction.park(again)
        await transaction.park(ParkedAggregate(PROJECTOR, other, 1, 2, "nor this"))
    async with storage.views.transaction() as transaction:
        assert await transaction.parked(PROJECTOR, [account(), account("x")]) == {account(): again}
        assert await transaction.parked("totals__1", [account()]) == {}
        assert await transaction.parked(PROJECTOR, []) == {}
        await transaction.unpark(PROJECTOR, account())
        await transaction.unpark(PROJECTOR, account("x"))
    assert [parked.key for parked in await storage.views.list_parked()] == [other]


# --- SQL of one's own --------------------------------------------------------


@on_sql
async def test_own_sql_counts_the_rows_it_touched(storage: Storage) -> None:
    """Statements say how many rows they touched; queries return rows."""
    async with in_sql(storage.views) as sql:
        insert = f"INSERT INTO {OWN_TABLE} VALUES (?, ?)"
        for name in ("a", "b", "100%", "?"):
            assert await sql.execute(insert, (name, 2**40)) == 1
        update = f"UPDATE {OWN_TABLE} SET total = total + ? WHERE name IN (?, ?, ?)"
        assert await sql.execute(update, (1, "a", "b", "none")) == 2
        assert await sql.execute(update, (1, "x", "y", "z")) == 0
        found = await sql.fetch(
            f"SELECT name, total FROM {OWN_TABLE} WHERE name = ?",
            ("a",),
        )
        assert [tuple(each) for each in found] == [("a", 2**40 + 1)]
        assert await sql.execute(f"DELETE FROM {OWN_TABLE}") == 4


async def totals(storage: Storage) -> dict[object, object]:
    rows = await sql_of(storage.views).query(f"SELECT name, total FROM {OWN_TABLE}")
    return {name: total for name, total in rows}  # noqa: C416 - as tuples of any length


def total(name: str, number: int) -> dict[str, SqlValue]:
    return {"name": name, "total": number}


@on_sql
async def test_own_upsert_inserts_and_changes(storage: Storage) -> None:
    """Rows that are there are changed as asked, or take the new values; others are added."""
    added_up = {"total": "old.total + new.total"}
    async with in_sql(storage.views) as sql:
        await sql.upsert(OWN_TABLE, ["name"], [total("b", 1), total("a", 2**40)], added_up)
    async with in_sql(storage.views) as sql:
        rows: list[dict[str, SqlValue]] = [{"total": 5, "name": "a"}, total("it's ? 100%", 7)]
        await sql.upsert(OWN_TABLE, ["name"], rows, added_up)
        await sql.upsert(OWN_TABLE, ["name"], [total("b", 9)])
        await sql.upsert(OWN_TABLE, ["name"], [])
    assert await totals(storage) == {"a": 2**40 + 5, "b": 9, "it's ? 100%": 7}


@on_sql
async def test_own_upsert_of_rows_that_are_nothing_but_a_key(storage: Storage) -> None:
    """What is there already stays; the rest is added."""
    await sql_of(storage.views).create("seen__1", "n BIGINT NOT NULL, m BIGINT, PRIMARY KEY (n, m)")
    for last in (1, 2):
        async with in_sql(storage.views) as sql:
            rows: list[dict[str, SqlValue]] = [{"n": n, "m": n} for n in range(last + 1)]
            await sql.upsert("seen__1", ["n", "m"], rows)
    assert await sql_of(storage.views).query("SELECT n FROM seen__1 ORDER BY n") == [
        (0,),
        (1,),
        (2,),
    ]


@on_sql
async def test_own_upserts_of_many_rows_never_wait_in_a_circle(storage: Storage) -> None:
    """Whatever order they are given in, two transactions lock them in one; nothing is lost."""
    names = [f"day {number}" for number in range(100)]

    async def add_one_to_each(some: list[str]) -> None:
        rows = [total(name, 1) for name in some]
        for _ in range(5):
            async with in_sql(storage.views) as sql:
                await sql.upsert(OWN_TABLE, ["name"], rows, {"total": "old.total + new.total"})

    await asyncio.gather(*(add_one_to_each(some) for some in (names, names[::-1], names[50:])))
    assert await totals(storage) == {
        name: 15 if index >= 50 else 10 for index, name in enumerate(names)
    }


@on_sql
async def test_own_upsert_of_rows_that_differ_in_columns_is_refused(storage: Storage) -> None:
    """One statement can't write them; the error names the table."""
    async with in_sql(storage.views) as sql:
        with pytest.raises(errors.StoreError, match=OWN_TABLE):
            await sql.upsert(OWN_TABLE, ["name"], [total("a", 1), {"name": "b"}])


@on_sql
async def test_own_sql_that_is_wrong_rolls_back(storage: Storage) -> None:
    """A statement that the store refuses is a store's error and ends the transaction."""
    await save_something(storage)
    with pytest.raises(errors.StoreError):
        async with storage.views.transaction() as transaction:
            await write_everything(transaction, sql=storage.views.sql is not None)
            await sql_of(transaction).execute("UPDATE nowhere SET nothing = ?", (1,))
    await assert_untouched(storage)


@on_sql
async def test_own_table_is_made_once(storage: Storage) -> None:
    """Creating a table with columns again leaves its rows."""
    async with storage.views.transaction() as transaction:
        await sql_of(transaction).execute(f"INSERT INTO {OWN_TABLE} VALUES (?, ?)", ("a", 1))
    await sql_of(storage.views).create(OWN_TABLE, "name VARCHAR(40) PRIMARY KEY, total BIGINT")
    assert len(await sql_of(storage.views).query(f"SELECT name FROM {OWN_TABLE}")) == 1


# --- Statements of a projector's own -------------------------------------------


@on_sql
async def test_statements_at_the_same_time_take_turns(storage: Storage) -> None:
    """A projector may gather its queries: they are run one after the other."""
    async with storage.views.transaction() as transaction:
        await sql_of(transaction).execute(f"INSERT INTO {OWN_TABLE} VALUES (?, ?)", ("a", 7))
        select = f"SELECT total + ? FROM {OWN_TABLE} WHERE name = ?"
        found = await asyncio.gather(
            *(sql_of(transaction).fetch(select, (n, "a")) for n in range(5))
        )
    assert found == [[(7 + n,)] for n in range(5)]


@on_sql
@pytest.mark.parametrize("values", [(1,), (1, 2, 3), ()], ids=str)
async def test_a_statement_with_the_wrong_number_of_values(
    storage: Storage, values: tuple[int, ...]
) -> None:
    """It is the statement that is wrong, not a store that is away; the next one works."""
    with pytest.raises(Exception, match=r".") as caught:
        async with storage.views.transaction() as transaction:
            await sql_of(transaction).fetch(
                f"SELECT total FROM {OWN_TABLE} WHERE total > ? + ?", values
            )
    assert not isinstance(caught.value, errors.Unavailable)
    assert await sql_of(storage.views).query(f"SELECT COUNT(*) FROM {OWN_TABLE}") == [(0,)]


@on_sql
async def test_a_task_that_outlives_its_transaction_is_refused(storage: Storage) -> None:
    """Its statements would end up in the next transaction on the same connection."""
    ended = asyncio.Event()

    async def linger(transaction: ViewTransaction) -> None:
        await ended.wait()
        await sql_of(transaction).execute(f"INSERT INTO {OWN_TABLE} VALUES (?, ?)", ("late", 1))

    async with storage.views.transaction() as transaction:
        lingering = asyncio.create_task(linger(transaction))
    async with storage.views.transaction():
        ended.set()
        with pytest.raises(errors.TransactionEnded):
            await lingering
    assert await sql_of(storage.views).query(f"SELECT COUNT(*) FROM {OWN_TABLE}") == [(0,)]
