"""Dead letters in memory."""

from __future__ import annotations

import itertools

import msgspec

from cqrs_es.ports.dead_letters import DeadLetter, DeadLetters


class MemoryDeadLetters(DeadLetters):
    """The dead letters of an in-memory store."""

    def __init__(self) -> None:
        self._letters: dict[str, DeadLetter] = {}

    def put(self, letter: DeadLetter) -> None:
        """Keep a letter, at once; `append` does so as part of its transaction."""
        known = self._letters.get(letter.id)
        self._letters[letter.id] = _seen_again(known, letter) if known else letter

    def remove(self, letter_id: str) -> bool:
        """Forget a letter, at once; return whether there was one."""
        return self._letters.pop(letter_id, None) is not None

    async def add(self, letter: DeadLetter) -> None:
        """Keep a letter; where its id is known, add its attempts and update the rest."""
        self.put(letter)

    async def page(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Return up to `limit` letters with an id above `after`, by id."""
        above = (letter for id_, letter in sorted(self._letters.items()) if id_ > after)
        return list(itertools.islice(above, limit))

    async def get(self, letter_id: str) -> DeadLetter | None:
        """Return one letter, None when there is none by that id."""
        return self._letters.get(letter_id)

    async def drop(self, letter_id: str) -> bool:
        """Forget a letter; return whether there was one."""
        return self.remove(letter_id)

    async def count(self) -> int:
        """Return how many letters there are."""
        return len(self._letters)


def _seen_again(known: DeadLetter, letter: DeadLetter) -> DeadLetter:
    return msgspec.structs.replace(
        letter,
        attempts=known.attempts + letter.attempts,
        first_seen_at=known.first_seen_at,
    )
