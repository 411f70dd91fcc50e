"""Outcomes of commands and attempts at them, as statements within a session."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es.ports.store import FOR_EVER
from cqrs_es.stores.sql.dialect import marks
from cqrs_es.stores.sql.rows import outcome_of, outcome_row
from cqrs_es.stores.sql.session import chunks
from cqrs_es.stores.sql.tables import ATTEMPTS, OUTCOMES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from cqrs_es.ports.store import StoredOutcome
    from cqrs_es.stores.sql.dialect import Dialect, Parameter
    from cqrs_es.stores.sql.session import Session

_FIND: Final = "SELECT command_id, request_hash, outcome FROM command_outcomes WHERE command_id IN "
_PRUNABLE: Final = """
    SELECT command_id FROM command_outcomes WHERE recorded_at < ? AND {status} <> 'failed'
    ORDER BY recorded_at LIMIT ?"""
_DELETE: Final = "DELETE FROM command_outcomes WHERE command_id IN "
_ATTEMPTS: Final = "SELECT command_id, attempts FROM command_attempts WHERE command_id IN "
_DELETE_ATTEMPTS: Final = "DELETE FROM command_attempts WHERE command_id IN "


async def find(session: Session, command_ids: Sequence[str]) -> dict[str, StoredOutcome]:
    """Read the outcomes of those ids that have one."""
    found: dict[str, StoredOutcome] = {}
    for ids in chunks(command_ids):
        rows = await session.fetch(_FIND + marks(len(ids)), ids)
        found.update({row[0]: outcome_of(row[1:]) for row in rows})
    return found


async def insert(session: Session, stored: Sequence[StoredOutcome], at: datetime) -> None:
    """Add outcomes of commands that have none."""
    dialect = session.dialect
    await session.write(dialect.insert(OUTCOMES), _rows(dialect, stored, at))


async def replace(session: Session, stored: Sequence[StoredOutcome], at: datetime) -> None:
    """Write outcomes over those that failed."""
    dialect = session.dialect
    await session.write(dialect.upsert(OUTCOMES), _rows(dialect, stored, at))


def _rows(
    dialect: Dialect, stored: Sequence[StoredOutcome], at: datetime
) -> list[tuple[Parameter, ...]]:
    recorded_at = dialect.to_time(at)
    return [
        outcome_row(each, dialect.to_time(FOR_EVER) if each.kept else recorded_at)
        for each in stored
    ]


async def prune(session: Session, before: datetime, limit: int) -> int:
    """Delete the oldest outcomes that did not fail; return how many.

    In ascending id, as they are inserted, so that it deadlocks with nobody.
    """
    dialect = session.dialect
    sql = _PRUNABLE.format(status=dialect.outcome_status)
    ids = sorted(id_ for (id_,) in await session.fetch(sql, (dialect.to_time(before), limit)))
    return sum([await session.execute(_DELETE + marks(len(some)), some) for some in chunks(ids)])


async def find_attempts(session: Session, command_ids: Sequence[str]) -> dict[str, int]:
    """Read the last attempts at those commands that have one."""
    found: dict[str, int] = {}
    for ids in chunks(command_ids):
        rows = await session.fetch(_ATTEMPTS + marks(len(ids)), ids)
        found.update({command_id: int(attempts) for command_id, attempts in rows})
    return found


async def record_attempts(session: Session, attempts: Mapping[str, int]) -> None:
    """Write the attempts at commands, in ascending id: two of these never deadlock."""
    rows = [(command_id, attempts[command_id], None) for command_id in sorted(attempts)]
    await session.write(session.dialect.upsert(ATTEMPTS), rows)


async def forget_attempts(session: Session, command_ids: Sequence[str]) -> None:
    """Delete the attempts at commands, in the order given."""
    for ids in chunks(command_ids):
        await session.execute(_DELETE_ATTEMPTS + marks(len(ids)), ids)
