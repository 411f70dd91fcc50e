"""Generations of a view: which is live, which a rebuild fills, and changing that.

The table `generations` holds the live number under the view's name. Under
`$rebuild:<name>` it holds the number that a rebuild fills; with a minus, where
none is under way, the last number that one has filled. No number is filled
twice: what may be left of a generation that was given up, in whatever order it
was dropped, is never mistaken for a beginning. Under `$published:<name>` it
holds the number that the view's own names show.

Everything here that changes a number locks the table first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.projection.folding import folding_for
from cqrs_es.projector import generation_of, physical_name, view_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.definitions import ProjectionDefinition
    from cqrs_es.ports.views import SqlTables, ViewStore, ViewTransaction
    from cqrs_es.projection.folding import Folding

log = structlog.get_logger("cqrs_es.projection")

FIRST: Final = 1


@dataclass(frozen=True, slots=True)
class Generations:
    """A view's generations as they stand; `building` is None without a rebuild under way.

    `last` is the highest number there has been.
    """

    live: int
    building: int | None
    last: int


async def read_generations(views: ViewStore, name: str) -> Generations:
    """Read a view's generations."""
    return generations_of(await views.generations(), name)


def generations_of(numbers: Mapping[str, int], name: str) -> Generations:
    """Pick a view's generations out of the whole table."""
    live = numbers.get(name, FIRST)
    noted = numbers.get(_building_key(name), 0)
    return Generations(live, noted if noted > 0 else None, max(live, abs(noted)))


def live_name(numbers: Mapping[str, int], name: str) -> str:
    """Return the table and checkpoint key of a view's live generation."""
    return physical_name(name, numbers.get(name, FIRST))


def _building_key(name: str) -> str:
    return f"$rebuild:{name}"


def _published_key(name: str) -> str:
    return f"$published:{name}"


# --- Changing them -----------------------------------------------------------


async def prepared_live(views: ViewStore, definition: ProjectionDefinition) -> Folding:
    """Return a view's live generation, its tables made sure of; note the first one as live."""
    name = definition.name
    if name not in await views.generations():
        await _note_first(views, name)
    folding = folding_for(definition, (await read_generations(views, name)).live)
    await make_sure_of_tables(views, folding)
    return folding


async def _note_first(views: ViewStore, name: str) -> None:
    async with views.transaction() as transaction:
        if name not in await transaction.generations():
            await transaction.set_generation(name, FIRST)


async def begin_building(views: ViewStore, name: str) -> int:
    """Return the number that a rebuild is to fill: that of one under way, else a new one."""
    async with views.transaction() as transaction:
        now = generations_of(await transaction.generations(), name)
        if now.building is None:
            await transaction.set_generation(_building_key(name), now.last + 1)
        return now.building or now.last + 1


async def make_live(transaction: ViewTransaction, name: str, number: int) -> None:
    """Make a generation live in a transaction that has locked the table."""
    now = generations_of(await transaction.generations(), name)
    await transaction.set_generation(name, number)
    if now.building == number:
        await transaction.set_generation(_building_key(name), -now.last)


async def give_up(views: ViewStore, name: str) -> int:
    """End a rebuild under way and forget how far it was; return its number, or `NotFound`."""
    async with views.transaction() as transaction:
        now = generations_of(await transaction.generations(), name)
        if now.building is None:
            message = f"no rebuild of {name} is under way"
            raise errors.NotFound(message)
        await transaction.set_generation(_building_key(name), -now.last)
        await transaction.forget(physical_name(name, now.building))
        return now.building


async def retire(views: ViewStore, name: str, number: int) -> None:
    """Forget how far a generation was, so that it can be dropped.

    Raises `ConfigurationError` for one in use, `NotFound` for one that there never was.
    """
    async with views.transaction() as transaction:
        now = generations_of(await transaction.generations(), name)
        if number in {now.live, now.building}:
            state = "live" if number == now.live else "being built: `rebuild --abort` ends that"
            message = f"generation {number} of {name} is {state}; it can't be dropped"
            raise errors.ConfigurationError(message)
        if number > now.last:
            message = f"{name} has no generation {number}; the last one was {now.last}"
            raise errors.NotFound(message)
        await transaction.forget(physical_name(name, number))


# --- Their tables ------------------------------------------------------------


async def make_sure_of_tables(views: ViewStore, folding: Folding) -> None:
    """Create a generation's tables where nothing was ever written to them, or raise `ViewLost`."""
    if await _missing_of(views, folding):
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
        live = (await read_generations(views, name)).live
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
            if generations_of(await transaction.generations(), name).live == live:
                await transaction.set_generation(_published_key(name), live)
                return


async def publish_if_needed(views: ViewStore, definition: ProjectionDefinition) -> None:
    """Publish unless a view's names show its live generation: a switch may have been cut short.

    That takes no right but to read, where nothing is to be done. A refusal is logged:
    those who read by SQL wait for a name, the view itself does not.
    """
    name = definition.name
    numbers = await views.generations()
    if numbers.get(_published_key(name)) == generations_of(numbers, name).live:
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
    keys = [key for key in noted if key.rpartition(":")[2].lower() == name.lower()]
    tables = sorted(table for table in there if _is_generation_of(table, name))
    if not keys and not tables:
        message = f"nothing is left of a view or table {name}"
        raise errors.NotFound(message)
    names = {name, *(key.rpartition(":")[2] for key in keys), *map(view_of, tables)}
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
