"""Running what authors write, whatever kind of function it is: handlers, and reactions."""

from __future__ import annotations

import asyncio
import functools
import inspect
import types
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
)
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

from cqrs_es import errors
from cqrs_es.intents import Cancel, Later, Send
from cqrs_es.reactor import ProcessManager

if TYPE_CHECKING:
    from cqrs_es.definitions import AnyAggregate

_INTENTS: Final = (Send, Later, Cancel)

OnYield: TypeAlias = Callable[[object], None]


async def run_handler(
    aggregate: AnyAggregate,
    command: object,
    services: object,
    *,
    on_yield: OnYield,
    seconds: float | None = None,
) -> None:
    """Call `handle`; pass what it yields to `on_yield`, then events to `apply`, as they come.

    A plain function or generator runs to its end without giving way to the
    event loop. Raises `HandlerTimeout` after `seconds`, and whatever the
    handler raises.
    """

    def happen(yielded: object) -> None:
        on_yield(yielded)
        if type(yielded) not in _INTENTS:
            aggregate.apply(yielded)

    if isinstance(aggregate, ProcessManager):
        result = aggregate.handle(command)
    else:
        result = aggregate.handle(command, services)
    await take_all(result, happen, seconds)


Result: TypeAlias = AsyncIterator[Any] | Iterable[Any] | Awaitable[Iterable[Any] | None] | None


async def take_all(result: Result, each: OnYield, seconds: float | None = None) -> None:
    """Pass on what a function yields or returns, whatever kind of function it is."""
    # Nearly all are generators, and to ask an ABC takes ten times as long.
    generator = type(result) is types.AsyncGeneratorType
    if generator or isinstance(result, AsyncIterator) or inspect.isawaitable(result):
        await _within(seconds, _drive(cast("AsyncIterator[Any]", result), each))
    else:
        _apply_all(result, each)


async def _drive(result: AsyncIterator[Any] | Awaitable[Any], happen: OnYield) -> None:
    if not isinstance(result, AsyncIterator):
        _apply_all(await result, happen)
        return
    try:
        async for event in result:
            happen(event)
    except BaseException:
        if isinstance(result, AsyncGenerator):  # end it here, not when it is collected
            await cast("AsyncGenerator[Any]", result).aclose()
        raise


def _apply_all(result: object, happen: OnYield) -> None:
    if result is None:
        return
    if not isinstance(result, Iterable) or isinstance(result, str | bytes):
        message = f"it must yield what is to happen, or return a list of it, not {result!r}"
        raise errors.DefinitionError(message)
    for event in cast("Iterable[object]", result):
        happen(event)


async def _within(seconds: float | None, work: Coroutine[Any, Any, None]) -> None:
    """Await under a deadline; tell our time-out from one that the handler raised itself.

    The deadline is set where the work first waits for something: most handlers
    never do, and a timer costs as much as deciding a simple command.
    """
    try:
        first = work.send(None)
    except StopIteration:
        return
    deadline = asyncio.timeout(seconds)
    try:
        async with deadline:
            await _rest_of(work, first)
    except TimeoutError as exc:
        if deadline.expired():
            message = f"the handler took longer than {seconds} s (CQRS_ES_HANDLER_TIMEOUT)"
            raise errors.HandlerTimeout(message) from exc
        raise


@types.coroutine
def _rest_of(work: Coroutine[Any, Any, None], waits_for: object) -> Generator[Any, Any, None]:
    """Await a coroutine that was begun by hand and now waits for something [PEP 380]."""
    while True:
        try:
            answer = yield waits_for
        except GeneratorExit:
            work.close()
            raise
        except BaseException as exc:  # noqa: BLE001 - it is the work's own to handle
            step = functools.partial[object](work.throw, exc)
        else:
            step = functools.partial[object](work.send, answer)
        try:
            waits_for = step()
        except StopIteration:
            return
