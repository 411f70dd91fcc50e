"""The test kit for a whole application: it runs on the real path and hides no failure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import orjson
import pytest

from cqrs_es import Envelope, View, errors
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.testing import TestApp
from tests.raw import raw
from tests.samples import (
    Add,
    AddAfterCall,
    Added,
    AddThenCrash,
    Counter,
    Crash,
    Refuse,
    Services,
    Totals,
    counting_app,
)
from tests.waiting import eventually


class Unlucky(Exception):
    """A bug in a view."""


@dataclass
class Moody(View[Added], name="moody"):
    """A view that can't bear the number 13."""

    total: int = 0

    def update(self, event: Envelope[Added]) -> None:
        if event.data.n == 13:
            raise Unlucky
        self.total += event.data.n


async def test_a_command_takes_the_whole_path() -> None:
    """Its outcome is a reply; its events are in the log; the view has seen them."""
    async with TestApp(counting_app()) as t:
        outcome = await t.send(Counter, "A", Add(5), metadata={"why": "test"})
        assert outcome.accepted
        await t.drain()
        (event,) = await t.events(Counter, "A")
        assert (event.data, event.metadata, event.recorded_at) == (
            Added(5),
            {"why": "test"},
            t.clock.now(),
        )
        assert await t.view(Totals, "A") == Totals(total=5, times=1)
        assert await t.view(Totals, "B") is None
        assert await t.query("SELECT view_id FROM totals") == [("A",)]
        assert await t.outcome(outcome.command_id) == outcome


async def test_a_rejection_is_an_outcome_and_no_failure() -> None:
    """A rule that says no is part of the domain."""
    async with TestApp(counting_app()) as t:
        outcome = await t.send(Counter, "A", Refuse())
    assert outcome.error is not None
    assert outcome.error.code == "refused"


async def test_what_no_message_may_hold_is_refused_at_once() -> None:
    """The sender is told; nothing is enqueued."""
    async with TestApp(counting_app()) as t:
        with pytest.raises(errors.InvalidMessage):
            await t.send(Counter, "", Add(5))
        await t.drain()
        assert await t.dead_letters() == []


async def test_a_crash_of_a_handler_is_raised_by_send() -> None:
    """It is the handler's own exception, with a note on where it came from; once."""
    async with TestApp(counting_app()) as t:
        with pytest.raises(Crash) as raised:
            await t.send(Counter, "A", AddThenCrash(5))
        assert raised.value.__notes__ == ["raised by the handler of AddThenCrash for counter/A"]
        await t.drain()
        assert len(await t.dead_letters()) == 1


async def test_a_crash_is_raised_at_the_end_at_the_latest() -> None:
    """A test that did not look can't pass."""

    async def looked_away() -> None:
        async with TestApp(counting_app()) as t:
            message = raw("AddThenCrash", {"n": 5}, aggregate_type="counter")
            await t.enqueue(orjson.dumps(message))

            async def failed() -> object:
                t.clock.advance(1.0)
                return await t.dead_letters()

            await eventually(failed)

    with pytest.raises(Crash):
        await looked_away()


async def test_a_failed_test_is_not_overlaid_by_a_crash() -> None:
    """The test's own error is the one that counts, and the end does not wait."""
    services = Services({"hangs": asyncio.Event().wait})  # type: ignore[dict-item]

    async def failed() -> None:
        async with TestApp(counting_app(services)) as t:
            message = raw("AddAfterCall", {"name": "hangs", "n": 5}, aggregate_type="counter")
            await t.enqueue(orjson.dumps(message))
            raise AssertionError("the test's own")

    with pytest.raises(AssertionError, match="the test's own"):
        await failed()


async def test_a_crash_of_a_view_is_raised_by_drain() -> None:
    """The aggregate is parked, as in production; others go on."""
    async with TestApp(counting_app(view=Moody)) as t:
        await t.send(Counter, "A", Add(13))
        with pytest.raises(Unlucky) as raised:
            await t.drain()
        assert raised.value.__notes__ == ["raised by a view on counter/A/1, Added"]
        await t.send(Counter, "B", Add(12))
        await t.drain()
        assert await t.view(Moody, "B") == Moody(12)
        assert [str(marker.key) for marker in await t.parked()] == ["counter/A"]


async def test_a_program_that_ends_in_a_handler() -> None:
    """A test is not ended by it, but fails."""

    async def leave() -> None:
        raise SystemExit

    async with TestApp(counting_app(Services({"leave": leave}))) as t:
        with pytest.raises(RuntimeError, match="SystemExit"):
            await t.send(Counter, "A", AddAfterCall("leave", 5))


async def test_failures_can_be_expected() -> None:
    """The outcome is what a sender gets, and every attempt is in the list."""
    async with TestApp(counting_app()) as t:
        with t.expect_failures() as failures:
            outcome = await t.send(Counter, "A", AddThenCrash(5))
        assert outcome.status == "failed"
        assert [type(failure) for failure in failures] == [Crash] * 5


async def test_retries_take_no_time_but_the_clocks() -> None:
    """The clock has moved by the waits of the ladder; without them it stands still."""
    async with TestApp(counting_app()) as t:
        before = t.clock.now()
        await t.send(Counter, "A", Add(1))
        assert t.clock.now() == before
        with t.expect_failures():
            await t.send(Counter, "A", AddThenCrash(5))
        waited = t.clock.now() - before
    assert timedelta(seconds=0.75 * 6.2) <= waited <= timedelta(seconds=1.25 * 6.2)


async def test_the_clock_is_the_tests() -> None:
    """Events are recorded at the moment that it was set to."""
    moment = datetime(2030, 2, 3, 4, 5, 6, tzinfo=UTC)
    async with TestApp(counting_app()) as t:
        t.clock.set(moment)
        await t.send(Counter, "A", Add(1))
        (event,) = await t.events(Counter, "A")
    assert event.recorded_at == moment


async def test_on_another_store(store_url: str) -> None:
    """What was stored is there when it is opened again."""
    settings = Settings(store_url=store_url, partitions=4)
    storage = storage_for(store_url)
    for times in (1, 2):
        async with TestApp(counting_app(), settings=settings, storage=storage) as t:
            await t.send(Counter, "A", Add(5))
            await t.drain()
            assert await t.view(Totals, "A") == Totals(total=5 * times, times=times)
    await storage.close()


async def test_not_opened() -> None:
    """It says how it is used."""
    with pytest.raises(errors.ConfigurationError, match="async with"):
        await TestApp(counting_app()).enqueue(b"{}")
