"""The rights of `config/database-grant`: each role can do its work, and little else."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import pytest
from structlog.testing import capture_logs

from cqrs_es import errors
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.http import Gateway
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from tests.conftest import run_on
from tests.gateways import ask_within
from tests.samples import Add, Counter, Totals
from tests.servers import CONFIG, psql
from tests.stores import in_sql, sql_of
from tests.tallies import check_complete, tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator, Iterator

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage
    from cqrs_es.runtime.supervisor import Supervisor

ROLES = ("init", "worker", "relay", "projector", "run", "gateway", "reader:totals+reader:sums")
EVERY = ("worker", "relay", "projector:totals", "projector:sums")
PATIENCE = 60.0
PARTITIONS = 2

on_servers = pytest.mark.parametrize("store_url", ["mysql", "postgres"], indirect=True)


@dataclass(frozen=True, slots=True)
class Users:
    """A user of one database for each role."""

    url: str
    prefix: str

    @property
    def kind(self) -> str:
        return "mysql" if self.url.startswith("mysql") else "postgres"

    def name(self, role: str) -> str:
        return f"{self.prefix}_{role.partition(':')[0]}"

    def url_of(self, role: str) -> str:
        parts = urlsplit(self.url)
        password = ":secret" if self.kind == "mysql" else ""
        place = f"{self.name(role)}{password}@{parts.hostname}:{parts.port}"
        return urlunsplit(parts._replace(netloc=place))

    def sql(self, statement: str) -> str:
        """Run a statement as who may do anything."""
        if self.kind == "postgres":
            return psql(self.url, statement)
        return str(run_on(self.url, statement))

    @contextmanager
    def made(self) -> Generator[Users]:
        for role in ROLES:
            identified = " IDENTIFIED BY 'secret'" if self.kind == "mysql" else " LOGIN"
            self.sql(f"CREATE USER {self.name(role)}{identified}")
        try:
            yield self
        finally:
            for role in ROLES:
                if self.kind == "postgres":
                    self.sql(f"DROP OWNED BY {self.name(role)} CASCADE")
                self.sql(f"DROP USER {self.name(role)}")

    def grant(self, role: str) -> None:
        database = urlsplit(self.url).path.strip("/")
        place = database if self.kind == "mysql" else self.name("init")
        printed = subprocess.run(
            [str(CONFIG / "database-grant"), self.kind, role, self.name(role), place],
            check=True,
            capture_output=True,
        ).stdout.decode()
        for statement in printed.splitlines():
            self.sql(statement)


@pytest.fixture
def users(store_url: str) -> Iterator[Users]:
    with Users(store_url, f"u{uuid.uuid4().hex[:8]}").made() as users:
        yield users


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def opened_by(
    users: Users,
    role: str,
    stack: AsyncExitStack,
    broker: MemoryBroker,
    *,
    initialise: bool = False,
) -> OpenApplication:
    settings = Settings(store_url=users.url_of(role), partitions=PARTITIONS)
    opening = tallying_app().open(settings, broker=broker, initialise=initialise)
    return await stack.enter_async_context(opening)


async def running_role(
    users: Users, role: str, stack: AsyncExitStack, broker: MemoryBroker
) -> Supervisor:
    process = await opened_by(users, role.partition(":")[0], stack, broker)
    return await stack.enter_async_context(process.running([role]))


async def prepared(users: Users, stack: AsyncExitStack, broker: MemoryBroker) -> OpenApplication:
    """Initialise as one user, then grant the others what they need."""
    users.grant("init")
    init = await opened_by(users, "init", stack, broker, initialise=True)
    for role in ROLES[1:]:
        users.grant(role)
    return init


@on_servers
async def test_every_role_can_do_its_work(users: Users, stack: AsyncExitStack) -> None:
    """Commands, events and views go their way, also through a rebuild and a second start."""
    broker = MemoryBroker(event_retention=100_000)
    init = await prepared(users, stack, broker)
    for _ in range(2):
        async with AsyncExitStack() as running:
            supervisors = [await running_role(users, role, running, broker) for role in EVERY]
            worker = await opened_by(users, "worker", running, broker)
            with capture_logs() as captured:
                for name in ("a", "d", "e"):  # in both partitions
                    assert (await worker.execute(Counter, name, Add(1))).accepted
                await eventually(supervisors[0].idle, within_seconds=PATIENCE)
            assert not [line for line in captured if line["log_level"] in {"error", "critical"}]
            await ask_by_http(users, running, broker)
            for name in ("totals", "sums"):
                assert await init.rebuild(name).run() > 1
                await eventually(supervisors[0].idle, within_seconds=PATIENCE)
                await check_complete(init, name)
    reader = await opened_store(users.url_of("reader"), stack)
    assert len(await sql_of(reader.views).query("SELECT * FROM totals")) == 3
    assert len(await sql_of(reader.views).query("SELECT * FROM sums")) == 3
    with pytest.raises(errors.CqrsError):
        await sql_of(reader.views).query("SELECT * FROM events")


async def ask_by_http(users: Users, stack: AsyncExitStack, broker: MemoryBroker) -> None:
    """Have a gateway that may only read send a command to the queue, and read all there is."""
    opened = await opened_by(users, "gateway", stack, broker)
    gateway = Gateway(tallying_app(), via="queue", public=True)
    await stack.enter_async_context(gateway.on(opened))
    sent = await ask_within(gateway, "POST", "/aggregates/counter/d/Add", b'{"n": 1}')
    assert sent.status == 200, sent.body
    outcome = sent.json
    seen = f"?seen={outcome['partition']}:{outcome['offset']}"
    outcome_path, events = f"/outcomes/{outcome['command_id']}", "/aggregates/counter/d/events"
    for path in (outcome_path, f"/views/totals/d{seen}", f"/views/totals{seen}", events):
        answer = await ask_within(gateway, "GET", path)
        assert answer.status == 200, answer.body


async def opened_store(url: str, stack: AsyncExitStack) -> Storage:
    storage = storage_for(url)
    await storage.open()
    stack.push_async_callback(storage.close)
    return storage


@on_servers
async def test_a_role_can_do_nothing_else(users: Users, stack: AsyncExitStack) -> None:
    """Nobody but `init` makes tables, nobody but a worker appends, nobody changes an event."""
    await prepared(users, stack, MemoryBroker(event_retention=100_000))
    new_event = "INSERT INTO events (aggregate_type) VALUES ('a')"
    forbidden = {
        "worker": ["CREATE TABLE mine (n INT)", "DELETE FROM events", "DELETE FROM checkpoints"],
        "relay": ["CREATE TABLE mine (n INT)", new_event, "DELETE FROM generations"],
        "projector": ["CREATE TABLE mine (n INT)", "DROP TABLE events", "DROP VIEW totals"],
        "run": ["CREATE TABLE mine (n INT)", "DROP TABLE events", "DROP VIEW totals"],
        "gateway": ["CREATE TABLE mine (n INT)", new_event, "DELETE FROM totals"],
        "reader": [new_event, "DELETE FROM totals", "SELECT * FROM totals__1"],
    }
    for role, statements in forbidden.items():
        storage = await opened_store(users.url_of(role), stack)
        for statement in statements:
            with pytest.raises(errors.CqrsError) as refusal:
                async with in_sql(storage.views) as sql:
                    await sql.execute(statement)
            assert "may not" in str(refusal.value) or "denied" in str(refusal.value)


@on_servers
async def test_a_projector_that_may_not_publish_goes_on(
    users: Users, stack: AsyncExitStack
) -> None:
    """Where older code noted nothing of the name, it says so and projects all the same."""
    broker = MemoryBroker(event_retention=100_000)
    init = await prepared(users, stack, broker)
    async with in_sql(init.storage.views) as sql:
        await sql.execute("DELETE FROM generations WHERE projector LIKE '$published%'")
    process = await opened_by(users, "run", stack, broker)
    with capture_logs() as captured:
        async with process.running() as supervisor:
            outcome = await process.execute(Counter, "d", Add(1))
            await eventually(supervisor.idle, within_seconds=PATIENCE)
            assert outcome.accepted
            assert await process.view(Totals, "d") == Totals(1, 1)
    lines = [line for line in captured if line["event"] == "name not published"]
    assert {line["view"] for line in lines} == {"totals", "sums"}
    assert all("run `cqrs-es init`" in line["error"] for line in lines)
    await init.initialise()
    with capture_logs() as captured:
        async with process.running() as supervisor:
            await asyncio.sleep(0)
            await eventually(supervisor.idle, within_seconds=PATIENCE)
    assert not [line for line in captured if line["event"] == "name not published"]


def test_a_role_that_is_none_is_refused() -> None:
    """Nothing is granted for a slip of the pen."""
    command = [str(CONFIG / "database-grant"), "mysql", "werker", "me", "bank"]
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        subprocess.run(command, check=True, capture_output=True)
    assert refusal.value.stderr == b"no role is called werker\n"
