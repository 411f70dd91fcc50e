"""Readiness: what a process says of itself."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cqrs_es.execution.policy import ExecutionPolicy
from cqrs_es.runtime import health
from cqrs_es.runtime.health import Health
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from tests.faulty import FaultyStorage
from tests.measured import measured
from tests.samples import Services, counting_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    import pytest

SETTINGS = Settings(store_url="memory://", lease_seconds=1.0, handler_timeout=1.0)


@asynccontextmanager
async def watching(judge: Health) -> AsyncGenerator[None]:
    watch = asyncio.create_task(judge.watch())
    try:
        yield
    finally:
        watch.cancel()


async def test_before_the_application_is_open() -> None:
    """Not ready, and what it waits for; no password leaves."""
    judge = Health(SETTINGS, counting_app().registry, asyncio.Event())
    assert judge.reasons() == ["not open yet: starting"]
    judge.waiting_for = "no answer from mysql://me:secret@db/bank"
    assert judge.reasons() == ["not open yet: no answer from mysql://me:***@db/bank"]
    assert judge.ready("").status == 503
    assert judge.live("").status == 200


async def test_a_blocked_event_loop_is_told_of_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Longer than a quarter of a lease endangers the leases."""
    judge = Health(SETTINGS, counting_app().registry, asyncio.Event())

    async def told() -> bool:
        return any("event loop was blocked for 0." in reason for reason in judge.reasons())

    async def forgotten() -> bool:
        return not await told()

    async with watching(judge):
        await asyncio.sleep(0)
        time.sleep(0.7)  # noqa: ASYNC251 - that is the trouble
        await eventually(told)
        monkeypatch.setattr(health, "REMEMBERED_SECONDS", 0.0)
        await eventually(forgotten)


async def test_progress_and_its_lack() -> None:
    """Ready; not while a command hangs for longer than it may; ready again when it goes on."""
    services, called = Services(), asyncio.Event()

    async def hang() -> None:
        await called.wait()

    services.hooks["hang"] = hang
    app = counting_app(services)
    stopping = asyncio.Event()
    impatient = Settings(store_url="memory://", lease_seconds=1.0, handler_timeout=0.01)
    judge = Health(impatient, app.registry, stopping)

    async def ready() -> bool:
        return not judge.reasons()

    async def stalled() -> bool:
        return any("worker on partition 0: no progress" in reason for reason in judge.reasons())

    async with (
        measured(app, policy=ExecutionPolicy(handler_timeout=60.0)) as running,
        watching(judge),
    ):
        judge.follow(running.supervisor)
        await eventually(ready)
        await running.send("AddAfterCall", payload={"name": "hang", "n": 1})
        await eventually(stalled)
        called.set()
        await eventually(ready)
        stopping.set()
        assert judge.reasons() == ["stopping"]


async def test_roles_that_have_not_begun() -> None:
    """Each is named until it has announced itself to the others."""
    storage = FaultyStorage(storage_for("memory://"))
    app = counting_app()
    judge = Health(SETTINGS, app.registry, asyncio.Event())
    async with app.open(SETTINGS, storage=storage, initialise=True) as opened:
        supervisor = opened.supervisor(["worker", "relay"])
        judge.follow(supervisor)
        assert judge.reasons() == ["relay has not joined yet", "worker has not joined yet"]
        async with opened.running(["relay"]) as running:
            judge.follow(running)

            async def ready() -> bool:
                return not judge.reasons()

            await eventually(ready)
