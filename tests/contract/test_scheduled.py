"""Commands that events cause, and those for later: the rows of `outgoing_commands`."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.ports.store import IMMEDIATELY, Committed, Conflicted, ScheduledCommand
from cqrs_es.stores.append_plan import MOST_TIMERS
from cqrs_es.types import AggregateKey, new_command_id
from tests.contract.building import (
    NOW,
    PARTITIONS,
    accepted,
    account_in,
    chain,
    commit,
    event,
    failed,
)
from tests.stores import on_dynamodb, on_sql
from tests.waiting import eventually

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import Chain, DecidedCommand
    from tests.contract.conftest import Database

log = logging.getLogger(__name__)
TARGET = account_in(1)
HOUR = timedelta(hours=1)
RACES = int(os.environ.get("CQRS_ES_TEST_RACES", "40"))  # more: make proofs


def now() -> datetime:
    """Return the time, to the microsecond that every store keeps."""
    return datetime.now(UTC)


def row(
    due: datetime | timedelta = IMMEDIATELY,
    *,
    key: AggregateKey = TARGET,
    timer: str | None = None,
    command_id: str | None = None,
) -> ScheduledCommand:
    """Make a row for a target."""
    return ScheduledCommand(
        command_id=command_id or new_command_id(),
        key=key,
        partition=key.partition(PARTITIONS),
        due=due,
        body='{"who": "ünïcode \U0001f3e6"}'.encode(),
        timer=timer,
    )


def causing(
    base: int,
    *causes: ScheduledCommand,
    cancels: tuple[str, ...] = (),
    key: AggregateKey = TARGET,
) -> DecidedCommand:
    """Decide a command with one event, and what it causes."""
    decided = accepted(key, base, [event(base + 1)])
    return replace(decided, causes=causes, cancels=cancels)


def consuming(taken: ScheduledCommand, base: int = 0) -> Chain:
    """Decide a row's command, with one event."""
    decided = accepted(taken.key, base, [event(base + 1)], command_id=taken.command_id)
    return chain(taken.key, base, replace(decided, scheduled=True))


async def ids(storage: Storage, key: AggregateKey | None = None) -> list[str]:
    """Return the ids of the rows there are, in the order in which they are due."""
    return [each.command_id for each in await storage.events.list_scheduled(None, 2000, key)]


# --- Adding and reading ------------------------------------------------------


async def test_what_is_scheduled_is_found_as_it_was(storage: Storage) -> None:
    """A row comes back with its target, moment, body and timer."""
    late = now().replace(microsecond=123456) + HOUR
    rows = [row(late, key=AggregateKey("account", "🏦'é")), row(timer="remind “me”")]
    await storage.events.schedule(rows)
    found = await storage.events.find_scheduled([*(r.command_id for r in rows), new_command_id()])
    assert found == {each.command_id: each for each in rows}


async def test_scheduling_again_changes_nothing(storage: Storage) -> None:
    """An id that has a row keeps it, also when several come at once."""
    first = row(now() + HOUR)
    await storage.events.schedule([first])
    again, other = replace(first, due=now() + 2 * HOUR, body=b"{}"), row(now() + HOUR)
    await asyncio.gather(*(storage.events.schedule([again, other]) for _ in range(4)))
    found = await storage.events.find_scheduled([first.command_id, other.command_id])
    assert found == {first.command_id: first, other.command_id: other}


async def test_what_was_decided_is_not_scheduled_again(storage: Storage) -> None:
    """An id that has an outcome gets no row."""
    taken = row()
    await storage.events.schedule([taken])
    await commit(storage, consuming(taken))
    await storage.events.schedule([taken])
    assert await ids(storage) == []


async def test_due_rows_come_by_moment_then_by_id(storage: Storage) -> None:
    """What is due is read in the order of its moments, equal ones by id, those for now first."""
    before = now() - HOUR
    same = sorted((row(before) for _ in range(3)), key=lambda it: it.command_id)
    earlier, at_once = row(before - HOUR), row()
    elsewhere, later = row(before, key=account_in(2)), row(now() + HOUR)
    await storage.events.schedule([later, same[2], same[0], elsewhere, earlier, same[1], at_once])
    found = await storage.events.due(1, 10)
    expected = [at_once, earlier, *same]
    assert [each.command_id for each in found] == [each.command_id for each in expected]
    assert [each.command_id for each in await storage.events.due(1, 2)] == [
        at_once.command_id,
        earlier.command_id,
    ]
    assert found[2].late >= HOUR
    assert await storage.events.count_due(range(PARTITIONS)) == {1: 5, 2: 1}
    assert await storage.events.count_due([0, 2]) == {2: 1}


async def test_rows_become_due(storage: Storage) -> None:
    """A row is not due before its moment, and is then, by the store's clock."""
    soon = row(timedelta(seconds=0.2))
    await commit(storage, chain(TARGET, 0, causing(0, soon)))
    assert await storage.events.due(1, 10) == []
    left = (await storage.events.next_due(range(PARTITIONS)))[1]
    assert 0 < left <= 0.2
    await eventually(lambda: storage.events.due(1, 10))
    [found] = await storage.events.due(1, 10)
    assert timedelta(0) <= found.late
    assert (await storage.events.next_due([1]))[1] <= 0


async def test_next_due_tells_of_partitions_that_have_rows(storage: Storage) -> None:
    """The seconds until the first row of each partition asked for; nothing for the others."""
    await storage.events.schedule([row(now() + HOUR), row(now() + 2 * HOUR)])
    await storage.events.schedule([row(key=account_in(2)), row(now() + HOUR, key=account_in(3))])
    left = await storage.events.next_due([0, 1, 2])
    assert left.keys() == {1, 2}
    assert left[2] <= 0
    assert 3_500 < left[1] <= 3_601
    assert await storage.events.next_due([]) == {}


async def test_rows_are_listed_in_pages(storage: Storage) -> None:
    """Pages go on behind the last row, among rows of one moment too; of one target or of all."""
    moment = now() + HOUR
    rows = [row(moment) for _ in range(5)] + [row(), row(moment, key=account_in(2))]
    await storage.events.schedule(rows)
    listed: list[ScheduledCommand] = []
    after = None
    while page := await storage.events.list_scheduled(after, 2):
        listed += page
        after = page[-1].moment, page[-1].command_id
    assert listed == sorted(rows, key=lambda it: (it.moment, it.command_id))
    assert await ids(storage, account_in(2)) == [rows[-1].command_id]


# --- Deciding, cancelling, hastening -----------------------------------------


async def test_deciding_a_row_deletes_it(storage: Storage) -> None:
    """The append that decides a row's command writes its outcome and deletes the row."""
    taken, other = row(), row()
    await storage.events.schedule([taken, other])
    [outcome] = await commit(storage, consuming(taken))
    assert outcome.command_id in await storage.events.find_outcomes([taken.command_id])
    assert await ids(storage) == [other.command_id]


async def test_a_row_that_is_gone_conflicts(storage: Storage) -> None:
    """What was cancelled meanwhile is not decided: its chain leaves no trace, others commit."""
    gone, there = row(), row(key=account_in(2))
    await storage.events.schedule([gone, there])
    assert await storage.events.unschedule([gone.command_id]) == {gone.command_id}
    results = await storage.events.append([consuming(gone), consuming(there)], NOW)
    assert results[0] == Conflicted(0)
    assert isinstance(results[1], Committed)
    assert await storage.events.find_outcomes([gone.command_id]) == {}
    assert await ids(storage) == []


async def test_cancelling_tells_what_there_was(storage: Storage) -> None:
    """Of ids that have no row nothing is said, and nothing happens."""
    known = row(now() + HOUR)
    await storage.events.schedule([known])
    asked = [known.command_id, new_command_id()]
    assert await storage.events.unschedule(asked) == {known.command_id}
    assert await storage.events.unschedule(asked) == set()


async def test_a_hastened_row_is_due(storage: Storage) -> None:
    """What is hastened is due now, behind what was due before; other ids are no error."""
    later, before = row(now() + HOUR), row(now() - HOUR)
    await storage.events.schedule([later, before])
    assert await storage.events.hasten([later.command_id, new_command_id()]) == {later.command_id}
    found = await storage.events.due(1, 10)
    assert [each.command_id for each in found] == [before.command_id, later.command_id]
    assert found[1].moment > now() - HOUR


# --- What commands cause -----------------------------------------------------


async def test_an_append_adds_what_it_causes(storage: Storage) -> None:
    """Rows go in with the events; in a chain that conflicts neither does."""
    sent, timer = row(key=account_in(2)), row(HOUR, timer="t")
    await commit(storage, chain(TARGET, 0, causing(0, sent, timer)))
    assert await ids(storage) == [sent.command_id, timer.command_id]
    doomed = chain(TARGET, 0, causing(0, row(), row(HOUR, timer="t"), cancels=("t",)))
    assert await storage.events.append([doomed], NOW) == [Conflicted(1)]
    assert await ids(storage) == [sent.command_id, timer.command_id]


async def test_a_span_counts_from_the_append(storage: Storage) -> None:
    """A row that is due after a span is due so long after the store's time of the append."""
    timer = row(HOUR, timer="t")
    before = now()
    await commit(storage, chain(TARGET, 0, causing(0, timer)))
    [found] = (await storage.events.find_scheduled([timer.command_id])).values()
    assert timedelta(seconds=-1) < found.moment - before - HOUR < timedelta(seconds=30)


async def test_a_timer_replaces_that_of_its_name(storage: Storage) -> None:
    """Set anew, in one chain or in another append, a timer has one row: the last one."""
    first, second, third, other = (row(HOUR, timer=name) for name in ("t", "t", "t", "u"))
    await commit(storage, chain(TARGET, 0, causing(0, first), causing(1, second, other)))
    assert set(await ids(storage)) == {second.command_id, other.command_id}
    same_name_elsewhere = row(HOUR, key=account_in(1, 1), timer="t")
    await commit(
        storage,
        chain(TARGET, 2, causing(2, third)),
        chain(same_name_elsewhere.key, 0, causing(0, same_name_elsewhere, key=account_in(1, 1))),
    )
    left = {third.command_id, other.command_id, same_name_elsewhere.command_id}
    assert set(await ids(storage)) == left


async def test_a_timer_is_cancelled(storage: Storage) -> None:
    """A timer ends by its name, in the chain that set it or later; where there is none, nothing."""
    first, second = row(HOUR, timer="t"), row(HOUR, timer="u")
    commands = (causing(0, first), causing(1, second, cancels=("t",)))
    await commit(storage, chain(TARGET, 0, *commands))
    assert await ids(storage) == [second.command_id]
    await commit(storage, chain(TARGET, 2, causing(2, cancels=("u", "t"))))
    assert await ids(storage) == []


async def test_a_timer_that_fires_may_set_itself_again(storage: Storage) -> None:
    """The append that decides a timer may add the next one of its name."""
    first, second = row(timer="t"), row(HOUR, timer="t")
    await commit(storage, chain(TARGET, 0, causing(0, first)))
    decided = causing(1, second)
    outcome = dataclasses.replace(decided.outcome, command_id=first.command_id)
    await commit(storage, chain(TARGET, 1, replace(decided, outcome=outcome, scheduled=True)))
    assert await ids(storage) == [second.command_id]


@on_dynamodb
async def test_rows_that_no_transaction_holds_are_refused(storage: Storage) -> None:
    """They count among the hundred items: over it, nothing of the command is written."""
    fitting, too_many = ([row(key=account_in(2)) for _ in range(n)] for n in (45, 50))
    with pytest.raises(errors.TooLarge, match="of which it takes 100"):
        await storage.events.append([chain(TARGET, 0, causing(0, *too_many))], NOW)
    assert await ids(storage) == []
    await commit(storage, chain(TARGET, 0, causing(0, *fitting)))
    assert len(await ids(storage)) == 45


@on_sql
async def test_an_aggregate_has_a_thousand_timers_at_most(storage: Storage) -> None:
    """One more is refused, having written nothing; one of them set anew, or in place, is not."""
    timers = [row(HOUR, timer=f"t{number}") for number in range(MOST_TIMERS)]
    await commit(storage, chain(TARGET, 0, causing(0, *timers)))
    with pytest.raises(errors.TooLarge, match="more than 1000 timers"):
        await storage.events.append([chain(TARGET, 1, causing(1, row(HOUR, timer="u")))], NOW)
    assert len(await ids(storage)) == MOST_TIMERS
    again, instead = row(HOUR, timer="t0"), row(HOUR, timer="u")
    await commit(storage, chain(TARGET, 1, causing(1, again, instead, cancels=("t1",))))
    assert len(await ids(storage)) == MOST_TIMERS


# --- Cancelling against firing -----------------------------------------------


async def test_a_row_is_decided_or_cancelled(database: Database) -> None:
    """Of a decision and a cancel that race exactly one takes place, by an append or an operator."""
    one, two = await database.open(), await database.open()
    await one.initialise(PARTITIONS)
    base, fired = 0, 0
    races = RACES // 10 if database.url.startswith("dynamodb") else RACES
    for attempt in range(races):
        if attempt % 1000 == 999:
            log.warning("%s of %s races, %s fired", attempt + 1, races, fired)
        timer = row(timer="t")
        set_it = replace(causing(base, timer), events=())
        outcome = dataclasses.replace(set_it.outcome, sequence=base, events=())
        await commit(one, chain(TARGET, base, replace(set_it, outcome=outcome)))
        ending = chain(TARGET, base, causing(base, cancels=("t",)))
        by_hand = attempt % 2 == 0

        fired_by = consuming(timer, base)

        async def fire(taken: Chain = fired_by) -> bool:
            [result] = await one.events.append([taken], NOW)
            return isinstance(result, Committed)

        async def end(ending: Chain = ending, row: str = timer.command_id) -> bool:
            if by_hand:  # noqa: B023 - awaited here
                return bool(await two.events.unschedule([row]))
            [result] = await two.events.append([ending], NOW)
            return isinstance(result, Committed)

        if attempt % 4 < 2:
            decided, ended = await asyncio.gather(fire(), end())
        else:
            ended, decided = await asyncio.gather(end(), fire())
        base += int(ended and not by_hand)
        assert decided != ended, attempt
        base += int(decided)
        fired += int(decided)
        assert bool(await one.events.find_outcomes([timer.command_id])) == decided
        assert await ids(one) == []
    assert (await one.events.heads())[1] == base


# --- Held back ---------------------------------------------------------------


async def test_a_failed_command_holds_back_what_is_for_its_target(storage: Storage) -> None:
    """Rows for it, older and newer, are not there until its outcome is replaced; others are."""
    events = storage.events
    first, later, other = row(), row(), row(key=account_in(2))
    await events.schedule([first, later, other])
    refused = replace(failed(TARGET, command_id=first.command_id), holds_back=True)
    await commit(storage, chain(TARGET, 0, replace(refused, scheduled=True)))
    newest = row()
    await events.schedule([newest])
    rows = [later, newest, other]

    async def due() -> set[str]:
        return {r.command_id for p in range(PARTITIONS) for r in await events.due(p, 10)}

    assert await due() == {other.command_id}
    assert await events.next_due([1]) == {}
    assert await events.count_due(range(PARTITIONS)) == {2: 1}
    assert set(await events.find_scheduled([r.command_id for r in rows])) == {other.command_id}
    assert await events.append([consuming(later)], NOW) == [Conflicted(0)]
    assert len(await ids(storage)) == 3

    decided = accepted(TARGET, 0, command_id=first.command_id, replaces_failed=True)
    await commit(storage, chain(TARGET, 0, replace(decided, holds_back=True)))
    assert await due() == {r.command_id for r in rows}
    assert set(await events.next_due(range(PARTITIONS))) == {1, 2}
    await commit(storage, consuming(later))


class GaveUpError(Exception):
    """What ends a transaction."""


async def test_rows_are_added_in_the_transaction_that_moves_a_checkpoint(storage: Storage) -> None:
    """Both are there when it has committed, neither when it was rolled back."""
    caused = row()

    async def react(*, fail: bool) -> None:
        async with storage.views.transaction() as transaction:
            await transaction.advance("$reactor", 0, 0, 5)
            await transaction.schedule([caused])
            if fail:
                raise GaveUpError

    with pytest.raises(GaveUpError):
        await react(fail=True)
    assert await ids(storage) == []
    await react(fail=False)
    assert await storage.events.list_scheduled(None, 10) == [caused]
    assert await storage.views.checkpoints("$reactor") == {0: 5}
    await commit(storage, consuming(caused))
