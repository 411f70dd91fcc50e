"""Waiting until a view has seen what a command did, to read one's own writes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.projection.generations import live_name
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cqrs_es.messages import Outcome
    from cqrs_es.ports.views import ViewStore

POLL_SECONDS: Final = 0.02


async def wait_for_outcome(
    look: Callable[[], Awaitable[Outcome | None]], command_id: str, seconds: float
) -> Outcome:
    """Look for a command's outcome until there is one; raise `WaitTimeout`."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                found = await look()
                if found is not None:
                    return found
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        message = f"command {command_id} has no outcome after {seconds:g} s"
        raise errors.WaitTimeout(f"{message}; was it sent, and is a worker running?") from None


async def wait_until_seen(views: ViewStore, name: str, outcome: Outcome, seconds: float) -> None:
    """Wait until a view has seen an outcome's events; at once where there are none.

    Raises `WaitTimeout`, and `ViewFailed` when the aggregate is parked.
    """
    if outcome.partition is None or outcome.offset is None:
        return
    await wait_until_reached(views, name, outcome.partition, outcome.offset, seconds)
    await refuse_parked(views, name, AggregateKey(outcome.aggregate_type, outcome.aggregate_id))


async def wait_until_reached(
    views: ViewStore, name: str, partition: int, offset: int, seconds: float
) -> None:
    """Wait until a view has seen a place in the log; raise `WaitTimeout`."""
    try:
        async with asyncio.timeout(seconds):
            await _until_reached(views, name, partition, offset)
    except TimeoutError:
        message = f"{name} has not seen {partition}:{offset} in {seconds:g} s"
        raise errors.WaitTimeout(f"{message}; is its projector running?") from None


async def _until_reached(views: ViewStore, name: str, partition: int, offset: int) -> None:
    while True:
        checkpoints = await views.checkpoints(await _live(views, name))
        if checkpoints.get(partition, 0) >= offset:
            return
        await asyncio.sleep(POLL_SECONDS)


async def refuse_parked(views: ViewStore, name: str, key: AggregateKey) -> None:
    """Raise `ViewFailed` where a view has parked an aggregate."""
    for marker in await views.list_parked(await _live(views, name)):
        if marker.key == key:
            raise errors.ViewFailed(f"{key} is parked for {name}: {marker.reason}")


async def _live(views: ViewStore, name: str) -> str:
    return live_name(await views.generations(), name)
