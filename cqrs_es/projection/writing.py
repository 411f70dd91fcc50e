"""Writing events to a generation of a view, within a transaction, and what may go wrong."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from cqrs_es import errors
from cqrs_es.execution.retry import backoff
from cqrs_es.types import storable, text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cqrs_es.messages import Envelope, StoredEvent
    from cqrs_es.ports.views import ViewTransaction
    from cqrs_es.projection.folding import Folding
    from cqrs_es.registry import Registry

log = structlog.get_logger("cqrs_es.projection")

T = TypeVar("T")

# A batch collides once for each row that another partition inserts first: rarely more than one.
MOST_COLLISIONS: Final = 5
# Not the event's fault: the store's, another process's, or the deployment's.
NOT_POISON: Final = (
    errors.Unavailable,
    errors.Conflict,
    errors.StoreUnusable,
    errors.NeedsNewerCode,
)


async def write(
    registry: Registry,
    folding: Folding,
    events: Sequence[StoredEvent],
    transaction: ViewTransaction,
    on_followed: Callable[[Sequence[StoredEvent]], object] | None = None,
) -> None:
    """Write what events mean to a view, but for those of parked aggregates.

    `on_followed` is told before which of them are written: those that the view follows.
    """
    parked = await transaction.parked(folding.key, {event.key for event in events})
    unparked = [event for event in events if event.key not in parked]
    await write_all(registry, folding, unparked, transaction, on_followed)


async def write_all(
    registry: Registry,
    folding: Folding,
    events: Sequence[StoredEvent],
    transaction: ViewTransaction,
    on_followed: Callable[[Sequence[StoredEvent]], object] | None = None,
) -> None:
    """Write what events mean to a view; raises whatever the author's code raises."""
    followed = [
        (event, envelopes) for event in events if (envelopes := relevant(registry, folding, event))
    ]
    if not followed:
        return
    if on_followed is not None:
        on_followed([event for event, _ in followed])
    envelopes = [envelope for _, envelopes in followed for envelope in envelopes]
    await guarded(folding.name, folding.fold(envelopes, transaction))


async def guarded(name: str, work: Awaitable[T]) -> T:
    """Await the author's code; what it raises that is no `Exception` must not end the process."""
    try:
        return await work
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as exc:
        if isinstance(exc, asyncio.CancelledError) and _being_cancelled():
            raise
        message = f"{name} raised {text_of(exc)}"
        raise errors.ViewFailed(message) from exc


def _being_cancelled() -> bool:
    """Tell a cancellation of this task from a CancelledError that a view raised itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def relevant(registry: Registry, folding: Folding, event: StoredEvent) -> list[Envelope[Any]]:
    """Decode what a view folds of an event: nothing where it does not follow it."""
    return [
        envelope
        for envelope in registry.envelopes(event)
        if type(envelope.data) in folding.event_classes
    ]


async def past_collisions(work: Callable[[], Awaitable[T]], view: str) -> T:
    """Do a transaction's work; again where a row or a lock stood in its way, a few times.

    Views and projectors look for a row and insert it where there is none:
    another partition may do the same in between. The next try finds its row.
    """
    for _ in range(MOST_COLLISIONS):
        try:
            return await work()
        except (errors.CheckpointMoved, errors.StoreUnusable, errors.TooLarge):
            raise
        except (errors.Conflict, errors.StoreError, errors.RolledBack) as exc:
            log.debug("projection refused", view=view, error=exc.message)
            if isinstance(exc, errors.RolledBack):  # so that the two do not collide again
                await asyncio.sleep(backoff(1))
    return await work()


def reason_of(exc: Exception) -> str:
    """Say for an operator why an event was not applied."""
    return storable(f"{type(exc).__name__}: {text_of(exc, str)}")
