"""Changing between generations, killed before each of its steps in turn, then done again."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias

import pytest

from cqrs_es import errors
from cqrs_es.projection.generations import read_generations, remove
from cqrs_es.projection.rebuild import Rebuild
from cqrs_es.projector import physical_name
from cqrs_es.settings import Settings
from tests.mortal import Killed, MortalStorage
from tests.samples import AddEach, Counter
from tests.stores import on_sql, sql_of
from tests.tallies import check_complete, check_live, numbers_of, tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage

Verb: TypeAlias = "Callable[[Rebuild], Awaitable[object]]"

PARTITIONS = 3
VIEWS = ("totals", "sums")


@asynccontextmanager
async def tallying(url: str) -> AsyncGenerator[OpenApplication]:
    """Open an application whose views have seen all that was done."""
    settings = Settings(store_url=url, partitions=PARTITIONS)
    async with tallying_app().open(settings, initialise=True) as opened:
        for name in "abcdef":
            await opened.execute(Counter, name, AddEach(list(range(1, 101))))
        await project(opened)
        yield opened


async def project(opened: OpenApplication) -> None:
    """Let the projectors see everything, then stop them."""
    async with opened.running() as supervisor:
        await eventually(supervisor.idle)


def rebuild_on(opened: OpenApplication, storage: Storage, name: str) -> Rebuild:
    """Make a rebuild as another process would, with a store of its own."""
    return Rebuild(opened.registry, storage, opened.projection(name))


async def killed_at(opened: OpenApplication, name: str, verb: Verb, step: int) -> bool:
    """Do what a verb does until the process dies at a step; return whether it died."""
    mortal = MortalStorage(opened.storage, dies_at=step)
    died = False
    try:
        await verb(rebuild_on(opened, mortal, name))
    except* Killed:
        died = True
    return died


def dropping(number: int) -> Verb:
    return lambda rebuild: rebuild.drop(number)


def switching_to(number: int) -> Verb:
    return lambda rebuild: rebuild.switch_to(number)


async def again(opened: OpenApplication, name: str, verb: Verb) -> None:
    """Do it once more; that there is nothing left to do is fine."""
    with suppress(errors.NotFound):
        await verb(opened.rebuild(name))


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_a_rebuild_killed_at_every_step(store_url: str, name: str) -> None:
    """What is live is right at every moment, and the next rebuild goes on and ends."""
    async with tallying(store_url) as opened:
        step, last = 0, 1
        for step in itertools.count(1):
            live, _, last = await numbers_of(opened.storage.views, name)
            died = await killed_at(opened, name, Rebuild.run, step)
            await check_live(opened, name)
            between, _, _ = await numbers_of(opened.storage.views, name)
            assert between in {live, last + 1}
            if not died:
                break
            await opened.execute(Counter, "late", AddEach([step]))
            await opened.rebuild(name).run()
            assert await check_complete(opened, name) == last + 1 + (between != live)
        assert step > 10
        await project(opened)
        assert await check_complete(opened, name) == last + 1


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_an_abort_killed_at_every_step(store_url: str, name: str) -> None:
    """What it leaves behind never becomes part of a later generation."""
    async with tallying(store_url) as opened:
        for step in itertools.count(1):
            given_up, rebuilt = 2 * step, 2 * step + 1
            assert await killed_at(opened, name, Rebuild.run, 9), "before it was done"
            assert (await read_generations(opened.storage.views, name)).building == given_up
            died = await killed_at(opened, name, Rebuild.abort, step)
            await again(opened, name, Rebuild.abort)
            now = await numbers_of(opened.storage.views, name)
            assert now == (given_up - 1, None, given_up)
            await opened.rebuild(name).drop(given_up)
            assert await sql_of(opened.storage.views).columns(physical_name(name, given_up)) == []
            assert await opened.rebuild(name).run() == rebuilt
            assert await check_complete(opened, name) == rebuilt
            if not died:
                assert step > 3
                return


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_a_removal_killed_at_every_step(store_url: str, name: str) -> None:
    """What is left is never taken for a new view, and the same again removes it."""
    async with tallying(store_url) as opened:
        for step in itertools.count(1):
            await opened.rebuild(name).run()
            died = True
            try:
                await remove(MortalStorage(opened.storage, dies_at=step).views, name)
                died = False
            except Killed:
                pass
            if not died:
                assert step > 8
                return
            with suppress(errors.ViewLost):
                await opened.initialise()
                await check_live(opened, name)
            await remove(opened.storage.views, name)
            assert not [n for n in await opened.storage.views.list_tables() if name in n]
            await opened.initialise()
            await project(opened)
            assert await check_complete(opened, name) == 1


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_a_drop_killed_at_every_step(store_url: str, name: str) -> None:
    """Dropped again it is gone, and can't be switched to; the live one is whole throughout."""
    async with tallying(store_url) as opened:
        for step in itertools.count(1):
            await opened.rebuild(name).run()
            died = await killed_at(opened, name, dropping(step), step)
            assert await check_complete(opened, name) == step + 1
            await opened.rebuild(name).drop(step)
            with pytest.raises(errors.NotFound):
                await opened.rebuild(name).switch_to(step)
            assert await sql_of(opened.storage.views).columns(physical_name(name, step)) == []
            if not died:
                assert step > 3
                return


@on_sql
@pytest.mark.parametrize("name", VIEWS)
async def test_switching_back_killed_at_every_step(store_url: str, name: str) -> None:
    """It leaves one of both live and both whole; a rebuild after it begins a new one."""
    async with tallying(store_url) as opened:
        await opened.rebuild(name).run()
        targets = itertools.cycle([1, 2])
        for step, target in enumerate(targets, start=1):
            await opened.execute(Counter, "late", AddEach([step]))
            died = await killed_at(opened, name, switching_to(target), step)
            await check_live(opened, name)
            await opened.rebuild(name).switch_to(target)
            assert await check_complete(opened, name) == target
            if not died:
                assert step > 5
                now = await numbers_of(opened.storage.views, name)
                assert now == (target, None, 2)
                assert await opened.rebuild(name).run() == 3
                return
