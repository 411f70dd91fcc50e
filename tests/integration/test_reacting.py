"""Reactors: what they send, where they begin, what stops them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import orjson
import pytest

from cqrs_es import (
    Aggregate,
    Envelope,
    Reactor,
    Refused,
    Send,
    cancel,
    command,
    errors,
    event,
    send,
)
from cqrs_es.application import Application
from cqrs_es.ports.leases import Lease
from cqrs_es.runtime.leases import Assignment
from cqrs_es.runtime.projection_loop import ReactorLoop
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.testing import ReactorScenario, Scenario, TestApp
from tests.faulty import FaultyStorage
from tests.stores import on_sql
from tests.transfers import Account, Asked, Begun, Deposit, Ended, Transfer, Withdraw

if TYPE_CHECKING:
    from cqrs_es.messages import CommandContext, StoredEvent
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage
    from cqrs_es.projection.applying import Applier
    from tests.faulty import Faults


@command
class Say:
    word: str


@event
class Said:
    word: str


@dataclass
class Speaker(Aggregate[Say, Said, None], type="speaker"):
    said: int = 0

    def handle(self, command: Say, services: None) -> Iterator[Said]:  # noqa: ARG002
        yield Said(command.word)

    def apply(self, event: Said) -> None:  # noqa: ARG002
        self.said += 1


class Echo(Reactor[Said], name="echo", since="start"):
    """Has another speaker say it, once."""

    failing: ClassVar[bool] = False

    async def react(self, event: Envelope[Said], services: list[str]) -> AsyncIterator[Send]:
        services.append(event.data.word)
        if self.failing and event.data.word == "no":
            raise LookupError
        if event.aggregate_id != "echo":
            yield send(Speaker, "echo", Say(event.data.word))


class Endless(Reactor[Said], name="endless"):
    """Has each speaker answer itself."""

    def react(self, event: Envelope[Said], services: None) -> list[Send]:  # noqa: ARG002
        return [send(Speaker, event.aggregate_id, Say("again"))]


def talking(*reactors: type[Reactor[Any]], heard: list[str] | None = None) -> Application:
    """Make an application with some reactors; what they see goes into `heard`."""
    app = Application("talk")
    app.aggregate(Speaker)

    def services(context: CommandContext) -> list[str] | None:
        assert context.command_id.startswith("speaker/")
        return heard

    for reactor in reactors:
        app.reactor(reactor, services=services)
    return app


@pytest.fixture
async def storage(store_url: str) -> AsyncIterator[Storage]:
    """Lend a store that outlives the applications on it."""
    storage = storage_for(store_url)
    yield storage
    await storage.close()


async def said(t: TestApp, name: str) -> list[str]:
    return [event.data.word for event in await t.events(Speaker, name)]


@on_sql
async def test_an_event_is_reacted_to_once(storage: Storage) -> None:
    """From the start or from when the reactor was deployed, and not again after a restart."""
    async with TestApp(talking(), storage=storage) as t:
        await t.send(Speaker, "a", Say("early"))
    heard: list[str] = []
    for _ in range(2):
        async with TestApp(talking(Echo, heard=heard), storage=storage) as t:
            await t.send(Speaker, "a", Say("late"))
            await t.drain()
    async with TestApp(talking(Echo, heard=heard), storage=storage) as t:
        await t.drain()
        assert await said(t, "echo") == ["early", "late", "late"]
        caused = (await t.events(Speaker, "echo"))[0]
        assert caused.metadata["causation_id"] == "speaker/a/1"
        assert await storage.events.list_scheduled(None, 10) == []


@on_sql
async def test_a_reactor_begins_with_the_event_after_its_first_deployment(
    storage: Storage,
) -> None:
    """What was said before is not answered; what follows is, until sixteen steps are over."""
    async with TestApp(talking(), storage=storage) as t:
        await t.send(Speaker, "a", Say("early"))
    async with TestApp(talking(Endless), storage=storage) as t:
        await t.drain()
        assert await said(t, "a") == ["early"]
        with t.expect_failures() as failures:
            await t.send(Speaker, "b", Say("late"))
            await t.drain()
        assert await said(t, "b") == ["late", *["again"] * 16]
        assert [type(failure) for failure in failures] == [errors.TooManyHops]
        (parked,) = await t.parked()
        assert (parked.key.id, parked.from_sequence) == ("b", 17)
        with pytest.raises(errors.ConfigurationError, match="nothing can replay it"):
            t.opened.rebuild("endless")


@on_sql
async def test_a_reactor_that_fails_parks_the_source(storage: Storage) -> None:
    """Others go on; a retry reacts to what was passed over, in order, and to nothing twice."""
    heard: list[str] = []
    Echo.failing = True
    try:
        async with TestApp(talking(Echo, heard=heard), storage=storage) as t:
            with t.expect_failures():
                for name, word in [("a", "yes"), ("a", "no"), ("b", "so"), ("a", "well")]:
                    await t.send(Speaker, name, Say(word))
                await t.drain()
            assert sorted(await said(t, "echo")) == ["so", "yes"]
            (parked,) = await t.parked()
            assert "LookupError" in parked.reason
            Echo.failing = False
            assert await t.opened.retry_parked("echo", parked)
            assert await t.parked() == []
            while "well" not in await said(t, "echo"):  # no poke: another process may have retried
                t.opened.process.timetable.poke()
                await t.drain()
            assert (await said(t, "echo"))[2:] == ["no", "well"]
    finally:
        Echo.failing = False


# --- What keeps it from sending twice -----------------------------------------


async def another(opened: OpenApplication) -> Applier:
    """Begin as a process does that has got the partition."""
    loop = ReactorLoop(opened.process, opened.registry.reactors["echo"])
    applier = await loop.applier(Assignment(Lease(loop.name, 0, "p", 1)))
    await applier.read_checkpoint()
    return applier


@asynccontextmanager
async def four_said(
    store_url: str, heard: list[str]
) -> AsyncGenerator[tuple[OpenApplication, Faults, list[StoredEvent]]]:
    """Open an application in which four things were said, to which nobody has reacted."""
    storage = storage_for(store_url)
    try:
        faulty, settings = FaultyStorage(storage), Settings(store_url=store_url, partitions=1)
        app = talking(Echo, heard=heard)
        async with app.open(settings, storage=faulty, initialise=True) as opened:
            for word in "1234":
                await opened.execute(Speaker, "a", Say(word))
            yield opened, faulty.faults, await storage.events.read_log(0, 0, 9)
    finally:
        await storage.close()


async def sent(opened: OpenApplication) -> list[str]:
    """Return what was to be said, a word for each row."""
    rows = await opened.storage.events.list_scheduled(None, 100)
    return sorted(orjson.loads(row.body)["payload"]["word"] for row in rows)


@on_sql
async def test_g11_of_two_with_one_partition_one_sends(store_url: str) -> None:
    """Both have read the same checkpoint; what the second one does is undone, and it says so."""
    async with four_said(store_url, []) as (opened, _, events):
        first, second = await another(opened), await another(opened)
        await first.offer(events[:2])
        for late in (events[:1], events[:2], events):
            with pytest.raises(errors.CheckpointMoved):
                await second.offer(late)
        with pytest.raises(errors.CheckpointMoved):
            await second.catch_up()
        assert await sent(opened) == ["1", "2"]
        await second.read_checkpoint()
        await second.offer(events)
        assert await sent(opened) == ["1", "2", "3", "4"]


@on_sql
async def test_g11_what_the_topic_repeats_or_leaves_out_changes_nothing(store_url: str) -> None:
    """Known events cause nothing, also amid new ones; what is missing is read from the store."""
    async with four_said(store_url, []) as (opened, _, events):
        one, two, three, four = events
        applier = await another(opened)
        await applier.offer([one, three])
        assert await sent(opened) == ["1", "2", "3"]
        for again in ([one, two], [three, three, one], [four, one, two, three, four]):
            await applier.offer(again)
        assert await sent(opened) == ["1", "2", "3", "4"]
        await (await another(opened)).offer(events)
        assert await sent(opened) == ["1", "2", "3", "4"]


@on_sql
async def test_g11_a_checkpoint_and_its_commands_come_together(store_url: str) -> None:
    """Cut off before the commit neither is there, after it both: the next to try finds out."""
    async with four_said(store_url, []) as (opened, faults, events):
        for cut, what, left in (
            (faults.before, "commit", []),
            (faults.after, "transaction", ["1", "2"]),
        ):
            cut(what, errors.StoreUnavailable())
            with pytest.raises(errors.StoreUnavailable):
                await (await another(opened)).offer(events[:2])
            assert await sent(opened) == left
            assert (await another(opened)).checkpoint == len(left)
        await (await another(opened)).offer(events)
        assert await sent(opened) == ["1", "2", "3", "4"]


@on_sql
async def test_g11_a_transaction_that_is_repeated_adds_the_same(store_url: str) -> None:
    """After a collision, and in parts where an event fails: the reactor itself is not run again."""
    heard: list[str] = []
    async with four_said(store_url, heard) as (opened, faults, events):
        faults.before("commit", errors.StoreError("a row was there"))
        await (await another(opened)).offer(events[:2])
        assert await sent(opened) == ["1", "2"]
        await opened.execute(Speaker, "b", Say("no"))
        Echo.failing = True
        try:
            await (await another(opened)).catch_up()
        finally:
            Echo.failing = False
        assert await sent(opened) == ["1", "2", "3", "4"]
        assert [word for word in heard if word != "no"] == ["1", "2", "3", "4"]


class Ping(Reactor[Said], name="ping"):
    """Has pong answer."""

    def react(self, event: Envelope[Said], services: None) -> Iterator[Send]:  # noqa: ARG002
        if event.aggregate_id == "ping":
            yield send(Speaker, "pong", Say(event.data.word))


class Pong(Reactor[Said], name="pong"):
    """Has ping answer."""

    def react(self, event: Envelope[Said], services: None) -> Iterator[Send]:  # noqa: ARG002
        if event.aggregate_id == "pong":
            yield send(Speaker, "ping", Say(event.data.word))


async def test_two_reactors_that_feed_each_other_come_to_an_end() -> None:
    """After sixteen steps the source is parked, with a reason; what others say goes on."""
    async with TestApp(talking(Ping, Pong)) as t:
        await t.drain()
        with t.expect_failures():
            await t.send(Speaker, "ping", Say("1"))
            await t.drain()
        (marker,) = await t.parked()
        assert "17 steps after the first one" in marker.reason
        assert (marker.projector, str(marker.key)) == ("reactor:ping__1", "speaker/ping")
        assert len(await said(t, "ping")) + len(await said(t, "pong")) == 17
        await t.send(Speaker, "other", Say("2"))
        await t.drain()
        assert await said(t, "other") == ["2"]


class Chatty(Reactor[Said], name="chatty"):
    """Sends as many commands as it is told."""

    def react(self, event: Envelope[Said], services: None) -> Iterator[Send]:  # noqa: ARG002
        if event.aggregate_id == "source":
            for number in range(int(event.data.word)):
                yield send(Speaker, f"s{number}", Say("x"))


async def test_an_event_causes_a_hundred_commands_at_most() -> None:
    """One more and none is sent; the source is parked, and says what to do."""
    async with TestApp(talking(Chatty)) as t:
        await t.drain()
        await t.send(Speaker, "source", Say("100"))
        await t.drain()
        assert await said(t, "s99") == ["x"]
        with t.expect_failures():
            await t.send(Speaker, "source", Say("101"))
            await t.drain()
        (marker,) = await t.parked()
        assert "sends 101 commands for one event; at most 100" in marker.reason
        assert await said(t, "s99") == ["x"]
        assert await said(t, "s100") == []


def test_events_that_nobody_yields_are_refused() -> None:
    """When the application is opened."""
    app = Application("talk")
    app.reactor(Echo)
    with pytest.raises(errors.DefinitionError, match="echo follows Said, which no registered"):
        app.registry.check()
    with pytest.raises(errors.DefinitionError, match="two reactors"):
        app.reactor(Echo)


def test_scenarios_of_reactors_and_processes() -> None:
    """What is sent and which timers are set can be expected, and a difference is told."""
    reaction = ReactorScenario(Echo, []).when(Said("yes"))
    reaction.then_expect_commands(send(Speaker, "echo", Say("yes")))
    with pytest.raises(AssertionError, match="other commands than expected"):
        reaction.then_expect_commands()
    begun = Scenario(Transfer).given(Begun("A", "B", 5))
    refused = begun.when(Refused(Withdraw(5), "not_enough", ""))
    refused.then_expect_events(Ended("refused: not_enough")).then_expect_commands()
    refused.then_expect_timers(cancel("too long"))
    asked = Scenario(Transfer).given().when(Asked("t1", "A", "B", 5))
    asked.then_expect_commands(send(Account, "A", Withdraw(5)))
    with pytest.raises(AssertionError, match="other timers than expected"):
        asked.then_expect_timers()
    over = begun.and_(Ended("done")).when(Asked("t1", "A", "B", 5))
    over.then_expect_events().then_expect_commands()
    with pytest.raises(errors.DefinitionError, match="not one of the inputs of Transfer"):
        begun.when(Deposit(1))
