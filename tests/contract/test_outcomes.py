"""What looking outcomes up, pruning them and counting attempts promises."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

from cqrs_es.messages import Status
from cqrs_es.ports.store import StoredOutcome
from cqrs_es.types import new_command_id
from tests.contract.building import (
    NOW,
    accepted,
    account,
    account_in,
    chain,
    commit,
    events,
    failed,
    refused,
)

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import DecidedCommand

KEY = account("ACCT-001")
LATER = NOW + timedelta(days=30)


async def test_outcomes_come_back_as_they_were(storage: Storage) -> None:
    """An outcome is found by its id, with all its fields and the hash of its command."""
    command = accepted(KEY, 0, events(2))
    rejected = refused(KEY, 2)
    outcomes = await commit(storage, chain(KEY, 0, command, rejected))
    ids = [command.outcome.command_id, rejected.outcome.command_id]
    found = await storage.events.find_outcomes([*ids, new_command_id()])
    assert found == {
        id_: StoredOutcome(outcome, "c0ffee") for id_, outcome in zip(ids, outcomes, strict=True)
    }


async def test_looking_for_no_outcome(storage: Storage) -> None:
    """No ids, or unknown ones, find nothing."""
    assert await storage.events.find_outcomes([]) == {}
    assert await storage.events.find_outcomes([new_command_id()]) == {}


async def test_looking_for_many_outcomes(storage: Storage) -> None:
    """Hundreds of outcomes are written and found in one call each."""
    most = 600 if (storage.views.sql is not None) else 150
    commands = [accepted(account(f"{n}"), None) for n in range(most)]
    await commit(storage, *(chain(account(f"{n}"), None, c) for n, c in enumerate(commands)))
    ids = {command.outcome.command_id for command in commands}
    assert (await storage.events.find_outcomes(ids)).keys() == ids


# --- Pruning -----------------------------------------------------------------


async def _record(storage: Storage, days_ago: int, *commands: DecidedCommand) -> list[str]:
    moment = LATER - timedelta(days=days_ago)
    await storage.events.append([chain(KEY, None, *commands)], moment)
    return [command.outcome.command_id for command in commands]


async def test_pruning_takes_the_old_ones_only(storage: Storage) -> None:
    """Outcomes recorded before the moment are deleted, those recorded at it or later stay."""
    old = await _record(storage, 31, accepted(KEY, None), refused(KEY, None))
    kept = await _record(storage, 30, accepted(KEY, None))
    kept += await _record(storage, 1, refused(KEY, None))
    assert await storage.events.prune_outcomes(LATER - timedelta(days=30), 100) == 2
    assert (await storage.events.find_outcomes([*old, *kept])).keys() == set(kept)
    assert await storage.events.prune_outcomes(LATER - timedelta(days=30), 100) == 0


async def test_pruning_is_limited(storage: Storage) -> None:
    """No more are deleted at a time than asked for, until all old ones are gone."""
    await _record(storage, 40, *(accepted(KEY, None) for _ in range(25)))
    pruned = [await storage.events.prune_outcomes(LATER, 10) for _ in range(4)]
    assert pruned == [10, 10, 5, 0]


async def test_pruning_never_deletes_failed(storage: Storage) -> None:
    """A failed outcome stays however old it is, and does not use the limit up."""
    [lost] = await _record(storage, 99, failed(KEY, command_id=new_command_id()))
    await _record(storage, 50, *(accepted(KEY, None) for _ in range(3)))
    assert await storage.events.prune_outcomes(LATER, 2) == 2
    assert await storage.events.prune_outcomes(LATER, 2) == 1
    assert await storage.events.prune_outcomes(LATER, 2) == 0
    found = await storage.events.find_outcomes([lost])
    assert found[lost].outcome.status is Status.FAILED


async def test_pruning_spares_a_retried_outcome(storage: Storage) -> None:
    """An outcome that replaced a failed one is as old as the replacement."""
    command_id = new_command_id()
    await _record(storage, 40, failed(KEY, command_id=command_id))
    await _record(storage, 5, accepted(KEY, None, command_id=command_id, replaces_failed=True))
    assert await storage.events.prune_outcomes(LATER - timedelta(days=30), 10) == 0


async def test_pruning_leaves_what_is_kept_for_ever(storage: Storage) -> None:
    """Whatever its age, retried ones too; and others of the same age go."""
    retried = new_command_id()
    long_ago = LATER - timedelta(days=9999)
    kept = [accepted(KEY, None), refused(KEY, None), failed(KEY, command_id=retried)]
    await storage.events.append([chain(KEY, None, *kept, keeps_outcomes=True)], long_ago)
    again = accepted(KEY, None, command_id=retried, replaces_failed=True)
    await storage.events.append([chain(KEY, None, again, keeps_outcomes=True)], long_ago)
    await _record(storage, 40, *(accepted(KEY, None) for _ in range(3)))
    assert await storage.events.prune_outcomes(LATER + timedelta(days=9999), 100) == 3
    ids = {command.outcome.command_id for command in kept}
    assert (await storage.events.find_outcomes(ids)).keys() == ids


# --- Attempts ----------------------------------------------------------------


async def test_g9_attempts_are_recorded(storage: Storage) -> None:
    """The last attempt at each command is found; of others there is none."""
    first, second, unknown = (new_command_id() for _ in range(3))
    await storage.events.record_attempts({first: 1, second: 0})
    await storage.events.record_attempts({first: 2})
    assert await storage.events.find_attempts([first, second, unknown]) == {first: 2, second: 0}
    assert await storage.events.find_attempts([]) == {}


async def test_g9_an_attempt_recorded_again_counts_once(storage: Storage) -> None:
    """Whoever does not know whether an attempt was recorded may record it again, at any time."""
    ids = [new_command_id() for _ in range(10)]
    attempts = dict.fromkeys(ids, 1)
    await asyncio.gather(*(storage.events.record_attempts(attempts) for _ in range(5)))
    assert await storage.events.find_attempts(ids) == attempts


async def test_g9_many_attempts_are_recorded_together(storage: Storage) -> None:
    """Hundreds of attempts are written and found in one call each."""
    most = 600 if (storage.views.sql is not None) else 150
    attempts = {new_command_id(): number % 3 for number in range(most)}
    await storage.events.record_attempts(attempts)
    assert await storage.events.find_attempts(attempts) == attempts


async def test_g9_attempts_are_forgotten(storage: Storage) -> None:
    """Those named have none any more; others keep theirs."""
    first, second, unknown = (new_command_id() for _ in range(3))
    await storage.events.record_attempts({first: 2, second: 1})
    await storage.events.forget_attempts([first, unknown])
    await storage.events.forget_attempts([])
    assert await storage.events.find_attempts([first, second]) == {second: 1}


async def test_g9_attempts_are_no_outcome(storage: Storage) -> None:
    """A command that was only attempted has no outcome and may commit."""
    command = accepted(account_in(0), 0, events(1), attempted=True)
    await storage.events.record_attempts({command.outcome.command_id: 1})
    assert await storage.events.find_outcomes([command.outcome.command_id]) == {}
    await commit(storage, chain(account_in(0), 0, command))
