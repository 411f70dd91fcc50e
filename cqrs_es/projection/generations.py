"""Generations of a view: which code made each, which is live, and changing that.

A generation is one copy of a view's tables, known by a number. Code knows by its
fingerprint (`definitions.py`) which of them are as it would make them. It projects
into the live one if that is such a one, else into the newest that is; where there
is none it begins the next. So while two versions of the code run, each keeps a
generation of its own up to date, and each reads its own once that is filled.

    begun ──filled up to the log's end──▶ filled ──no other code projects──▶ live
                                             ▲                                 │
                                             └──another generation is live─────┘

All of it is numbers in the table `generations`, by keys; `n` is a generation's number:

    <name>              which one is live
    $fits:<name>__n     the fingerprint of the code that has made it; gone when it is dropped
    $filled:<name>__n   it is filled, by so many events a second (0: nobody knows)
    $rebuild:<name>     which one a `rebuild` fills; with a minus, the highest number there was
    $published:<name>   which one the view's own names show

No number is filled twice: what may be left of a generation that was given up, in
whatever order it was dropped, is never mistaken for a beginning. Everything here
that changes a number locks the table first. A store that older code has made has
no fingerprints; what is live there is taken for this code's where it looks so.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors
from cqrs_es.projection.folding import folding_for, past_collisions
from cqrs_es.projector import generation_of, physical_name
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cqrs_es.definitions import ProjectionDefinition
    from cqrs_es.ports.views import SqlTables, ViewStore, ViewTransaction
    from cqrs_es.projection.folding import Folding

log = get_logger("cqrs_es.projection")

FIRST: Final = 1
# So many events apart two generations are equally up to date: each has a transaction under way.
FEW_EVENTS: Final = 100


class Generations(msgspec.Struct, frozen=True):
    """A view's generations as they stand; `building` is None without a rebuild under way.

    `last` is the highest number there has been. `made_by` has the fingerprint of each
    that is not dropped, `filled` at what rate each was filled that is.
    """

    live: int
    building: int | None
    last: int
    made_by: Mapping[int, int] = msgspec.field(default_factory=dict[int, int])
    filled: Mapping[int, int] = msgspec.field(default_factory=dict[int, int])

    def projected_by(self, fingerprint: int | None) -> int | None:
        """Return the generation that code projects into; None where it has to begin one."""
        if self.made_by.get(self.live) == fingerprint:
            return self.live
        fitting = [n for n, made in self.made_by.items() if made == fingerprint]
        return max((n for n in fitting if n != self.building), default=None)

    def read_by(self, fingerprint: int | None) -> int:
        """Return the generation that code reads: its own once it is filled, till then the live."""
        own = self.projected_by(fingerprint)
        return own if own is not None and own in self.filled else self.live

    def state(self, number: int) -> str:
        """Say what a generation is, as `views list` does."""
        if number == self.live:
            return "live"
        if number == self.building:
            return "rebuilding"
        return "filled" if number in self.filled or number not in self.made_by else "filling"

    def has_filled(self, fingerprint: int) -> bool:
        """Tell whether there is a generation of this code's that is filled."""
        return self.projected_by(fingerprint) in self.filled

    def is_live_or_filled(self, number: int) -> bool:
        """Tell whether somebody reads a generation."""
        return number == self.live or number in self.filled


async def read_generations(views: ViewStore, name: str) -> Generations:
    """Read a view's generations."""
    return generations_of(await views.generations(), name)


def generations_of(numbers: Mapping[str, int], name: str) -> Generations:
    """Pick a view's generations out of the whole table."""
    live = numbers.get(name, FIRST)
    noted = numbers.get(_building_key(name), 0)
    made_by = _numbered(numbers, _fits_key(name, ""))
    last = max(live, abs(noted), *made_by)
    filled = _numbered(numbers, _filled_key(name, ""))
    return Generations(live, noted if noted > 0 else None, last, made_by, filled)


def _numbered(numbers: Mapping[str, int], prefix: str) -> dict[int, int]:
    found = {key.removeprefix(prefix): n for key, n in numbers.items() if key.startswith(prefix)}
    return {int(number): n for number, n in found.items()}


def is_projected(numbers: Mapping[str, int], folding: Folding) -> bool:
    """Tell whether a generation is the one that its code projects into; a reactor has but one."""
    if folding.fingerprint is None:
        return True
    now = generations_of(numbers, folding.name)
    return now.projected_by(folding.fingerprint) == folding.generation


async def views_behind(
    views: ViewStore, numbers: Mapping[str, int], definitions: Iterable[ProjectionDefinition]
) -> list[str]:
    """Return the views of which this code has no generation that is filled and up to date.

    After a time without its projectors one that is filled is behind the live one.
    """
    return [each.name for each in definitions if await _is_behind(views, numbers, each)]


async def _is_behind(
    views: ViewStore, numbers: Mapping[str, int], definition: ProjectionDefinition
) -> bool:
    name = definition.name
    now = generations_of(numbers, name)
    own = now.projected_by(definition.fingerprint)
    if own is None or own not in now.filled:
        return True
    if own == now.live:
        return False
    seen = await views.checkpoints(physical_name(name, own))
    live = await views.checkpoints(physical_name(name, now.live))
    return sum(max(0, to - seen.get(p, 0)) for p, to in live.items()) > FEW_EVENTS


def views_of(numbers: Mapping[str, int]) -> list[str]:
    """Return the views that something is noted of."""
    return sorted({view_of_key(key) for key in numbers if is_of_a_view(key)})


def _building_key(name: str) -> str:
    return f"$rebuild:{name}"


def _published_key(name: str) -> str:
    return f"$published:{name}"


def _fits_key(name: str, number: int | str) -> str:
    return f"$fits:{name}__{number}"


def _filled_key(name: str, number: int | str) -> str:
    return f"$filled:{name}__{number}"


# --- Changing them -----------------------------------------------------------


async def prepared(views: ViewStore, definition: ProjectionDefinition) -> Folding:
    """Return the generation that this code projects into, begun if need be, with its tables."""
    name, numbers = definition.name, await views.generations()
    number = generations_of(numbers, name).projected_by(definition.fingerprint)
    if number is None or name not in numbers:
        number = await past_collisions(lambda: _begin(views, definition), name)
    folding = folding_for(definition, number)
    await make_sure_of_tables(views, folding)
    return folding


async def _begin(views: ViewStore, definition: ProjectionDefinition) -> int:
    """Note which generation this code is to project into, and return its number."""
    name, made = definition.name, definition.fingerprint
    before = await read_generations(views, name)
    taken = await taken_over(views, definition, before)
    async with views.transaction() as transaction:
        numbers = await transaction.generations(name)
        now = generations_of(numbers, name)
        number = now.projected_by(made)
        if number is not None and name in numbers:
            return number
        if name not in numbers:
            number = FIRST
            await transaction.set_generation(name, number)
        elif now.live not in now.made_by and now.live == taken:
            number = now.live
            await transaction.set_generation(_filled_key(name, number), 0)
        else:
            number = await _take_next(transaction, now, name)
            log.info("view to be filled anew", view=name, generation=number, live=now.live)
        await transaction.set_generation(_fits_key(name, number), made)
        return number


async def taken_over(
    views: ViewStore, definition: ProjectionDefinition, now: Generations
) -> int | None:
    """Return which generation this code projects into, or would if it began now; None for a new.

    One that is live, has no fingerprint, and looks as if this code had made it is its own.
    """
    if now.live in now.made_by:
        return now.projected_by(definition.fingerprint)
    right = await folding_for(definition, now.live).looks_right(views)
    return now.live if right else now.projected_by(definition.fingerprint)


async def _take_next(transaction: ViewTransaction, now: Generations, name: str) -> int:
    """Return a number that no generation has had."""
    if now.building is None:
        await transaction.set_generation(_building_key(name), -(now.last + 1))
    return now.last + 1


async def begin_building(views: ViewStore, definition: ProjectionDefinition) -> int:
    """Return the number that a rebuild is to fill.

    That of one under way, or of what projectors are filling for this code, else a new
    one. Raises `ConfigurationError` where the one under way is other code's.
    """
    name, made = definition.name, definition.fingerprint
    async with views.transaction() as transaction:
        now = generations_of(await transaction.generations(name), name)
        if now.building is not None:
            if now.made_by.get(now.building, made) != made:
                message = f"a rebuild of {name} by other code is under way: end it there"
                raise errors.ConfigurationError(f"{message}, or give it up with --abort")
            number = now.building
        else:
            own = now.projected_by(made)
            if own is not None and not now.is_live_or_filled(own):
                return own
            number = now.last + 1
            await transaction.set_generation(_building_key(name), number)
        await transaction.set_generation(_fits_key(name, number), made)
        return number


async def make_live(transaction: ViewTransaction, name: str, number: int) -> None:
    """Make a generation live in a transaction that has locked the table."""
    now = generations_of(await transaction.generations(name), name)
    await transaction.set_generation(name, number)
    if now.live in now.made_by and now.live not in now.filled:
        await note_filled(transaction, name, now.live, 0)  # its code goes on reading it
    if now.building == number:
        await transaction.set_generation(_building_key(name), -now.last)


async def note_filled(transaction: ViewTransaction, name: str, number: int, rate: int) -> None:
    """Let readers have a generation, in a transaction that has locked the table."""
    await transaction.set_generation(_filled_key(name, number), rate)


async def give_up(views: ViewStore, name: str) -> int:
    """End a rebuild under way and forget how far it was; return its number, or `NotFound`."""
    async with views.transaction() as transaction:
        now = generations_of(await transaction.generations(name), name)
        if now.building is None:
            message = f"no rebuild of {name} is under way"
            raise errors.NotFound(message)
        await transaction.set_generation(_building_key(name), -now.last)
        await _forget_generation(transaction, name, now.building)
        return now.building


async def retire(views: ViewStore, name: str, number: int) -> None:
    """Forget how far a generation was, so that it can be dropped.

    Raises `ConfigurationError` for one in use, `NotFound` for one that there never was.
    """
    async with views.transaction() as transaction:
        now = generations_of(await transaction.generations(name), name)
        if number in {now.live, now.building}:
            state = "live" if number == now.live else "being built: `rebuild --abort` ends that"
            message = f"generation {number} of {name} is {state}; it can't be dropped"
            raise errors.ConfigurationError(message)
        if number > now.last:
            message = f"{name} has no generation {number}; the last one was {now.last}"
            raise errors.NotFound(message)
        if number == now.last and now.building is None:  # its number is not taken again
            await transaction.set_generation(_building_key(name), -now.last)
        await _forget_generation(transaction, name, number)


async def _forget_generation(transaction: ViewTransaction, name: str, number: int) -> None:
    for key in (physical_name(name, number), _fits_key(name, number), _filled_key(name, number)):
        await transaction.forget(key)


# --- Their tables ------------------------------------------------------------


async def make_sure_of_tables(views: ViewStore, folding: Folding) -> None:
    """Create a generation's tables where nothing was ever written to them, or raise `ViewLost`."""
    if await _missing_of(views, folding) or await folding.lacks_indexes(views):
        await folding.create_tables(views)


async def require_tables(views: ViewStore, folding: Folding) -> None:
    """Raise `StoreNotInitialised` where a generation has no tables yet, `ViewLost` if it had."""
    if missing := await _missing_of(views, folding):
        message = (
            f"the view {folding.name} has no table {' and '.join(missing)} yet: run `cqrs-es init`"
        )
        raise errors.StoreNotInitialised(message)


async def _missing_of(views: ViewStore, folding: Folding) -> list[str]:
    """Return which tables a generation lacks.

    Raises `ViewLost` where the checkpoints say that they held something: an
    empty table would stand for a full one.
    """
    missing = await folding.missing_tables(views)
    if missing and any((await views.checkpoints(folding.key)).values()):
        # Another process may have made and filled them between these two looks.
        missing = await folding.missing_tables(views)
        if missing:
            raise lost(folding, missing)
    return missing


def lost(folding: Folding, missing: list[str]) -> errors.ViewLost:
    """Say that tables are gone, and what to do about it."""
    tables, name = " and ".join(missing), folding.name
    message = f"the table {tables} of the view {name} is gone: run `cqrs-es rebuild {name}`"
    return errors.ViewLost(f"{message}, with --abort first where one is under way")


async def publish(views: ViewStore, definition: ProjectionDefinition) -> None:
    """Make a view's own names show its live generation, and note that they do.

    Again where another became live meanwhile: whoever publishes last looks last.
    Raises `ConfigurationError` where the database refuses it.
    """
    name = definition.name
    while True:
        now = await read_generations(views, name)
        live = now.live
        if now.made_by.get(live, definition.fingerprint) != definition.fingerprint:
            return  # it is for the code that has made it to say which tables it has
        folding = folding_for(definition, live)
        try:
            await folding.publish_tables(views)
        except errors.StoreUnusable:
            raise
        except (errors.StoreError, errors.SettingsError) as exc:
            message = (
                f"generation {live} of {name} is live, but the name can't be made to show it:"
                f" {' '.join(exc.message.split())}; fix that, then run `cqrs-es init` as the"
                " owner of the tables"
            )
            raise errors.ConfigurationError(message) from exc
        async with views.transaction() as transaction:
            if generations_of(await transaction.generations(name), name).live == live:
                await transaction.set_generation(_published_key(name), live)
                return


async def publish_if_needed(views: ViewStore, definition: ProjectionDefinition) -> None:
    """Publish unless a view's names show its live generation: a switch may have been cut short.

    That takes no right but to read, where nothing is to be done. A refusal is logged:
    those who read by SQL wait for a name, the view itself does not.
    """
    name, numbers = definition.name, await views.generations()
    if numbers.get(_published_key(name)) == numbers.get(name, FIRST):
        return
    try:
        await publish(views, definition)
    except errors.ConfigurationError as exc:
        log.warning("name not published", view=name, error=exc.message)


# --- What no code has any more -----------------------------------------------

# Generations have small numbers: a date is another program's.
_GENERATION: Final = re.compile(r"(.+)__[1-9][0-9]{0,4}")


async def remove(views: ViewStore, name: str) -> list[str]:
    """Drop all generations of a view, projector or table, and forget them; return the tables.

    Killed at any step, the same again removes the rest: what `checkpoints` and `generations`
    say goes last, so that tables with rows never pass for new ones. A table that has the name
    itself is another program's. Case does not count, as some databases fold it. Raises
    `NotFound` where there is nothing, `ConfigurationError` where something depends on the name.
    """
    noted, there = await views.generations(), await views.list_tables()
    keys = [key for key in noted if is_of_a_view(key) and view_of_key(key).lower() == name.lower()]
    tables = sorted(table for table in there if _is_generation_of(table, name))
    if not keys and not tables:
        message = f"nothing is left of a view or table {name}"
        raise errors.NotFound(message)
    names = {name, *map(view_of_key, keys), *map(view_of_key, tables)}
    if views.sql is not None and name.lower() not in {table.lower() for table in there}:
        for each in names:
            await _unpublish(views.sql, each)
    for table in tables:
        await views.drop_table(table)
    for each in names:
        numbers = {*range(1, generations_of(noted, each).last + 1), *map(generation_of, tables)}
        for number in sorted(numbers):
            await _forget(views, [physical_name(each, number)])
    await _forget(views, keys)
    return tables


def is_of_a_view(key: str) -> bool:
    """Tell a key of `generations` that is a view's from a reactor's role."""
    return key.startswith("$") or ":" not in key


def view_of_key(key: str) -> str:
    """Return the view that a row of `generations`, a checkpoint or a table is of."""
    noted = key.rpartition(":")[2]
    found = _GENERATION.fullmatch(noted)
    return noted if found is None else found[1]


def _is_generation_of(table: str, name: str) -> bool:
    found = _GENERATION.fullmatch(table)
    return found is not None and found[1].lower() == name.lower()


async def _unpublish(sql: SqlTables, name: str) -> None:
    try:
        await sql.unpublish(name)
    except errors.Unavailable:
        raise
    except errors.StoreError as exc:
        message = f"nothing is removed, as {name} can't be dropped: {' '.join(exc.message.split())}"
        raise errors.ConfigurationError(f"{message}; drop it, or what depends on it") from exc


async def _forget(views: ViewStore, keys: Sequence[str]) -> None:
    async with views.transaction() as transaction:
        for key in keys:
            await transaction.forget(key)
