"""When a command was received, as handlers are told: the same moment whenever it is decided."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar

import pytest

from cqrs_es import Aggregate, CommandContext, Envelope, Intent, Reactor, Send, command, event, send
from cqrs_es.application import Application, ExecutionPolicy
from cqrs_es.client import Client
from cqrs_es.ports.broker import Delivery
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from cqrs_es.types import new_command_id, time_of
from tests.contract.brokers import RabbitMqServer
from tests.waiting import PATIENCE, eventually

if TYPE_CHECKING:
    from cqrs_es.opened import OpenApplication

SERVICE = "received"


@dataclass
class Watch:
    """Notes what each decision is told, and what the first ones are to end in."""

    seen: list[datetime] = field(default_factory=list[datetime])
    troubles: list[str] = field(default_factory=list[str])

    def made_for(self, context: CommandContext) -> Watch:
        self.seen.append(context.received_at)
        return self

    async def trouble(self) -> None:
        trouble = self.troubles.pop(0) if self.troubles else ""
        if trouble == "hang":
            await asyncio.sleep(1000)
        if trouble:
            raise KeyError(trouble)


@command
class Stamp:
    pass


@event
class Stamped:
    pass


@dataclass
class Sheet(Aggregate[Stamp, Stamped, Watch], type="sheet"):
    times: int = 0

    async def handle(self, command: Stamp, services: Watch) -> AsyncIterator[Stamped | Intent]:
        del command
        await services.trouble()
        yield Stamped()

    def apply(self, event: Stamped) -> None:
        del event
        self.times += 1


class Copier(Reactor[Stamped], name="copier"):
    copies: ClassVar[str] = "copy"

    async def react(self, event: Envelope[Stamped], services: Watch) -> AsyncIterator[Send]:
        await services.trouble()
        if event.aggregate_id != self.copies:
            yield send(Sheet, self.copies, Stamp())


def sheets(watch: Watch, *waits: float) -> Application:
    app = Application(SERVICE, policy=ExecutionPolicy(retry_delays=waits))
    app.aggregate(Sheet, services=watch.made_for)
    return app


@pytest.fixture(params=["redis", "amqp"])
async def broker_url(request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """Lend a server on which nobody had this service before."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    server = RabbitMqServer(url) if request.param == "amqp" else None
    yield url
    if server is not None:
        await server.close()


@contextlib.asynccontextmanager
async def working(app: Application, settings: Settings) -> AsyncGenerator[OpenApplication]:
    """Run a worker beside the block, and let it die with it."""
    opening: asyncio.Future[OpenApplication] = asyncio.get_running_loop().create_future()

    async def work() -> None:
        async with app.open(settings, initialise=True) as opened, opened.running(["worker"]):
            opening.set_result(opened)
            await asyncio.sleep(1000)

    task = asyncio.create_task(work())
    try:
        yield await opening
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_redelivery_and_a_retry_are_told_the_same(broker_url: str, sqlite_url: str) -> None:
    """A worker dies in the handler, the next one fails, and an operator has it decided again.

    The command's id has no time in it, so that only what broker and sender say is left.
    """
    service = f"received-{new_command_id()[-12:]}"
    settings = Settings(
        store_url=sqlite_url, broker_url=broker_url, service=service, lease_seconds=1.0
    )
    watch = Watch(troubles=["hang", "fails", "fails again"])
    before = datetime.now(UTC) - timedelta(milliseconds=1)
    command_id = "0192f0c4-5b7a-4cc3-98c4-dc0c0c07398f"
    async with working(sheets(watch), settings), Client(broker_url, service=service) as client:
        await client.send(Sheet, "S", Stamp(), command_id=command_id)
        after = datetime.now(UTC) + timedelta(milliseconds=1)
        await seen(watch, 1)
    async with working(sheets(watch, 0.0), settings) as opened:
        await seen(watch, 3)

        async def failed() -> bool:
            return await opened.outcome(command_id) is not None

        await eventually(failed, within_seconds=PATIENCE)
        outcome = await opened.retry_dead_letter(command_id)
    assert outcome.accepted
    assert len(watch.seen) == 4
    assert len(set(watch.seen)) == 1
    assert before <= watch.seen[0] <= after


async def seen(watch: Watch, times: int) -> None:
    async def so() -> bool:
        return len(watch.seen) >= times

    await eventually(so, within_seconds=PATIENCE)


async def test_a_due_command_is_received_when_it_is_due() -> None:
    """However late it is decided, and however often."""
    watch = Watch(troubles=["first", "second"])
    async with TestApp(sheets(watch, 0.0, 5.0)) as t:
        due = t.clock.now() + timedelta(hours=1)
        with t.expect_failures() as failures:
            await t.opened.schedule(Sheet, "S", Stamp(), at=due)
            await t.advance(timedelta(hours=3))
        assert len(failures) == 2
    assert watch.seen == [due] * 3


async def test_what_an_event_causes_has_its_moment() -> None:
    """A reactor is told when the event was recorded, its command when it was written down."""
    sheet, reactor = Watch(troubles=["", "once"]), Watch()
    app = sheets(sheet, 5.0)
    app.reactor(Copier, services=reactor.made_for)
    async with TestApp(app) as t:
        await t.advance(timedelta(hours=1))
        with t.expect_failures() as failures:
            await t.send(Sheet, "S", Stamp())
            await t.drain()
        assert len(failures) == 1
        (stamped,) = await t.events(Sheet, "S")
        (copied,) = await t.events(Sheet, "copy")
    assert reactor.seen == [stamped.recorded_at, copied.recorded_at]
    first, *copies = sheet.seen
    assert first == stamped.recorded_at
    assert len(copies) == 2
    assert set(copies) == {stamped.recorded_at}
    assert copied.recorded_at > stamped.recorded_at


async def test_in_the_process_it_is_now_or_what_the_id_says() -> None:
    """By the test's clock; who executes again with an id of version 7 gives the same moment."""
    watch = Watch()
    async with TestApp(sheets(watch)) as t:
        await t.advance(timedelta(days=1))
        await t.opened.execute(Sheet, "S", Stamp())
        assert watch.seen.pop() == t.clock.now()
        known = new_command_id()
        await t.opened.execute(Sheet, "S", Stamp(), command_id=known)
        assert watch.seen.pop() == time_of(known)
        await t.opened.execute(Sheet, "S", Stamp(), command_id=f"{known[:14]}4{known[15:]}")
        assert watch.seen.pop() == t.clock.now()


@pytest.mark.parametrize("queued_at", [1e300, -1e300, float("nan"), 2.0**63])
def test_a_moment_that_cannot_be_is_none(queued_at: float) -> None:
    """A sender may set RabbitMQ's property as it likes."""
    assert Delivery(0, b"", 0, queued_at=queued_at).received_at is None


def test_an_id_may_say_anything() -> None:
    """Of another version, or of a moment beyond the calendar, it says nothing."""
    assert time_of("ffffffff-ffff-7000-8000-000000000000") is None
    assert time_of("00000000-0000-4000-8000-000000000000") is None
    assert time_of("00000000-0001-7000-8000-000000000000") == datetime(
        1970, 1, 1, 0, 0, 0, 1000, UTC
    )
