"""Whatever the topic, the store and other processes do, each event is in a view once, in order.

Projectors and reactors are driven as a process drives them, two for each partition, as after a
lease that was lost unnoticed. The rows are compared with the log after every step.
"""
# ruff: noqa: S608 - the names of tables are the framework's

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections import Counter as Tally
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec
import orjson
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from cqrs_es import Envelope, Reactor, Send, View, errors, send
from cqrs_es.application import Application
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.ports.broker import EventFeed, TopicEvent
from cqrs_es.ports.leases import Lease
from cqrs_es.projector import Projector, SqlSession, physical_name, view_of
from cqrs_es.runtime.leases import Assignment
from cqrs_es.runtime.projection_loop import ProjectorLoop, ReactorLoop
from cqrs_es.runtime.topic import topic_events
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.testing import FakeClock
from tests.faulty import FaultyStorage
from tests.samples import AddEach, Added, Counter, Services
from tests.stores import sql_of

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.views import ParkedAggregate
    from cqrs_es.projection.applying import Applier
    from cqrs_es.runtime.process import Process

T = TypeVar("T")
pytestmark = pytest.mark.timeout(400)  # where others are at work it takes ten times as long
PARTITIONS = 2
HOLDERS = 2
IDS = ("a", "b", "d")
FOLLOWERS = ("journal", "lines", "echo")
BAD: set[tuple[str, int]] = set()
"""The events, by counter and sequence, that everybody fails on for now."""


class Died(BaseException):
    """The process ends here, as far as the framework can tell."""


def refuse_bad(event: Envelope[Added]) -> None:
    """Fail as an author's code does."""
    if (event.aggregate_id, event.sequence) in BAD:
        message = "can't"
        raise LookupError(message)


@dataclass
class Journal(View[Added], name="journal"):
    """What was applied to a counter's row and to its partition's, in the order of that."""

    seen: list[str] = field(default_factory=list)

    @classmethod
    def view_id(cls, event: Envelope[Added]) -> list[str]:
        return [event.aggregate_id, f"partition {event.partition}"]

    def update(self, event: Envelope[Added]) -> None:
        refuse_bad(event)
        self.seen.append(f"{event.aggregate_id}/{event.sequence}")


class Lines(Projector[Added], name="lines"):
    """A line for each time that an event was applied: nothing refuses a second one."""

    tables: ClassVar[Mapping[str, str]] = {"lines": "place VARCHAR(40) NOT NULL"}

    async def project(self, events: Sequence[Envelope[Added]], sql: SqlSession) -> None:
        insert = f"INSERT INTO {self.table('lines')} VALUES (?)"
        for event in events:
            await sql.execute(insert, [f"{event.aggregate_id}/{event.sequence}"])
            refuse_bad(event)


class Echo(Reactor[Added], name="echo", since="start"):
    """Sends two commands for each event, which nobody decides: their rows stay."""

    def react(self, event: Envelope[Added], services: None) -> Iterator[Send]:  # noqa: ARG002
        yield send(Counter, "first", AddEach([event.data.n]))
        refuse_bad(event)
        yield send(Counter, "second", AddEach([event.data.n]))


PASSING = (errors.Conflict, errors.Unavailable, errors.StoreError, Died)
"""After these a process tries again, or another one does."""


# --- What may happen ---------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """An error of the store's, after so many calls that went well; `done`: when all is done."""

    method: str
    error: type[BaseException]
    calls: int = 0
    done: bool = False


@dataclass(frozen=True)
class Commit:
    """So many events of a counter come into the log."""

    id: str
    events: int


@dataclass(frozen=True)
class Deliver:
    """The topic delivers offsets, counted back from the end of the log; some of another epoch."""

    back: list[int]
    foreign: bool = False


@dataclass(frozen=True)
class Silence:
    """The topic delivers nothing for a while, in which the log's head is looked at."""


troubles = st.none() | st.one_of(
    st.builds(
        Trouble,
        st.sampled_from(["transaction", "commit"]),
        st.sampled_from([Died, errors.StoreUnavailable]),
        calls=st.integers(0, 2),
    ),
    st.builds(
        Trouble,
        st.just("transaction"),
        st.sampled_from([Died, errors.StoreUnavailable]),
        calls=st.integers(0, 2),
        done=st.just(value=True),
    ),
    st.builds(Trouble, st.just("commit"), st.just(errors.StoreError)),
    st.builds(
        Trouble,
        st.sampled_from(["read_log", "list_parked", "load"]),
        st.sampled_from([Died, errors.StoreUnavailable]),
        calls=st.integers(0, 2),
    ),
)
backs = st.lists(st.integers(0, 9), min_size=1, max_size=8)
commits = st.builds(Commit, st.sampled_from(IDS), st.integers(1, 4))
deliveries = st.one_of(
    st.builds(Deliver, backs),
    st.builds(Deliver, st.integers(0, 9).map(lambda n: [*range(n, -1, -1)])),
    st.builds(Deliver, backs, foreign=st.just(value=True)),
)
scripts = st.lists(st.one_of(commits, deliveries, st.builds(Silence)), max_size=8)
followers = st.sampled_from(FOLLOWERS)
partitions = st.integers(0, PARTITIONS - 1)
holders = st.integers(0, HOLDERS - 1)


class Topic(MemoryBroker):
    """A topic that delivers what its script says, and then has its reader stop."""

    def __init__(self, machine: Following, assignment: Assignment, script: list[Any]) -> None:
        super().__init__(event_retention=1)
        self._arguments = machine, assignment, script

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        del after
        return _Scripted(*self._arguments)


class _Scripted(EventFeed):
    def __init__(self, machine: Following, assignment: Assignment, script: list[Any]) -> None:
        self._machine = machine
        self._assignment = assignment
        self._script = iter(script)

    async def receive(self, limit: int) -> list[TopicEvent]:
        del limit
        for step in self._script:
            match step:
                case Commit():
                    await self._machine.add(step)
                case Deliver():
                    return self._machine.delivered(step, self._assignment.lease.partition)
                case _:
                    await self._machine.process.watcher.look()
                    return []
        self._assignment.stopping.set()
        return []

    async def close(self) -> None:
        """There is nothing to close."""


# --- The machine -------------------------------------------------------------


class Following(RuleBasedStateMachine):
    """A view, a projector and a reactor follow one log, through all that may happen to them."""

    url = "memory://"

    def __init__(self) -> None:
        super().__init__()
        BAD.clear()
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._folder = tempfile.TemporaryDirectory()
        self._clock = FakeClock()
        self._numbers = count(1)
        self._log: dict[int, list[StoredEvent]] = {}
        self._appliers: dict[tuple[str, int, int], Applier] = {}
        self._checkpoints: dict[tuple[str, int], int] = {}
        self._seen: dict[str, dict[int, int]] = {}
        self._markers: list[ParkedAggregate] = []
        self._ever_bad: set[tuple[str, int]] = set()
        self._once_parked: set[tuple[str, str]] = set()
        self._run(self._open())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _open(self) -> None:
        app = Application("tests")
        app.aggregate(Counter, services=lambda _: Services())
        app.view(Journal)
        app.projector(Lines)
        app.reactor(Echo)
        url = self.url.format(folder=self._folder.name)
        self._storage = storage_for(url)
        await self._storage.open()
        self._stack.push_async_callback(self._storage.close)
        self._faulty = FaultyStorage(self._storage)
        settings, broker = (
            Settings(store_url=url, partitions=PARTITIONS),
            MemoryBroker(event_retention=1),
        )
        opened = [
            await self._stack.enter_async_context(
                app.open(settings, storage=each, broker=broker, clock=self._clock, initialise=True)
            )
            for each in (self._storage, self._faulty)
        ]
        self._sender, self._opened = opened  # who decides is another process
        await self._opened.initialise()
        self._epoch = (await self._storage.info()).log_epoch

    def teardown(self) -> None:
        self._faulty.faults.clear()
        self._run(self._stack.aclose())
        self._runner.close()
        self._folder.cleanup()
        BAD.clear()

    @property
    def process(self) -> Process:
        """What the roles of the process share."""
        return self._opened.process

    # --- The log and the topic ---

    async def add(self, commit: Commit) -> None:
        """Bring events into the log."""
        numbers = [next(self._numbers) for _ in range(commit.events)]
        await self._sender.execute(Counter, commit.id, AddEach(numbers))
        await self._look()

    async def _look(self) -> None:
        """Read the log behind everybody's back."""
        heads = await self._storage.events.heads()
        read = self._storage.events.read_log
        self._log = {p: await read(p, 0, head) for p, head in heads.items() if head}

    def _picked(self, back: Sequence[int], partition: int) -> list[StoredEvent]:
        log = self._log.get(partition, [])
        return [log[-1 - n] for n in back if n < len(log)]

    def delivered(self, delivery: Deliver, partition: int) -> list[TopicEvent]:
        """Return what a subscriber gets."""
        picked = self._picked(delivery.back, partition)
        if not delivery.foreign:
            found = topic_events(picked, "tests", self._epoch)
            return [TopicEvent(partition, event.offset, event.body) for event in found]
        # Of a log that was longer: some stand where this one ends.
        head = len(self._log.get(partition, []))
        others = [
            msgspec.structs.replace(e, sequence=e.sequence + 100, offset=head + number)
            for number, e in enumerate(picked)
        ]
        found = topic_events(others, "tests", "of another log")
        broken = [TopicEvent(partition, 1, b"{}")]
        return broken + [TopicEvent(partition, event.offset, event.body) for event in found]

    @initialize(first=st.lists(commits, max_size=4))
    def begin(self, first: list[Commit]) -> None:
        """Have some events there from the beginning."""
        for commit in first:
            self._run(self.add(commit))

    @rule(commit=commits)
    def commit(self, commit: Commit) -> None:
        """Bring events into the log."""
        self._run(self.add(commit))

    @rule(id_=st.sampled_from(IDS), ahead=st.lists(st.integers(-2, 4), min_size=1, max_size=2))
    def poison(self, id_: str, ahead: list[int]) -> None:
        """Let everybody fail on events, which may be in the log already or still to come."""
        there = sum(event.key.id == id_ for log in self._log.values() for event in log)
        bad = {(id_, there + n) for n in ahead}
        BAD.update(bad)
        self._ever_bad |= bad

    @rule()
    def mend(self) -> None:
        """Fix the code that fails."""
        BAD.clear()

    # --- Projectors and reactors ---

    def _loop(self, name: str, process: Process) -> ProjectorLoop | ReactorLoop:
        registry = self._opened.registry
        if name in registry.reactors:
            return ReactorLoop(process, registry.reactors[name])
        return ProjectorLoop(process, registry.projections[name])

    async def _applier(self, slot: tuple[str, int, int]) -> Applier:
        if slot not in self._appliers:
            name, partition, _ = slot
            loop = self._loop(name, self.process)
            applier = await loop.applier(Assignment(Lease(loop.name, partition, "p", 1)))
            await applier.read_checkpoint()
            self._appliers[slot] = applier
        return self._appliers[slot]

    def _act(self, work: Coroutine[Any, Any, None], trouble: Trouble | None) -> bool:
        """Do work during which the store may fail; return False where a process would try again."""
        if trouble is not None:
            faults = self._faulty.faults
            cause = faults.after if trouble.done else faults.before
            cause(trouble.method, *[None] * trouble.calls, trouble.error("injected"))
        try:
            self._run(work)
        except PASSING:
            return False
        except BaseExceptionGroup as several:
            _, others = several.split((*PASSING, errors.ViewFailed))
            if others is not None:
                raise
            return False
        finally:
            self._faulty.faults.clear()
            self._clock.advance(61.0)  # parks count by the minute
        return True

    @rule(partition=partitions, holder=holders, back=backs, trouble=troubles)
    def offer(self, partition: int, holder: int, back: list[int], trouble: Trouble | None) -> None:
        """Offer events in any order to one of the two that think they hold the partition."""
        events = self._picked(back, partition)
        for name in FOLLOWERS:
            self._with((name, partition, holder), lambda applier: applier.offer(events), trouble)

    @rule(partition=partitions, first=backs, second=backs)
    def race(self, partition: int, first: list[int], second: list[int]) -> None:
        """Have both read the checkpoint before either of them applies anything."""
        for name in FOLLOWERS:
            for holder in range(HOLDERS):
                self._appliers.pop((name, partition, holder), None)
                self._run(self._applier((name, partition, holder)))
        self.offer(partition, 0, first, None)
        self.offer(partition, 1, second, None)

    @rule(partition=partitions, holder=holders, most=st.none() | st.integers(0, 9))
    def catch_up(self, partition: int, holder: int, most: int | None) -> None:
        """Have one of the two read the store."""
        for name in FOLLOWERS:
            self._with((name, partition, holder), lambda applier: applier.catch_up(most=most))

    def _with(
        self,
        slot: tuple[str, int, int],
        work: Callable[[Applier], Coroutine[Any, Any, object]],
        trouble: Trouble | None = None,
    ) -> None:
        """Do something with an applier; one that fails is replaced when it is next needed."""

        async def with_applier() -> None:
            await work(await self._applier(slot))

        if not self._act(with_applier(), trouble):
            self._appliers.pop(slot, None)

    @rule(name=followers, partition=partitions, script=scripts, trouble=troubles)
    def follow(self, name: str, partition: int, script: list[Any], trouble: Trouble | None) -> None:
        """Run a role on a partition, from its start to its end."""
        assignment = Assignment(Lease(name, partition, "p", 1))
        process = msgspec.structs.replace(self.process, broker=Topic(self, assignment, script))
        self._act(self._loop(name, process).run_partition(assignment), trouble)

    @precondition(lambda self: self._markers)
    @rule(data=st.data(), mended=st.booleans(), more=st.integers(0, 2), trouble=troubles)
    def retry(
        self, data: st.DataObject, *, mended: bool, more: int, trouble: Trouble | None
    ) -> None:
        """Try a parked aggregate again, which may have been tried meanwhile, or gone on."""
        marker = data.draw(st.sampled_from(self._markers))
        if mended:  # a later event of the same counter may go on failing
            BAD.discard((marker.key.id, marker.from_sequence))
        if more:
            self._run(self.add(Commit(marker.key.id, more)))
        name = view_of(marker.projector).removeprefix("reactor:")

        async def work() -> None:
            await self._opened.retry_parked(name, marker)

        self._act(work(), trouble)

    @rule(
        name=st.sampled_from(["journal", "lines"]),
        meanwhile=st.lists(commits, max_size=4),
        trouble=troubles,
    )
    def rebuild(self, name: str, meanwhile: list[Commit], trouble: Trouble | None) -> None:
        """Rebuild a view that is in use, or go on with that; its process may die of it."""
        if trouble is not None:  # while the store is away it would wait
            trouble = replace(trouble, error=Died)

        async def use() -> None:
            for commit in meanwhile:
                await self.add(commit)
                for partition in range(PARTITIONS):
                    with contextlib.suppress(errors.Conflict):
                        await (await self._applier((name, partition, 0))).catch_up()

        async def work() -> None:
            using = asyncio.create_task(use())
            try:
                await self._opened.rebuild(name).run()
            except errors.ViewFailed:
                assert BAD
            finally:
                await using

        for partition in range(PARTITIONS):
            self._appliers.pop((name, partition, 0), None)
        self._act(work(), trouble)

    @rule()
    def drain(self) -> None:
        """Heal everything: each view then has the whole log, and nothing is parked."""
        BAD.clear()
        for name in FOLLOWERS:
            for partition in range(PARTITIONS):
                self.follow(name, partition, [], None)
        for marker in self._run(self._storage.views.list_parked()):
            name = view_of(marker.projector).removeprefix("reactor:")
            assert self._run(self._opened.retry_parked(name, marker))
        assert self._run(self._storage.views.list_parked()) == []
        live = self._run(self._storage.views.generations())
        for key in (f"journal__{live['journal']}", f"lines__{live['lines']}", "reactor:echo__1"):
            at = self._run(self._storage.views.checkpoints(key))
            assert {p: at[p] for p in self._log} == {p: len(e) for p, e in self._log.items()}

    # --- What must hold ---

    @invariant()
    def each_event_is_in_each_view_once(self) -> None:
        """Compare what is stored with a fold of the log, up to the checkpoints or the parking."""
        self._run(self._check())

    async def _check(self) -> None:
        await self._look()
        there = await self._storage.views.list_parked()
        self._markers += [marker for marker in there if marker not in self._markers]
        await self._check_live(await self._storage.views.generations())
        await self._check_reactor(await self._expected("reactor:echo__1"))
        for key in await self._storage.views.list_tables():
            if view_of(key) == "journal":
                await self._check_journal(key, await self._expected(key))
            elif view_of(key) == "lines":
                rows = await sql_of(self._storage.views).query(f"SELECT place FROM {key}")
                expected = await self._expected(key)
                assert Tally(place for (place,) in rows) == Tally(map(_place, expected)), key

    async def _check_live(self, numbers: Mapping[str, int]) -> None:
        """Check that what readers see never goes back, also where another generation is live."""
        for name in ("journal", "lines"):
            at = await self._storage.views.checkpoints(physical_name(name, numbers[name]))
            before, self._seen[name] = self._seen.get(name, {}), at
            assert all(at.get(p, 0) >= offset for p, offset in before.items()), name

    async def _expected(self, key: str) -> list[StoredEvent]:
        """Return what the checkpoints say a generation has, in the order of the log."""
        checkpoints = await self._storage.views.checkpoints(key)
        for partition, offset in checkpoints.items():
            assert self._checkpoints.get((key, partition), 0) <= offset
            assert offset <= len(self._log.get(partition, []))
            self._checkpoints[key, partition] = offset
        parked = {m.key: m.from_sequence for m in await self._storage.views.list_parked(key)}
        for aggregate, sequence in parked.items():
            self._once_parked.add((key, aggregate.id))
            assert (aggregate.id, sequence) in self._ever_bad, "parked for no reason"
        return [
            event
            for partition, offset in sorted(checkpoints.items())
            for event in self._log.get(partition, [])[:offset]
            if event.sequence < parked.get(event.key, event.sequence + 1)
        ]

    async def _check_journal(self, key: str, expected: list[StoredEvent]) -> None:
        page = await self._storage.views.page(key, limit=1000)
        rows = {row.view_id: orjson.loads(row.payload)["seen"] for row in page}
        folded: defaultdict[str, list[str]] = defaultdict(list)
        for event in expected:
            folded[event.key.id].append(_place(event))
            folded[f"partition {event.partition}"].append(_place(event))
        for view_id in [*folded, *rows]:
            found, should_be = rows.get(view_id, []), folded.get(view_id, [])
            if view_id.startswith("partition"):  # those that were parked are late there
                assert Tally(found) == Tally(should_be), (key, view_id)
                found, should_be = self._in_time(key, found), self._in_time(key, should_be)
            assert found == should_be, (key, view_id)

    def _in_time(self, key: str, places: list[str]) -> list[str]:
        return [p for p in places if (key, p.partition("/")[0]) not in self._once_parked]

    async def _check_reactor(self, expected: list[StoredEvent]) -> None:
        rows = await self._storage.events.list_scheduled(None, 10_000)
        sent = Tally((r.key.id, orjson.loads(r.body)["payload"]["numbers"][0]) for r in rows)
        numbers = [orjson.loads(event.payload)["n"] for event in expected]
        assert sent == Tally((to, n) for n in numbers for to in ("first", "second"))


def _place(event: StoredEvent) -> str:
    return f"{event.key.id}/{event.sequence}"


class FollowingOnSqlite(Following):
    """The same on SQLite."""

    url = "sqlite:///{folder}/store.db"


THOROUGH = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestFollowing = Following.TestCase
TestFollowing.settings = THOROUGH
TestFollowingOnSqlite = FollowingOnSqlite.TestCase
TestFollowingOnSqlite.settings = settings(THOROUGH, max_examples=10)
