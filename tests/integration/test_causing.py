"""What a command causes: commands to other aggregates, and timers."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar, assert_never

import pytest

from cqrs_es import Aggregate, Elapsed, Intent, cancel, command, errors, event, later, send, wire
from cqrs_es.application import Application
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.messages import CommandMessage
from cqrs_es.ports.clock import SystemClock
from cqrs_es.runtime.due import keep_recurring
from cqrs_es.settings import Settings
from cqrs_es.testing import FakeClock, TestApp
from cqrs_es.types import new_command_id
from tests.stores import on_sql
from tests.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from cqrs_es.definitions import Recurring
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.types import AggregateKey


@command
class Order:
    item: str


@command
class Pay:
    pass


@event
class Ordered:
    item: str


@event
class Paid:
    pass


@event
class Expired:
    pass


@command
class Reserve:
    item: str


@event
class Reserved:
    item: str


@dataclass
class Stock(Aggregate[Reserve, Reserved, None], type="stock"):
    reserved: int = 0

    def handle(self, command: Reserve, services: None) -> Iterator[Reserved]:  # noqa: ARG002
        yield Reserved(command.item)

    def apply(self, event: Reserved) -> None:  # noqa: ARG002
        self.reserved += 1


@dataclass
class Purchase(Aggregate[Order | Pay | Elapsed, Ordered | Paid | Expired, None], type="purchase"):
    state: str = "new"

    def handle(
        self,
        command: Order | Pay | Elapsed,
        services: None,  # noqa: ARG002
    ) -> Iterator[Ordered | Paid | Expired | Intent]:
        match command:
            case Order(item):
                yield Ordered(item)
                yield send(Stock, item, Reserve(item))
                yield later("unpaid", after=timedelta(hours=1))
            case Pay():
                yield Paid()
                yield cancel("unpaid")
            case Elapsed("unpaid"):
                yield Expired()
            case Elapsed():
                pass

    def apply(self, event: Ordered | Paid | Expired) -> None:
        match event:
            case Ordered():
                self.state = "ordered"
            case Paid():
                self.state = "paid"
            case Expired():
                self.state = "expired"
            case _:
                assert_never(event)


def shop() -> Application:
    app = Application("shop")
    app.aggregate(Stock)
    app.aggregate(Purchase)
    return app


@pytest.mark.parametrize("store_url", ["memory", "sqlite", "dynamodb"], indirect=True)
async def test_a_command_sends_another_and_sets_a_timer(store_url: str) -> None:
    """The command is decided; the timer fires when it is due, and not when it was cancelled."""
    async with TestApp(shop(), settings=Settings(store_url=store_url)) as t:
        for number in range(3):
            await t.send(Purchase, f"p{number}", Order("book"))
        await t.send(Purchase, "p1", Pay())
        await t.drain()
        assert (await t.opened.load(Stock, "book")).state.reserved == 3
        await t.advance(timedelta(minutes=59))
        assert (await t.opened.load(Purchase, "p0")).state.state == "ordered"
        await t.advance(timedelta(minutes=2))
        states = [(await t.opened.load(Purchase, f"p{n}")).state.state for n in range(3)]
        assert states == ["expired", "paid", "expired"]
        assert await t.opened.storage.events.list_scheduled(None, 10) == []


async def test_a_command_is_scheduled_from_outside(tmp_path: Path) -> None:
    """It is decided when it is due, once however often it is scheduled."""
    app = shop()
    async with TestApp(app, settings=Settings(store_url=f"sqlite:///{tmp_path}/shop.db")) as t:
        at = t.clock.now() + timedelta(days=1)
        command_id = await app.schedule(Stock, "book", Reserve("book"), at=at)
        again = await app.schedule(Stock, "book", Reserve("book"), at=at, command_id=command_id)
        assert again == command_id
        await t.advance(timedelta(hours=23))
        assert await t.outcome(command_id) is None
        await t.advance(timedelta(hours=2))
        outcome = await t.outcome(command_id)
        assert outcome is not None
        assert outcome.accepted
        await app.schedule(Stock, "book", Reserve("book"), at=at, command_id=command_id)
        await t.drain()
        assert (await t.opened.load(Stock, "book")).state.reserved == 1


@pytest.mark.parametrize(
    "at",
    [
        datetime(2026, 1, 1),  # noqa: DTZ001
        datetime(2025, 12, 30, tzinfo=UTC),
        datetime(2037, 1, 1, tzinfo=UTC),
    ],
)
async def test_an_impossible_moment_is_refused(at: datetime) -> None:
    """A moment without a zone, more than a day ago, or ten years ahead."""
    app = shop()
    async with TestApp(app):
        with pytest.raises(errors.InvalidMessage, match=r"time zone|more than a day ago"):
            await app.schedule(Stock, "book", Reserve("book"), at=at)


async def test_nobody_else_can_let_a_timer_elapse() -> None:
    """A sender may schedule a command, but none that only the framework sends."""
    async with TestApp(shop()) as t:
        await t.send(Purchase, "p", Order("book"))
        elapsed = CommandMessage(
            id=new_command_id(),
            type="Elapsed",
            aggregate_type="purchase",
            aggregate_id="p",
            payload={"name": "unpaid"},
            metadata={"hops": "1", "process_mac": "0" * 64},
        )
        await t.enqueue(wire.encode_schedule(elapsed, t.clock.now()))
        await t.drain()
        outcome = await t.outcome(elapsed.id)
        assert outcome is not None
        assert outcome.error is not None
        assert outcome.error.code == "unknown_command"
        assert (await t.opened.load(Purchase, "p")).state.state == "ordered"


@command
class Try:
    """Set a timer and send a command, then do what `how` says."""

    how: str


@dataclass
class Hasty(Aggregate[Try | Elapsed, Ordered, None], type="hasty"):
    tries: int = 0

    def handle(self, command: Try | Elapsed, services: None) -> Iterator[Ordered | Intent]:  # noqa: ARG002
        if isinstance(command, Elapsed):
            return
        if command.how != "no event":
            yield Ordered("x")
        yield later("soon", after=timedelta(minutes=1))
        yield send(Stock, "x", Reserve("x"))
        if command.how == "rejected":
            raise TooHasty
        if command.how == "101 commands":
            for _ in range(100):
                yield send(Stock, "x", Reserve("x"))

    def apply(self, event: Ordered) -> None:  # noqa: ARG002
        self.tries += 1


class TooHasty(errors.DomainError):
    """not so fast"""  # noqa: D400


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("rejected", "too_hasty", "not so fast"),
        ("no event", "internal_error", "sends a command without an event"),
        ("101 commands", "internal_error", "causes 102 commands; at most 100"),
    ],
)
async def test_what_is_not_accepted_causes_nothing(how: str, code: str, said: str) -> None:
    """A timer that was set and a command that was sent before the no leave no row."""
    app = shop()
    app.aggregate(Hasty)
    async with TestApp(app) as t:
        with t.expect_failures():
            outcome = await t.send(Hasty, "h", Try(how))
        assert outcome.error is not None
        assert (outcome.error.code, said in outcome.error.message) == (code, True)
        assert await rows(t) == []
        await t.advance(timedelta(hours=1))
        assert await t.events(Stock, "x") == []
        assert await t.events(Hasty, "h") == []


async def test_too_many_timers_fail_their_command() -> None:
    """The command that sets one too many fails with a reason, and nobody else's."""
    async with TestApp(reminders()) as t:
        for first in range(0, 1000, 100):
            assert (await t.send(Reminders, "r", Remind(first, 100))).accepted
        outcome, others = await asyncio.gather(
            t.send(Reminders, "r", Remind(1000, 1)), t.send(Reminders, "s", Remind(0, 100))
        )
        assert others.accepted
        assert outcome.error is not None
        assert "more than 1000 timers" in outcome.error.message
        assert (await t.send(Reminders, "r", Remind(0, 100))).accepted
        assert (await t.opened.load(Reminders, "r")).state.set == 1100


@pytest.mark.parametrize("after", [timedelta(days=4000), timedelta.max, timedelta(days=-2)])
async def test_a_timer_out_of_all_bounds_fails_its_command(after: timedelta) -> None:
    """Nobody else's command is touched by it."""
    async with TestApp(reminders()) as t:
        with t.expect_failures():
            outcome, others = await asyncio.gather(
                t.send(Reminders, "r", Remind(0, 1, after)), t.send(Reminders, "s", Remind(0, 1))
            )
        assert others.accepted
        assert outcome.error is not None
        assert "can't be due at" in outcome.error.message


async def test_a_timer_that_failed_is_tried_again_by_an_operator() -> None:
    """`dead retry` decides it though its row is gone."""
    async with TestApp(reminders()) as t:
        await t.send(Reminders, "r", Remind(0, 1, timedelta(hours=1)))
        with t.expect_failures():
            Reminders.broken = True
            await t.advance(timedelta(hours=2))
        Reminders.broken = False
        [letter] = await t.dead_letters()
        assert (await t.opened.retry_dead_letter(letter.id)).accepted
        assert (await t.opened.load(Reminders, "r")).state.elapsed == ["0"]


@command
class Remind:
    first: int
    count: int
    after: timedelta = timedelta(days=1)


@event
class Reminded:
    count: int
    elapsed: str = ""


@dataclass
class Reminders(Aggregate[Remind | Elapsed, Reminded, None], type="reminders"):
    broken: ClassVar[bool] = False
    set: int = 0
    elapsed: list[str] = field(default_factory=list)

    def handle(
        self,
        command: Remind | Elapsed,
        services: None,  # noqa: ARG002
    ) -> Iterator[Reminded | Intent]:
        match command:
            case Remind(first, count, after):
                yield Reminded(count)
                for number in range(first, first + count):
                    yield later(str(number), after=after)
            case Elapsed(name):
                if self.broken:
                    raise RuntimeError(name)
                yield Reminded(0, name)
            case _:
                assert_never(command)

    def apply(self, event: Reminded) -> None:
        self.set += event.count
        if event.elapsed:
            self.elapsed.append(event.elapsed)


def reminders() -> Application:
    app = Application("reminders")
    app.aggregate(Reminders)
    return app


# --- Recurring commands ------------------------------------------------------

BERLIN = "Europe/Berlin"


def nightly(
    cron: str = "30 2 * * *", item: str = "book", zone: str = BERLIN, name: str | None = None
) -> Application:
    app = Application("shop")
    app.aggregate(Stock)
    app.every(cron, send(Stock, "book", Reserve(item)), zone=zone, name=name)
    return app


async def rows(t: TestApp) -> list[ScheduledCommand]:
    return await t.opened.storage.events.list_scheduled(None, 10)


async def reserved(t: TestApp) -> int:
    return (await t.opened.load(Stock, "book")).state.reserved


@pytest.mark.parametrize("store", ["memory://", "sqlite:///{folder}/shop.db"])
async def test_a_command_recurs(store: str, tmp_path: Path) -> None:
    """One row at a time, each time once, with ids that are the same whoever makes them."""
    settings = Settings(store_url=store.format(folder=tmp_path))
    async with TestApp(nightly(), settings=settings) as t:
        [first] = await rows(t)
        assert first.due == datetime(2026, 1, 1, 1, 30, tzinfo=UTC)
        assert uuid.UUID(first.command_id).version == 8
        for day in range(1, 4):
            await t.advance(timedelta(days=1))
            assert await reserved(t) == day
            [following] = await rows(t)
            assert following.due == datetime(2026, 1, 1 + day, 1, 30, tzinfo=UTC)
        outcome = await t.outcome(first.command_id)
        assert outcome is not None
        assert outcome.accepted


async def test_a_row_that_is_decided_while_others_are_listed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its page is read before, and the next one after it was decided: both rows are seen."""
    async with TestApp(nightly()) as t:
        [first] = await rows(t)
        events = t.opened.storage.events
        listed = events.list_scheduled

        async def decided_between_pages(
            after: tuple[datetime, str] | None, limit: int, key: AggregateKey | None = None
        ) -> list[ScheduledCommand]:
            page = await listed(after, limit, key)
            if first in page:
                await t.advance(timedelta(seconds=1))
                assert await reserved(t) == 1
            return page

        t.clock.advance(timedelta(hours=2).total_seconds())
        with monkeypatch.context() as patched:
            patched.setattr(events, "list_scheduled", decided_between_pages)
            [definition] = t.opened.registry.recurring.values()
            await keep_recurring(t.opened.process, definition)
        [following] = await rows(t)
        assert following.due == datetime(2026, 1, 2, 1, 30, tzinfo=UTC)


async def test_what_was_missed_is_made_up_for_once() -> None:
    """After a week without workers it is sent once, and then at its next time."""
    async with TestApp(nightly()) as t:
        await t.advance(timedelta(days=7))
        assert await reserved(t) == 1
        [following] = await rows(t)
        assert following.due == datetime(2026, 1, 8, 1, 30, tzinfo=UTC)


async def test_a_recurring_command_keeps_to_the_clock_on_the_wall() -> None:
    """In summer time it comes an hour earlier by UTC."""
    clock = FakeClock(datetime(2026, 3, 28, tzinfo=UTC))
    async with TestApp(nightly("30 3 * * *"), clock=clock) as t:
        hours: list[int] = []
        for _ in range(3):
            [row] = await rows(t)
            hours.append(row.moment.hour)
            await t.advance(timedelta(days=1))
        assert hours == [2, 1, 1]
        assert await reserved(t) == 3


async def test_a_recurring_command_goes_on_whatever_its_outcome() -> None:
    """One that fails is a dead letter, and comes again."""
    app = Application("shop")
    app.aggregate(Reminders)
    app.every("0 * * * *", send(Reminders, "r", Remind(0, 1, timedelta(days=-3))), name="hourly")
    async with TestApp(app) as t:
        for count in (1, 2):
            with t.expect_failures():
                await t.advance(timedelta(hours=1))
            assert len(await t.dead_letters()) == count
            assert len(await rows(t)) == 1


async def test_the_code_of_a_recurring_command_changes(tmp_path: Path) -> None:
    """Its row is replaced when times or content are others, and left when they are not."""
    settings = Settings(store_url=f"sqlite:///{tmp_path}/shop.db")
    found: list[ScheduledCommand] = []
    for cron, item in (
        ("30 2 * * *", "a"),
        ("30 2 * * *", "a"),
        ("0 5 * * *", "a"),
        ("0 5 * * *", "b"),
    ):
        app = nightly(cron, item)
        definition = app.registry.recurring["stock", "book", "Reserve"]
        async with TestApp(app, settings=settings) as t:

            async def right(t: TestApp = t, definition: Recurring = definition) -> bool:
                causes = t.opened.process.executor.causes
                return await rows(t) == [causes.recurring(definition, t.clock.now())]

            await eventually(right)
            found += await rows(t)
    assert found[0] == found[1]
    assert [row.moment.hour for row in found] == [1, 1, 4, 4]
    assert found[2].command_id == found[3].command_id


async def test_one_time_of_a_recurring_command_is_left_out() -> None:
    """Cancelled it is passed over; made due it is sent early, and not again at its time."""
    async with TestApp(nightly()) as t:
        [first] = await rows(t)
        assert await t.opened.unschedule(first.command_id)
        [second] = await rows(t)
        assert second.due == datetime(2026, 1, 2, 1, 30, tzinfo=UTC)
        await t.advance(timedelta(hours=12))
        assert await reserved(t) == 0
        await t.opened.storage.events.hasten([second.command_id])
        t.opened.process.timetable.poke()
        await eventually(lambda: t.outcome(second.command_id))
        assert await reserved(t) == 1
        [third] = await rows(t)
        assert third.due == datetime(2026, 1, 3, 1, 30, tzinfo=UTC)
        assert not await t.opened.unschedule(second.command_id)


@pytest.mark.parametrize(
    ("cron", "zone", "name", "said"),
    [
        ("61 * * * *", BERLIN, None, "names no time"),
        ("0 0 30 2 *", BERLIN, None, "names no time"),
        ("nightly", BERLIN, None, "names no time"),
        ("0 3 * * *", "Europe/Atlantis", None, "no time zone"),
        ("0 3 * * *", "../etc/passwd", None, "no time zone"),
        ("0 3 * * *", BERLIN, "$x", "a timer's name"),
    ],
)
def test_a_recurring_command_that_could_never_be_sent(
    cron: str, zone: str, name: str | None, said: str
) -> None:
    """The mistake is named where it is made."""
    with pytest.raises(errors.DefinitionError, match=said):
        nightly(cron, zone=zone, name=name)


def test_recurring_commands_have_names_of_their_own() -> None:
    """Two of one command for one aggregate need names; others' aggregates are not for them."""
    app = nightly()
    with pytest.raises(errors.DefinitionError, match="give name="):
        app.every("0 4 * * *", send(Stock, "book", Reserve("book")))
    app.every("0 4 * * *", send(Stock, "book", Reserve("book")), name="at four")
    with pytest.raises(errors.DefinitionError, match="not registered"):
        app.every("0 4 * * *", send(Purchase, "p", Pay()))
    with pytest.raises(errors.DefinitionError, match="only aggregates of this service"):
        app.every("0 4 * * *", send("billing:report", "p", Pay()))


async def test_a_recurring_command_that_its_target_has_not() -> None:
    """The application does not open."""
    app = nightly()
    app.every("0 4 * * *", send(Stock, "book", Pay()))
    with pytest.raises(errors.DefinitionError, match="has no such command"):
        async with TestApp(app):
            pass


async def test_a_year_passes() -> None:
    """A test may let any span pass, longer than leases last."""
    async with TestApp(shop()) as t:
        await t.send(Purchase, "p", Order("book"))
        await t.advance(timedelta(days=365))
        assert (await t.opened.load(Purchase, "p")).state.state == "expired"
        outcome = await t.send(Purchase, "p", Order("another"))
        assert outcome.accepted


# --- Clocks ------------------------------------------------------------------


class WrongClock(SystemClock):
    """A process's clock that is wrong by so much."""

    off = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.off


@pytest.mark.parametrize("store_url", ["mysql", "postgres"], indirect=True)
async def test_processes_whose_clocks_differ_fire_nothing_early(store_url: str) -> None:
    """The database's clock decides, whichever process holds the partition; once, and in time."""
    settings = Settings(store_url=store_url, partitions=2, lease_seconds=2)
    broker, clocks = MemoryBroker(event_retention=10), (WrongClock(), WrongClock())
    clocks[0].off, clocks[1].off = timedelta(minutes=5), timedelta(minutes=-5)
    async with AsyncExitStack() as stack:
        opened: list[OpenApplication] = []
        for clock in clocks:
            opening = shop().open(settings, broker=broker, clock=clock, initialise=True)
            opened.append(await stack.enter_async_context(opening))
            await stack.enter_async_context(opened[-1].running({"worker"}))
        due = datetime.now(UTC) + timedelta(seconds=2)
        ids = [
            await one.schedule(Stock, f"b{number}", Reserve("book"), at=due)
            for number in range(4)
            for one in opened
        ]
        events = opened[0].storage.events

        async def any_decided() -> bool:
            return bool(await events.find_outcomes(ids))

        async def all_decided() -> bool:
            return len(await events.find_outcomes(ids)) == len(ids)

        await eventually(any_decided, within_seconds=60)
        assert datetime.now(UTC) >= due
        await eventually(all_decided, within_seconds=60)
        for number in range(4):
            assert (await opened[0].load(Stock, f"b{number}")).sequence == 2

        # A clock that is set back an hour does not hold up what is due.
        for clock in clocks:
            clock.off = timedelta(hours=-1)
        again = await opened[0].schedule(Stock, "b9", Reserve("book"), at=datetime.now(UTC))
        await eventually(lambda: opened[1].outcome(again), within_seconds=60)
        assert await events.list_scheduled(None, 10) == []


@pytest.mark.parametrize("store_url", ["memory", "sqlite"], indirect=True)
async def test_a_store_whose_clock_is_set_back_an_hour(store_url: str) -> None:
    """What is due at once goes on, what is due at a moment waits for it again; both are once."""
    clock = WrongClock()
    settings = Settings(store_url=store_url, lease_seconds=2)
    opening = shop().open(settings, clock=clock, initialise=True)
    async with opening as opened, opened.running({"worker"}):
        events = opened.storage.events
        due = datetime.now(UTC) + timedelta(seconds=0.5)
        planned = await opened.schedule(Stock, "planned", Reserve("book"), at=due)
        clock.off = timedelta(hours=-1)
        for number in range(3):
            await opened.execute(Purchase, f"p{number}", Order("book"))

        async def reserved() -> int:
            return (await opened.load(Stock, "book")).state.reserved

        async def all_reserved() -> bool:
            return await reserved() == 3

        await eventually(all_reserved, within_seconds=60)
        await asyncio.sleep((due - datetime.now(UTC)).total_seconds() + 0.1)
        assert await opened.outcome(planned) is None
        assert len(await events.list_scheduled(None, 10)) == 4  # it, and what is unpaid
        clock.off = timedelta(0)
        await eventually(lambda: opened.outcome(planned), within_seconds=60)
        assert (await opened.load(Stock, "planned")).state.reserved == 1
        assert await reserved() == 3


@on_sql
async def test_an_hour_without_a_worker_is_made_up_for_in_order(store_url: str) -> None:
    """What was due meanwhile is decided, once, each target's in the order of its moments."""
    async with shop().open(Settings(store_url=store_url), initialise=True) as opened:
        began = datetime.now(UTC) - timedelta(hours=1)
        wanted = {
            f"b{shelf}": [f"{minute}" for minute in range(shelf, 60, 4)] for shelf in range(4)
        }
        missed = [(stock, minute) for stock, minutes in wanted.items() for minute in minutes]
        random.Random(7).shuffle(missed)
        ids = [
            await opened.schedule(
                Stock, stock, Reserve(minute), at=began + timedelta(minutes=int(minute))
            )
            for stock, minute in missed
        ]
        async with opened.running({"worker"}):
            events = opened.storage.events

            async def all_decided() -> bool:
                return len(await events.find_outcomes(ids)) == len(ids)

            await eventually(all_decided, within_seconds=60)
        for stock, minutes in wanted.items():
            assert [each.data.item for each in await opened.events(Stock, stock)] == minutes
        assert await events.list_scheduled(None, 10) == []
