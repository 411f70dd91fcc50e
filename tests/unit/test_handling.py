"""Handlers that wait: begun without a deadline, which comes where they first wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cqrs_es import Aggregate, errors
from cqrs_es.execution.handling import run_handler
from tests.samples import Add, Added

Services = Callable[[], Awaitable[int]]


@dataclass
class Waiting(Aggregate[Add, Added, Services], type="waiting"):
    """Yields what its service says, as often as the command asks."""

    total: int = 0

    async def handle(self, command: Add, services: Services) -> AsyncIterator[Added]:
        for _ in range(command.n):
            yield Added(await services())

    def apply(self, event: Added) -> None:
        self.total += event.n


async def handled(services: Services, times: int = 1, seconds: float | None = 5.0) -> list[object]:
    events: list[object] = []
    aggregate: Any = Waiting()
    await run_handler(aggregate, Add(times), services, on_yield=events.append, seconds=seconds)
    return events


async def test_one_that_never_waits_sets_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most handlers don't; a timer would cost as much as the decision."""

    async def at_once() -> int:
        return 1

    def no_timer(_: object) -> None:
        pytest.fail("a timer was set")

    monkeypatch.setattr(asyncio, "timeout", no_timer)
    assert await handled(at_once, times=3) == [Added(1)] * 3


async def test_every_wait_gets_its_own_answer() -> None:
    """What is awaited first is no different from what is awaited later."""
    loop = asyncio.get_running_loop()
    answers = iter(range(1, 4))

    async def later() -> int:
        answer = loop.create_future()
        loop.call_soon(answer.set_result, next(answers))
        result: int = await answer
        return result

    assert await handled(later, times=3) == [Added(1), Added(2), Added(3)]


async def test_what_a_service_raises_can_be_caught_by_the_handler() -> None:
    """At the first wait, and at those after it."""
    failures = 0

    async def failing() -> int:
        nonlocal failures
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 0.001)
        except TimeoutError:
            failures += 1
        return failures

    assert await handled(failing, times=2) == [Added(1), Added(2)]


@pytest.mark.parametrize("times", [1, 2])
async def test_the_deadline_ends_it_where_it_waits(times: int) -> None:
    """It is told apart from a time-out of the handler's own."""
    calls = 0

    async def stuck() -> int:
        nonlocal calls
        calls += 1
        await (asyncio.Event().wait() if calls == times else asyncio.sleep(0))
        return calls

    with pytest.raises(errors.HandlerTimeout, match=r"0\.01 s"):
        await handled(stuck, times=2, seconds=0.01)
    assert calls == times


async def test_a_timeout_of_its_own_is_the_handlers() -> None:
    """The deadline has not passed, so nothing is said of it."""

    async def impatient() -> int:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()
        return 0

    with pytest.raises(TimeoutError):
        await handled(impatient)


async def test_cancelling_reaches_the_handler() -> None:
    """It cleans up, and the cancellation goes on to who waits."""
    cleaned = asyncio.Event()
    waiting = asyncio.Event()

    async def endless() -> int:
        waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()
        return 0

    task = asyncio.create_task(handled(endless))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


async def test_the_handler_runs_in_the_task_that_decides() -> None:
    """Also before its first wait: context variables and task names are the same throughout."""
    tasks: list[object] = []

    async def noting() -> int:
        tasks.append(asyncio.current_task())
        await asyncio.sleep(0)
        tasks.append(asyncio.current_task())
        return 0

    await handled(noting)
    assert tasks == [asyncio.current_task()] * 2
