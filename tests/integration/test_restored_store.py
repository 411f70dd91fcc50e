"""A store that was put back from a backup, while the broker has what was published since."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.client import Client
from cqrs_es.client.subscription import FileCursor
from cqrs_es.settings import Settings
from tests.contract.brokers import RabbitMqServer
from tests.samples import Add, Counter, Totals, counting_app
from tests.servers import installed
from tests.waiting import PATIENCE, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from cqrs_es.brokers.amqp.driver import Channel
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import Broker
    from cqrs_es.runtime.supervisor import Supervisor

USER = {"mysql": "user", "postgres": "username"}
ROLES = ["relay", "projector:totals"]


@dataclass
class Service:
    """Counters on a SQLite file and a broker that outlives the file's content."""

    settings: Settings
    broker: Broker
    file: Path
    server: RabbitMqServer | None

    @contextlib.asynccontextmanager
    async def open(self, *, initialise: bool | None = None) -> AsyncGenerator[OpenApplication]:
        opening = counting_app().open(self.settings, broker=self.broker, initialise=initialise)
        async with opening as opened:
            yield opened

    async def count(self, *numbers: int, initialise: bool | None = None) -> None:
        """Add numbers, and see to it that they are published and projected."""
        async with self.open(initialise=initialise) as opened:
            for number in numbers:
                await opened.execute(Counter, "A", Add(number))
            async with opened.running(ROLES) as supervisor:
                await rested(supervisor)

    def copy(self, to: Path) -> None:
        """Back the file up, or put it back, as the runbook has it."""
        source, target = (self.file, to) if not to.exists() else (to, self.file)
        if target == self.file:
            for ending in ("", "-wal", "-shm"):
                target.with_name(target.name + ending).unlink(missing_ok=True)
        with (
            contextlib.closing(sqlite3.connect(source)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)


async def rested(supervisor: Supervisor) -> None:
    await eventually(supervisor.idle, within_seconds=PATIENCE)


async def says(supervisor: Supervisor, *words: str) -> str:
    """Wait until the process says why it stands still, in these words."""
    found: list[str] = []

    async def said() -> bool:
        found[:] = [t for t in supervisor.troubles if all(word in t for word in words)]
        return bool(found)

    await eventually(said, within_seconds=PATIENCE)
    return found[0]


@pytest.fixture(params=["memory", "redis", "amqp"])
async def service(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Service]:
    file = tmp_path / "tests.db"
    url = "memory://"
    if request.param != "memory":
        url = request.getfixturevalue(f"{request.param}_url")
    server = RabbitMqServer(url) if request.param == "amqp" else None
    name = server.service if server else f"test-{uuid.uuid4().hex[:12]}"
    broker = broker_for(url, service=name)
    settings = Settings(store_url=f"sqlite:///{file}", service=name, lease_seconds=1.0)
    try:
        yield Service(settings, broker, file, server)
    finally:
        await broker.close()
        if server is not None:
            await server.close()


async def test_a_store_that_was_put_back_and_has_gone_on_is_found_out(
    service: Service, tmp_path: Path
) -> None:
    """Its log is as long as before, so that only the events tell: nothing is published over them.

    No view takes what the topic has of the other history. A new epoch makes all well.
    """
    await service.count(1, 2)
    backup = tmp_path / "backup.db"
    service.copy(backup)
    await service.count(30, 40)
    before = await service.broker.last_published(0)
    assert before is not None
    service.copy(backup)
    async with service.open() as opened:
        for number in (500, 600, 700):
            await opened.execute(Counter, "A", Add(number))
        async with opened.running(ROLES) as supervisor:
            told = await says(supervisor, "init --new-epoch")
            assert "partition 0" in told
            assert "offset 4" in told
        assert await service.broker.last_published(0) == before
        view = await opened.view(Totals, "A")
        assert view is None or view.total in {3, 1803}  # of this history, however far it is
        await opened.initialise(new_epoch=True)
    async with service.open() as opened, opened.running(ROLES) as supervisor:
        await rested(supervisor)
        assert await opened.view(Totals, "A") == Totals(total=1803, times=5)
        after = await service.broker.last_published(0)
        assert after is not None
        assert (after.offset, b"700" in after.body) == (5, True)


async def test_a_store_that_ends_before_what_was_published(
    service: Service, tmp_path: Path
) -> None:
    """The same, said by the mark alone where the topic keeps nothing."""
    await service.count(1, 2)
    backup = tmp_path / "backup.db"
    service.copy(backup)
    await service.count(30, 40)
    service.copy(backup)
    async with service.open() as opened, opened.running(["relay"]) as supervisor:
        await says(supervisor, "partition 0", "4", "init --new-epoch")


@pytest.mark.parametrize("service", ["memory", "redis"], indirect=True)
async def test_a_subscriber_of_a_store_that_has_gone_on(service: Service, tmp_path: Path) -> None:
    """It takes nothing from a store that is not what the topic was published from."""
    await service.count(1, 2)
    backup = tmp_path / "backup.db"
    service.copy(backup)
    await service.count(30, 40)
    service.copy(backup)
    async with service.open() as opened:
        for number in (500, 600, 700):
            await opened.execute(Counter, "A", Add(number))
        name = service.settings.service or ""
        client = Client(broker=service.broker, storage=opened.storage, service=name)
        async with client:
            with pytest.raises(errors.BrokenLog, match="offset 4"):
                async with client.subscribe("s") as events:
                    await anext(events)


async def test_a_subscriber_that_has_seen_more_than_the_store_has(
    service: Service, tmp_path: Path
) -> None:
    """It stops; with the new epoch it begins again."""
    await service.count(1, 2)
    backup = tmp_path / "backup.db"
    service.copy(backup)
    await service.count(30, 40)
    cursor = FileCursor(tmp_path / "cursor.json")
    client = Client(
        broker=service.broker,
        service=service.settings.service or "",
        store_url=service.settings.store_url,
    )
    async with client, client.subscribe("s", cursor=cursor) as events:
        assert [(await anext(events)).offset for _ in range(4)] == [1, 2, 3, 4]
    service.copy(backup)
    async with client:
        with pytest.raises(errors.BrokenLog, match="put back"):
            async with client.subscribe("s", cursor=cursor) as events:
                await anext(events)
    async with service.open() as opened:
        await opened.initialise(new_epoch=True)
    async with client, client.subscribe("s", cursor=cursor) as events:
        assert [(await anext(events)).offset for _ in range(2)] == [1, 2]


# --- The runbook, with the servers' own programs ----------------------------------


def run(*command: str, **options: Any) -> None:
    subprocess.run([installed(command[0]), *command[1:]], check=True, **options)


@pytest.mark.parametrize("kind", ["mysql", "postgres"])
async def test_the_runbook_of_a_server(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Backed up while it runs, put back, given a new epoch: the log, its view and the topic."""
    given: str = request.getfixturevalue(f"{kind}_url")
    url = urlsplit(given)
    name, dump = url.path[1:], tmp_path / "dump"
    user = url.username or ("root" if kind == "mysql" else "postgres")
    at = [f"--host={url.hostname}", f"--port={url.port}", f"--{USER[kind]}={user}"]
    settings = Settings(store_url=given, partitions=1, lease_seconds=2.0)
    broker = broker_for("memory://", service="tests")
    async with (
        counting_app().open(settings, broker=broker, initialise=True) as opened,
        opened.running(ROLES) as supervisor,
    ):
        await opened.execute(Counter, "A", Add(1))
        await opened.execute(Counter, "A", Add(2))
        await rested(supervisor)
        if kind == "mysql":
            with dump.open("wb") as file:
                run("mariadb-dump", *at, "--single-transaction", name, stdout=file)
        else:
            run("pg_dump", *at, "--format=custom", f"--file={dump}", name)
        await opened.execute(Counter, "A", Add(400))
        await rested(supervisor)
    if kind == "mysql":
        run("mariadb", *at, "-e", f"DROP DATABASE {name}; CREATE DATABASE {name}")
        with dump.open("rb") as file:
            run("mariadb", *at, name, stdin=file)
    else:
        run("dropdb", *at, name)
        run("createdb", *at, name)
        run("pg_restore", *at, f"--dbname={name}", str(dump))
    async with counting_app().open(settings, broker=broker) as opened:
        await opened.initialise(new_epoch=True)
        async with opened.running(ROLES) as supervisor:
            await opened.execute(Counter, "A", Add(10))
            await rested(supervisor)
        assert await opened.view(Totals, "A") == Totals(total=13, times=3)
    last = await broker.last_published(0)
    assert last is not None
    assert last.offset == 3


# --- RabbitMQ, which keeps marks of its own -------------------------------------


ON_RABBITMQ = pytest.mark.parametrize("service", ["amqp"], indirect=True)


@pytest.fixture
async def marked(service: Service) -> Service:
    await service.count(1, 2)
    return service


def on_channel(service: Service, do: Callable[[Channel, str], object]) -> None:
    """Do something to the mark of the one partition."""
    assert service.server is not None
    with service.server.channel() as channel:
        do(channel, service.server.names.mark(0))


@ON_RABBITMQ
async def test_a_mark_that_was_deleted_is_made_again(marked: Service) -> None:
    """The relay goes on without it, says so, and has it again after `init`."""
    on_channel(marked, lambda channel, mark: channel.queue_delete(mark))
    await marked.count(3, initialise=False)
    assert await marked.broker.last_published(0) is None
    async with marked.open() as opened:
        await opened.initialise()
    await marked.count(4)
    last = await marked.broker.last_published(0)
    assert last is not None
    assert last.offset == 4


@ON_RABBITMQ
async def test_an_emptied_mark_is_written_again(marked: Service) -> None:
    """By the next event."""
    on_channel(marked, lambda channel, mark: channel.queue_purge(mark))
    await marked.count(3)
    last = await marked.broker.last_published(0)
    assert last is not None
    assert last.offset == 3


@ON_RABBITMQ
async def test_the_mark_of_another_store_stops_the_relay(marked: Service, tmp_path: Path) -> None:
    """It would publish over another log by the same name, until `init` gives it the topic."""
    settings = replace(marked.settings, store_url=f"sqlite:///{tmp_path / 'other.db'}")
    other = Service(settings, marked.broker, tmp_path / "other.db", marked.server)
    elsewhere = broker_for("memory://", service=settings.service or "")
    async with counting_app().open(settings, broker=elsewhere) as opened:
        await opened.execute(Counter, "A", Add(9))
    async with (
        other.open(initialise=False) as opened,
        opened.running(["relay"]) as supervisor,
    ):
        await says(supervisor, "epoch", "another store", "cqrs-es init")
    await other.count(10)
    last = await marked.broker.last_published(0)
    assert last is not None
    assert last.offset == 2
