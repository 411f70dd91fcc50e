"""A rolling deploy of changed views, and back again: processes of both versions, under load.

`make deploys` runs it: on SQLite, where a process has every role, and on servers role by role in
several orders. `tests/integration/test_view_versions.py` has the same in one process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.client import Client
from cqrs_es.projection.replay import stored_log
from cqrs_es.settings import Settings
from tests.processes import Service, service
from tests.samples import Add, Counter
from tests.stores import sql_of
from tests.versions import NEW, OLD, Arriving, Leaving, NewTally, OldTally, version
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path
    from subprocess import Popen

    from cqrs_es.opened import OpenApplication

log = logging.getLogger(__name__)

LONG = 120.0
NAMES = [f"counter-{number}" for number in range(12)]
HISTORY = 1500
pytestmark = pytest.mark.skipif(
    not os.environ.get("CQRS_ES_TEST_DEPLOYS"), reason="minutes of processes: make deploys"
)
READERS: dict[str, tuple[type[Any], ...]] = {
    "old": (OldTally, Leaving),
    "new": (NewTally, Arriving),
}


@dataclass
class Reader:
    """Reads its version's views again and again; none goes missing or back once it was there."""

    opened: OpenApplication
    views: tuple[type[Any], ...]
    reads: int = 0

    async def run(self) -> None:
        seen: dict[str, dict[str, int]] = {}
        while True:
            for cls in self.views:
                name = cls.view_name
                try:
                    rows = await self.opened.view_page(cls, limit=100)
                except errors.ViewBehind:
                    assert name not in seen, "it had its view before"
                    continue
                found = {row: int(view.total) for row, view in rows}
                before = seen.get(name, {})
                assert all(found.get(row, 0) >= total for row, total in before.items()), name
                seen[name] = found
                self.reads += 1
            await asyncio.sleep(0.02)


async def expected(opened: OpenApplication) -> dict[str, int]:
    """Fold the log."""
    totals: dict[str, int] = {}
    for partition, head in (await opened.storage.events.heads()).items():
        async for event in stored_log(opened.storage.events, partition, 0, head):
            totals[event.key.id] = totals.get(event.key.id, 0) + orjson.loads(event.payload)["n"]
    return totals


async def shown(opened: OpenApplication, code: str) -> list[dict[str, int]]:
    """Read every view of a version."""
    found = [
        {row: int(view.total) for row, view in await opened.view_page(cls, limit=100)}
        for cls in READERS[code]
    ]
    column = {"old": "total", "new": "amount"}[code]
    table = await opened.table("days")
    rows = await sql_of(opened.storage.views).query(f"SELECT counter, {column} FROM {table}")  # noqa: S608
    return [*found, {str(name): int(total) for name, total in rows}]


class Deploy:
    """Replaces the processes of one version by those of the other, role by role."""

    def __init__(self, made: Service, readers: dict[str, OpenApplication]) -> None:
        self._made = made
        self._readers = readers
        self._running: dict[str, Popen[bytes]] = {}

    async def to(self, code: str, roles: tuple[str, ...]) -> None:
        self._made.settings["VERSION"] = code
        await asyncio.to_thread(self._made.call, "init")
        for role in roles:
            before, began = self._running.get(role), time.monotonic()
            self._running[role] = self._made.start(role)
            if role in {"run", "projector"}:
                await eventually(lambda: self._filled(code), within_seconds=LONG)
                log.warning("%s filled after %.1f s", code, time.monotonic() - began)
            if before is not None:
                assert await asyncio.to_thread(self._made.stop, before) == 0
        await eventually(lambda: self._live(code), within_seconds=LONG)

    async def _filled(self, code: str) -> bool:
        return not await self._readers[code].views_behind()

    async def _live(self, code: str) -> bool:
        own = [kept for kept in await self._readers[code].generations() if kept.own]
        return len(own) == 3 and all(kept.state == "live" for kept in own)


async def roll(made: Service, orders: tuple[tuple[str, ...], ...], via: str) -> None:
    """Deploy the new version and the old one again, in each order of roles, under load."""
    settings = Settings(store_url=made.store_url)
    async with (
        version(*OLD).open(settings, initialise=False, reach_broker=False) as old,
        version(*NEW).open(settings, initialise=False, reach_broker=False) as new,
    ):
        readers = {"old": old, "new": new}
        sent = await _history(old)
        deploy = Deploy(made, readers)
        await deploy.to("old", orders[0])
        watching = [Reader(opened, READERS[code]) for code, opened in readers.items()]
        load = _Load(old, made if via == "queue" else None)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(reader.run()) for reader in watching]
            tasks.append(group.create_task(load.run()))
            for order in orders:
                await deploy.to("new", order)
                await deploy.to("old", order)
            await deploy.to("new", orders[0])
            for task in tasks:
                task.cancel()
        await eventually(lambda: _right(new, "new"), within_seconds=LONG)
        assert await new.storage.views.list_parked() == []
        assert await new.storage.dead_letters.count() == 0
        reads = [reader.reads for reader in watching]
        log.warning("%s + %s commands; reads old and new: %s", sent, load.sent, reads)
        assert min(reads) > 0
        assert load.sent > 0


async def _history(opened: OpenApplication) -> int:
    for number in range(HISTORY):
        await opened.execute(Counter, NAMES[number % len(NAMES)], Add(1))
    return HISTORY


async def _right(opened: OpenApplication, code: str) -> bool:
    total = await expected(opened)
    return all(view == total for view in await shown(opened, code))


class _Load:
    """Commands without end: in this process, or by the queue of a service."""

    def __init__(self, opened: OpenApplication, made: Service | None) -> None:
        self._opened = opened
        self._made = made
        self.sent = 0

    async def run(self) -> None:
        if self._made is None:
            await self._repeat(lambda name: self._opened.execute(Counter, name, Add(1)))
        else:
            async with Client(broker_url=self._made.broker_url, service="tests") as client:
                await self._repeat(lambda name: client.send("counter", name, "Add", {"n": 1}))

    async def _repeat(self, send: Callable[[str], Awaitable[object]]) -> None:
        while True:
            await send(NAMES[self.sent % len(NAMES)])
            self.sent += 1
            await asyncio.sleep(0.01)


@pytest.mark.timeout(300)
async def test_a_rolling_deploy_and_back_on_sqlite(tmp_path: Path) -> None:
    """Nothing is parked, no reader is without its view, and all are right by a fold of the log."""
    url = f"sqlite:///{tmp_path}/store.db"
    with service("tests.apps.versions:app", url, "memory://", tmp_path, VERSION="old") as made:
        await roll(made, (("run",),), "process")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("store", "broker"), [("mysql_url", "amqp_url"), ("postgres_url", "redis_url")]
)
async def test_a_rolling_deploy_and_back_on_servers(
    store: str, broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The same with a process for each role, in different orders."""
    urls: list[str] = [request.getfixturevalue(name) for name in (store, broker)]
    settings = {"VERSION": "old", "CQRS_ES_PARTITIONS": "4"}
    with service("tests.apps.versions:app", urls[0], urls[1], tmp_path, **settings) as made:
        orders = (("projector", "worker", "relay"), ("worker", "relay", "projector"))
        await roll(made, orders, "queue")
