"""Unique keys: what an aggregate's state claims, who holds it, and filling the table anew (G12).

A key is stored as an HMAC of type, name and value under the store's secret: its
length is bounded, and no value stands in the table in clear.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from types import CodeType
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from cqrs_es import errors
from cqrs_es.execution.baselines import first_page, replayed
from cqrs_es.ports.store import Chain, Committed, KeyMoves, UniqueKey
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import NAME, AggregateKey, shown, utc_now

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from cqrs_es.definitions import AggregateDefinition, AnyAggregate
    from cqrs_es.ports.storage import Storage

log = get_logger("cqrs_es.execution")

Claims: TypeAlias = frozenset[UniqueKey]
NONE: Final[Claims] = frozenset()
MOST_KEYS: Final = 16
PAGE: Final = 100
MAX_TRIES: Final = 20


class Keys:
    """Turns what states claim into keys, under a store's secret."""

    def __init__(self, secret: bytes, partitions: int) -> None:
        self._secret = secret
        self.partitions = partitions

    def key(self, definition: AggregateDefinition, name: object, value: object) -> UniqueKey:
        """Make the key of a value that a state may claim; raise `DefinitionError` for another."""
        where = f"{definition.cls.__qualname__}.keys()"
        if not isinstance(name, str) or not NAME.fullmatch(name):
            message = f"{where}: a key's name must match {NAME.pattern}, not {shown(str(name))}"
            raise errors.DefinitionError(message)
        if not isinstance(value, str) or not value:
            what = "empty" if value == "" else f"a {type(value).__qualname__}"
            message = f"{where}: the value of {name} is {what}; give text, or leave the name out"
            raise errors.DefinitionError(message)
        text = f"unique key\0{definition.type}\0{name}\0{value}".encode(errors="surrogatepass")
        digest = hmac.new(self._secret, text, hashlib.sha256).hexdigest()
        return UniqueKey(definition.type, name, digest)

    def of(self, definition: AggregateDefinition, state: AnyAggregate) -> Claims:
        """Return what a state claims; raise `DefinitionError` for what is no keys."""
        if not definition.has_keys:
            return NONE
        where = f"{definition.cls.__qualname__}.keys()"
        try:
            keys = dict(state.keys())
        except Exception as exc:
            message = f"{where} raised {type(exc).__name__}: {exc}"
            raise errors.DefinitionError(message) from exc
        if not keys:
            return NONE
        if len(keys) > MOST_KEYS:
            message = f"{where} returned {len(keys)} keys; at most {MOST_KEYS} are allowed"
            raise errors.DefinitionError(message)
        return frozenset(self.key(definition, name, value) for name, value in keys.items())

    def moves(self, claims: Claims, releases: Claims) -> KeyMoves | None:
        """Say how keys move, and whose partitions' heads are locked; None where none does."""
        if not claims and not releases:
            return None
        numbers = {int(key.value_hash[:8], 16) % self.partitions for key in claims | releases}
        return KeyMoves(claims, releases, tuple(sorted(numbers)))


def fingerprint(definition: AggregateDefinition) -> str:
    """Return what changes when `keys()` does: a hash of the names and texts in its code.

    What it calls is not looked into.
    """
    function = definition.cls.keys
    words = sorted(set(_words(function.__code__)) - {function.__doc__})
    return hashlib.sha256("\0".join(words).encode()).hexdigest()


def _words(constant: object) -> Iterator[str]:
    if isinstance(constant, str) and "<locals>" not in constant:
        yield constant
    elif isinstance(constant, tuple):
        for each in constant:  # pyright: ignore[reportUnknownVariableType]
            yield from _words(each)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(constant, CodeType):
        yield from constant.co_names
        yield from _words(constant.co_consts)


def due(definitions: Iterable[AggregateDefinition], noted: Mapping[str, str]) -> list[str]:
    """Return the aggregate types whose keys were not made by what `keys()` is today."""
    return [
        definition.type
        for definition in definitions
        if definition.has_keys and noted.get(definition.type) != fingerprint(definition)
    ]


# --- Filling the table anew --------------------------------------------------


class Collision(msgspec.Struct, frozen=True, order=True):
    """A value that two aggregates of a type have: `holder` holds it, `other` does not."""

    name: str
    holder: str
    other: str


class KeysRebuilt(msgspec.Struct, frozen=True):
    """What was looked at and changed; with collisions, the type stays due."""

    aggregates: int
    added: int
    removed: int
    collisions: tuple[Collision, ...]


class KeysRebuild:
    """Makes a type's keys those that its aggregates' states claim today.

    First what no state claims goes, then what is missing is added, an aggregate at a time,
    each in an append that holds only if the aggregate has not changed: the keys that
    stand go on guarding, and commands go on meanwhile. It can be broken off and run again.
    """

    def __init__(self, definition: AggregateDefinition, storage: Storage, keys: Keys) -> None:
        self._definition = definition
        self._storage = storage
        self._events = storage.events
        self._keys = keys
        self._added = self._removed = 0
        self._collisions: set[Collision] = set()

    async def run(self) -> KeysRebuilt:
        """Do it; record that it is done unless values collide."""
        await self._remove_stale()
        aggregates = 0
        for partition in range(self._keys.partitions):
            async for id_ in self._ids(partition):
                await self._reconcile(id_)
                aggregates += 1
        if not self._collisions:
            await self._storage.note_keys(self._definition.type, fingerprint(self._definition))
        return KeysRebuilt(aggregates, self._added, self._removed, tuple(sorted(self._collisions)))

    async def _remove_stale(self) -> None:
        after: UniqueKey | None = None
        while page := await self._events.list_keys(self._definition.type, after, PAGE):
            held: dict[str, set[UniqueKey]] = {}
            for key, holder in page:
                held.setdefault(holder, set()).add(key)
            for holder, keys in held.items():
                await self._reconcile(holder, frozenset(keys))
            after = page[-1][0]

    async def _ids(self, partition: int) -> AsyncIterator[str]:
        """Read the ids of the type's aggregates in a partition, by their first events."""
        after = 0
        while page := await self._events.read_log(partition, after, PAGE):
            for event in page:
                if event.sequence == 1 and event.key.type == self._definition.type:
                    yield event.key.id
            after = page[-1].offset

    async def _reconcile(self, id_: str, held: Claims = NONE) -> None:
        """Give up those of the keys held that the state does not claim, or add what it lacks."""
        for _ in range(MAX_TRIES):
            sequence, claims = await self._claims(id_)
            holders = await self._events.find_holders(held - claims if held else claims)
            others = {} if held else {k: h for k, h in holders.items() if h != id_}
            if others and (await self._claims(id_))[0] != sequence:
                continue  # it may have given up what the other holds
            added = NONE if held else claims - holders.keys()
            removed = frozenset(k for k, h in holders.items() if h == id_) if held else NONE
            if await self._moved(id_, sequence, added, removed):
                self._added += len(added)
                self._removed += len(removed)
                self._collisions |= {Collision(k.name, h, id_) for k, h in others.items()}
                return
        message = f"{self._definition.type}/{id_} kept changing: run `cqrs-es keys rebuild` again"
        raise errors.StoreUnavailable(message)

    async def _claims(self, id_: str) -> tuple[int, Claims]:
        key = AggregateKey(self._definition.type, id_)
        (first,) = await self._events.load([first_page(self._definition, key)])
        baseline = await replayed(self._definition, key, first, self._events.load)
        state = baseline.thaw(self._definition)
        return baseline.sequence, self._keys.of(self._definition, state)

    async def _moved(self, id_: str, sequence: int, added: Claims, removed: Claims) -> bool:
        """Move keys if the aggregate is still at a sequence; return whether that was done."""
        moves = self._keys.moves(added, removed)
        if moves is None:
            return True
        key = AggregateKey(self._definition.type, id_)
        partition = key.partition(self._keys.partitions)
        chain = Chain(
            key=key, partition=partition, base_sequence=sequence, commands=(), moves=moves
        )
        (result,) = await self._events.append([chain], utc_now())
        return isinstance(result, Committed)
