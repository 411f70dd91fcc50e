"""Unique keys: a value has one holder, on every store (G12)."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING

from msgspec.structs import replace

from cqrs_es.execution.keys import Keys
from cqrs_es.ports.store import Chain, Committed, Conflicted, UniqueKey
from tests.contract.building import NOW, PARTITIONS, account, account_in, chain, commit, one

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.ports.storage import Storage
    from cqrs_es.types import AggregateKey
    from tests.contract.conftest import Database

KEYS = Keys(b"secret", PARTITIONS)
ADA, BOB = account("ada"), account("bob")


def email(value: str, name: str = "email", type_: str = "account") -> UniqueKey:
    return UniqueKey(type_, name, hashlib.sha256(value.encode()).hexdigest())


A, B, C = map(email, "abc")


def moving(
    key: AggregateKey,
    base: int,
    claims: Iterable[UniqueKey] = (),
    releases: Iterable[UniqueKey] = (),
) -> Chain:
    """Make a chain of one event that moves keys."""
    moves = KEYS.moves(frozenset(claims), frozenset(releases))
    return replace(one(key, base), moves=moves)


async def test_g12_a_key_is_claimed_changed_and_released(storage: Storage) -> None:
    """What is committed with a chain is seen at once; what is released is free."""
    await commit(storage, moving(ADA, 0, [A, B]))
    assert await storage.events.find_holders([A, B, C]) == {A: "ada", B: "ada"}
    await commit(storage, moving(ADA, 1, [C], [A]))
    assert await storage.events.find_holders([A, B, C]) == {B: "ada", C: "ada"}
    await commit(storage, moving(BOB, 0, [A]), moving(ADA, 2, [], [B, C]))
    assert await storage.events.find_holders([A, B, C]) == {A: "bob"}


async def test_g12_what_another_holds_is_said(storage: Storage) -> None:
    """The chain conflicts, leaves no trace, and is told which of its claims are taken."""
    await commit(storage, moving(ADA, 0, [A, B]))
    [result] = await storage.events.append([moving(BOB, 0, [A, C])], NOW)
    assert result == Conflicted(0, frozenset({A}))
    assert await storage.events.find_holders([A, C]) == {A: "ada"}
    await commit(storage, moving(ADA, 1, [A]))  # its own again


async def test_g12_names_and_types_are_apart(storage: Storage) -> None:
    """One value may be had under two names, and by aggregates of two types."""
    other = replace(A, aggregate_type="user")
    phone = replace(A, name="phone")
    user = replace(ADA, type="user")
    await commit(storage, moving(ADA, 0, [A]), moving(BOB, 0, [phone]), moving(user, 0, [other]))
    assert await storage.events.find_holders([A, phone, other]) == {
        A: "ada",
        phone: "bob",
        other: "ada",
    }


async def test_g12_within_one_append(storage: Storage) -> None:
    """A key goes from one aggregate to the next, but not to two."""
    one_, two, three = (account_in(2, nth) for nth in range(3))
    await commit(storage, moving(one_, 0, [A]))
    results = await storage.events.append(
        [moving(one_, 1, [], [A]), moving(two, 0, [A]), moving(three, 0, [A])], NOW
    )
    assert [type(result) for result in results] == [Committed, Committed, Conflicted]
    assert await storage.events.find_holders([A]) == {A: two.id}


async def test_g12_claimed_and_given_up_within_a_chain(storage: Storage) -> None:
    """Such a claim is checked, and nothing is left of it."""
    await commit(storage, moving(ADA, 0, [A], [A]))
    assert await storage.events.find_holders([A]) == {}
    await commit(storage, moving(BOB, 0, [A]))
    [result] = await storage.events.append([moving(ADA, 1, [A], [A])], NOW)
    assert result == Conflicted(1, frozenset({A}))


async def test_g12_releasing_what_one_does_not_hold(storage: Storage) -> None:
    """It does nothing: the key may be another's, or nobody's."""
    await commit(storage, moving(ADA, 0, [A]))
    await commit(storage, moving(BOB, 0, [], [A, B]))
    assert await storage.events.find_holders([A, B]) == {A: "ada"}


async def test_g12_keys_move_without_a_command_if_the_aggregate_stands(storage: Storage) -> None:
    """A chain without commands moves keys if its aggregate is at its base, and only then."""
    await commit(storage, one(ADA, 0, 2))
    moves = KEYS.moves(frozenset({A}), frozenset())
    stale, fresh = (replace(chain(ADA, base), moves=moves) for base in (1, 2))
    [result] = await storage.events.append([stale], NOW)
    assert result == Conflicted(2)
    [result] = await storage.events.append([fresh], NOW)
    assert result == Committed(())
    assert await storage.events.find_holders([A]) == {A: "ada"}
    assert sum((await storage.events.heads()).values()) == 2


async def test_g12_a_race_across_partitions_has_one_winner(database: Database) -> None:
    """Whoever claims at the same time: one holds, the others are told; nobody waits for ever."""
    storages = [await database.open() for _ in range(PARTITIONS)]
    await storages[0].initialise(PARTITIONS)
    racers = {account_in(p): storages[p] for p in range(PARTITIONS)}
    wins = dict.fromkeys(racers, 0)
    for round_ in range(10):
        keys = [email(f"{round_}-{number}") for number in range(4)]
        results = await asyncio.gather(
            *(s.events.append([moving(key, wins[key], keys)], NOW) for key, s in racers.items())
        )
        committed = [k for k, [r] in zip(racers, results, strict=True) if isinstance(r, Committed)]
        assert len(committed) == 1
        wins[committed[0]] += 1
        refused = [r for [r] in results if isinstance(r, Conflicted)]
        assert all(r.taken == frozenset(keys) for r in refused)
        holders = await storages[0].events.find_holders(keys)
        assert set(holders.values()) == {committed[0].id}
        assert len(holders) == 4


async def test_keys_are_listed_in_pages(storage: Storage) -> None:
    """All of one type, in the order of name and hash, each once."""
    keys = [email(str(n), name=name) for name in ("email", "phone") for n in range(5)]
    await commit(storage, moving(ADA, 0, keys[::2]), moving(BOB, 0, keys[1::2]))
    user = replace(ADA, type="user")
    await commit(storage, moving(user, 0, [replace(A, aggregate_type="user")]))
    found: list[tuple[UniqueKey, str]] = []
    while page := await storage.events.list_keys("account", found[-1][0] if found else None, 3):
        found += page
    assert [key for key, _ in found] == sorted(keys)
    assert {key for key, holder in found if holder == "ada"} == set(keys[::2])


async def test_what_keys_were_made_by_is_noted(storage: Storage) -> None:
    """By type, replaced when it changes; a new epoch leaves it."""
    assert (await storage.info()).keys == {}
    await storage.note_keys("account", "one")
    await storage.note_keys("user", "two")
    await storage.note_keys("account", "three")
    await storage.initialise(PARTITIONS, new_epoch=True)
    assert (await storage.info()).keys == {"account": "three", "user": "two"}
