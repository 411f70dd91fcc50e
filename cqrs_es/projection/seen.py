"""Waiting until a view has seen what a command did, to read one's own writes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.projection.generations import read_generations
from cqrs_es.projector import physical_name
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


async def wait_until_seen(
    views: ViewStore, name: str, outcome: Outcome, seconds: float, fingerprint: int | None = None
) -> None:
    """Wait until a view has seen an outcome's events; at once where there are none.

    That is the generation that code with a fingerprint reads, without one the live one.

    Raises `WaitTimeout`, and `ViewFailed` when the aggregate is parked.
    """
    if outcome.partition is None or outcome.offset is None:
        return
    key = AggregateKey(outcome.aggregate_type, outcome.aggregate_id)
    place = (outcome.partition, outcome.offset)
    await wait_until_reached(views, name, place, seconds, fingerprint)
    await refuse_parked(views, name, key, fingerprint)


async def wait_until_reached(
    views: ViewStore,
    name: str,
    place: tuple[int, int],
    seconds: float,
    fingerprint: int | None = None,
) -> None:
    """Wait until a view has seen a partition's offset; raise `WaitTimeout`."""
    partition, offset = place
    try:
        async with asyncio.timeout(seconds):
            await _until_reached(views, name, fingerprint, partition, offset)
    except TimeoutError:
        message = f"{name} has not seen {partition}:{offset} in {seconds:g} s"
        raise errors.WaitTimeout(f"{message}; is its projector running?") from None


async def _until_reached(
    views: ViewStore, name: str, fingerprint: int | None, partition: int, offset: int
) -> None:
    while True:
        checkpoints = await views.checkpoints(await _read(views, name, fingerprint))
        if checkpoints.get(partition, 0) >= offset:
            return
        await asyncio.sleep(POLL_SECONDS)


async def refuse_parked(
    views: ViewStore, name: str, key: AggregateKey, fingerprint: int | None = None
) -> None:
    """Raise `ViewFailed` where a view has parked an aggregate."""
    for marker in await views.list_parked(await _read(views, name, fingerprint)):
        if marker.key == key:
            raise errors.ViewFailed(f"{key} is parked for {name}: {marker.reason}")


async def _read(views: ViewStore, name: str, fingerprint: int | None) -> str:
    return physical_name(name, (await read_generations(views, name)).read_by(fingerprint))
