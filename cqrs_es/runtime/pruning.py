"""Forgetting old outcomes, in chunks so small that nobody waits for it (G2)."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors

if TYPE_CHECKING:
    from cqrs_es.runtime.process import Process

log = structlog.get_logger("cqrs_es.worker")

PRUNE_CHUNK: Final = 1000
PRUNE_EVERY_SECONDS: Final = 60.0


async def prune_forever(process: Process) -> None:
    """Forget outcomes that have been kept for long enough, for ever; errors are only logged."""
    while True:
        if await _try_prune(process) < PRUNE_CHUNK:
            await process.clock.sleep(PRUNE_EVERY_SECONDS)


async def _try_prune(process: Process) -> int:
    before = process.clock.now() - timedelta(days=process.settings.outcome_retention_days)
    try:
        return await process.storage.events.prune_outcomes(before, PRUNE_CHUNK)
    except errors.CqrsError as exc:
        log.warning("outcomes not pruned", error=exc.message)
        return 0
