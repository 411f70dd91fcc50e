"""Dead letters in DynamoDB."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es.ports.dead_letters import DeadLetters
from cqrs_es.stores.dynamodb import items, places
from cqrs_es.stores.dynamodb.actions import condition, delete, update

if TYPE_CHECKING:
    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.stores.dynamodb.actions import Action
    from cqrs_es.stores.dynamodb.table import Table

_ALL: Final = places.all_of(places.LETTERS)


class DynamoDeadLetters(DeadLetters):
    """The dead letters of a table."""

    def __init__(self, table: Table) -> None:
        self._table = table

    async def add(self, letter: DeadLetter) -> None:
        """Keep a letter durably; where its id is known, add its attempts and update the rest."""
        await self._table.write(adding(letter))

    async def page(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Return up to `limit` letters with an id above `after`, by id."""
        found = await self._table.query(places.above(places.LETTERS, after), limit=limit)
        return [items.letter_of(fields) for fields in found]

    async def get(self, letter_id: str) -> DeadLetter | None:
        """Return one letter, None when there is none by that id."""
        found = await self._table.get(places.letter_key(letter_id))
        return items.letter_of(found) if found else None

    async def drop(self, letter_id: str) -> bool:
        """Forget a letter; return whether there was one."""
        return bool(await self._table.write(delete(places.letter_key(letter_id)), "ALL_OLD"))

    async def count(self) -> int:
        """Return how many letters there are."""
        return await self._table.count(_ALL)


def adding(letter: DeadLetter) -> Action:
    """Keep a letter: its attempts are added to those there are, its first sight is kept."""
    fields = items.letter_fields(letter)
    changes = [f"#{name} = :{name}" for name in fields]
    changes.append("#first_seen_at = if_not_exists(#first_seen_at, :first_seen_at)")
    change = condition(
        f"SET {', '.join(changes)} ADD #attempts :attempts",
        first_seen_at=items.moment_text(letter.first_seen_at),
        attempts=letter.attempts,
        **fields,
    )
    return update(places.letter_key(letter.id), change)
