"""Checkpoints, as statements within a transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.stores.sql.session import DuplicateKey
from cqrs_es.stores.sql.tables import CHECKPOINTS

if TYPE_CHECKING:
    from cqrs_es.stores.sql.session import Session

_GET: Final = "SELECT log_offset FROM checkpoints WHERE projector = ? AND log_partition = ?"
_MOVE: Final = """
    UPDATE checkpoints SET log_offset = ?
    WHERE projector = ? AND log_partition = ? AND log_offset = ?"""
_LIST: Final = "SELECT log_partition, log_offset FROM checkpoints WHERE projector = ?"
_FORGET: Final = "DELETE FROM checkpoints WHERE projector = ?"


async def lock(session: Session, projector: str, partition: int) -> int:
    """Lock and return a checkpoint; 0 before the first."""
    rows = await session.fetch(_GET, (projector, partition), lock=True)
    return int(rows[0][0]) if rows else 0


async def advance(session: Session, projector: str, partition: int, expected: int, to: int) -> None:
    """Move a checkpoint; raise `Conflict` when it is not at `expected`."""
    if await session.execute(_MOVE, (to, projector, partition, expected)):
        return
    actual = await lock(session, projector, partition)
    if (expected, actual) != (0, 0):
        raise _moved(projector, expected, actual)
    try:
        await session.write(session.dialect.insert(CHECKPOINTS), [(projector, partition, to)])
    except DuplicateKey as exc:
        raise _moved(projector, expected, None) from exc


async def all_of(session: Session, projector: str) -> dict[int, int]:
    """Return a projector's checkpoints by partition."""
    return dict(await session.fetch(_LIST, (projector,)))


async def forget(session: Session, projector: str) -> None:
    """Delete a projector's checkpoints."""
    await session.execute(_FORGET, (projector,))


def _moved(projector: str, expected: int, actual: int | None) -> errors.Conflict:
    place = "elsewhere" if actual is None else f"at {actual}"
    message = f"the checkpoint of {projector} is {place}, not at {expected}: read it again"
    return errors.Conflict(message, expected=expected, actual=actual)
