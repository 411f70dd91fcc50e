"""Finding the state that decisions start from: in the cache, or with one query for all."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from cqrs_es import errors
from cqrs_es.execution.baselines import baseline_from, load_request, mended_baseline
from cqrs_es.ports.store import LoadRequest, load_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.execution.baselines import Baseline, BaselineCache
    from cqrs_es.execution.outage import Outage
    from cqrs_es.execution.work import Work
    from cqrs_es.ports.store import EventStore, LoadedAggregate

log = structlog.get_logger("cqrs_es.execution")


class BaselineLoader:
    """Gives works their baselines; what can't be loaded spoils only its own work."""

    def __init__(self, events: EventStore, cache: BaselineCache, outage: Outage) -> None:
        self._events = events
        self._cache = cache
        self._outage = outage

    async def find_baselines(self, works: Sequence[Work]) -> None:
        """Set `baseline`, or `load_failure`, on each work with a command that needs state.

        Raises `StoreUnavailable` when patience with the store is spent.
        """
        missing: list[tuple[Work, AggregateDefinition]] = []
        for work in works:
            if work.definition is None or not _needs_state(work, work.definition):
                continue
            work.baseline = self._cache.get(work.key)
            if work.baseline is None:
                missing.append((work, work.definition))
        if missing:
            await self._load(missing)

    async def _load(self, wanted: Sequence[tuple[Work, AggregateDefinition]]) -> None:
        requests = [load_request(definition, work.key) for work, definition in wanted]
        try:
            loaded = await self._outage.wait_out(lambda: load_whole(self._events, requests))
        except errors.UndecodableRow as exc:
            await self._load_one_by_one(wanted, exc)
            return
        for (work, definition), found in zip(wanted, loaded, strict=True):
            await self._fold(work, definition, found)

    async def _load_one_by_one(
        self, wanted: Sequence[tuple[Work, AggregateDefinition]], exc: errors.UndecodableRow
    ) -> None:
        if len(wanted) == 1:
            wanted[0][0].load_failure = exc
            return
        for one in wanted:
            await self._load([one])

    async def _fold(
        self, work: Work, definition: AggregateDefinition, found: LoadedAggregate
    ) -> None:
        try:
            work.baseline = baseline_from(definition, found)
            if work.baseline is None:
                work.baseline = await self._replay_all(definition, found)
        except (errors.StoreUnavailable, asyncio.CancelledError, KeyboardInterrupt):
            raise
        except BaseException as exc:  # noqa: BLE001 - an apply can raise anything
            work.load_failure = exc

    async def _replay_all(
        self, definition: AggregateDefinition, found: LoadedAggregate
    ) -> Baseline:
        """Fold all events where the snapshot is of another shape than the class today."""
        assert found.snapshot is not None  # noqa: S101 - only a snapshot can be unusable
        key = found.snapshot.key
        log.warning("snapshot unusable", aggregate=str(key), number=found.snapshot.number)
        (everything,) = await self._outage.wait_out(
            lambda: load_whole(self._events, [LoadRequest(key)])
        )
        return mended_baseline(definition, found.snapshot, everything)


def _needs_state(work: Work, definition: AggregateDefinition) -> bool:
    return any(
        job.condemned is None and job.message.type in definition.commands for job in work.jobs
    )
