"""Rolling deploys of a changed service, and back again: processes of both versions, under load.

`make deploys` runs it: two processes of each role, replaced one by one, role by role in every
order (`CQRS_ES_TEST_ORDERS`: in so many). What changes, `tests.apps.versions` says.
`tests/integration/test_view_versions.py` has the like of it for views, in one process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.client import Client
from cqrs_es.projection.replay import stored_log
from cqrs_es.settings import Settings
from tests.apps import versions
from tests.processes import Service, service
from tests.stores import sql_of
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path
    from subprocess import Popen

    from cqrs_es.opened import OpenApplication

log = logging.getLogger(__name__)

LONG = 180.0
NAMES = [f"purse-{number}" for number in range(12)]
HISTORY = 1500
ROLES = ("projector", "worker", "relay")
ORDERS: Sequence[tuple[str, ...]] = [*itertools.permutations(ROLES)][
    : int(os.environ.get("CQRS_ES_TEST_ORDERS", "6"))
]
APP = "tests.apps.versions:app"
Shown = dict[str, tuple[int, str, int]]
"""By purse its total, its title, and the last event that was seen."""

pytestmark = pytest.mark.skipif(
    not os.environ.get("CQRS_ES_TEST_DEPLOYS"), reason="minutes of processes: make deploys"
)


# --- Senders and readers -----------------------------------------------------


@dataclass
class Sender:
    """Sends what one version of a sender sends, again and again while it is let."""

    client: Client
    opened: OpenApplication
    code: str
    pauses: asyncio.Event = field(default_factory=asyncio.Event)
    renamed: bool = False
    """Whether it may send commands of new names: only when every worker knows them."""
    sent: int = 0
    unanswered: deque[tuple[str, float]] = field(default_factory=deque[tuple[str, float]])
    longest: float = 0.0

    def _next(self) -> tuple[str, dict[str, Any], str | None]:
        kind, n = self.sent % 3, 1 + self.sent % 7
        if kind == 0:
            title = f"{self.code} {self.sent}"
            if self.code == "old":
                return "Name", {"title": title}, None
            return "Name", {"title": title, "by": "tests"}, "1.1"
        if self.code == "new" and self.renamed:
            return ("Put" if kind == 1 else "Take"), {"n": n}, None
        return "Change", {"n": n if kind == 1 else -n}, None

    async def run(self) -> None:
        while True:
            if self.pauses.is_set():
                await self._look()
                await asyncio.sleep(0.02)
                continue
            name, payload, version = self._next()
            purse = NAMES[self.sent % len(NAMES)]
            self.sent += 1
            sent_at = time.monotonic()
            id_ = await self.client.send("purse", purse, name, payload, version=version)
            self.unanswered.append((id_, sent_at))
            await self._look()
            await asyncio.sleep(0.03)

    async def _look(self) -> None:
        """Look whether the first is answered, and that it was not refused."""
        while self.unanswered:
            id_, sent_at = self.unanswered[0]
            outcome = await self.opened.outcome(id_)
            if outcome is None:
                return
            assert outcome.accepted, outcome
            self.longest = max(self.longest, time.monotonic() - sent_at)
            self.unanswered.popleft()

    async def pause(self) -> None:
        """Stop sending, and wait until all that was sent is decided."""
        self.pauses.set()
        await eventually(self._done, within_seconds=LONG)

    async def _done(self) -> bool:
        return not self.unanswered

    def go_on(self) -> None:
        self.pauses.clear()


@dataclass
class Reader:
    """Reads its version's views again and again; none goes missing, or back once it was there."""

    opened: OpenApplication
    code: str
    reads: int = 0
    behind: int = 0

    async def run(self) -> None:
        before: dict[str, Shown] = {}
        while True:
            for cls in versions.VIEWS[self.code]:
                name = cls.view_name
                try:
                    found = await shown_by(self.opened, cls)
                except errors.ViewBehind:
                    assert name not in before, f"{self.code} had its view {name} before"
                    self.behind += 1
                    continue
                for purse, (_, _, seen) in before.get(name, {}).items():
                    assert purse in found, (self.code, name, purse)
                    assert found[purse][2] >= seen, (self.code, name, purse)
                before[name] = found
                self.reads += 1
            await asyncio.sleep(0.05)


async def shown_by(opened: OpenApplication, cls: type[Any]) -> Shown:
    page = await opened.view_page(cls, limit=100)
    return {purse: (int(view.total), view.title, view.seen) for purse, view in page}


async def folded(opened: OpenApplication) -> Shown:
    """Fold the log, with code of its own."""
    found: Shown = {}
    for partition, head in (await opened.storage.events.heads()).items():
        async for event in stored_log(opened.storage.events, partition, 0, head):
            total, title, _ = found.get(event.key.id, (0, "", 0))
            payload = orjson.loads(event.payload)
            sign = 1 if event.event_type == "Added" else -1
            total += sign * (payload.get("n", 0) + payload.get("fee", 0))
            title = payload.get("title", title)
            found[event.key.id] = (total, title, event.sequence)
    return found


async def differences(opened: OpenApplication, code: str) -> list[str]:
    """Compare each view and table of a version with the log."""
    expected, wrong = await folded(opened), list[str]()
    for cls in versions.VIEWS[code]:
        if await shown_by(opened, cls) != expected:
            wrong.append(cls.view_name)
    days = versions.DAYS[code]
    for table in (await opened.table("days"), "days"):  # by its own name as well
        rows = await sql_of(opened.storage.views).query(f"SELECT purse, {days.column} FROM {table}")  # noqa: S608
        if {str(purse): int(total) for purse, total in rows} != {
            p: s[0] for p, s in expected.items()
        }:
            wrong.append(table)
    return wrong


# --- Deploying ---------------------------------------------------------------


class Deploy:
    """Replaces the processes of one version by those of the other, one by one."""

    def __init__(self, made: Service, readers: Mapping[str, OpenApplication], copies: int) -> None:
        self._made = made
        self._readers = readers
        self._copies = copies
        self._running: dict[tuple[str, int], Popen[bytes]] = {}
        self.filled_in: list[float] = []

    async def to(self, code: str, roles: tuple[str, ...]) -> None:
        """Deploy a version, role by role; each process is to be there before the next goes."""
        self._made.settings["VERSION"] = code
        await asyncio.to_thread(self._made.call, "init")
        for role in roles:
            for copy in range(self._copies):
                before, began = self._running.get((role, copy)), time.monotonic()
                started = self._running[role, copy] = self._made.start(role)
                await eventually(partial(self._joined, started), within_seconds=LONG, every=0.2)
                if role == "projector":
                    await eventually(lambda: self._filled(code), within_seconds=LONG, every=0.1)
                    self.filled_in.append(time.monotonic() - began)
                if before is not None:
                    assert await asyncio.to_thread(self._made.stop, before) == 0
        await eventually(lambda: self._live(code), within_seconds=LONG, every=0.1)

    async def _joined(self, process: Popen[bytes]) -> bool:
        assert process.poll() is None, self._made.log_of(process)[-3000:]
        return "started" in self._made.log_of(process)

    async def _filled(self, code: str) -> bool:
        return not await self._readers[code].views_behind()

    async def _live(self, code: str) -> bool:
        own = [kept for kept in await self._readers[code].generations() if kept.own]
        return len(own) == 3 and all(kept.state == "live" for kept in own)


async def _all_right(opened: OpenApplication, code: str) -> None:
    """Wait until the views of a version are what the log says, and check that nothing is amiss."""
    found: list[str] = []

    async def right() -> bool:
        found[:] = await differences(opened, code)
        return not found

    try:
        await eventually(right, within_seconds=LONG, every=0.2)
    except AssertionError:
        raise AssertionError(f"{code}: not as the log says: {found}") from None
    assert await opened.storage.views.list_parked() == []
    assert await opened.storage.dead_letters.count() == 0


async def roll(made: Service, orders: Sequence[tuple[str, ...]], copies: int) -> None:
    """Deploy the new version and the old one again, in each order of roles, under load."""
    settings = Settings(store_url=made.store_url)
    async with (
        versions.old().open(settings, initialise=False, reach_broker=False) as old,
        versions.new().open(settings, initialise=False, reach_broker=False) as new,
    ):
        opened = {"old": old, "new": new}
        for number in range(HISTORY):
            change = versions.Change(number % 5 - 2 or 3)
            assert (
                await old.execute(versions.OldPurse, NAMES[number % len(NAMES)], change)
            ).accepted
        deploy = Deploy(made, opened, copies)
        await deploy.to("old", orders[0])
        readers = [Reader(opened[code], code) for code in opened]
        async with _senders(made, old) as senders, asyncio.TaskGroup() as group:
            runs = [each.run() for each in readers] + [each.run() for each in senders.values()]
            tasks = [group.create_task(run) for run in runs]
            for order in orders:
                await _there_and_back(deploy, order, senders, opened)
            for task in tasks:
                task.cancel()
        figures = {
            "orders": len(orders),
            "commands": HISTORY + sum(each.sent for each in senders.values()),
            "reads": {each.code: each.reads for each in readers},
            "reads behind": {each.code: each.behind for each in readers},
            "longest wait for an outcome": round(max(s.longest for s in senders.values()), 1),
            "longest fill, start included": round(max(deploy.filled_in), 1),
        }
        log.warning("%s", figures)
        assert all(each.reads for each in readers)
        assert all(each.sent for each in senders.values())


async def _there_and_back(
    deploy: Deploy,
    order: tuple[str, ...],
    senders: Mapping[str, Sender],
    opened: Mapping[str, OpenApplication],
) -> None:
    """Deploy the new version, then the old one; new senders are the last to come, first to go."""
    began = time.monotonic()
    senders["new"].go_on()  # what it sends has versions, so that workers of any order may be there
    await deploy.to("new", order)
    senders["new"].renamed = True
    await asyncio.sleep(1.0)  # of load with new names
    for each in senders.values():
        await each.pause()
    await _all_right(opened["new"], "new")
    there = time.monotonic()
    senders["new"].renamed = False
    senders["old"].go_on()
    await deploy.to("old", order)
    await senders["old"].pause()
    await _all_right(opened["old"], "old")
    senders["old"].go_on()
    log.warning(
        "%s: there in %.0f s, back in %.0f s", order, there - began, time.monotonic() - there
    )


@asynccontextmanager
async def _senders(made: Service, opened: OpenApplication) -> AsyncGenerator[dict[str, Sender]]:
    async with Client(broker_url=made.broker_url, service="tests") as client:
        found = {code: Sender(client, opened, code) for code in versions.VIEWS}
        found["new"].pauses.set()
        yield found


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("store", "broker"), [("mysql_url", "amqp_url"), ("postgres_url", "redis_url")]
)
async def test_rolling_deploys_and_back_in_every_order(
    store: str, broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Nothing is parked or refused, no reader is without its view, and all are as the log says."""
    urls: list[str] = [request.getfixturevalue(name) for name in (store, broker)]
    settings = {"VERSION": "old", "CQRS_ES_PARTITIONS": "4"}
    with service(APP, urls[0], urls[1], tmp_path, **settings) as made:
        await roll(made, ORDERS, copies=2)
