"""What a command causes: commands to other aggregates, and timers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar, assert_never

import pytest

from cqrs_es import Aggregate, Elapsed, Intent, cancel, command, errors, event, later, send, wire
from cqrs_es.application import Application
from cqrs_es.messages import CommandMessage
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from cqrs_es.types import new_command_id

if TYPE_CHECKING:
    from pathlib import Path


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
