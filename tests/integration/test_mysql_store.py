"""What only MySQL and MariaDB do: their limits, and the tables that the Rust crates made there."""

from __future__ import annotations

import math
import random
import uuid
from datetime import UTC, datetime, timedelta
from itertools import chain as chain_of
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
import pymysql
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.ports.store import NewEvent, ScheduledCommand
from cqrs_es.stores import storage_for
from cqrs_es.stores.mysql import session as mysql_session
from cqrs_es.stores.mysql.database import STRICT
from cqrs_es.stores.mysql.dialect import literal
from cqrs_es.stores.sql import events
from cqrs_es.stores.sql.dialect import literals
from cqrs_es.types import new_command_id
from tests.conftest import run_on
from tests.contract.building import (
    AWKWARD_IDS,
    NOW,
    PARTITIONS,
    accepted,
    account,
    account_in,
    assert_complete,
    chain,
    commit,
    conflict,
    one,
    stream,
    whole_log,
)
from tests.stores import sql_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from decimal import Decimal

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.storage import Storage

TARGET = account_in(1)
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


# --- Sessions ----------------------------------------------------------------


async def test_sessions_are_set_up(storage: Storage, *, on_mariadb: bool) -> None:
    """What correctness rests on: the isolation, the limits, the clock's zone."""
    isolation_name, idle_name = (
        ("tx_isolation", "idle_transaction_timeout")
        if on_mariadb
        else ("transaction_isolation", "wait_timeout")
    )
    [(isolation, lock_wait, idle, zone)] = await sql_of(storage.views).query(
        f"SELECT @@{isolation_name}, @@innodb_lock_wait_timeout, @@{idle_name}, @@time_zone"
    )
    assert (isolation, lock_wait, idle, zone) == ("READ-COMMITTED", 5, 7, "+00:00")


async def test_an_account_that_logs_in_in_an_unknown_way(
    mysql_server: str, mysql_url: str, *, on_mariadb: bool
) -> None:
    """It is a wrong setting, which no waiting fixes."""
    if not on_mariadb:
        pytest.skip("only MariaDB has ed25519")
    user = f"ed_{uuid.uuid4().hex[:8]}"
    run_on(mysql_server, "INSTALL SONAME 'auth_ed25519'")
    run_on(mysql_server, f"CREATE USER {user} IDENTIFIED VIA ed25519 USING PASSWORD('secret')")
    url = urlsplit(mysql_url)
    where = f"{url.hostname}:{url.port}{url.path}"
    storage = storage_for(f"mysql://{user}:secret@{where}")
    try:
        with pytest.raises(errors.SettingsError, match=r"client_ed25519.*give it mysql_native"):
            await storage.open()
    finally:
        run_on(mysql_server, f"DROP USER {user}")
        run_on(mysql_server, "UNINSTALL SONAME 'auth_ed25519'")


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
            await sql_of(transaction).execute(statement)
    await storage.initialise(PARTITIONS)
    [found] = await stream(storage, account("a"))
    assert orjson.loads(found.payload) == {"a": 1}  # MySQL writes it with a space
    assert (found.partition, found.offset, found.command_id) == (0, 0, None)
    assert await conflict(storage, one(account("a"), 0)) == 1
    await commit(storage, one(account("a"), 1), one(account("A"), 0), one(account("a "), 0))
    assert [len(await stream(storage, account(id_))) for id_ in ("a", "A", "a ")] == [2, 1, 1]
    await storage.close()


# --- Scheduled commands -----------------------------------------------------------

DUE_TOGETHER = 300
PAGES = "SHOW GLOBAL STATUS LIKE 'Innodb_buffer_pool_read_requests'"
AS_BEFORE = """
    ALTER TABLE outgoing_commands DROP PRIMARY KEY, ADD PRIMARY KEY (command_id),
    DROP INDEX outgoing_commands_id,
    ADD INDEX outgoing_commands_due (log_partition, due_at, command_id)"""

TWICE = """
    INSERT INTO outgoing_commands
    SELECT 2, due_at, command_id, aggregate_type, aggregate_id, timer, body
    FROM outgoing_commands"""


def rows_in_any_order(count: int) -> list[ScheduledCommand]:
    """Make rows for one target, whose ids are in another order than their moments."""
    moments = [datetime.now(UTC) - timedelta(hours=1, seconds=n) for n in range(count)]
    random.shuffle(moments)
    body = orjson.dumps({"text": "x" * 200})
    return [
        ScheduledCommand(
            command_id=new_command_id(), key=TARGET, partition=1, due=moment, body=body
        )
        for moment in moments
    ]


async def test_the_log_is_read_as_its_streams_are(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log by one column of JSON for each event, streams by their columns: to the byte."""
    bodies = [
        orjson.dumps({"text": text, "more": [None, {"a": [1.5, -0.0, 2**53]}]})
        for text in ("", "\x00\x01\x1f\x7f", "\"\\'", "\u2028", "🏦", "]},{[", "x" * 70_000)
    ]
    bodies += [b'{ "spaced" :\t[ ] }', b"{" + b'"a":{' * 30 + b"}" * 31]
    made = tuple(NewEvent("Happened", "1.0", body, body) for body in bodies)
    keys = [account(id_) for id_ in AWKWARD_IDS]
    await storage.events.append(
        [chain(key, 0, accepted(key, 0, made)) for key in keys], NOW + timedelta(microseconds=1)
    )
    streams = [event for key in keys for event in await stream(storage, key)]
    with monkeypatch.context() as patch:
        patch.setattr(events, "event_of", None)
        log = await whole_log(storage)
    assert len(streams) == len(keys) * len(made)
    assert sorted(streams, key=_place) == sorted(chain_of(*log.values()), key=_place)


def _place(event: StoredEvent) -> tuple[int, int]:
    return event.partition, event.offset


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ("payload = '{'", b"{"),
        ("payload = '{},{}'", b"{},{}"),
        ("payload = '{}],[{}'", b"{}],[{}"),
        ("payload = CONCAT(REPEAT('[', 9000), REPEAT(']', 9000))", b"[" * 9000 + b"]" * 9000),
        ("recorded_at = NULL", b'{"number":1}'),
    ],
    ids=["broken", "two values", "two rows", "nested too deep", "no moment"],
)
async def test_a_row_that_is_not_as_it_should_be(
    storage: Storage, mysql_url: str, change: str, read: bytes
) -> None:
    """It is read as it is by itself: what is wrong with it is said by those who decode it."""
    await commit(storage, one(TARGET, 0, 3))
    database = urlsplit(mysql_url).path[1:]
    text = "LONGTEXT COLLATE utf8mb4_general_ci"
    for statement in (
        f"ALTER TABLE {database}.events MODIFY payload {text}, MODIFY recorded_at DATETIME(6)",
        f"UPDATE {database}.events SET {change} WHERE sequence = 1",  # noqa: S608
    ):
        run_on(mysql_url, statement)
    found = await storage.events.read_log(1, 0, 10)
    assert [event.offset for event in found] == [1, 2, 3]
    assert found[0].payload.replace(b" ", b"") == read  # MySQL puts one after each colon
    assert found == await stream(storage, TARGET)


async def test_rows_that_are_due_together_lie_together(storage: Storage) -> None:
    """What reads them does not look for each on a page of its own."""
    events, views = storage.events, sql_of(storage.views)
    for _ in range(10):
        await events.schedule(rows_in_any_order(DUE_TOGETHER))

    async def pages() -> int:
        return int(str((await views.query(PAGES))[0][1]))

    least = math.inf
    for _ in range(5):  # the server may do something of its own meanwhile
        before = await pages()
        assert len(await events.due(1, DUE_TOGETHER)) == DUE_TOGETHER
        least = min(least, await pages() - before)
    assert least < DUE_TOGETHER


async def test_rows_are_put_in_order_by_a_migration(storage: Storage) -> None:
    """Those that were there stay, each once; a migration that was interrupted is made again."""
    events, views = storage.events, sql_of(storage.views)
    rows = {row.command_id: row for row in rows_in_any_order(50)}
    await views.query(AS_BEFORE)
    await events.schedule([*rows.values()])
    for _ in range(2):
        await views.query("UPDATE store_info SET value = '2' WHERE name = 'schema_migrations'")
        await storage.initialise(PARTITIONS)
        assert await events.find_scheduled(rows) == rows
        moments = [row.moment for row in await events.due(1, 100)]
        assert moments == sorted(row.moment for row in rows.values())
    with pytest.raises(errors.StoreError):  # an id has one row, whenever it is due
        await views.query(TWICE)
    assert await events.find_scheduled(rows) == rows


# --- Literals ----------------------------------------------------------------------

ODD = st.text(alphabet=st.sampled_from("\\'\"`%?_-#/*;\0\b\n\r\t\x1aß🏦 "), max_size=12)
MOMENTS = st.datetimes(datetime(1000, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - of UTC


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    texts=st.lists(ODD | st.text(), min_size=1, max_size=8),
    raw=st.binary(max_size=20),
    whole=st.integers(-(2**63), 2**64 - 1),
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    exact=st.decimals(-(10**30), 10**30, places=20),
    moment=MOMENTS,
)
def test_literals_are_read_as_they_were_meant(
    literal_reader: Callable[[str], tuple[Any, ...]],
    texts: list[str],
    raw: bytes,
    whole: int,
    ratio: float,
    exact: Decimal,
    moment: datetime,
) -> None:
    """By the server itself, beside one another in one statement: no value gets out of its own."""
    values = (*texts, raw, whole, ratio, exact, None, moment)
    select = f"SELECT {'HEX(%s), ' * (len(texts) + 1)}%s, %s, %s, %s, CAST(%s AS DATETIME(6))"
    found = literal_reader(select % literals(values, literal))
    hexes, (raw_read, whole_read, ratio_read, exact_read, none, at_read) = found[:-6], found[-6:]
    assert [bytes.fromhex(text).decode() for text in hexes] == texts
    assert bytes.fromhex(raw_read) == raw
    assert (whole_read, float(ratio_read), exact_read, none) == (whole, ratio, exact, None)
    assert at_read.replace(tzinfo=UTC) == moment


@pytest.fixture
def literal_reader(mysql_url: str) -> Iterator[Callable[[str], tuple[Any, ...]]]:
    """Ask the server as a session of the store's asks: its character set and its mode."""
    url = urlsplit(mysql_url)
    mode = f"SET SESSION sql_mode = '{STRICT}'"
    connection = pymysql.connect(
        host=url.hostname, port=url.port or 3306, user="root", charset="utf8mb4", init_command=mode
    )

    def read(statement: str) -> tuple[Any, ...]:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            (row,) = cursor.fetchall()
            return row

    with connection:
        yield read
