"""What only a database server does: networks that stall, sessions that are killed, frozen peers."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.ports.store import NewEvent
from cqrs_es.ports.views import ViewRow
from cqrs_es.stores import storage_for
from cqrs_es.stores.mysql import database as mysql_database
from cqrs_es.stores.mysql import session as mysql_session
from tests.contract.building import (
    NOW,
    PARTITIONS,
    accepted,
    account,
    account_in,
    assert_complete,
    chain,
    commit,
    conflict,
    letter,
    one,
    stream,
    whole_log,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewTransaction

HEAD = "SELECT head FROM log_partitions WHERE log_partition = ? FOR UPDATE"


@pytest.fixture
async def storage(mysql_url: str) -> AsyncIterator[Storage]:
    storage = storage_for(mysql_url)
    await storage.open()
    await storage.initialise(PARTITIONS)
    yield storage
    await storage.close()


@pytest.fixture
def on_mariadb(mysql_version: str) -> bool:
    """Tell MariaDB from MySQL."""
    return "mariadb" in mysql_version.lower()


@pytest.fixture
async def other(mysql_url: str) -> AsyncIterator[Storage]:
    """Connect to the same store as another process would, with leases of two seconds."""
    storage = storage_for(mysql_url, lease_seconds=2)
    await storage.open()
    yield storage
    await storage.close()


async def connection_id(transaction: ViewTransaction) -> int:
    [(number,)] = await transaction.fetch("SELECT CONNECTION_ID()")
    assert isinstance(number, int)
    return number


# --- Sessions ----------------------------------------------------------------


async def test_sessions_are_set_up(storage: Storage, *, on_mariadb: bool) -> None:
    """What correctness rests on: the isolation, the limits, the clock's zone."""
    isolation_name, idle_name = (
        ("tx_isolation", "idle_transaction_timeout")
        if on_mariadb
        else ("transaction_isolation", "wait_timeout")
    )
    [(isolation, lock_wait, idle, zone)] = await storage.views.query(
        f"SELECT @@{isolation_name}, @@innodb_lock_wait_timeout, @@{idle_name}, @@time_zone"
    )
    assert (isolation, lock_wait, idle, zone) == ("READ-COMMITTED", 5, 7, "+00:00")


async def test_g5_a_frozen_process_can_not_hold_a_partition(
    storage: Storage, other: Storage
) -> None:
    """Whoever idles between lock and commit is thrown out before its lease ends."""
    key = account_in(0)

    async def freeze() -> None:
        async with other.views.transaction() as frozen:
            await frozen.fetch(HEAD, (0,))
            await commit(storage, one(key, 0))
            await frozen.fetch(HEAD, (0,))

    began = time.monotonic()
    with pytest.raises(errors.StoreUnavailable):
        await freeze()
    assert time.monotonic() - began < 4
    assert len(await stream(storage, key)) == 1


async def test_a_lock_that_is_held_for_long(storage: Storage, other: Storage) -> None:
    """It is waited for a bounded time, again and again, and then reported."""
    async with storage.views.transaction() as holder:
        await holder.fetch(HEAD, (0,))
        waiting = asyncio.create_task(other.events.append([one(account_in(0), 0)], NOW))
        async with asyncio.timeout(20):
            while not waiting.done():
                await holder.fetch("SELECT 1")  # so that it does not idle
                await asyncio.sleep(0.1)
    with pytest.raises(errors.StoreUnavailable):
        await waiting
    assert await stream(storage, account_in(0)) == []


async def test_a_deadlock_of_projectors_can_be_tried_again(storage: Storage) -> None:
    """One of two is rolled back, with an error that says to try again; the other commits."""
    await storage.views.create_table("ledger__1")
    async with storage.views.transaction() as transaction:
        await transaction.save("ledger__1", [ViewRow("a", 1, b"{}"), ViewRow("b", 1, b"{}")])
    both_hold = asyncio.Barrier(2)

    async def lock(first: str, then: str) -> None:
        async with storage.views.transaction() as transaction:
            await transaction.load("ledger__1", [first])
            await both_hold.wait()
            await transaction.load("ledger__1", [then])

    results = await asyncio.gather(lock("a", "b"), lock("b", "a"), return_exceptions=True)
    assert sorted(isinstance(result, errors.StoreUnavailable) for result in results) == [
        False,
        True,
    ]


async def test_disjoint_partitions_do_not_wait_for_each_other(
    storage: Storage, other: Storage
) -> None:
    """Only the heads that an append names are locked, also where the table is tiny."""
    async with other.views.transaction() as holder:
        await holder.fetch(HEAD, (1,))
        async with asyncio.timeout(1):
            await commit(storage, *(one(account_in(p), 0) for p in (0, 2, 3)))


# --- Broken connections --------------------------------------------------------


async def test_a_killed_connection_is_reported_and_replaced(storage: Storage) -> None:
    """Whoever had it is told to try again, and can."""

    async def be_killed() -> None:
        async with storage.views.transaction() as transaction:
            await storage.views.query(f"KILL {await connection_id(transaction)}")
            await transaction.fetch("SELECT 1")

    with pytest.raises(errors.StoreUnavailable):
        await be_killed()
    await commit(storage, one(account(), 0))


async def test_a_connection_killed_while_idle(storage: Storage, other: Storage) -> None:
    """It is reported at most once."""
    async with storage.views.transaction() as transaction:
        number = await connection_id(transaction)
    await other.views.query(f"KILL {number}")
    with contextlib.suppress(errors.StoreUnavailable):
        await storage.info()
    assert (await storage.info()).partitions == PARTITIONS


async def test_a_cancelled_query_leaves_no_answer_for_the_next(storage: Storage) -> None:
    """Its connection is closed: nobody knows what comes next on it."""
    slow = asyncio.create_task(storage.views.query("SELECT SLEEP(5), 'stale'"))
    await storage.info()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert await storage.views.query("SELECT 'fresh'") == [("fresh",)]


async def test_a_query_beyond_its_deadline(mysql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as unavailable, and the next one works."""
    monkeypatch.setattr(mysql_database, "STATEMENT_SECONDS", 0.2)
    storage = storage_for(mysql_url)
    await storage.open()
    with pytest.raises(errors.StoreUnavailable):
        await storage.views.query("SELECT SLEEP(5)")
    assert await storage.views.query("SELECT 1") == [(1,)]
    await storage.close()


async def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting has a deadline that covers the handshake."""
    monkeypatch.setattr(mysql_database, "CONNECT_SECONDS", 0.2)
    hung_up = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        storage = storage_for(f"mysql://root@127.0.0.1:{port}/bank")
        with pytest.raises(errors.StoreUnavailable):
            await storage.open()
        async with asyncio.timeout(5):
            await hung_up.wait()


async def test_all_connections_in_use(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user waits for one, but not for ever."""
    monkeypatch.setattr(mysql_database, "CONNECT_SECONDS", 0.2)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(mysql_database.MAX_CONNECTIONS):
            await stack.enter_async_context(storage.views.transaction())
        with pytest.raises(errors.StoreUnavailable, match="in use"):
            await storage.info()
    assert (await storage.info()).partitions == PARTITIONS


# --- Settings ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user", "database", "reason"),
    [("root", "nowhere", "no such database"), ("nobody:secret", "mysql", "password")],
)
async def test_wrong_settings_are_no_outage(
    mysql_url: str, user: str, database: str, reason: str
) -> None:
    """They are reported for what they are, without the password."""
    url = urlsplit(mysql_url)
    storage = storage_for(f"mysql://{user}@{url.hostname}:{url.port}/{database}")
    with pytest.raises(errors.SettingsError, match=reason) as caught:
        await storage.open()
    assert "secret" not in str(caught.value)


async def test_no_tables(mysql_url: str) -> None:
    """Before `init` every use says what to do; an unknown table of an author's does not."""
    storage = storage_for(mysql_url)
    await storage.open()
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.append([one(account(), 0)], NOW)
    with pytest.raises(errors.StoreError, match="nowhere"):
        await storage.views.query("SELECT * FROM nowhere")
    await storage.close()


async def test_not_open(mysql_url: str) -> None:
    """A store that was never opened says so."""
    with pytest.raises(errors.StoreUnavailable, match="not open"):
        await storage_for(mysql_url).info()


# --- Sizes ---------------------------------------------------------------------


async def test_an_event_over_the_packet_limit(storage: Storage) -> None:
    """It is refused before the server would cut the connection; nothing is written."""
    huge = NewEvent("Huge", "1.0", b'{"a":"' + b"x" * 17_000_000 + b'"}', b"{}")
    key = account()
    with pytest.raises(errors.TooLarge, match="max_allowed_packet"):
        await storage.events.append([chain(key, 0, accepted(key, 0, [huge]))], NOW)
    await commit(storage, one(key, 0))
    assert len(await stream(storage, key)) == 1


async def test_json_nested_too_deep(storage: Storage, *, on_mariadb: bool) -> None:
    """MariaDB takes 31 levels, MySQL 100; a level more is the command's failure, no outage."""
    levels = 32 if on_mariadb else 101
    deep = NewEvent("Deep", "1.0", b'{"a":' * levels + b"1" + b"}" * levels, b"{}")
    key = account()
    with pytest.raises(errors.TooLarge, match="nested"):
        await storage.events.append([chain(key, 0, accepted(key, 0, [deep]))], NOW)
    assert_complete(await whole_log(storage))


async def test_rows_are_spread_over_statements_by_bytes(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows there are, and however long each is."""
    monkeypatch.setattr(mysql_session, "STATEMENT_BYTES", 2_000)
    await commit(storage, *(one(account(str(n)), 0, 7) for n in range(50)))
    log = await whole_log(storage)
    assert_complete(log)
    assert sum(map(len, log.values())) == 350


async def test_bodies_of_any_bytes_are_kept(storage: Storage) -> None:
    """Dead letters may hold what is no text."""
    kept = letter("1", body=bytes(range(256)))
    await storage.dead_letters.add(kept)
    assert await storage.dead_letters.get("1") == kept


# --- Rows that the Rust crates wrote -------------------------------------------

RUST_SCHEMA = (
    """CREATE TABLE events (
        aggregate_type varchar(255) NOT NULL, aggregate_id varchar(255) NOT NULL,
        sequence bigint NOT NULL CHECK (sequence >= 0),
        event_type text NOT NULL, event_version text NOT NULL,
        payload json NOT NULL, metadata json NOT NULL,
        timestamp timestamp DEFAULT (CURRENT_TIMESTAMP),
        PRIMARY KEY (aggregate_type, aggregate_id, sequence))""",
    """CREATE TABLE snapshots (
        aggregate_type varchar(255) NOT NULL, aggregate_id varchar(255) NOT NULL,
        last_sequence bigint NOT NULL CHECK (last_sequence >= 0),
        current_snapshot bigint NOT NULL CHECK (current_snapshot >= 0),
        payload json NOT NULL, PRIMARY KEY (aggregate_type, aggregate_id))""",
    """INSERT INTO events (aggregate_type, aggregate_id, sequence, event_type, event_version,
        payload, metadata) VALUES ('account', 'a', 1, 'Opened', '1.0', '{"a":1}', '{}')""",
    "INSERT INTO snapshots VALUES ('account', 'a', 1, 1, '{}')",
)


async def test_a_database_of_the_rust_crates_is_adopted(mysql_url: str) -> None:
    """Its events load and count as versions, and from now on ids compare by bytes."""
    storage = storage_for(mysql_url)
    await storage.open()
    async with storage.views.transaction() as transaction:
        for statement in RUST_SCHEMA:
            await transaction.execute(statement)
    await storage.initialise(PARTITIONS)
    [found] = await stream(storage, account("a"))
    assert orjson.loads(found.payload) == {"a": 1}  # MySQL writes it with a space
    assert (found.partition, found.offset, found.command_id) == (0, 0, None)
    assert await conflict(storage, one(account("a"), 0)) == 1
    await commit(storage, one(account("a"), 1), one(account("A"), 0), one(account("a "), 0))
    assert [len(await stream(storage, account(id_))) for id_ in ("a", "A", "a ")] == [2, 1, 1]
    await storage.close()
