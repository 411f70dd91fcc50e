"""A store that was put back from a backup, while the broker has what was published since.

Every kind of store on every kind of broker by `make deploys`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.client import Client
from cqrs_es.client.subscription import FileCursor
from cqrs_es.settings import Settings
from tests import lambda_runtime
from tests.contract.brokers import RabbitMqServer
from tests.samples import Add, Counter, Totals, counting_app
from tests.servers import installed
from tests.waiting import PATIENCE, eventually

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.driver import Channel
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import Broker
    from cqrs_es.runtime.supervisor import Supervisor

ROLES = ["relay", "projector:totals"]
STORES = ("sqlite", "mysql", "postgres", "dynamodb")
BROKERS = ("memory", "redis", "amqp")
CHEAP = [*(("sqlite", broker) for broker in BROKERS), ("mysql", "memory"), ("postgres", "memory")]
PAIRS = (
    [(store, broker) for store in STORES for broker in BROKERS]
    if os.environ.get("CQRS_ES_TEST_DEPLOYS")
    else CHEAP
)


# --- Backing up and putting back, as the runbook has it, with the servers' own programs --------


class Backup(ABC):
    """What is kept of a store at one moment; `put_back` returns the URL to use from then on."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.kept = folder / "backup"

    @abstractmethod
    def make(self) -> None: ...

    @abstractmethod
    def put_back(self) -> str: ...


class SqliteBackup(Backup):
    def make(self) -> None:
        self._copy(self._file, self.kept)

    def put_back(self) -> str:
        for ending in ("", "-wal", "-shm"):
            self._file.with_name(self._file.name + ending).unlink(missing_ok=True)
        self._copy(self.kept, self._file)
        return self.url

    @property
    def _file(self) -> Path:
        return Path(self.url.removeprefix("sqlite:///"))

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        with (
            contextlib.closing(sqlite3.connect(source)) as old,
            contextlib.closing(sqlite3.connect(target)) as new,
        ):
            old.backup(new)


class ServerBackup(Backup):
    USER: ClassVar[str]

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url, folder)
        parts = urlsplit(url)
        self.name = parts.path[1:]
        user = parts.username or {"user": "root"}.get(self.USER, "postgres")
        self.at = [f"--host={parts.hostname}", f"--port={parts.port}", f"--{self.USER}={user}"]


class MysqlBackup(ServerBackup):
    USER = "user"

    def make(self) -> None:
        with self.kept.open("wb") as file:
            run("mariadb-dump", *self.at, "--single-transaction", self.name, stdout=file)

    def put_back(self) -> str:
        drop = f"DROP DATABASE {self.name}; CREATE DATABASE {self.name}"
        run("mariadb", *self.at, "-e", drop)
        with self.kept.open("rb") as file:
            run("mariadb", *self.at, self.name, stdin=file)
        return self.url


class PostgresBackup(ServerBackup):
    USER = "username"

    def make(self) -> None:
        run("pg_dump", *self.at, "--format=custom", f"--file={self.kept}", self.name)

    def put_back(self) -> str:
        run("dropdb", *self.at, self.name)
        run("createdb", *self.at, self.name)
        run("pg_restore", *self.at, f"--dbname={self.name}", str(self.kept))
        return self.url


class DynamodbBackup(Backup):
    """Put back to a new table, as Amazon does."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url, folder)
        parts = urlsplit(url)
        self._prefix = parts.path[1:]
        self._client = lambda_runtime.client("dynamodb", parts.query.removeprefix("endpoint="))
        self._times = 0
        self._arn = ""

    def make(self) -> None:
        table = f"{self._prefix}-store"
        made = self._client.create_backup(TableName=table, BackupName="backup")
        self._arn = made["BackupDetails"]["BackupArn"]

    def put_back(self) -> str:
        self._times += 1
        prefix = f"{self._prefix}-{self._times}"
        table = f"{prefix}-store"
        self._client.restore_table_from_backup(TargetTableName=table, BackupArn=self._arn)
        return self.url.replace(f"/{self._prefix}?", f"/{prefix}?")


BACKUPS: Mapping[str, type[Backup]] = {
    "sqlite": SqliteBackup,
    "mysql": MysqlBackup,
    "postgres": PostgresBackup,
    "dynamodb": DynamodbBackup,
}


def run(*command: str, **options: Any) -> None:
    subprocess.run([installed(command[0]), *command[1:]], check=True, **options)


# --- The service whose store it is -------------------------------------------------


@dataclass
class Service:
    """Counters on a store, and a broker that outlives what is in it."""

    settings: Settings
    broker: Broker
    backup: Backup
    server: RabbitMqServer | None

    @contextlib.asynccontextmanager
    async def open(self, *, initialise: bool | None = None) -> AsyncGenerator[OpenApplication]:
        opening = counting_app().open(self.settings, broker=self.broker, initialise=initialise)
        async with opening as opened:
            yield opened

    async def count(
        self, *numbers: int, initialise: bool | None = None, back_up: bool = False
    ) -> None:
        """Add numbers, see to it that they are published and projected, and back up if asked to."""
        async with self.open(initialise=initialise) as opened:
            for number in numbers:
                await opened.execute(Counter, "A", Add(number))
            async with opened.running(ROLES) as supervisor:
                await rested(supervisor)
                if back_up:  # while it runs
                    await asyncio.to_thread(self.backup.make)

    async def put_back(self) -> None:
        """Put the backup back, and forget the new epoch."""
        url = await asyncio.to_thread(self.backup.put_back)
        self.settings = replace(self.settings, store_url=url)


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


@pytest.fixture(params=[("sqlite", broker) for broker in BROKERS], ids="-".join)
async def service(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Service]:
    store, broker_kind = request.param
    url = "memory://"
    if broker_kind != "memory":
        url = request.getfixturevalue(f"{broker_kind}_url")
    server = RabbitMqServer(url) if broker_kind == "amqp" else None
    name = server.service if server else f"test-{uuid.uuid4().hex[:12]}"
    broker = broker_for(url, service=name)
    store_url: str = request.getfixturevalue(f"{store}_url")
    seconds = 20.0 if store == "dynamodb" else 2.0  # moto has one thread
    settings = Settings(store_url=store_url, service=name, partitions=1, lease_seconds=seconds)
    try:
        yield Service(settings, broker, BACKUPS[store](store_url, tmp_path), server)
    finally:
        await broker.close()
        if server is not None:
            await server.close()


@pytest.mark.parametrize("service", PAIRS, indirect=True, ids="-".join)
async def test_a_store_that_was_put_back(service: Service) -> None:
    """Without a new epoch nothing is published over what was, and the relay says why it stops.

    First since the log ends before what was published; then, when it is as long as before, since
    only the events differ. No view takes what the topic has of the other history. A new epoch makes
    all well.
    """
    await service.count(1, 2, initialise=True, back_up=True)
    await service.count(30, 40)
    before = await service.broker.last_published(0)
    assert before is not None
    assert before.offset == 4
    await service.put_back()
    async with service.open() as opened:
        async with opened.running(["relay"]) as supervisor:
            await says(supervisor, "partition 0", "4", "init --new-epoch")
        for number in (500, 600, 700):
            await opened.execute(Counter, "A", Add(number))
        async with opened.running(ROLES) as supervisor:
            await says(supervisor, "partition 0", "offset 4", "init --new-epoch")
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


@pytest.mark.parametrize(
    "service", [("sqlite", "memory"), ("sqlite", "redis")], indirect=True, ids="-".join
)
async def test_a_subscriber_of_a_store_that_has_gone_on(service: Service) -> None:
    """It takes nothing from a store that is not what the topic was published from."""
    await service.count(1, 2, back_up=True)
    await service.count(30, 40)
    await service.put_back()
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
    await service.count(1, 2, back_up=True)
    await service.count(30, 40)
    cursor = FileCursor(tmp_path / "cursor.json")
    client = Client(
        broker=service.broker,
        service=service.settings.service or "",
        store_url=service.settings.store_url,
    )
    async with client, client.subscribe("s", cursor=cursor) as events:
        assert [(await anext(events)).offset for _ in range(4)] == [1, 2, 3, 4]
    await service.put_back()
    async with client:
        with pytest.raises(errors.BrokenLog, match="put back"):
            async with client.subscribe("s", cursor=cursor) as events:
                await anext(events)
    async with service.open() as opened:
        await opened.initialise(new_epoch=True)
    async with client, client.subscribe("s", cursor=cursor) as events:
        assert [(await anext(events)).offset for _ in range(2)] == [1, 2]


# --- RabbitMQ, which keeps marks of its own -------------------------------------


ON_RABBITMQ = pytest.mark.parametrize("service", [("sqlite", "amqp")], indirect=True, ids="-".join)


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
    other = replace(marked, settings=settings)
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
