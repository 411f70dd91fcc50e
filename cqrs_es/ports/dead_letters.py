"""Dead letters: messages that could not be decided, kept until an operator deals with them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es.types import storable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime


RECEIVED_AT: Final = "received_at"
"""The header that says when a message was received, for who decides it again."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that nobody could decide, and why.

    `id` is the command's id where the message has a valid one that no other
    letter has, else the start of `body_hash`. `body` is cut at the limit for messages; `body_hash`
    (SHA-256, hex) and `body_length` are of the whole.
    """

    id: str
    source: str
    reason: str
    body: bytes
    body_hash: str
    body_length: int
    headers: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    attempts: int = 1
    first_seen_at: datetime
    last_seen_at: datetime

    @classmethod
    def of(  # noqa: PLR0913 - one argument for each thing that is known about a letter
        cls,
        body: bytes,
        *,
        reason: str,
        source: str,
        seen_at: datetime,
        limit: int,
        command_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int = 1,
    ) -> DeadLetter:
        """Make the letter for a message body that was seen just now."""
        digest = hashlib.sha256(body).hexdigest()
        return cls(
            id=command_id or digest[:32],
            source=source,
            reason=storable(reason),
            body=body[:limit],
            body_hash=digest,
            body_length=len(body),
            headers=headers or {},
            attempts=attempts,
            first_seen_at=seen_at,
            last_seen_at=seen_at,
        )


class DeadLetters(ABC):
    """The dead letters of a store."""

    @abstractmethod
    async def add(self, letter: DeadLetter) -> None:
        """Keep a letter durably; where its id is known, add its attempts and update the rest."""

    @abstractmethod
    async def page(self, *, after: str = "", limit: int = 100) -> list[DeadLetter]:
        """Return up to `limit` letters with an id above `after`, by id."""

    @abstractmethod
    async def get(self, letter_id: str) -> DeadLetter | None:
        """Return one letter, None when there is none by that id."""

    @abstractmethod
    async def drop(self, letter_id: str) -> bool:
        """Forget a letter; return whether there was one. A failed outcome stays failed."""

    @abstractmethod
    async def count(self) -> int:
        """Return how many letters there are."""
