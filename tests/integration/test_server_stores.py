"""What only a database server does: networks that stall, sessions that are killed, frozen peers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pymysql
import pytest

from cqrs_es import errors
from cqrs_es.application import Application
from cqrs_es.ports.clock import SystemClock
from cqrs_es.ports.leases import Part
from cqrs_es.ports.views import ViewRow
from cqrs_es.runtime.leases import LeaseKeeper, Membership
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.stores.sql import pool
from cqrs_es.stores.sql.expected import UNMOVED_TIMES
from cqrs_es.stores.sql.pool import Limits
from tests.conftest import run_on
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
    events,
    letter,
    one,
    refused,
    stream,
    whole_log,
)
from tests.proxy import proxy_to
from tests.samples import Add, Counter, Services, Totals
from tests.servers import psql, start_mariadb
from tests.stores import in_sql, sql_of
from tests.waiting import eventually, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import Chain
    from cqrs_es.ports.views import ViewTransaction
    from cqrs_es.runtime.leases import Assignment

ALONE = 1 + UNMOVED_TIMES
"""How many appends it takes until a process expects to be alone."""
HEAD = "SELECT head FROM log_partitions WHERE log_partition = ? FOR UPDATE"


@dataclass(frozen=True, slots=True)
class Server:
    """A server's store, and how that server is told what no port allows."""

    url: str
    connection_id: str
    kill: str
    sleep: str
    waiting: str
    default_user: str
    default_database: str


@pytest.fixture(params=["mysql", "postgres"])
def server(request: pytest.FixtureRequest) -> Server:
    """Lend an empty database of each server."""
    if request.param == "mysql":
        return Server(
            url=request.getfixturevalue("mysql_url"),
            connection_id="SELECT CONNECTION_ID()",
            kill="KILL {}",
            sleep="SELECT SLEEP(5), 'stale'",
            waiting="SELECT COUNT(*) FROM information_schema.innodb_trx"
            " WHERE trx_state = 'LOCK WAIT'",
            default_user="root",
            default_database="mysql",
        )
    return Server(
        url=request.getfixturevalue("postgres_url"),
        connection_id="SELECT pg_backend_pid()",
        kill="SELECT pg_terminate_backend({})",
        sleep="SELECT pg_sleep(5), 'stale'",
        waiting="SELECT COUNT(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database()",
        default_user="postgres",
        default_database="postgres",
    )


class Writable:
    """A server's store for a user without privileges, and ways to refuse that user."""

    def __init__(self, server: Server) -> None:
        self.server = server
        url = urlsplit(server.url)
        self._root = urlunsplit(url._replace(path=""))
        self._mysql = url.scheme == "mysql"
        self.user = f"u{uuid.uuid4().hex[:16]}"
        database = url.path.strip("/")
        if self._mysql:
            self._tell(f"CREATE USER {self.user}")
            self._tell(f"GRANT ALL ON {database}.* TO {self.user}")
        else:
            self._tell(f"CREATE ROLE {self.user} LOGIN")
            self._tell(f"ALTER DATABASE {database} OWNER TO {self.user}")
            psql(server.url, f"GRANT ALL ON SCHEMA public TO {self.user}")
        self.url = f"{url.scheme}://{self.user}@{url.hostname}:{url.port}/{database}"

    def read_only(self, *, on: bool) -> None:
        """Make the server one that takes no writes, as after a failover."""
        if self._mysql:
            self._tell(f"SET GLOBAL read_only = {int(on)}")
        else:
            self._tell(f"ALTER SYSTEM SET default_transaction_read_only = {'on' if on else 'off'}")
            self._tell("SELECT pg_reload_conf()")
            until(
                lambda: (
                    self._tell("SHOW default_transaction_read_only").strip()
                    == ("on" if on else "off")
                )
            )

    def limit_connections(self, most: int) -> None:
        """Allow the user so many connections at most."""
        if self._mysql:
            self._tell(f"ALTER USER {self.user} WITH MAX_USER_CONNECTIONS {most}")
        else:
            self._tell(f"ALTER ROLE {self.user} CONNECTION LIMIT {most}")

    def remove(self) -> None:
        """Leave the server as it was; the role of PostgreSQL owns a database until that goes."""
        self.read_only(on=False)
        if self._mysql:
            self._tell(f"DROP USER {self.user}")

    def _tell(self, statement: str) -> str:
        return str(run_on(self._root, statement)) if self._mysql else psql(self._root, statement)


@pytest.fixture
def writable(server: Server) -> Iterator[Writable]:
    """Lend a server that can be made to refuse an ordinary user."""
    writable = Writable(server)
    yield writable
    writable.remove()


async def connection_ids(server: Server, storage: Storage, count: int) -> set[int]:
    """Use so many connections at once; return which those are."""
    async with contextlib.AsyncExitStack() as stack:
        transactions = [
            await stack.enter_async_context(storage.views.transaction()) for _ in range(count)
        ]
        return {await connection_id(server, transaction) for transaction in transactions}


@pytest.fixture
async def storage(server: Server) -> AsyncIterator[Storage]:
    storage = storage_for(server.url)
    await storage.open()
    await storage.initialise(PARTITIONS)
    yield storage
    await storage.close()


@pytest.fixture
async def other(server: Server) -> AsyncIterator[Storage]:
    """Connect to the same store as another process would, with leases of two seconds."""
    storage = storage_for(server.url, lease_seconds=2)
    await storage.open()
    yield storage
    await storage.close()


async def connection_id(server: Server, transaction: ViewTransaction) -> int:
    [(number,)] = await sql_of(transaction).fetch(server.connection_id)
    assert isinstance(number, int)
    return number


# --- Locks --------------------------------------------------------------------


async def test_g5_a_frozen_process_can_not_hold_a_partition(
    storage: Storage, other: Storage
) -> None:
    """Whoever idles between lock and commit is thrown out before its lease ends."""
    key = account_in(0)

    async def freeze() -> None:
        async with other.views.transaction() as frozen:
            await sql_of(frozen).fetch(HEAD, (0,))
            await commit(storage, one(key, 0))
            await sql_of(frozen).fetch(HEAD, (0,))

    began = time.monotonic()
    with pytest.raises(errors.StoreUnavailable):
        await freeze()
    assert time.monotonic() - began < 4
    assert len(await stream(storage, key)) == 1


async def test_a_lock_that_is_held_for_long(storage: Storage, other: Storage) -> None:
    """It is waited for a bounded time, again and again, and then reported."""
    async with storage.views.transaction() as holder:
        await sql_of(holder).fetch(HEAD, (0,))
        waiting = asyncio.create_task(other.events.append([one(account_in(0), 0)], NOW))
        async with asyncio.timeout(20):
            while not waiting.done():
                await sql_of(holder).fetch("SELECT 1")  # so that it does not idle
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
        await sql_of(holder).fetch(HEAD, (1,))
        async with asyncio.timeout(1):
            await commit(storage, *(one(account_in(p), 0) for p in (0, 2, 3)))


async def test_a_migration_that_fails_leaves_its_limits_to_nobody(
    server: Server, storage: Storage
) -> None:
    """Its connection is not lent again: it waits for locks for longer than a lease."""
    before = await sql_of(storage.views).query(server.connection_id)
    with pytest.raises(errors.StoreError):
        await sql_of(storage.views).create("broken__1", "no columns at all")
    assert await sql_of(storage.views).query(server.connection_id) != before
    assert (await storage.initialise(PARTITIONS)).partitions == PARTITIONS


# --- Broken connections --------------------------------------------------------


async def test_a_killed_connection_is_reported_and_replaced(
    server: Server, storage: Storage
) -> None:
    """Whoever had it is told to try again, and can."""

    async def be_killed() -> None:
        async with storage.views.transaction() as transaction:
            number = await connection_id(server, transaction)
            await sql_of(storage.views).query(server.kill.format(number))
            await sql_of(transaction).fetch("SELECT 1")

    with pytest.raises(errors.StoreUnavailable):
        await be_killed()
    await commit(storage, one(account(), 0))


async def test_a_connection_killed_while_idle(
    server: Server, storage: Storage, other: Storage
) -> None:
    """It is reported at most once."""
    async with storage.views.transaction() as transaction:
        number = await connection_id(server, transaction)
    await sql_of(other.views).query(server.kill.format(number))
    with contextlib.suppress(errors.StoreUnavailable):
        await storage.info()
    assert (await storage.info()).partitions == PARTITIONS


async def test_a_cancelled_query_leaves_no_answer_for_the_next(
    server: Server, storage: Storage
) -> None:
    """Its connection is closed: nobody knows what comes next on it."""
    slow = asyncio.create_task(sql_of(storage.views).query(server.sleep))
    await storage.info()
    slow.cancel()
    with pytest.raises(asyncio.CancelledError):
        await slow
    assert await sql_of(storage.views).query("SELECT 'fresh'") == [("fresh",)]


async def test_a_query_beyond_its_deadline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends as unavailable, and the next one works."""
    monkeypatch.setattr(pool, "STATEMENT_SECONDS", 0.2)
    storage = storage_for(server.url)
    await storage.open()
    with pytest.raises(errors.StoreUnavailable):
        await sql_of(storage.views).query(server.sleep)
    assert await sql_of(storage.views).query("SELECT 1") == [(1,)]
    await storage.close()


async def test_a_server_that_never_answers(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting has a deadline that covers the handshake."""
    monkeypatch.setattr(pool, "CONNECT_SECONDS", 0.2)
    hung_up = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        hung_up.set()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        scheme = urlsplit(server.url).scheme
        storage = storage_for(f"{scheme}://root@127.0.0.1:{port}/bank")
        with pytest.raises(errors.StoreUnavailable):
            await storage.open()
        async with asyncio.timeout(5):
            await hung_up.wait()


async def test_all_connections_in_use(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user waits for one, but not for ever; a lease does not, from whose end all goes."""
    leases = storage.leases
    held = await leases.acquire("relay", "a", [0, 1], LEASE_SECONDS)
    part = Part("relay", fit=True, seconds=LEASE_SECONDS, held=held)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(pool.MAX_CONNECTIONS):
            await stack.enter_async_context(storage.views.transaction())
        monkeypatch.setattr(pool, "CONNECT_SECONDS", 0.2)
        with pytest.raises(errors.StoreUnavailable, match="in use"):
            await storage.info()
        standing = (await leases.take_part("a", [part], LEASE_SECONDS))["relay"]
        assert standing.kept == held
        assert await leases.go_on("a", [part], LEASE_SECONDS)
        assert (await leases.look("a", [part])) is not None
    assert (await storage.info()).partitions == PARTITIONS


LEASE_SECONDS = 2.0


async def test_a_store_that_hangs_takes_the_leases_with_it(server: Server) -> None:
    """A member lets go of its partitions, and says why, before its leases end; later it goes on."""
    port = urlsplit(server.url).port
    assert port is not None
    async with proxy_to(port) as proxy:
        storage = storage_for(_through(proxy.port, server.url), lease_seconds=LEASE_SECONDS)
        await storage.open()
        await storage.initialise(PARTITIONS)
        membership = Membership(
            role="relay", owner="a", partitions=PARTITIONS, lease_seconds=LEASE_SECONDS
        )
        keeper = LeaseKeeper(storage.leases, SystemClock(), _hold, membership)
        stopping = asyncio.Event()

        async def holds(count: int, trouble: str | None) -> bool:
            words = keeper.trouble
            return len(keeper.held) == count and (
                trouble in words if trouble and words else words == trouble
            )

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(keeper.run(stopping))
            await eventually(lambda: holds(PARTITIONS, None))
            proxy.stall()
            await eventually(lambda: holds(0, "did not answer"), within_seconds=LEASE_SECONDS)
            proxy.reset()
            proxy.heal()
            await eventually(lambda: holds(PARTITIONS, None), within_seconds=30)
            stopping.set()
        await storage.close()


async def _hold(assignment: Assignment) -> None:
    await assignment.stopping.wait()


def _through(port: int, url: str) -> str:
    return url.replace(f":{urlsplit(url).port}/", f":{port}/")


# --- Servers that are there and refuse ------------------------------------------


async def test_a_primary_that_becomes_a_replica(writable: Writable) -> None:
    """No connection that was made before is used again, also not those that only read."""
    storage = storage_for(writable.url)
    await storage.open()
    await storage.initialise(PARTITIONS)
    connections = await connection_ids(writable.server, storage, 3)
    writable.read_only(on=True)
    with pytest.raises(errors.StoreNotPrimary, match="primary"):
        await storage.events.append([one(account(), 0)], NOW)
    assert not connections & await connection_ids(writable.server, storage, 3)
    writable.read_only(on=False)
    await commit(storage, one(account(), 0))
    await storage.close()


async def test_a_server_without_a_place_for_us(writable: Writable) -> None:
    """The account's limit of connections is said, and waited for as a server that is away."""
    first, second = storage_for(writable.url), storage_for(writable.url)
    writable.limit_connections(1)
    await first.open()
    await first.initialise(PARTITIONS)
    with pytest.raises(errors.StoreRefusing, match="too many connections; raise the limit"):
        await second.open()
    await first.close()
    async with asyncio.timeout(10):
        while True:  # the server notices after a moment that the first one is gone
            with contextlib.suppress(errors.StoreRefusing):
                await second.open()
                break
    assert (await second.info()).partitions == PARTITIONS
    await second.close()


async def goes_on_when_mended(
    url: str, refuse: Callable[[], None], fix: Callable[[], None]
) -> None:
    """Check that every role waits for a store that refuses, says so, and then goes on."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    app.view(Totals)
    settings = Settings(store_url=url, partitions=2, lease_seconds=LEASE_SECONDS)

    async with app.open(settings, initialise=True) as opened, opened.running() as supervisor:

        async def in_trouble() -> bool:
            return not any(supervisor.held.values()) and bool(supervisor.troubles)

        async def well() -> bool:
            return not supervisor.troubles and await supervisor.idle()

        await opened.execute(Counter, "c", Add(1))
        await eventually(well)
        refuse()
        pending = asyncio.create_task(opened.execute(Counter, "c", Add(2)))
        await eventually(in_trouble, within_seconds=30)
        fix()
        assert (await pending).status == "accepted"
        await eventually(well, within_seconds=30)
        assert await opened.view(Totals, "c") == Totals(3, 2)


async def test_every_role_waits_for_a_primary_to_take_writes_again(writable: Writable) -> None:
    """Nothing ends, and no command fails, while the server is a replica."""
    await goes_on_when_mended(
        writable.url, lambda: writable.read_only(on=True), lambda: writable.read_only(on=False)
    )


async def test_every_role_waits_for_a_full_server_to_have_room(tmp_path: Path) -> None:
    """Nothing ends, and no command fails, while somebody makes room."""
    small = ("--innodb-data-file-path=ibdata1:12M", "--innodb-file-per-table=0")
    servers = [start_mariadb(tmp_path, *small)]
    root = f"mysql://root@127.0.0.1:{servers[0].port}"

    def fill() -> None:
        run_on(root, "CREATE DATABASE filler")
        numbers = itertools.count()
        for size in (1_000_000, 100_000, 1_000):
            with contextlib.suppress(pymysql.OperationalError):  # the table is full
                while True:
                    table = f"CREATE TABLE filler.t{next(numbers)}"
                    run_on(root, f"{table} AS SELECT REPEAT('x', {size}) AS content")

    def make_room() -> None:
        servers[0].stop()
        larger = "--innodb-data-file-path=ibdata1:12M:autoextend"
        servers[0] = start_mariadb(tmp_path, larger, port=servers[0].port)

    try:
        run_on(root, "CREATE DATABASE shop")
        await goes_on_when_mended(f"{root}/shop", fill, make_room)
    finally:
        servers[0].stop()


# --- Settings ------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["database", "user"])
async def test_wrong_settings_are_no_outage(server: Server, wrong: str) -> None:
    """They are reported for what they are, without the password."""
    url = urlsplit(server.url)
    user = server.default_user if wrong == "database" else "nobody:secret"
    database = "nowhere" if wrong == "database" else server.default_database
    storage = storage_for(f"{url.scheme}://{user}@{url.hostname}:{url.port}/{database}")
    with pytest.raises(errors.SettingsError, match="CQRS_ES_STORE_URL") as caught:
        await storage.open()
    assert "secret" not in str(caught.value)


async def test_no_tables(server: Server) -> None:
    """Before `init` every use says what to do; an unknown table of an author's does not."""
    storage = storage_for(server.url)
    await storage.open()
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.append([one(account(), 0)], NOW)
    with pytest.raises(errors.StoreError, match="nowhere"):
        await sql_of(storage.views).query("SELECT * FROM nowhere")
    await storage.close()


async def test_not_open(server: Server) -> None:
    """A store that was never opened says so."""
    with pytest.raises(errors.StoreUnavailable, match="not open"):
        await storage_for(server.url).info()


# --- Bytes ---


async def test_bodies_of_any_bytes_are_kept(storage: Storage) -> None:
    """Dead letters may hold what is no text."""
    kept = letter("1", body=bytes(range(256)))
    await storage.dead_letters.add(kept)
    assert await storage.dead_letters.get("1") == kept


# --- Round trips -------------------------------------------------------------


@pytest.fixture
def trips(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count what is sent to the server and answered, whoever sends it."""
    answer, counted = pool.ServerSession._answer, [0]

    async def counting(session: pool.ServerSession, ask: Callable[[], Awaitable[object]]) -> object:
        counted[0] += 1
        return await answer(session, ask)

    monkeypatch.setattr(pool.ServerSession, "_answer", counting)
    return counted


async def trips_of_commit(storage: Storage, trips: list[int], chain: Chain) -> int:
    """Append a chain that passes; return how many round trips that took."""
    before = trips[0]
    await commit(storage, chain)
    return trips[0] - before


async def test_an_append_takes_few_round_trips(
    server: Server, storage: Storage, trips: list[int]
) -> None:
    """One to lock and read, on PostgreSQL one for each; one to write. In all one, where alone."""
    reading = 2 if server.url.startswith("mysql") else 3
    chains = [one(account("A"), base, 2) for base in (0, 2, 4, 6, 8, 10)]
    found = [await trips_of_commit(storage, trips, each) for each in chains]
    assert found == [reading] * (1 + UNMOVED_TIMES) + [1, 1]
    assert len(await stream(storage, account("A"))) == 12


async def test_beside_others_an_append_reads_first(
    server: Server, storage: Storage, trips: list[int]
) -> None:
    """What is not as expected costs a round trip more, once, until it is again."""
    reading = 2 if server.url.startswith("mysql") else 3
    mine, theirs = account_in(1), account_in(1, nth=1)
    for base in range(ALONE):
        await commit(storage, one(mine, base))
    other = storage_for(server.url)
    await other.open()
    await commit(other, one(theirs, 0))
    failed = 2  # and rolled back
    found = [
        await trips_of_commit(storage, trips, one(mine, base))
        for base in range(ALONE, 2 * ALONE + 1)
    ]
    assert found == [failed + reading, *[reading] * UNMOVED_TIMES, 1]
    await commit(other, one(theirs, 1))
    await other.close()
    await commit(storage, one(mine, 2 * ALONE + 1))
    assert_complete(await whole_log(storage))


async def somebody_waits_for_a_lock(server: Server, storage: Storage) -> bool:
    """Tell whether a statement in the server's database waits for another's row."""
    [(count,)] = await sql_of(storage.views).query(server.waiting)
    return bool(count)


@pytest.mark.parametrize("rejects", [False, True])
async def test_what_an_append_expects_is_looked_at_under_its_lock(
    server: Server, storage: Storage, *, rejects: bool
) -> None:
    """While it waits for the lock somebody else moves the aggregate: it conflicts."""
    mine = account("A")
    for base in range(ALONE):
        await commit(storage, one(mine, base))
    doomed = chain(mine, ALONE, refused(mine, ALONE)) if rejects else one(mine, ALONE)
    other = storage_for(server.url)
    await other.open()
    partition = mine.partition(PARTITIONS)
    async with in_sql(other.views) as sql:
        await sql.fetch(HEAD, (partition,))
        waiting = asyncio.create_task(conflict(storage, doomed))
        await eventually(lambda: somebody_waits_for_a_lock(server, other))
        copied = (
            "INSERT INTO events SELECT aggregate_type, aggregate_id, 5, event_type, event_version,"
            " payload, metadata, log_partition, 5, command_id, recorded_at FROM events"
            " WHERE sequence = 4"
        )
        await sql.execute(copied)
        await sql.execute(
            "UPDATE log_partitions SET head = 5 WHERE log_partition = ?", (partition,)
        )
    assert await waiting == 5
    await other.close()
    assert len(await stream(storage, mine)) == 5


async def test_an_append_of_many_reads_first(
    server: Server, storage: Storage, trips: list[int]
) -> None:
    """Where commands share what it costs, it is cheaper to ask for them together."""
    reading = 2 if server.url.startswith("mysql") else 3
    mine = account("A")
    for base in range(ALONE):
        await commit(storage, one(mine, base))
    many = chain(
        mine, ALONE, *[accepted(mine, ALONE + n, events(1, ALONE + 1 + n)) for n in range(21)]
    )
    assert await trips_of_commit(storage, trips, many) == reading
    assert await trips_of_commit(storage, trips, one(mine, ALONE + 21)) == 1


@pytest.mark.parametrize("lease_seconds", [1, 10, 61, 120, 3600, 1e6])
def test_a_lock_is_given_up_before_its_statement_is(lease_seconds: float) -> None:
    """Else the server goes on with a packet that nobody waits for any more, and commits it."""
    assert Limits.within(lease_seconds).lock_wait < pool.STATEMENT_SECONDS


async def test_what_was_looked_up_in_vain_is_not_written_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a deadline the outcome is looked up: what is not there by then never will be."""
    monkeypatch.setattr(pool, "STATEMENT_SECONDS", 3.0)  # a tenth, of the lease too
    mine = storage_for(server.url, lease_seconds=12)
    other = storage_for(server.url, lease_seconds=120)  # idles while it holds the lock
    await mine.open()
    await other.open()
    await mine.initialise(PARTITIONS)
    key = account("A")
    for base in range(ALONE):
        await commit(mine, one(key, base))
    doomed = one(key, ALONE)
    id_ = doomed.commands[0].outcome.command_id
    async with in_sql(other.views) as sql:
        await sql.fetch(HEAD, (key.partition(PARTITIONS),))
        with pytest.raises(errors.StoreUnavailable):
            await mine.events.append([doomed], NOW)
        assert await other.events.find_outcomes([id_]) == {}
    async with in_sql(other.views) as sql:  # who waited for the lock longer has had it by then
        await sql.fetch(HEAD, (key.partition(PARTITIONS),))
    assert await other.events.find_outcomes([id_]) == {}
    await mine.close()
    await other.close()


async def test_handlers_are_not_blamed_for_an_append_that_waits_for_a_lock(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The packet can't be cancelled; no handler is to be blamed for that."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    other = storage_for(server.url)
    await other.open()
    settings = Settings(store_url=server.url, partitions=1)
    async with (
        contextlib.AsyncExitStack() as stack,
        app.open(settings, initialise=True) as opened,
    ):
        for _ in range(ALONE):
            await opened.execute(Counter, "c", Add(1))
        sql = await stack.enter_async_context(in_sql(other.views))
        await sql.fetch(HEAD, (0,))
        pending = asyncio.create_task(opened.execute(Counter, "c", Add(1)))
        await eventually(lambda: somebody_waits_for_a_lock(server, other))
    with contextlib.suppress(BaseException):
        await pending
    await other.close()
    [said] = [it for it in caplog.records if "go on after their cancellation" in it.message]
    assert "appending=True" in said.message


@pytest.mark.parametrize("processes", [2, 3])
async def test_where_several_append_by_turns_hardly_anything_is_sent_in_vain(
    server: Server, storage: Storage, trips: list[int], processes: int
) -> None:
    """Who found a partition as it was left once by chance does not rely on it."""
    reading = 2 if server.url.startswith("mysql") else 3
    others = [storage_for(server.url) for _ in range(processes - 1)]
    for other in others:
        await other.open()
    draw, before, count = random.Random(1), trips[0], 200
    for number in range(count):
        await commit(draw.choice([storage, *others]), one(account(f"{number}"), 0))
    found = (trips[0] - before) / count
    for other in others:
        await other.close()
    assert found < reading * 1.08
