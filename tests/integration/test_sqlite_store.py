"""What only SQLite does: a file that is locked, full, damaged or not there."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.ports.leases import Part
from cqrs_es.stores import storage_for
from cqrs_es.stores.sql.session import MAX_TRIES, DuplicateKey, RolledBack
from cqrs_es.stores.sqlite.address import SqliteTarget
from cqrs_es.stores.sqlite.database import SqliteDatabase
from tests.clock import SettableClock
from tests.contract.building import (
    NOW,
    PARTITIONS,
    account,
    assert_complete,
    commit,
    conflict,
    one,
    stream,
    whole_log,
)
from tests.stores import sql_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cqrs_es.ports.storage import Storage
    from cqrs_es.stores.sql.session import Session


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


@pytest.fixture
async def storage(path: Path) -> AsyncIterator[Storage]:
    storage = storage_for(f"sqlite:///{path}?timeout=0.1")
    await storage.open()
    await storage.initialise(PARTITIONS)
    yield storage
    await storage.close()


async def opened(path: Path, options: str = "timeout=0.1") -> Storage:
    storage = storage_for(f"sqlite:///{path}?{options}")
    await storage.open()
    return storage


def overwrite(path: Path, filler: bytes, keep: int = 0) -> None:
    """Replace all but the first bytes of a file."""
    content = path.read_bytes() if path.exists() else b""
    path.write_bytes(content[:keep] + filler * (len(content) or 4096))


async def test_commits_are_synced_to_the_disk(storage: Storage) -> None:
    """WAL, and a sync at every commit."""
    async with storage.views.transaction() as transaction:
        assert await sql_of(transaction).fetch("PRAGMA synchronous") == [(2,)]
        assert await sql_of(transaction).fetch("PRAGMA journal_mode") == [("wal",)]


async def test_locked_by_another_process(storage: Storage, path: Path) -> None:
    """A writer elsewhere is waited for, then reported; nothing is written."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(errors.StoreLocked):
        await storage.events.append([one(account(), 0)], NOW)
    other.execute("ROLLBACK")
    other.close()
    await commit(storage, one(account(), 0))
    assert len(await stream(storage, account())) == 1


async def test_locked_when_it_is_opened(path: Path) -> None:
    """Also before the file is in WAL mode."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(errors.StoreLocked):
        await opened(path)
    other.close()


async def test_readers_go_on_beside_a_writer(storage: Storage, path: Path) -> None:
    """A lock for writing keeps nobody from reading."""
    await commit(storage, one(account(), 0))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert len(await stream(storage, account())) == 1
    other.close()


async def test_full(path: Path) -> None:
    """What does not fit is refused whole, and what was there stays readable."""
    storage = await opened(path, "max_pages=60")
    await storage.initialise(PARTITIONS)
    await commit(storage, one(account(), 0))
    with pytest.raises(errors.StoreFull):
        await storage.events.append([one(account("big"), 0, 5000)], NOW)
    assert await stream(storage, account("big")) == []
    assert_complete(await whole_log(storage))
    await storage.close()


async def test_read_only(storage: Storage, path: Path) -> None:
    """Reading works, writing is refused."""
    await commit(storage, one(account(), 0))
    reader = await opened(path, "mode=ro")
    assert len(await stream(reader, account())) == 1
    with pytest.raises(errors.StoreReadOnly):
        await reader.events.append([one(account(), 1)], NOW)
    await reader.close()


async def test_no_such_folder(tmp_path: Path) -> None:
    """A file that can't be made is reported by the same name; one that is not there as missing."""
    storage = storage_for(f"sqlite:///{tmp_path / 'nowhere' / 'store.db'}")
    await storage.open()
    with pytest.raises(errors.StoreMissing, match="there is no file"):
        await storage.info()
    with pytest.raises(errors.StoreReadOnly):
        await storage.initialise(1)
    await storage.close()


async def test_no_database(path: Path) -> None:
    """A file of something else is refused."""
    overwrite(path, b"Dear diary, ")
    with pytest.raises(errors.StoreCorrupt):
        await opened(path)


async def test_damaged(storage: Storage, path: Path) -> None:
    """Damage is reported, never taken for an empty store."""
    await commit(storage, *(one(account(str(n)), 0, 20) for n in range(50)))
    await storage.close()
    overwrite(path, b"\xff", keep=4096)
    with pytest.raises(errors.StoreCorrupt):
        await opened(path)


@pytest.mark.parametrize("replaced", [False, True])
async def test_deleted_or_replaced_while_open(
    storage: Storage, path: Path, *, replaced: bool
) -> None:
    """Nothing more is accepted: it would be gone when the file that nobody sees is closed."""
    await commit(storage, one(account("A"), 0))
    lose(path, replaced=replaced)
    with pytest.raises(errors.StoreUnusable, match="deleted or replaced"):
        await commit(storage, one(account("B"), 0))


def lose(path: Path, *, replaced: bool) -> None:
    """Do what a restore does to a file in use, or half of that."""
    content = path.read_bytes()
    path.unlink()
    if replaced:
        path.write_bytes(content)


async def test_migrated_by_newer_code(storage: Storage, path: Path) -> None:
    """Old code refuses to go on."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("UPDATE store_info SET value = '99' WHERE name = 'schema_version'")
    other.close()
    with pytest.raises(errors.SchemaTooNew, match="schema 99"):
        await storage.info()
    with pytest.raises(errors.SchemaTooNew):
        await storage.initialise(PARTITIONS)


async def test_not_open(path: Path) -> None:
    """A store that was never opened, or is closed, says so."""
    storage = storage_for(f"sqlite:///{path}")
    with pytest.raises(errors.StoreUnavailable, match="not open"):
        await storage.info()
    await storage.open()
    await storage.close()
    with pytest.raises(errors.StoreUnavailable, match="not open"):
        await storage.events.append([one(account(), 0)], NOW)


async def test_no_tables(path: Path) -> None:
    """Before `init` every use says what to do."""
    storage = await opened(path)
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.heads()
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.append([one(account(), 0)], NOW)
    await storage.close()


async def test_append_inside_a_view_transaction_of_the_same_task(storage: Storage) -> None:
    """It would wait for itself, so it is refused."""
    async with storage.views.transaction():
        with pytest.raises(errors.StoreError, match="transaction open already"):
            await storage.events.append([one(account(), 0)], NOW)


async def test_a_projectors_mistake_is_reported_as_such(storage: Storage) -> None:
    """An unknown table of its own is no missing `init`."""
    with pytest.raises(errors.StoreError, match="no such table: nowhere") as caught:
        await sql_of(storage.views).query("SELECT * FROM nowhere")
    assert not isinstance(caught.value, errors.ConfigurationError)


async def test_queries_can_not_write(storage: Storage) -> None:
    """What is outside a transaction only reads."""
    with pytest.raises(errors.StoreReadOnly):
        await sql_of(storage.views).query("DELETE FROM store_info")


async def test_a_cancelled_query_ends(storage: Storage) -> None:
    """Its connection is free at once, for all of them."""
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    queries = [asyncio.create_task(sql_of(storage.views).query(endless)) for _ in range(4)]
    await asyncio.sleep(0)
    for query in queries:
        query.cancel()
    await asyncio.wait(queries)
    assert (await storage.info()).partitions == PARTITIONS


# --- Rows that the Rust crates wrote ------------------------------------------

RUST_SCHEMA = """
    CREATE TABLE events (
        aggregate_type TEXT NOT NULL, aggregate_id TEXT NOT NULL,
        sequence INTEGER CHECK (sequence >= 0) NOT NULL,
        event_type TEXT NOT NULL, event_version TEXT NOT NULL,
        payload TEXT NOT NULL, metadata TEXT NOT NULL,
        PRIMARY KEY (aggregate_type, aggregate_id, sequence));
    CREATE TABLE snapshots (
        aggregate_type TEXT NOT NULL, aggregate_id TEXT NOT NULL,
        last_sequence INTEGER CHECK (last_sequence >= 0) NOT NULL,
        current_snapshot INTEGER CHECK (current_snapshot >= 0) NOT NULL,
        payload TEXT NOT NULL, PRIMARY KEY (aggregate_type, aggregate_id));
    INSERT INTO events VALUES ('account', '1', 1, 'Opened', '1.0', '{"a":1}', '{}');
    INSERT INTO events VALUES ('account', '1', 2, 'Moved', '1.0', '{"a":2}', '{}');
"""


async def test_a_database_of_the_rust_crates_is_adopted(path: Path) -> None:
    """Its events load and count as versions, though they are not in the log."""
    rust = sqlite3.connect(path)
    rust.executescript(RUST_SCHEMA)
    rust.close()
    storage = await opened(path)
    await storage.initialise(PARTITIONS)
    found = await stream(storage, account("1"))
    assert [(e.sequence, e.event_type, e.payload) for e in found] == [
        (1, "Opened", b'{"a":1}'),
        (2, "Moved", b'{"a":2}'),
    ]
    assert {(e.partition, e.offset, e.command_id, e.recorded_at.year) for e in found} == {
        (0, 0, None, 1970)
    }
    assert await conflict(storage, one(account("1"), 0)) == 2
    await commit(storage, one(account("1"), 2))
    assert sum((await storage.events.heads()).values()) == 1
    await storage.close()


# --- Trying again --------------------------------------------------------------


@pytest.fixture
async def database(path: Path) -> AsyncIterator[SqliteDatabase]:
    database = SqliteDatabase(SqliteTarget(path), SettableClock())
    await database.open()
    async with database.migration() as session:
        await session.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")
    yield database
    await database.close()


@pytest.mark.parametrize("error", [RolledBack, DuplicateKey])
async def test_rolled_back_work_is_done_again(
    database: SqliteDatabase, error: type[errors.CqrsError]
) -> None:
    """Until it commits; the tries before leave no trace."""
    tries: list[int] = []

    async def work(session: Session) -> int:
        tries.append(len(tries))
        await session.execute("INSERT INTO numbers VALUES (?)", (len(tries),))
        if len(tries) < 3:
            raise error
        return len(tries)

    assert await database.run(work) == 3
    assert await database.read(lambda session: session.fetch("SELECT n FROM numbers")) == [(3,)]


async def test_work_is_not_done_again_for_ever(database: SqliteDatabase) -> None:
    """After some tries the store counts as unavailable."""
    tries: list[int] = []

    async def work(session: Session) -> None:
        tries.append(1)
        await session.execute("INSERT INTO numbers VALUES (1)")
        await session.execute("INSERT INTO numbers VALUES (1)")

    with pytest.raises(errors.StoreUnavailable, match="same row"):
        await database.run(work)
    assert len(tries) == MAX_TRIES


async def test_work_that_waits_for_something_else_is_a_bug(database: SqliteDatabase) -> None:
    """It would hold up the thread of the connection."""

    async def work(session: Session) -> None:
        await session.execute("INSERT INTO numbers VALUES (1)")
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="await nothing but the session"):
        await database.run(work)
    assert await database.read(lambda session: session.fetch("SELECT n FROM numbers")) == []


async def test_a_member_that_died_before_the_clock_was_set_back(path: Path) -> None:
    """It is one for another term, not for as long as it lies ahead; so is what it has leased."""
    clock = SettableClock()
    storage = storage_for(f"sqlite:///{path}", clock=clock)
    await storage.open()
    try:
        await storage.initialise(PARTITIONS)
        leases, part = storage.leases, Part("worker", fit=True, seconds=10.0, held=())
        await leases.announce("worker", "dead", fit=True, seconds=10.0)
        await leases.acquire("worker", "dead", [1], 10.0)
        clock.move(-3600)
        await leases.take_part("a", [part], 10.0)
        assert await leases.acquire("worker", "a", [1], 10.0) == []
        clock.move(10.0)
        standing = (await leases.take_part("a", [part], 10.0))["worker"]
        assert [member.owner for member in standing.members] == ["a"]
        [taken] = await leases.acquire("worker", "a", [1], 10.0)
        assert taken.inherited
    finally:
        await storage.close()
