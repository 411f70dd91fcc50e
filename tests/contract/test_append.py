"""What `append` promises: versions, one outcome per id, all or nothing, no holes (G2–G5)."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es import errors
from cqrs_es.messages import Status
from cqrs_es.ports.store import Committed, Conflicted, LoadRequest
from cqrs_es.stores.sql import expected
from cqrs_es.stores.sql.expected import Expectations
from cqrs_es.types import new_command_id
from tests.contract.building import (
    NOW,
    PARTITIONS,
    accepted,
    account,
    account_in,
    assert_complete,
    chain,
    commit,
    conflict,
    event,
    events,
    failed,
    letter,
    one,
    refused,
    snapshot,
    stored_snapshot,
    stream,
    whole_log,
)
from tests.stores import SERVERS, on_dynamodb, on_sql

if TYPE_CHECKING:
    from cqrs_es.messages import Outcome
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import Chain, ChainResult
    from tests.contract.conftest import Database

KEY = account("ACCT-001")


@pytest.fixture(autouse=True, params=["reads first", "expects"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test append in both ways that servers know; expectations are often wrong then."""
    if request.param == "expects":
        url: str = request.getfixturevalue("store_url")
        if not url.startswith(SERVERS):
            pytest.skip("only servers are spared round trips")
        monkeypatch.setattr(expected, "UNMOVED_TIMES", 0)
        monkeypatch.setattr(Expectations, "__init__", expect_empty_partitions)


def expect_empty_partitions(expectations: Expectations) -> None:
    """Begin with heads of 0, where an append by this process has left no other."""
    expectations._heads = defaultdict(int)
    expectations._unmoved_times = Counter()


# --- Versions ----------------------------------------------------------------


async def test_a24_append_and_conflict(storage: Storage) -> None:
    """Events are appended where the aggregate stands, and nothing is where it stands elsewhere."""
    assert await stream(storage, KEY) == []
    await commit(storage, one(KEY, 0, 2))
    assert await conflict(storage, one(KEY, 1, 2)) == 2
    assert [e.sequence for e in await stream(storage, KEY)] == [1, 2]
    assert [e.sequence for e in await stream(storage, KEY, after=1)] == [2]


async def test_a24_empty_append(storage: Storage) -> None:
    """Appending nothing does nothing."""
    assert await storage.events.append([], NOW) == []
    assert set((await storage.events.heads()).values()) == {0}


async def test_stored_events_hold_all_that_was_given(storage: Storage) -> None:
    """An event comes back with its key, place, type, version, content, command and moment."""
    command = accepted(KEY, 0, [event(1, "Opened", by="é🏦")])
    await commit(storage, chain(KEY, 0, command))
    [stored] = await stream(storage, KEY)
    assert (stored.key, stored.sequence, stored.offset) == (KEY, 1, 1)
    assert stored.partition == KEY.partition(PARTITIONS)
    assert (stored.event_type, stored.event_version) == ("Opened", "1.0")
    assert orjson.loads(stored.payload) == {"number": 1, "by": "é🏦"}
    assert orjson.loads(stored.metadata) == {"correlation_id": "order-17"}
    assert stored.command_id == command.outcome.command_id
    assert stored.recorded_at == NOW
    assert stored.recorded_at.tzinfo is not None
    assert await storage.events.read_log(stored.partition, 0, 10) == [stored]


async def test_b5_second_stale_commit_conflicts(storage: Storage) -> None:
    """Of two commits decided on the same state only the first is written."""
    await commit(storage, one(KEY, 0, 1))
    await commit(storage, one(KEY, 1, 1))
    assert await conflict(storage, one(KEY, 1, 1)) == 2
    assert len(await stream(storage, KEY)) == 2


async def test_b5_concurrent_commits_on_one_state(storage: Storage) -> None:
    """Of commits that race on the same state exactly one is written."""
    racing = [storage.events.append([one(KEY, 0, 2)], NOW) for _ in range(10)]
    results = [result for [result] in await asyncio.gather(*racing)]
    assert sum(isinstance(result, Committed) for result in results) == 1
    assert {result.actual for result in results if isinstance(result, Conflicted)} == {2}
    assert len(await stream(storage, KEY)) == 2


async def test_g3_rejection_on_stale_state_conflicts(storage: Storage) -> None:
    """A chain without events is checked too: its rejection was decided on a state."""
    await commit(storage, one(KEY, 0, 2))
    stale = refused(KEY, 1)
    assert await conflict(storage, chain(KEY, 1, stale)) == 2
    assert await storage.events.find_outcomes([stale.outcome.command_id]) == {}
    await commit(storage, chain(KEY, 2, refused(KEY, 2)))


async def test_g3_base_beyond_the_aggregate_conflicts(storage: Storage) -> None:
    """A chain decided on more events than there are conflicts, and says how many there are."""
    assert await conflict(storage, one(KEY, 3, 1)) == 0
    assert await stream(storage, KEY) == []


async def test_g3_chain_that_looked_at_nothing_is_not_checked(storage: Storage) -> None:
    """Where no aggregate was looked at there is no version to conflict with."""
    await commit(storage, one(KEY, 0, 2))
    [outcome] = await commit(storage, chain(KEY, None, refused(KEY, None)))
    assert (outcome.sequence, outcome.partition, outcome.offset) == (None, None, None)


async def test_g3_others_commit_beside_a_conflict(storage: Storage) -> None:
    """A chain that conflicts leaves no trace and keeps nobody else from committing."""
    keys = [account_in(partition, nth) for partition in range(2) for nth in range(3)]
    stale = keys[1]
    await commit(storage, one(stale, 0, 1))
    chains = [one(key, 0, 2) for key in keys]
    results = await storage.events.append(chains, NOW)
    assert [type(result) for result in results] == [
        Conflicted if key == stale else Committed for key in keys
    ]
    doomed = chains[1].commands[0].outcome.command_id
    assert await storage.events.find_outcomes([doomed]) == {}
    assert_complete(await whole_log(storage))
    assert [len(await stream(storage, key)) for key in keys] == [2, 1, 2, 2, 2, 2]


# --- All or nothing ----------------------------------------------------------


async def test_g4_chain_commits_whole(storage: Storage) -> None:
    """Events, outcomes and snapshot of a chain commit together; its outcomes come back complete."""
    await commit(storage, one(account_in(1, 5), 0, 3))
    key = account_in(1)
    commands = (
        accepted(key, 0, events(2)),
        refused(key, 2),
        accepted(key, 2, events(1, first=3)),
        accepted(key, 3),
    )
    outcomes = await commit(
        storage, chain(key, 0, *commands, snapshot=snapshot(key, 3, 1, total=6))
    )
    assert [(o.status, o.sequence, o.partition, o.offset) for o in outcomes] == [
        (Status.ACCEPTED, 2, 1, 5),
        (Status.REJECTED, 2, None, None),
        (Status.ACCEPTED, 3, 1, 6),
        (Status.ACCEPTED, 3, None, None),
    ]
    ids = [o.command_id for o in outcomes]
    assert [e.command_id for e in await stream(storage, key)] == [ids[0], ids[0], ids[2]]
    found = await storage.events.find_outcomes(ids)
    assert [found[id_].outcome for id_ in ids] == outcomes
    stored = await stored_snapshot(storage, key)
    assert stored is not None
    assert (stored.last_sequence, stored.number) == (3, 1)


async def test_g4_conflicted_chain_leaves_no_trace(storage: Storage) -> None:
    """Of a chain whose last command conflicts nothing is stored and nothing is deleted."""
    known = accepted(KEY, None)
    await commit(storage, chain(KEY, None, known))
    attempted = new_command_id()
    await storage.events.record_attempts({attempted: 1})
    lost = new_command_id()
    doomed = chain(
        KEY,
        0,
        accepted(KEY, 0, events(2), command_id=attempted, attempted=True),
        failed(KEY, command_id=lost),
        accepted(KEY, 2, events(1, first=3), command_id=known.outcome.command_id),
        snapshot=snapshot(KEY, 3, 1),
    )
    assert await conflict(storage, doomed) == 0
    assert await stream(storage, KEY) == []
    assert await stored_snapshot(storage, KEY) is None
    assert await storage.events.find_outcomes([attempted, lost]) == {}
    assert await storage.dead_letters.count() == 0
    assert await storage.events.find_attempts([attempted]) == {attempted: 1}


async def test_b12_snapshot_gone_before_the_commit(storage: Storage) -> None:
    """A chain that would replace a snapshot that is gone conflicts, and none of it is written."""
    await commit(storage, one(KEY, 0, 2))
    assert await conflict(storage, one(KEY, 2, 1, snapshot=snapshot(KEY, 3, 2))) == 2
    assert len(await stream(storage, KEY)) == 2
    assert await stored_snapshot(storage, KEY) is None


@on_sql
async def test_b15_a_thousand_events(storage: Storage) -> None:
    """One command may yield a thousand events."""
    [outcome] = await commit(storage, one(KEY, 0, 1000))
    assert (outcome.sequence, outcome.offset) == (1000, 1000)
    stored = await stream(storage, KEY)
    assert [orjson.loads(e.payload)["number"] for e in stored] == list(range(1, 1001))
    assert_complete(await whole_log(storage))


@on_dynamodb
async def test_b15_a_thousand_events_are_refused(storage: Storage) -> None:
    """More events than fit in a transaction are refused before anything is written."""
    fitting = one(account("fits"), 0, 97)  # beside them go an outcome, the log's entry, the head
    for doomed in (one(KEY, 0, 98), one(KEY, 0, 1000)):
        with pytest.raises(errors.TooLarge, match="fewer or smaller events"):
            await storage.events.append([fitting, doomed], NOW)
    assert set((await storage.events.heads()).values()) == {0}
    assert await stream(storage, KEY) == []
    [outcome] = await commit(storage, fitting)
    assert outcome.offset == 97


@on_dynamodb
async def test_an_event_of_half_a_megabyte_is_refused(storage: Storage) -> None:
    """An event larger than an item of DynamoDB is refused before anything is written."""
    doomed = accepted(KEY, 0, [event(1, text="💸" * 130_000)])
    with pytest.raises(errors.TooLarge, match="an item of"):
        await storage.events.append([chain(KEY, 0, doomed)], NOW)
    assert set((await storage.events.heads()).values()) == {0}


@on_dynamodb
async def test_more_chains_than_fit_in_a_transaction(storage: Storage) -> None:
    """An append of any size is cut into transactions; offsets are in the order of its chains."""
    chains = [one(account_in(1, nth), 0, 20) for nth in range(6)]
    chains.insert(3, one(account_in(0), 0, 2))
    outcomes = await commit(storage, *chains)
    assert [(o.partition, o.offset) for o in outcomes] == [
        *((1, 20), (1, 40), (1, 60)),
        (0, 2),
        *((1, 80), (1, 100), (1, 120)),
    ]
    assert_complete(await whole_log(storage))


async def test_big_payloads(storage: Storage) -> None:
    """Events of 200 KiB come back as they were, many in one append."""
    text = "💸'\"\\%s?" * 20_000
    made = [event(number, text=text) for number in range(1, 11)]
    await commit(storage, chain(KEY, 0, accepted(KEY, 0, made)))
    for stored in await stream(storage, KEY):
        assert orjson.loads(stored.payload)["text"] == text


# --- Snapshots ---------------------------------------------------------------


async def test_a25_snapshot_replaces_its_predecessor_only(storage: Storage) -> None:
    """A snapshot is written as number 1, replaced by the next number, and by no stale one."""
    assert await stored_snapshot(storage, KEY) is None
    await commit(storage, one(KEY, 0, 1, snapshot=snapshot(KEY, 1, 1, total=1)))
    await commit(storage, one(KEY, 1, 1, snapshot=snapshot(KEY, 2, 2, total=3)))
    for stale in (1, 2, 4):
        doomed = one(KEY, 2, 1, snapshot=snapshot(KEY, 3, stale, total=9))
        assert await conflict(storage, doomed) == 2
    stored = await stored_snapshot(storage, KEY)
    assert stored is not None
    assert (stored.key, stored.last_sequence, stored.number) == (KEY, 2, 2)
    assert orjson.loads(stored.payload) == {"total": 3}
    assert len(await stream(storage, KEY)) == 2


async def test_a25_snapshots_of_many_aggregates(storage: Storage) -> None:
    """One append writes first snapshots and replaces others."""
    old, new = account("old"), account("new")
    await commit(storage, one(old, 0, 1, snapshot=snapshot(old, 1, 1)))
    await commit(
        storage,
        one(new, 0, 2, snapshot=snapshot(new, 2, 1)),
        one(old, 1, 2, snapshot=snapshot(old, 3, 2)),
    )
    loaded = await storage.events.load([LoadRequest(k, snapshot=True) for k in (old, new)])
    assert [found.snapshot and found.snapshot.number for found in loaded] == [2, 1]


# --- One outcome per command id ----------------------------------------------


async def test_g2_second_outcome_for_an_id_conflicts(storage: Storage) -> None:
    """A command id that has an outcome gets no other; the aggregate's own version is reported."""
    first = accepted(KEY, 0, events(1))
    await commit(storage, chain(KEY, 0, first))
    again = accepted(KEY, 1, events(1), command_id=first.outcome.command_id)
    assert await conflict(storage, chain(KEY, 1, again)) == 1
    assert len(await stream(storage, KEY)) == 1


async def test_g2_one_id_twice_in_one_append(storage: Storage) -> None:
    """Of two chains with one command id in the same append the second conflicts."""
    twice = new_command_id()
    chains = [
        chain(key, 0, accepted(key, 0, events(1), command_id=twice))
        for key in (account_in(0), account_in(1))
    ]
    results = await storage.events.append(chains, NOW)
    assert [type(result) for result in results] == [Committed, Conflicted]
    assert await stream(storage, account_in(1)) == []


async def test_g2_one_id_racing_in_two_partitions(database: Database, storage: Storage) -> None:
    """Of concurrent appends with one command id, which share no lock, exactly one commits."""
    other = await database.open()
    turns = 20 if (storage.views.sql is not None) else 5
    for turn in range(turns):
        contested = new_command_id()
        keys = [account_in(partition, turn) for partition in (0, 1)]
        chains = [chain(k, 0, accepted(k, 0, events(1), command_id=contested)) for k in keys]
        [[first], [second]] = await asyncio.gather(
            storage.events.append(chains[:1], NOW), other.events.append(chains[1:], NOW)
        )
        assert {type(first), type(second)} == {Committed, Conflicted}
    assert sum((await storage.events.heads()).values()) == turns


async def test_g2_failed_outcome_comes_with_its_dead_letter(storage: Storage) -> None:
    """A failed command's outcome and dead letter commit together."""
    command_id = new_command_id()
    await commit(storage, chain(KEY, None, failed(KEY, command_id=command_id)))
    assert await storage.dead_letters.get(command_id) == letter(command_id)
    found = await storage.events.find_outcomes([command_id])
    assert found[command_id].outcome.status is Status.FAILED


async def test_g2_failed_outcome_is_replaced_on_retry(storage: Storage) -> None:
    """A retry replaces a failed outcome and its dead letter is gone."""
    command_id = new_command_id()
    await commit(storage, chain(KEY, None, failed(KEY, command_id=command_id)))
    retried = accepted(KEY, 0, events(1), command_id=command_id, replaces_failed=True)
    [outcome] = await commit(storage, chain(KEY, 0, retried))
    found = await storage.events.find_outcomes([command_id])
    assert found[command_id].outcome == outcome
    assert outcome.status is Status.ACCEPTED
    assert await storage.dead_letters.count() == 0


async def test_g2_failed_outcome_stands_unless_it_is_a_retry(storage: Storage) -> None:
    """Only a retry replaces a failed outcome."""
    command_id = new_command_id()
    await commit(storage, chain(KEY, None, failed(KEY, command_id=command_id)))
    await conflict(storage, chain(KEY, 0, accepted(KEY, 0, events(1), command_id=command_id)))
    assert await storage.dead_letters.count() == 1
    assert await stream(storage, KEY) == []


async def test_g2_retry_replaces_no_final_outcome(storage: Storage) -> None:
    """Accepted and rejected are final, also for a retry."""
    for final in (accepted(KEY, 0), refused(KEY, 0)):
        command_id = final.outcome.command_id
        await commit(storage, chain(KEY, 0, final))
        retried = accepted(KEY, 0, events(1), command_id=command_id, replaces_failed=True)
        assert await conflict(storage, chain(KEY, 0, retried)) == 0
        found = await storage.events.find_outcomes([command_id])
        assert found[command_id].outcome == final.outcome


async def test_g2_retry_that_fails_again(storage: Storage) -> None:
    """A retry that fails again keeps one outcome and one dead letter, with the attempts added."""
    command_id = new_command_id()
    await commit(storage, chain(KEY, None, failed(KEY, command_id=command_id)))
    again = failed(KEY, command_id=command_id, reason="again", replaces_failed=True)
    await commit(storage, chain(KEY, None, again))
    kept = await storage.dead_letters.get(command_id)
    assert kept is not None
    assert (kept.reason, kept.attempts) == ("again", 2)
    assert await storage.dead_letters.count() == 1


async def test_g9_attempts_end_with_the_outcome(storage: Storage) -> None:
    """Recorded attempts are deleted with the commit of the command's outcome."""
    command_id = new_command_id()
    await storage.events.record_attempts({command_id: 1})
    command = accepted(KEY, 0, events(1), command_id=command_id, attempted=True)
    await commit(storage, chain(KEY, 0, command))
    assert await storage.events.find_attempts([command_id]) == {}


# --- No holes ----------------------------------------------------------------


async def test_g5_offsets_follow_the_order_of_the_chains(storage: Storage) -> None:
    """Events of one partition get their offsets in the order in which chains were given."""
    keys = [account_in(2, nth) for nth in (4, 1, 3)]
    outcomes = await commit(storage, *(one(key, 0, 2) for key in keys))
    assert [o.offset for o in outcomes] == [2, 4, 6]
    found = await storage.events.read_log(2, 0, 10)
    assert [e.key for e in found] == [key for key in keys for _ in range(2)]


async def test_g5_heads_are_the_last_offsets(storage: Storage) -> None:
    """Every partition has a head, 0 while it is empty."""
    assert await storage.events.heads() == dict.fromkeys(range(PARTITIONS), 0)
    await commit(storage, one(account_in(1), 0, 3), one(account_in(3), 0, 1))
    assert await storage.events.heads() == {0: 0, 1: 3, 2: 0, 3: 1}


async def test_g5_conflicts_leave_no_hole(storage: Storage) -> None:
    """Offsets stay contiguous around appends that conflicted."""
    other = account_in(KEY.partition(PARTITIONS))
    for turn in range(5):
        await commit(storage, one(KEY, turn, 1))
        await conflict(storage, one(KEY, 0, 3))
        await commit(storage, one(other, turn, 1))
    assert_complete(await whole_log(storage))


async def test_g5_concurrent_appends_to_the_same_partitions(
    database: Database, storage: Storage
) -> None:
    """Appends that lock the same partitions, in any order of chains, neither fail nor tangle."""
    storages = [storage, await database.open()]
    writers, turns = (8, 10) if (storage.views.sql is not None) else (4, 2)

    async def write(writer: int) -> None:
        for turn in range(turns):
            keys = [account_in(partition, writer) for partition in range(PARTITIONS)]
            random.Random(turn).shuffle(keys)
            await commit(storages[writer % 2], *(one(key, turn * 2, 2) for key in keys))

    await asyncio.gather(*(write(writer) for writer in range(writers)))
    assert await storage.events.heads() == dict.fromkeys(range(PARTITIONS), writers * turns * 2)
    assert_complete(await whole_log(storage))


async def test_g5_cancelled_appends_leave_no_hole(storage: Storage) -> None:
    """A cancelled append is in the log whole, with its outcome, or not at all."""
    ids: list[str] = []
    for turn in range(30):
        key = account_in(turn % PARTITIONS, turn)
        command = accepted(key, 0, events(3))
        ids.append(command.outcome.command_id)
        await _cancel_midway(storage, chain(key, 0, command), steps=turn * turn)
    log = await whole_log(storage)
    assert_complete(log)
    written = [e.command_id for found in log.values() for e in found]
    outcomes: dict[str, Outcome] = {
        id_: stored.outcome for id_, stored in (await storage.events.find_outcomes(ids)).items()
    }
    assert {id_: written.count(id_) for id_ in ids} == {
        id_: 3 if id_ in outcomes else 0 for id_ in ids
    }
    await commit(storage, *(one(account_in(p, 99), 0, 1) for p in range(PARTITIONS)))


async def _cancel_midway(storage: Storage, chain_: Chain, steps: int) -> list[ChainResult] | None:
    """Cancel an append after so many turns of the event loop."""
    task = asyncio.create_task(storage.events.append([chain_], NOW))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    try:
        return await task
    except asyncio.CancelledError:
        return None
