"""An application within somebody else's process: other event loops, threads, forks, its end."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import structs

from cqrs_es import CommandContext, Envelope, View, errors
from cqrs_es.application import Application, ExecutionPolicy, execution_policy
from cqrs_es.client import Client
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from cqrs_es.types import new_command_id
from tests.contract.brokers import PARTITIONS, SERVICE, serving
from tests.samples import (
    Add,
    Added,
    AddThenCrash,
    Commit,
    Counter,
    Services,
    T,
    Totals,
    counting_app,
)
from tests.stores import on_sql
from tests.tallies import tallying_app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from cqrs_es.opened import OpenApplication

SECONDS = 10.0


@pytest.fixture
async def opened(store_url: str) -> AsyncIterator[OpenApplication]:
    settings = Settings(store_url=store_url, partitions=1)
    async with counting_app().open(settings, initialise=True) as opened:
        yield opened


async def elsewhere(work: Coroutine[object, object, object]) -> object:
    """Run work in a thread with an event loop of its own."""
    return await asyncio.wait_for(asyncio.to_thread(asyncio.run, work), SECONDS)


# --- Its import ---------------------------------------------------------------


@pytest.mark.parametrize("seldom", ["cqrs_es.runtime.supervisor", "cronsim", "structlog"])
def test_importing_an_application_leaves_out_what_few_need(seldom: str) -> None:
    """A function or program that only executes commands starts sooner."""
    program = f"import sys, cqrs_es.application; assert {seldom!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- Where it is not open -----------------------------------------------------


async def test_another_event_loop_is_told_so(opened: OpenApplication) -> None:
    """Nothing is executed, and the error names the way from a thread."""
    for work in (
        opened.execute(Counter, "a", Add(1)),
        opened.load(Counter, "a"),
        opened.view(Totals, "a"),
    ):
        with pytest.raises(errors.ConfigurationError, match="run_coroutine_threadsafe"):
            await elsewhere(work)
    assert await opened.events(Counter, "a") == []


async def test_the_way_from_a_thread(opened: OpenApplication) -> None:
    """What the error advises works."""
    loop = asyncio.get_running_loop()

    def in_thread() -> bool:
        work = opened.execute(Counter, "a", Add(1))
        return asyncio.run_coroutine_threadsafe(work, loop).result(SECONDS).accepted

    assert await asyncio.to_thread(in_thread)


async def test_after_the_end(store_url: str) -> None:
    """Who kept the application beyond its block is told, and nothing is executed."""
    app, settings = counting_app(), Settings(store_url=store_url, partitions=1)
    async with app.open(settings, initialise=True) as opened:
        pass
    for work in (opened.execute(Counter, "a", Add(1)), app.execute(Counter, "a", Add(1))):
        with pytest.raises(errors.ConfigurationError, match="async with"):
            await asyncio.wait_for(work, SECONDS)
    with pytest.raises(errors.ConfigurationError, match="async with"):
        async with opened.running():
            pass


async def test_after_a_fork(opened: OpenApplication) -> None:
    """The child has neither the connections nor the tasks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            opened.execute(Counter, "a", Add(1)).send(None)
        except errors.ConfigurationError as exc:
            code = 0 if "after the fork" in exc.message else 2
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.parametrize("name", ["memory", "fakeredis", "redis", "amqp"])
async def test_a_client_in_another_event_loop(name: str, request: pytest.FixtureRequest) -> None:
    """It is told so too, instead of waiting for what never comes."""
    async with serving(name, request) as server:
        broker = await server.open()
        async with Client(broker=broker, service=SERVICE, partitions=PARTITIONS) as client:
            with pytest.raises(errors.ConfigurationError, match="run_coroutine_threadsafe"):
                await elsewhere(client.send(Counter, "a", Add(1)))


# --- Policies -----------------------------------------------------------------


async def test_ids_of_one_aggregate_type_are_known_for_ever() -> None:
    """Those of another are forgotten when their time has passed."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services(), outcomes="for ever")
    app.aggregate(T)
    async with TestApp(app) as t:
        kept, gone = new_command_id(), new_command_id()
        await t.send(Counter, "a", Add(1), command_id=kept)
        await t.send(T, "a", Commit(["Done"]), command_id=gone)
        events, later = t.opened.storage.events, t.clock.now() + timedelta(days=1)
        assert await events.prune_outcomes(later, 100) == 1
        assert (await t.send(Counter, "a", Add(1), command_id=kept)).duplicate
        assert not (await t.send(T, "a", Commit(["Done"]), command_id=gone)).duplicate


def test_how_long_outcomes_are_kept_is_one_of_two() -> None:
    """Anything else is refused when it is registered."""
    forever: Any = "forever"
    with pytest.raises(errors.DefinitionError, match="for ever"):
        Application("tests").aggregate(Counter, services=lambda _: Services(), outcomes=forever)


async def test_an_applications_own_policy() -> None:
    """Its ladder of attempts holds, together with what the operator set."""
    policy = ExecutionPolicy(retry_delays=(), batch_size=7)
    app, attempts = Application("tests", policy=policy), 0

    def services_for(_: CommandContext) -> Services:
        nonlocal attempts
        attempts += 1
        return Services()

    app.aggregate(Counter, services=services_for)
    settings = Settings(store_url="memory://", max_event_bytes=2000)
    async with app.on_store_of(settings).open(settings) as opened_so:
        outcome = await opened_so.execute(Counter, "a", AddThenCrash(1))
    assert (outcome.status, attempts) == ("failed", 1)
    applied = execution_policy(settings, policy)
    assert (applied.max_event_bytes, applied.batch_size) == (2000, settings.batch_size)


# --- Reading views ------------------------------------------------------------


@dataclass
class Changed(View[Added], name="totals"):
    """The view `totals` as a later class, to which its rows do not fit."""

    total: str = ""

    def update(self, event: Envelope[Added]) -> None:
        del event


async def test_a_row_that_does_not_fit(store_url: str) -> None:
    """The error names the view, the row and the field, and what helps."""
    settings = Settings(store_url=store_url, partitions=1)
    app = counting_app()
    async with app.open(settings, initialise=True) as opened, opened.running():
        outcome = await opened.execute(Counter, "a", Add(1))
        await opened.wait_for("totals", outcome, SECONDS)
        storage = opened.storage
        async with counting_app(view=Changed).open(settings, storage=storage) as changed:
            for reading in (changed.view(Changed, "a"), changed.view_page(Changed)):
                with pytest.raises(errors.ViewBehind, match="'a' of view totals") as behind:
                    await reading
                assert "total: expected" in behind.value.message
        row = await storage.views.get("totals__1", "a")
        assert row is not None
        async with storage.views.transaction() as transaction:
            await transaction.save(
                "totals__1",
                [structs.replace(row, version=row.version + 1, payload=b'{"total": "one"}')],
            )
        with pytest.raises(errors.UndecodableRow, match="cqrs-es rebuild totals") as damaged:
            await opened.view(Totals, "a")
        assert "total: expected" in damaged.value.message


@on_sql
async def test_rows_of_a_projector(store_url: str) -> None:
    """They have no ids: the error says how they are read."""
    settings = Settings(store_url=store_url, partitions=1)
    async with tallying_app().open(settings, initialise=True) as opened:
        with pytest.raises(errors.ConfigurationError, match="tables of its own"):
            await opened.view_rows("sums")
