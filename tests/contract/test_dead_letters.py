"""What dead letters promise: kept whole as far as the limit goes, and counted."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.types import new_command_id
from tests.contract.building import NOW, letter

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage


async def test_letter_comes_back_as_it_was(storage: Storage) -> None:
    """A letter comes back with its body, whatever its bytes, its headers and moments."""
    given = DeadLetter.of(
        b"\x00\xff\"\xf0\x9f\x92\xb8\\'%s?\r\n",
        reason="no JSON: “é” 💸",
        source="bank:commands:3",
        seen_at=NOW,
        limit=1000,
        headers={"x-death": "é💸", "quote'd": '"'},
        attempts=3,
    )
    await storage.dead_letters.add(given)
    assert await storage.dead_letters.get(given.id) == given
    assert await storage.dead_letters.page() == [given]


async def test_letter_that_was_cut(storage: Storage) -> None:
    """A body is cut at the limit; its hash and length are those of the whole."""
    body = b"x" * 300_000 + b"\xff"
    given = DeadLetter.of(body, reason="too large", source="s", seen_at=NOW, limit=262_144)
    await storage.dead_letters.add(given)
    stored = await storage.dead_letters.get(given.id)
    assert stored is not None
    assert stored.body == body[:262_144]
    assert stored.body_length == len(body)
    assert stored.body_hash == hashlib.sha256(body).hexdigest()
    assert stored.id == stored.body_hash[:32]


async def test_letter_seen_again(storage: Storage) -> None:
    """A letter whose id is known adds its attempts and brings the rest up to date."""
    first = letter(new_command_id(), reason="crashed", body=b"1", attempts=2)
    again = msgspec.structs.replace(
        letter(first.id, reason="timed out", body=b"22", attempts=3),
        source="broker",
        headers={"death": "2"},
        first_seen_at=NOW + timedelta(hours=1),
        last_seen_at=NOW + timedelta(hours=1),
    )
    await storage.dead_letters.add(first)
    await storage.dead_letters.add(again)
    assert await storage.dead_letters.get(first.id) == msgspec.structs.replace(
        again, attempts=5, first_seen_at=NOW
    )
    assert await storage.dead_letters.count() == 1


async def test_letters_seen_at_once(storage: Storage) -> None:
    """No attempt is lost when one message is seen by several processes."""
    letter_id = new_command_id()
    await asyncio.gather(*(storage.dead_letters.add(letter(letter_id)) for _ in range(10)))
    stored = await storage.dead_letters.get(letter_id)
    assert stored is not None
    assert stored.attempts == 10


async def test_letters_are_listed_in_pages(storage: Storage) -> None:
    """Letters are listed by id, a page at a time."""
    ids = sorted(new_command_id() for _ in range(7))
    for letter_id in reversed(ids):
        await storage.dead_letters.add(letter(letter_id))
    first = await storage.dead_letters.page(limit=3)
    rest = await storage.dead_letters.page(after=first[-1].id)
    assert [found.id for found in (*first, *rest)] == ids
    assert len(first) == 3
    assert await storage.dead_letters.page(after=ids[-1]) == []
    assert await storage.dead_letters.count() == 7


async def test_letter_is_dropped_once(storage: Storage) -> None:
    """Dropping says whether there was a letter, and touches no other."""
    gone, kept = letter(new_command_id()), letter(new_command_id())
    await storage.dead_letters.add(gone)
    await storage.dead_letters.add(kept)
    assert await storage.dead_letters.drop(gone.id)
    assert not await storage.dead_letters.drop(gone.id)
    assert await storage.dead_letters.get(gone.id) is None
    assert await storage.dead_letters.page() == [kept]


async def test_no_letters(storage: Storage) -> None:
    """An empty store has no letters."""
    assert await storage.dead_letters.page() == []
    assert await storage.dead_letters.get("none") is None
    assert await storage.dead_letters.count() == 0
