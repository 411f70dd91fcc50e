"""Rolling deploys of a changed service, and back again: processes of both versions, under load.

`make deploys` runs it: two processes of each role, replaced one by one, role by role. There are
120 orders of five roles; of those in `ORDERS` each is followed by its reverse, so that every role
is replaced before, and after, every other one. What changes, `tests.apps.versions` says.
`tests/integration/test_view_versions.py` has the like of it for views, in one process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections import defaultdict, deque
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import orjson
import pytest

from cqrs_es.client import Client
from cqrs_es.projection.replay import stored_log
from cqrs_es.settings import Settings
from cqrs_es.types import new_command_id
from tests.apps import versions
from tests.gateways import JSON, Answer, ask
from tests.processes import Service, service
from tests.stores import sql_of
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from pathlib import Path
    from subprocess import Popen

    from cqrs_es.opened import OpenApplication

log = logging.getLogger(__name__)

LONG = 300.0
NAMES = [f"purse-{number}" for number in range(12)]
HISTORY = 800
ROLES = ("worker", "serve", "projector", "relay", "reactor")
_CHOSEN = [
    ("worker", "serve", "projector", "relay", "reactor"),
    ("projector", "reactor", "worker", "serve", "relay"),
]
ORDERS: Final[Sequence[tuple[str, ...]]] = [
    order for chosen in _CHOSEN for order in (chosen, chosen[::-1])
][: int(os.environ.get("CQRS_ES_TEST_ORDERS", "4"))]
COPIES = 2
APP = "tests.apps.versions:app"
# So long a command may take while there is a worker that knows it, on a machine that others use
# too: a worker that goes gives its partitions up, and what it had in hand comes to others.
MOST_SECONDS = 60.0
Shown = dict[str, tuple[int, str, int]]
"""By purse its total, its title, and the last event that was seen."""

pytestmark = pytest.mark.skipif(
    not os.environ.get("CQRS_ES_TEST_DEPLOYS"), reason="minutes of processes: make deploys"
)


def test_every_role_is_replaced_before_and_after_every_other_one() -> None:
    """The orders that were chosen say so."""
    found = {pair for order in _CHOSEN for pair in itertools.combinations(order, 2)}
    found |= {pair for order in _CHOSEN for pair in itertools.combinations(order[::-1], 2)}
    assert found == set(itertools.permutations(ROLES, 2))


# --- What happened when ------------------------------------------------------


@dataclass
class Diary:
    """What was done when, to explain what took long."""

    steps: list[tuple[float, str]] = field(default_factory=list[tuple[float, str]])
    unknown: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """From when until when new commands were sent, and no new worker was ready yet."""

    def note(self, step: str) -> None:
        self.steps.append((time.monotonic(), step))

    def during(self, since: float, until: float) -> list[str]:
        """Return what was done in a time."""
        return [f"+{at - since:.0f} s {step}" for at, step in self.steps if since < at < until]

    def known_for(self, since: float, until: float) -> float:
        """Return for how long of a time at its end there was a worker that knew everything."""
        known = [min(until, to) for at, to in self.unknown if at < until and since < to]
        return until - max([since, *known])


# --- Readers, by what balances the load --------------------------------------


@dataclass(eq=False)
class Copy:
    """A gateway that runs."""

    code: str
    port: int
    probes: int
    in_hand: int = 0

    async def is_ready(self) -> bool:
        return (await asyncio.to_thread(ask, self.probes, "GET", "/ready")).status == 200


class Balancer:
    """Sends each request to the next copy that says at `/ready` that it is."""

    def __init__(self) -> None:
        self._copies: deque[Copy] = deque()
        self.longest_without = 0.0

    def add(self, copy: Copy) -> None:
        """Have a copy asked from now on."""
        self._copies.append(copy)

    async def remove(self, copy: Copy) -> None:
        """Ask a copy no more, and wait until it has answered."""
        self._copies.remove(copy)
        await eventually(partial(self._is_idle, copy), within_seconds=LONG)

    async def _is_idle(self, copy: Copy) -> bool:
        return not copy.in_hand

    async def next_ready(self) -> Copy:
        """Return a copy that is ready, with one request more in hand; there has to be one."""
        began = time.monotonic()
        while True:
            for _ in range(len(self._copies)):
                self._copies.rotate()
                copy = self._copies[0]
                copy.in_hand += 1
                if await copy.is_ready():
                    self.longest_without = max(self.longest_without, time.monotonic() - began)
                    return copy
                copy.in_hand -= 1
            assert time.monotonic() - began < LONG, "no gateway is ready"
            await asyncio.sleep(0.05)

    async def ask(self, copy: Copy, method: str, path: str, *given: Any) -> Answer:
        """Send a request to a copy that `next_ready` returned."""
        try:
            return await asyncio.to_thread(ask, copy.port, method, path, *given)
        finally:
            copy.in_hand -= 1

    async def view(self, name: str | None = None) -> tuple[str, str, Shown]:
        """Read a view, or one that is next; return whose code has answered, its name, its rows."""
        copy = await self.next_ready()
        names = [cls.view_name for cls in versions.VIEWS[copy.code]]
        wanted = name or names[time.monotonic_ns() // 1000 % len(names)]
        answer = await self.ask(copy, "GET", f"/views/{wanted}?limit=100")
        assert answer.status == 200, (copy.code, wanted, answer)
        return copy.code, wanted, {row["view_id"]: _shown(row["payload"]) for row in answer.json}


def _shown(payload: Mapping[str, Any]) -> tuple[int, str, int]:
    title = payload["title"] if "title" in payload else payload["label"]
    return int(payload["total"]), title, payload["seen"]


@dataclass
class Reader:
    """Reads views again and again; every answer is right for its code, and none goes back."""

    balancer: Balancer
    reads: dict[str, int] = field(default_factory=lambda: dict.fromkeys(versions.VIEWS, 0))

    async def run(self) -> None:
        before: dict[tuple[str, str], Shown] = {}
        while True:
            code, name, found = await self.balancer.view()
            for purse, (_, _, seen) in before.get((code, name), {}).items():
                assert purse in found, (code, name, purse)
                assert found[purse][2] >= seen, (code, name, purse)
            before[code, name] = found
            self.reads[code] += 1
            await asyncio.sleep(0.15)


# --- Senders, and who hears of it --------------------------------------------


@dataclass
class Sender:
    """Sends what one version of a sender sends, again and again while it is let.

    In turns to the queue, and to a gateway of whichever version.
    """

    client: Client
    balancer: Balancer
    opened: OpenApplication
    code: str
    pauses: asyncio.Event = field(default_factory=asyncio.Event)
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    sent: int = 0
    asked_again: int = 0
    longest_post: float = 0.0
    unanswered: deque[tuple[str, str, float]] = field(default_factory=deque[tuple[str, str, float]])
    waits: list[tuple[float, float, str]] = field(default_factory=list[tuple[float, float, str]])

    def _next(self) -> tuple[str, dict[str, Any], str | None]:
        kind, n = self.sent % 3, 1 + self.sent % 7
        title = f"{self.code} {self.sent}"
        if self.code == "old":
            if kind == 0:
                return "Name", {"title": title}, None
            return "Change", {"n": n if kind == 1 else -n}, None
        if kind == 0:
            return "Name", {"title": title, "by": "tests"}, "1.1"
        return ("Put" if kind == 1 else "Take"), {"n": n}, "1.1"

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send())
            group.create_task(self._look())

    async def _send(self) -> None:
        while True:
            while self.pauses.is_set():
                self.paused.set()
                await asyncio.sleep(0.02)
            name, payload, version = self._next()
            purse = NAMES[self.sent % len(NAMES)]
            if self.sent // 3 % 2:
                began = time.monotonic()
                id_ = await self._post(purse, name, payload, version)
                self.longest_post = max(self.longest_post, time.monotonic() - began)
            else:
                id_ = await self.client.send("purse", purse, name, payload, version=version)
            self.sent += 1
            self.unanswered.append((id_, name, time.monotonic()))
            await asyncio.sleep(0.1)

    async def _post(
        self, purse: str, name: str, payload: dict[str, Any], version: str | None
    ) -> str:
        """Post a command, again where the code of a gateway is too old for it."""
        id_ = new_command_id()
        headers = {**JSON, "Idempotency-Key": id_, "Prefer": "respond-async"}
        if version is not None:
            headers["Command-Version"] = version
        path = f"/aggregates/purse/{quote(purse)}/{name}"
        while True:
            copy = await self.balancer.next_ready()
            answer = await self.balancer.ask(copy, "POST", path, orjson.dumps(payload), headers)
            if answer.status == 202:
                return id_
            assert answer.status == 503, (copy.code, name, answer)
            assert copy.code == "old", (copy.code, name, answer)
            assert version is not None, (copy.code, name, answer)
            self.asked_again += 1
            await asyncio.sleep(0.2)

    async def _look(self) -> None:
        """Look whether the first is answered, and that it was not refused."""
        while True:
            while self.unanswered:
                id_, name, sent_at = self.unanswered[0]
                outcome = await self.opened.outcome(id_)
                if outcome is None:
                    break
                assert outcome.accepted, outcome
                self.waits.append((sent_at, time.monotonic(), name))
                self.unanswered.popleft()
            await asyncio.sleep(0.05)

    async def pause(self) -> None:
        """Stop sending, and wait until all that was sent is decided."""
        self.paused.clear()
        self.pauses.set()
        await eventually(self._done, within_seconds=LONG)

    async def _done(self) -> bool:
        return self.paused.is_set() and not self.unanswered

    def go_on(self) -> None:
        self.pauses.clear()


@dataclass
class Listener:
    """A subscriber in another service: it gets every event, in order."""

    client: Client
    offsets: dict[int, int] = field(default_factory=dict[int, int])

    async def run(self) -> None:
        async with self.client.subscribe("listener", from_="end") as events:
            async for event in events:
                assert event.offset == self.offsets.get(event.partition, 0) + 1, event
                self.offsets[event.partition] = event.offset


# --- The log, and what is to follow from it ----------------------------------


@dataclass
class Folded:
    """The log, folded by code of its own."""

    shown: Shown = field(default_factory=Shown)
    noteworthy: set[tuple[str, int]] = field(default_factory=set[tuple[str, int]])
    notes: dict[tuple[str, int], list[str]] = field(
        default_factory=lambda: defaultdict[tuple[str, int], list[str]](list)
    )
    heads: Mapping[int, int] = field(default_factory=dict[int, int])

    @classmethod
    async def of(cls, opened: OpenApplication) -> Folded:
        made = cls(heads=await opened.storage.events.heads())
        for partition, head in made.heads.items():
            async for event in stored_log(opened.storage.events, partition, 0, head):
                payload, name = orjson.loads(event.payload), event.key.id
                if event.key.type == "ledger":
                    made.notes[name, payload["sequence"]].append(payload["by"])
                    continue
                if event.event_type in {"Added", "Moved", "Taken"}:
                    made.noteworthy.add((name, event.sequence))
                total, title, _ = made.shown.get(name, (0, "", 0))
                sign = 1 if event.event_type == "Added" else -1
                total += sign * (payload.get("n", 0) + payload.get("fee", 0))
                made.shown[name] = (total, payload.get("title", title), event.sequence)
        return made

    def check_notes(self) -> None:
        """Check that nothing was noted twice, or without a cause."""
        twice = {place: by for place, by in self.notes.items() if len(by) > 1}
        assert not twice, twice
        assert self.notes.keys() <= self.noteworthy, self.notes.keys() - self.noteworthy


@dataclass
class Judge:
    """Compares what there is with what the log says."""

    opened: Mapping[str, OpenApplication]
    balancer: Balancer
    listener: Listener
    noted: dict[str, int] = field(default_factory=dict[str, int])

    async def all_right(self, code: str) -> None:
        """Wait until all is as the log says, and check that nothing is amiss."""
        found: list[str] = []

        async def right() -> bool:
            found[:] = await self._differences(code)
            return not found

        try:
            await eventually(right, within_seconds=LONG, every=0.2)
        except AssertionError:
            raise AssertionError(f"{code}: not as the log says: {found}") from None
        storage = self.opened[code].storage
        assert await storage.views.list_parked() == []
        assert await storage.dead_letters.count() == 0

    async def _differences(self, code: str) -> list[str]:
        opened = self.opened[code]
        folded, wrong = await Folded.of(opened), list[str]()
        folded.check_notes()
        self.noted = {by: sum([by] == each for each in folded.notes.values()) for by in self.opened}
        if left := len(folded.noteworthy) - len(folded.notes):
            return [f"{left} notes are missing"]
        if self.listener.offsets != {n: head for n, head in folded.heads.items() if head}:
            return [f"the topic has {self.listener.offsets} of {folded.heads}"]
        for cls in versions.VIEWS[code]:
            answered_by, _, shown = await self.balancer.view(cls.view_name)
            assert answered_by == code
            if shown != folded.shown:
                wrong.append(cls.view_name)
        days = versions.DAYS[code]
        totals = {purse: total for purse, (total, _, _) in folded.shown.items()}
        for table in (await opened.table("days"), "days"):  # by its own name as well
            query = f"SELECT purse, {days.column} FROM {table}"  # noqa: S608 - ours
            rows = await sql_of(opened.storage.views).query(query)
            if {str(purse): int(total) for purse, total in rows} != totals:
                wrong.append(table)
        return wrong


# --- Deploying ---------------------------------------------------------------


class Deploy:
    """Replaces the processes of one version by those of the other, one by one, as they are ready.

    Gateways are not before their views are filled: where their turn comes before the
    projectors', the others are replaced meanwhile.
    """

    def __init__(
        self,
        made: Service,
        opened: Mapping[str, OpenApplication],
        balancer: Balancer,
        diary: Diary,
    ) -> None:
        self._made = made
        self._opened = opened
        self._balancer = balancer
        self.diary = diary
        self._running: dict[tuple[str, int], tuple[Popen[bytes], Copy]] = {}
        self._began = time.monotonic()
        self.gateways_in: list[float] = []

    async def to(self, code: str, roles: tuple[str, ...]) -> None:
        """Deploy a version, role by role."""
        self._began = time.monotonic()
        self._made.settings["VERSION"] = code
        self.diary.note(f"{code} init")
        await asyncio.to_thread(self._made.call, "init")
        self.diary.note(f"{code} init is done")
        async with asyncio.TaskGroup() as group:
            for place, role in enumerate(roles):
                rolling = group.create_task(self._roll(role, code))
                if role != "serve" or "projector" not in roles[place:]:
                    await rolling
        await eventually(lambda: self._live(code), within_seconds=LONG, every=0.1)

    async def _roll(self, role: str, code: str) -> None:
        for number in range(COPIES):
            began = time.monotonic()
            _, copy = started = await self._start(role, code)
            if role == "serve":
                self._balancer.add(copy)
            await eventually(copy.is_ready, within_seconds=LONG, every=0.2)
            self.diary.note(f"{code} {role} {number} is there")
            if role == "serve":
                self.gateways_in.append(time.monotonic() - began)
            if (role, code) == ("worker", "new") and number == 0:
                self.diary.unknown.append((self._began, time.monotonic()))
            before, self._running[role, number] = self._running.get((role, number)), started
            if before is not None:
                if role == "serve":
                    await self._balancer.remove(before[1])
                assert await asyncio.to_thread(self._made.stop, before[0]) == 0
                self.diary.note(f"the {role} {number} before it has gone")

    async def _start(self, role: str, code: str) -> tuple[Popen[bytes], Copy]:
        """Start a process; return it as soon as it can be asked."""
        given = ["--health-port", "127.0.0.1:0"]
        if role == "serve":
            given += ["--port", "0", "--gateway", "tests.apps.versions:gateway"]
        process = self._made.start(role, *given)
        wanted = ["probes served", "serving"][: 2 if role == "serve" else 1]
        ports: dict[str, int] = {}

        async def can_be_asked() -> bool:
            assert process.poll() is None, self._made.log_of(process)[-3000:]
            for line in self._made.log_of(process).splitlines():
                if '"port":' in line:
                    said = orjson.loads(line)
                    ports[said["event"]] = said["port"]
            return ports.keys() >= set(wanted)

        await eventually(can_be_asked, within_seconds=LONG, every=0.1)
        return process, Copy(code, ports.get("serving", 0), ports["probes served"])

    async def _live(self, code: str) -> bool:
        own = [kept for kept in await self._opened[code].generations() if kept.own]
        return len(own) == 3 and all(kept.state == "live" for kept in own)


async def roll(made: Service, orders: Sequence[tuple[str, ...]]) -> None:
    """Deploy the new version and the old one again, in each order of roles, under load."""
    settings = Settings(store_url=made.store_url)
    balancer, diary = Balancer(), Diary()
    async with (
        versions.old().open(settings, initialise=False, reach_broker=False) as old,
        versions.new().open(settings, initialise=False, reach_broker=False) as new,
        Client(broker_url=made.broker_url, service="tests") as client,
    ):
        opened = {"old": old, "new": new}
        for number in range(HISTORY):
            change = versions.Change(number % 5 - 2 or 3)
            assert (
                await old.execute(versions.OldPurse, NAMES[number % len(NAMES)], change)
            ).accepted
        reader, listener = Reader(balancer), Listener(client)
        senders = {code: Sender(client, balancer, opened[code], code) for code in versions.VIEWS}
        deploy = Deploy(made, opened, balancer, diary)
        judge = Judge(opened, balancer, listener)
        senders["new"].pauses.set()
        async with _beside(listener):
            await deploy.to("old", orders[0])
            async with _beside(reader, *senders.values()):
                for order in orders:
                    await _there_and_back(deploy, order, senders, judge)
    figures = {
        "orders": len(orders),
        "commands": HISTORY + sum(each.sent for each in senders.values()),
        "caused": judge.noted,
        "reads": reader.reads,
        "asked again of a newer gateway": senders["new"].asked_again,
        "longest till one took it": round(senders["new"].longest_post, 1),
        "longest without a ready gateway": round(balancer.longest_without, 1),
        "longest till a gateway was ready": round(max(deploy.gateways_in), 1),
    }
    log.warning("%s", figures)
    _check_waits(senders.values(), diary)
    assert all(reader.reads.values())
    assert all(judge.noted.values())


def _check_waits(senders: Any, diary: Diary) -> None:
    """Show what waited longest, and check that it was for a worker that knows it, if long."""
    waits = sorted(
        (
            (until - since, since, until, name)
            for each in senders
            for since, until, name in each.waits
        ),
        reverse=True,
    )
    for seconds, since, until, name in waits[:3]:
        log.warning("a %s waited %.1f s: %s", name, seconds, diary.during(since, until))
    known = max(diary.known_for(since, until) for _, since, until, _ in waits)
    log.warning("the longest while a worker knew it: %.1f s", known)
    for _, since, until, name in waits:
        seconds = diary.known_for(since, until)
        assert seconds < MOST_SECONDS, (name, seconds, diary.during(since, until))


async def _there_and_back(
    deploy: Deploy, order: tuple[str, ...], senders: Mapping[str, Sender], judge: Judge
) -> None:
    """Deploy the new version, then the old one; new senders are the first to come, and to go."""
    began = time.monotonic()
    senders["new"].go_on()  # what it sends has versions, so that workers of any order may be there
    await deploy.to("new", order)
    await asyncio.sleep(1.0)  # of load with nothing old left
    for each in senders.values():
        await each.pause()
    await judge.all_right("new")
    there = time.monotonic()
    senders["old"].go_on()
    await deploy.to("old", order)
    await senders["old"].pause()
    await judge.all_right("old")
    senders["old"].go_on()
    found = deploy.diary.during(began, time.monotonic())
    log.info("\n".join([f"{order}:", *found]))
    log.warning(
        "%s: there in %.0f s, back in %.0f s", order, there - began, time.monotonic() - there
    )


@asynccontextmanager
async def _beside(*runs: Reader | Sender | Listener) -> AsyncGenerator[None]:
    """Have these run during the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each.run()) for each in runs]
        yield
        for task in tasks:
            task.cancel()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("store", "broker"), [("mysql_url", "amqp_url"), ("postgres_url", "redis_url")]
)
async def test_rolling_deploys_and_back_in_orders_of_every_pair_of_roles(
    store: str, broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Nothing is parked or refused, no reader is without its view, and all are as the log says."""
    urls: list[str] = [request.getfixturevalue(name) for name in (store, broker)]
    settings = {
        "VERSION": "old",
        "CQRS_ES_PARTITIONS": "4",
        "CQRS_ES_LOG_FORMAT": "json",
        "CQRS_ES_LEASE_SECONDS": "10",
    }
    with service(APP, urls[0], urls[1], tmp_path, **settings) as made:
        await roll(made, ORDERS)
