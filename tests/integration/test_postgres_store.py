"""What only PostgreSQL does: transactions that an error ends, and the Rust crates' tables there."""

from __future__ import annotations

import contextlib
import itertools
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import orjson
import pytest
from structlog.testing import capture_logs

from cqrs_es import errors
from cqrs_es.ports.store import NewEvent, Snapshot
from cqrs_es.ports.views import ParkedAggregate
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.stores.postgres.dialect import literal
from tests.contract.building import (
    PARTITIONS,
    accepted,
    account,
    chain,
    commit,
    conflict,
    one,
    stream,
)
from tests.samples import Add, Counter
from tests.servers import psql, start_pgbouncer
from tests.stores import in_sql, sql_of
from tests.tallies import Sums, tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import SqlValue
    from cqrs_es.stores.sql.dialect import Parameter


@pytest.fixture
async def storage(postgres_url: str) -> AsyncIterator[Storage]:
    storage = storage_for(postgres_url)
    await storage.open()
    await storage.initialise(PARTITIONS)
    yield storage
    await storage.close()


async def test_sessions_are_set_up(storage: Storage) -> None:
    """What correctness rests on: the isolation, the limits, the clock's zone."""
    names = (
        "default_transaction_isolation",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "timezone",
    )
    found = [(await sql_of(storage.views).query(f"SHOW {name}"))[0][0] for name in names]
    assert found == ["read committed", "5s", "7s", "UTC"]


# --- Behind a pooler -----------------------------------------------------------


@pytest.fixture
def pooled_url(request: pytest.FixtureRequest, postgres_url: str) -> Iterator[str]:
    """Name the database by a PgBouncer, in the mode that the test is parametrised with."""
    url = urlsplit(postgres_url)
    with TemporaryDirectory(prefix="cqrs-es-pgbouncer-") as folder:
        pooler = start_pgbouncer(Path(folder), url.port or 5432, request.param)
        yield f"postgresql://{url.username}@127.0.0.1:{pooler.port}{url.path}"
        pooler.stop()


@pytest.mark.parametrize("pooled_url", ["session"], indirect=True)
async def test_a_pooler_of_sessions(pooled_url: str) -> None:
    """Sessions are set up as without it, also after a migration, and a store works."""
    first, second = storage_for(pooled_url), storage_for(pooled_url)
    for storage in (first, second):
        await storage.open()
        await storage.initialise(PARTITIONS)
        await test_sessions_are_set_up(storage)
    await commit(first, one(account("a"), 0, 2))
    assert len(await stream(second, account("a"))) == 2
    for storage in (first, second):
        await storage.close()


@pytest.mark.parametrize("pooled_url", ["transaction", "statement"], indirect=True)
async def test_a_pooler_of_transactions_is_refused(pooled_url: str, postgres_url: str) -> None:
    """With what to do, whatever others have left there, and its sessions stay as they were."""
    for _ in range(3):
        storage = storage_for(pooled_url)
        with pytest.raises(errors.SettingsError, match="pool_mode = session"):
            await storage.open()
        await storage.close()
    assert "0" in psql(pooled_url, "SHOW lock_timeout")
    direct = storage_for(postgres_url)
    await direct.open()
    with pytest.raises(errors.StoreNotInitialised):
        await direct.info()
    await direct.close()


async def test_a_transaction_that_an_error_ended_does_not_pass_for_committed(
    storage: Storage,
) -> None:
    """A projector that swallows the error of a statement commits nothing, and is told."""
    columns = "name VARCHAR(40) PRIMARY KEY, total BIGINT NOT NULL"
    await sql_of(storage.views).create("totals__1", columns)

    async def swallow() -> None:
        async with in_sql(storage.views) as sql:
            await sql.execute("INSERT INTO totals__1 VALUES ('a', 1)")
            with contextlib.suppress(errors.StoreError):
                await sql.execute("INSERT INTO totals__1 VALUES ('a', 2)")

    with pytest.raises(errors.StoreError, match="nothing of it was committed"):
        await swallow()
    assert await sql_of(storage.views).query("SELECT name FROM totals__1") == []


async def test_names_of_views_may_be_in_any_case(storage: Storage) -> None:
    """The database folds names that are not quoted, as in a projector's own SQL."""
    columns = "name VARCHAR(40) PRIMARY KEY, total BIGINT NOT NULL"
    await sql_of(storage.views).create("BankTotals__1", columns)
    await sql_of(storage.views).publish("BankTotals", "BankTotals__1")
    async with in_sql(storage.views) as sql:
        for _ in range(2):
            rows: list[dict[str, SqlValue]] = [{"name": "a", "total": 1}]
            added = {"total": "old.total + new.total"}
            await sql.upsert("BankTotals__1", ["name"], rows, added)
    assert await sql_of(storage.views).query("SELECT total FROM BankTotals") == [(2,)]


async def test_sums_are_whole_numbers(storage: Storage) -> None:
    """As on the other stores; what has decimals is a Decimal, as on MySQL."""
    [(total, half)] = await sql_of(storage.views).query(
        "SELECT SUM(n), AVG(n) FROM (VALUES (1), (2)) t(n)"
    )
    assert (total, half) == (3, 1.5)
    assert (type(total), type(half)) == (int, Decimal)


async def test_text_that_the_database_can_not_hold(storage: Storage) -> None:
    """A NUL in prose is replaced: what it is about matters more than the character."""
    marker = ParkedAggregate("ledger__1", account(), 1, 0, "bad byte \0 here")
    async with storage.views.transaction() as transaction:
        await transaction.park(marker)
    [kept] = await storage.views.list_parked()
    assert kept.reason == "bad byte ␀ here"


async def test_json_with_an_escaped_nul(storage: Storage) -> None:
    """Events hold it as their senders wrote it."""
    event = NewEvent("Named", "1.0", orjson.dumps({"name": "a\0b"}), b"{}")
    key = account()
    await commit(storage, chain(key, 0, accepted(key, 0, [event])))
    [found] = await stream(storage, key)
    assert orjson.loads(found.payload) == {"name": "a\0b"}


# --- Rows that the Rust crates wrote -------------------------------------------

RUST_SCHEMA = """
    CREATE TABLE events (
        aggregate_type text NOT NULL, aggregate_id text NOT NULL,
        sequence bigint NOT NULL CHECK (sequence >= 0),
        event_type text NOT NULL, event_version text NOT NULL,
        payload json NOT NULL, metadata json NOT NULL,
        timestamp timestamp with time zone DEFAULT (CURRENT_TIMESTAMP),
        PRIMARY KEY (aggregate_type, aggregate_id, sequence));
    CREATE TABLE snapshots (
        aggregate_type text NOT NULL, aggregate_id text NOT NULL,
        last_sequence bigint NOT NULL CHECK (last_sequence >= 0),
        current_snapshot bigint NOT NULL CHECK (current_snapshot >= 0),
        payload json NOT NULL,
        PRIMARY KEY (aggregate_type, aggregate_id, last_sequence));
    INSERT INTO events (aggregate_type, aggregate_id, sequence, event_type, event_version,
        payload, metadata) VALUES ('account', 'a', 1, 'Opened', '1.0', '{"a":1}', '{}');
    INSERT INTO snapshots VALUES
        ('account', 'a', 1, 1, '{"old":1}'), ('account', 'a', 2, 2, '{"new":1}'),
        ('account', 'b', 1, 1, '{"b":1}')"""


async def test_a_database_of_the_rust_crates_is_adopted(postgres_url: str) -> None:
    """Its events load and count as versions; of each aggregate's snapshots the last one stays."""
    storage = storage_for(postgres_url)
    await storage.open()
    async with storage.views.transaction() as transaction:
        await sql_of(transaction).execute(RUST_SCHEMA)
    for _ in range(2):
        await storage.initialise(PARTITIONS)
    [found] = await stream(storage, account("a"))
    assert (found.payload, found.partition, found.offset) == (b'{"a":1}', 0, 0)
    assert await conflict(storage, one(account("a"), 0)) == 1
    snapshots = await sql_of(storage.views).query(
        "SELECT aggregate_id, last_sequence, payload FROM snapshots ORDER BY aggregate_id"
    )
    assert snapshots == [("a", 2, '{"new":1}'), ("b", 1, '{"b":1}')]
    await storage.close()


async def test_an_adopted_snapshot_is_replaced(postgres_url: str) -> None:
    """There is one row for each aggregate, also after the next snapshot."""
    storage = storage_for(postgres_url)
    await storage.open()
    async with storage.views.transaction() as transaction:
        await sql_of(transaction).execute(RUST_SCHEMA)
    await storage.initialise(PARTITIONS)
    key = account("a")
    event = NewEvent("Changed", "1.0", b"{}", b"{}")
    snapshot = Snapshot(key, 2, 3, b'{"newest":1}')
    await commit(storage, chain(key, 1, accepted(key, 1, [event]), snapshot=snapshot))
    found = await sql_of(storage.views).query(
        "SELECT current_snapshot FROM snapshots WHERE aggregate_id='a'"
    )
    assert found == [(3,)]
    await storage.close()


# --- Published names -----------------------------------------------------------


async def run_ddl(storage: Storage, *statements: str) -> None:
    async with in_sql(storage.views) as sql:
        for statement in statements:
            await sql.execute(statement)


async def grants_on(storage: Storage, name: str) -> set[tuple[object, ...]]:
    found = await sql_of(storage.views).query(
        "SELECT grantee, privilege_type, is_grantable FROM information_schema.role_table_grants"
        " WHERE table_name = ? AND grantee IN ('PUBLIC', 'analyst')",
        (name,),
    )
    return set(map(tuple, found))


@pytest.fixture
async def published(storage: Storage) -> AsyncIterator[Storage]:
    """Publish a projector's table, with grants on the name; prepare two more generations."""
    views = storage.views
    await sql_of(views).create("days__1", "day INT PRIMARY KEY, total BIGINT NOT NULL")
    await sql_of(views).create("days__2", "day INT PRIMARY KEY, total BIGINT NOT NULL")
    await sql_of(views).create("days__3", "day INT PRIMARY KEY, amount VARCHAR(9)")
    await sql_of(views).publish("days", "days__1")
    await run_ddl(
        storage,
        "INSERT INTO days__2 VALUES (2, 2)",
        "INSERT INTO days__3 VALUES (3, 'three')",
        "CREATE ROLE analyst",
        "GRANT SELECT ON days TO analyst WITH GRANT OPTION",
        "GRANT SELECT ON days TO PUBLIC",
    )
    yield storage
    await run_ddl(storage, "DROP OWNED BY analyst", "DROP ROLE analyst")


async def test_a_published_name_keeps_its_grants_and_what_depends_on_it(published: Storage) -> None:
    """A view on top of it shows the new generation; with other columns the grants stay, too."""
    before = await grants_on(published, "days")
    assert ("analyst", "SELECT", "YES") in before
    assert ("PUBLIC", "SELECT", "NO") in before
    await run_ddl(published, "CREATE VIEW report AS SELECT total FROM days")
    await sql_of(published.views).publish("days", "days__2")
    assert await sql_of(published.views).query("SELECT total FROM report") == [(2,)]
    assert await grants_on(published, "days") == before
    await run_ddl(published, "DROP VIEW report")
    await sql_of(published.views).publish("days", "days__3")
    assert await sql_of(published.views).query("SELECT amount FROM days") == [("three",)]
    assert await grants_on(published, "days") == before


async def test_what_stands_in_the_way_of_a_published_name_is_named(published: Storage) -> None:
    """A view that reads columns which are gone: it is said which, and the name stays as it was."""
    await run_ddl(published, "CREATE VIEW report AS SELECT total FROM days")
    with pytest.raises(errors.StoreError, match="view report depends on view days"):
        await sql_of(published.views).publish("days", "days__3")
    assert await sql_of(published.views).columns("days") == ["day", "total"]
    before = await grants_on(published, "days")
    assert ("analyst", "SELECT", "YES") in before


async def test_a_rebuild_that_cant_publish_says_why(postgres_url: str) -> None:
    """The new generation is live and projected; `init` publishes it once the way is free."""
    settings = Settings(store_url=postgres_url, partitions=1)
    async with tallying_app().open(settings, initialise=True) as opened:
        await run_ddl(opened.storage, "CREATE VIEW report AS SELECT total FROM sums")
        await opened.execute(Counter, "a", Add(1))
        with pytest.MonkeyPatch.context() as patched:
            other = "counter VARCHAR(40) NOT NULL PRIMARY KEY, spare INT, total BIGINT NOT NULL"
            patched.setattr(Sums, "tables", {"sums": other})
            refused = r"generation 2 of sums is live, but .*view report depends on view sums"
            with pytest.raises(errors.ConfigurationError, match=refused):
                await opened.rebuild("sums").run()
            with capture_logs() as captured:
                async with opened.running() as supervisor:
                    await opened.execute(Counter, "a", Add(1))
                    await eventually(supervisor.idle)
            assert [line["view"] for line in captured if line["event"] == "name not published"] == [
                "sums"
            ]
            assert await sql_of(opened.storage.views).query("SELECT total FROM sums__2") == [(2,)]
            await run_ddl(opened.storage, "DROP VIEW report")
            await opened.initialise()
            assert await sql_of(opened.storage.views).query("SELECT total FROM sums") == [(2,)]


@pytest.mark.parametrize("conforming", ["on", "off"])
async def test_the_server_reads_literals_as_the_values_that_they_are(
    postgres_url: str, conforming: str
) -> None:
    """An append's values are sent in its text; none may end its literal, whatever it is."""
    pieces = [
        "'",
        "\\",
        "\\'",
        "''",
        '"',
        "%",
        "%s",
        "?",
        "$1",
        "--",
        "/*",
        ";",
        "\n",
        "é",
        "🏦",
        " E'",
    ]
    texts = ["", *pieces, *("".join(pair) for pair in itertools.product(pieces, repeat=2))]
    moment = datetime(2026, 3, 29, 1, 30, 0, 123456, tzinfo=UTC)
    connection: Any = await asyncpg.connect(postgres_url)
    try:
        await connection.execute(f"SET standard_conforming_strings = {conforming}")
        query = f"SELECT * FROM unnest(ARRAY[{', '.join(map(literal, texts))}])"  # noqa: S608
        assert [row[0] for row in await connection.fetch(query)] == texts
        values: list[Parameter] = [b"\x00\\'", b"", 2**63 - 1, -(2**63) + 1, 0, moment, None]
        row = await connection.fetchrow(f"SELECT {', '.join(map(literal, values))}")
        assert list(row) == values
    finally:
        await connection.close()
    with pytest.raises(TypeError):
        literal(Decimal(1))
