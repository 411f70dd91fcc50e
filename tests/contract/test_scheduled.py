"""What every store promises of rows of `outgoing_commands` beside what an append does to them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from cqrs_es.messages import Outcome, OutcomeError, Status
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import (
    IMMEDIATELY,
    Chain,
    Committed,
    Conflicted,
    DecidedCommand,
    ScheduledCommand,
)
from cqrs_es.types import AggregateKey, new_command_id
from tests.contract.building import PARTITIONS, account
from tests.stores import on_sql

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def command_for(key: AggregateKey) -> ScheduledCommand:
    """Make a row that is due."""
    return ScheduledCommand(
        command_id=new_command_id(),
        key=key,
        partition=key.partition(PARTITIONS),
        due=IMMEDIATELY,
        body=b"{}",
    )


def failing(row: ScheduledCommand) -> Chain:
    """Decide that a row's command has failed, which holds the later ones back."""
    letter = DeadLetter.of(
        row.body, reason="it raised", source="x", seen_at=NOW, limit=99, command_id=row.command_id
    )
    return chain(row, Status.FAILED, letter, scheduled=True)


def chain(
    row: ScheduledCommand,
    status: Status,
    letter: DeadLetter | None = None,
    *,
    scheduled: bool,
    replaces: bool = False,
) -> Chain:
    """Decide one row's command without events."""
    outcome = Outcome(
        command_id=row.command_id,
        status=status,
        aggregate_type=row.key.type,
        aggregate_id=row.key.id,
        error=None if status is Status.ACCEPTED else OutcomeError("internal_error", "it raised"),
    )
    decided = DecidedCommand(
        outcome=outcome,
        content_hash="x",
        dead_letter=letter,
        scheduled=scheduled,
        replaces_failed=replaces,
        holds_back=True,
    )
    return Chain(key=row.key, partition=row.partition, base_sequence=0, commands=(decided,))


@on_sql
async def test_a_failed_command_holds_back_what_is_for_its_target(storage: Storage) -> None:
    """Rows for it, older and newer, are not there until its outcome is replaced; others are."""
    events = storage.events
    failed, later, other = (command_for(account(name)) for name in ("A", "A", "B"))
    await events.schedule([failed, later, other])
    assert isinstance((await events.append([failing(failed)], NOW))[0], Committed)
    newest = command_for(account("A"))
    await events.schedule([newest])
    rows = [later, other, newest]
    partitions = range(PARTITIONS)

    async def due() -> set[str]:
        return {r.command_id for p in partitions for r in await events.due(p, 10)}

    assert await due() == {other.command_id}
    assert await events.next_due({later.partition} - {other.partition}) == {}
    assert set(await events.find_scheduled([r.command_id for r in rows])) == {other.command_id}
    decided = chain(later, Status.ACCEPTED, scheduled=True)
    assert isinstance((await events.append([decided], NOW))[0], Conflicted)
    assert len(await events.list_scheduled(None, 10)) == 3

    retried = chain(failed, Status.ACCEPTED, scheduled=False, replaces=True)
    assert isinstance((await events.append([retried], NOW))[0], Committed)
    assert await due() == {r.command_id for r in rows}
    assert set(await events.next_due(partitions)) == {r.partition for r in rows}
    ids = {r.command_id for r in rows}
    assert await events.unschedule(ids) == ids


class GaveUpError(Exception):
    """What ends a transaction."""


@on_sql
async def test_rows_are_added_in_the_transaction_that_moves_a_checkpoint(storage: Storage) -> None:
    """Both are there when it has committed, neither when it was rolled back."""
    row = command_for(account("A"))

    async def react(*, fail: bool) -> None:
        async with storage.views.transaction() as transaction:
            await transaction.advance("$reactor", 0, 0, 5)
            await transaction.schedule([row])
            if fail:
                raise GaveUpError

    with pytest.raises(GaveUpError):
        await react(fail=True)
    assert await storage.events.list_scheduled(None, 10) == []
    await react(fail=False)
    assert await storage.events.list_scheduled(None, 10) == [row]
    assert await storage.views.checkpoints("$reactor") == {0: 5}
