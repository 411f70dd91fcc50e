"""Chains of upcasters of any form, against lifting by hand: in whatever order they are declared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import Version, drops, renames, upcaster
from cqrs_es.upcasting import RawEvent, UpcasterChain

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from cqrs_es import Upcaster
    from cqrs_es.types import JsonObject

SPLIT_AT = "50.0"
"""Above all versions that events have."""


@dataclass(frozen=True)
class Kind:
    """What is done to events of one type: lifted, then current, renamed, split or dropped.

    `into` are the types of what comes of it, later ones in the list, and their versions.
    """

    steps: frozenset[int]
    end: str
    into: tuple[tuple[int, int], ...]


versions = st.integers(1, 9)
NOTHING: list[tuple[int, int]] = []


@st.composite
def histories(draw: st.DrawFn) -> list[Kind]:
    """Draw some types, of which the last one is as the code has it."""
    count = draw(st.integers(1, 5))
    kinds: list[Kind] = []
    for number in range(count):
        later = st.tuples(st.integers(number + 1, count - 1), versions)
        end, into = draw(
            st.just(("current", NOTHING))
            if number == count - 1
            else st.one_of(
                st.just(("current", NOTHING)),
                st.just(("dropped", NOTHING)),
                st.tuples(st.just("renamed"), st.lists(later, min_size=1, max_size=1)),
                st.tuples(st.just("split"), st.lists(later, min_size=1, max_size=3)),
            )
        )
        kinds.append(Kind(draw(st.frozensets(st.integers(2, 12), max_size=4)), end, tuple(into)))
    return kinds


def name(number: int) -> str:
    return f"Type{number}"


def upcasters(kinds: Sequence[Kind]) -> list[Upcaster]:
    """Declare what a history says; each notes in the payload that it was there."""
    made: list[Upcaster] = []
    for number, kind in enumerate(kinds):
        made += [_lifting(number, to) for to in kind.steps]
        if kind.end == "renamed":
            ((other, version),) = kind.into
            made.append(renames(name(number), name(other), version=f"{version}.0"))
        elif kind.end == "dropped":
            made.append(drops(name(number)))
        elif kind.end == "split":
            made.append(_splitting(number, kind.into))
    return made


def _lifting(number: int, to: int) -> Upcaster:
    @upcaster(name(number), to=f"{to}.0")
    def lift(payload: JsonObject) -> JsonObject:
        return _noted(payload, f"{number} to {to}")

    return lift


def _splitting(number: int, into: Sequence[tuple[int, int]]) -> Upcaster:
    @upcaster(name(number), to=SPLIT_AT)
    def split(payload: JsonObject) -> Sequence[RawEvent]:
        return [
            RawEvent.of(name(other), f"{version}.0", _noted(payload, f"part {nth} of {number}"))
            for nth, (other, version) in enumerate(into)
        ]

    return split


def _noted(payload: JsonObject, what: str) -> JsonObject:
    return {"notes": f"{payload['notes']}; {what}"}


def current(kinds: Sequence[Kind]) -> dict[str, Version]:
    """Say which types the code has, in which versions."""
    return {
        name(number): Version(max(kind.steps, default=1))
        for number, kind in enumerate(kinds)
        if kind.end == "current"
    }


def lifted(kinds: Sequence[Kind], number: int, version: int, notes: str) -> list[tuple[int, str]]:
    """Do by hand what the chains are to do: type and notes of what comes of an event."""
    kind = kinds[number]
    for to in sorted(kind.steps):
        if to > version:
            notes = f"{notes}; {number} to {to}"
    found: list[tuple[int, str]] = []
    match kind.end:
        case "current":
            return [(number, notes)]
        case "renamed":
            ((other, of),) = kind.into
            return lifted(kinds, other, of, notes)
        case "dropped":
            return []
        case _:
            for nth, (other, of) in enumerate(kind.into):
                found += lifted(kinds, other, of, f"{notes}; part {nth} of {number}")
    return found


@given(histories(), versions, st.randoms(use_true_random=False))
def test_events_are_lifted_as_by_hand(kinds: list[Kind], version: int, order: Random) -> None:
    """Every step once, in the order of versions, part by part; what is current stays as it is."""
    declared = upcasters(kinds)
    order.shuffle(declared)
    chain = UpcasterChain(declared, current(kinds))
    for number in range(len(kinds)):
        event = RawEvent.of(name(number), f"{version}.0", {"notes": ""})
        found = chain.upcast(event)
        by_hand = lifted(kinds, number, version, "")
        assert [(e.type, e.payload["notes"]) for e in found] == [(name(n), t) for n, t in by_hand]
        assert [again for each in found for again in chain.upcast(each)] == found
        assert event.payload == {"notes": ""}
