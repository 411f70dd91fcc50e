"""Dead letters in SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es.ports.dead_letters import DeadLetters
from cqrs_es.stores.sql.dialect import marks
from cqrs_es.stores.sql.rows import letter_of, letter_row
from cqrs_es.stores.sql.session import chunks
from cqrs_es.stores.sql.tables import DEAD_LETTERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.stores.sql.session import Database, Session

_LIST: Final = f"{DEAD_LETTERS.select} WHERE id > ? ORDER BY id LIMIT ?"
_GET: Final = f"{DEAD_LETTERS.select} WHERE id = ?"
_DELETE: Final = "DELETE FROM dead_letters WHERE id IN "
_COUNT: Final = "SELECT COUNT(*) FROM dead_letters"
_SEEN_AGAIN: Final = {
    "attempts": "old.attempts + new.attempts",
    "first_seen_at": "old.first_seen_at",
}


class SqlDeadLetters(DeadLetters):
    """The dead letters of an SQL database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, letter: DeadLetter) -> None:
        """Keep a letter durably; where its id is known, add its attempts and update the rest."""
        await self._database.run(lambda session: add(session, [letter]))

    async def page(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Return up to `limit` letters with an id above `after`, by id."""
        rows = await self._database.read(lambda session: session.fetch(_LIST, (after, limit)))
        return [letter_of(row) for row in rows]

    async def get(self, letter_id: str) -> DeadLetter | None:
        """Return one letter, None when there is none by that id."""
        rows = await self._database.read(lambda session: session.fetch(_GET, (letter_id,)))
        return letter_of(rows[0]) if rows else None

    async def drop(self, letter_id: str) -> bool:
        """Forget a letter; return whether there was one."""
        return await self._database.run(lambda session: delete(session, [letter_id])) > 0

    async def count(self) -> int:
        """Return how many letters there are."""
        rows = await self._database.read(lambda session: session.fetch(_COUNT))
        return int(rows[0][0])


async def add(session: Session, letters: Sequence[DeadLetter]) -> None:
    """Keep letters, within a transaction."""
    dialect = session.dialect
    rows = [letter_row(letter, dialect) for letter in letters]
    await session.write(dialect.upsert(DEAD_LETTERS, _SEEN_AGAIN), rows)


async def delete(session: Session, letter_ids: Sequence[str]) -> int:
    """Forget letters, within a transaction; return how many there were."""
    return sum(
        [await session.execute(_DELETE + marks(len(some)), some) for some in chunks(letter_ids)]
    )
