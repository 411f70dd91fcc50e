"""An append: partitions side by side, each in transactions that hold only if nothing moved.

There are no locks to take in DynamoDB. So what the plan depends on is read,
and written back as a condition on each item of the transaction: the head is
where it was, the events are not there yet, the outcome is not there or still
failed, the snapshot has the number it had. Where one does not hold nothing is
written, and the plan is made again. Every chain is whole in one transaction.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.ports.store import Committed
from cqrs_es.stores import append_plan
from cqrs_es.stores.append_plan import AppendState
from cqrs_es.stores.dynamodb import dead_letters, items, places, scheduled
from cqrs_es.stores.dynamodb.actions import ABSENT, check, condition, delete, put, update
from cqrs_es.stores.dynamodb.failures import ConditionFailed, Contended
from cqrs_es.stores.dynamodb.fitting import check_fits, cut
from cqrs_es.stores.dynamodb.table import pause, side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from datetime import datetime

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.store import Chain, ChainResult, Snapshot, StoredOutcome, UniqueKey
    from cqrs_es.stores.append_plan import AppendPlan
    from cqrs_es.stores.dynamodb.actions import Action, Condition, Key
    from cqrs_es.stores.dynamodb.scheduled import Found
    from cqrs_es.stores.dynamodb.table import Table
    from cqrs_es.types import AggregateKey

MAX_TRIES: Final = 20
"""A try is lost to somebody else's success: so many in a row are other processes' work."""


class Appender:
    """Writes chains; appends of one process to one partition queue here, not at the server."""

    def __init__(self, table: Table, now: Callable[[], datetime]) -> None:
        self._table = table
        self._now = now
        self._turns: defaultdict[int, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def append(
        self, chains: Sequence[Chain], recorded_at: datetime, partitions: int
    ) -> list[ChainResult]:
        """Write what passes its checks; results in the order of `chains`.

        Raises `TooLarge`, having written nothing, for a chain that fits in no transaction.
        """
        for chain in chains:
            _check_partition(chain, partitions)
            check_fits(chain)
        places: defaultdict[int, list[int]] = defaultdict(list)
        for place, chain in enumerate(chains):
            places[chain.partition].append(place)

        async def append_to(partition: int) -> list[ChainResult]:
            some = [chains[place] for place in places[partition]]
            async with self._turns[partition]:
                return await self._append_in_order(some, recorded_at)

        numbers = sorted(places)
        results = await side_by_side(append_to, numbers)
        answers: dict[int, ChainResult] = {}
        for partition, some in zip(numbers, results, strict=True):
            answers.update(zip(places[partition], some, strict=True))
        return [answers[place] for place in range(len(chains))]

    async def _append_in_order(
        self, chains: Sequence[Chain], recorded_at: datetime
    ) -> list[ChainResult]:
        """Append chains of one partition, in as few transactions as they fit in."""
        results: list[ChainResult] = []
        for some in cut(chains):
            results += await self._append_at_once(some, recorded_at)
        return results

    async def _append_at_once(
        self, chains: Sequence[Chain], recorded_at: datetime
    ) -> list[ChainResult]:
        for tries in range(1, MAX_TRIES + 1):
            state, found = await self._read(chains)
            plan = append_plan.plan_append(chains, state, recorded_at)
            try:
                if plan.writes:
                    await self._table.transact(
                        [
                            *_actions(chains, state, plan, recorded_at),
                            *scheduled.changes(plan, found),
                        ]
                    )
            except (ConditionFailed, Contended):
                await pause(tries)
            else:
                return list(plan.results)
        message = f"others wrote to partition {chains[0].partition} {MAX_TRIES} times; try again"
        raise errors.StoreUnavailable(message)

    # --- Reading -------------------------------------------------------------

    async def _read(self, chains: Sequence[Chain]) -> tuple[AppendState, Found]:
        """Read what the plan depends on, in any order: the transaction has it all as conditions."""
        wanted = append_plan.wanted(chains)
        ids = wanted.command_ids
        head = places.head_key(chains[0].partition)
        snapshots = {places.snapshot_key(key): key for key in wanted.snapshots}
        keys = {places.unique_key(key): key for key in wanted.unique_keys}
        probes = [key for chain in chains for key in _probes(chain)]
        small, outcomes, found = await asyncio.gather(
            self._table.get_many([head, *snapshots, *probes, *keys], *_SMALL),
            self._table.get_many(map(places.outcome_key, ids)),
            scheduled.find_for(self._table, chains, wanted),
        )
        known = {id_: outcomes.get(places.outcome_key(id_)) for id_ in ids}
        state = AppendState(
            heads={chains[0].partition: small[head]["head"] if head in small else 0},
            versions=await self._versions(chains, frozenset(small)),
            outcomes={id_: items.outcome_of(fields) for id_, fields in known.items() if fields},
            snapshot_numbers={
                key: small[place]["current_snapshot"]
                for place, key in snapshots.items()
                if place in small
            },
            holders={
                key: small[place]["aggregate_id"] for place, key in keys.items() if place in small
            },
            scheduled=found.free,
            timers=found.timer_ids,
            now=self._now(),
        )
        return state, found

    async def _versions(
        self, chains: Sequence[Chain], found: frozenset[object]
    ) -> dict[AggregateKey, int]:
        """Return where aggregates stand: at their bases, unless the probes say otherwise."""
        versioned = [(c.key, c.base_sequence) for c in chains if c.base_sequence is not None]
        expected = dict(versioned)
        elsewhere = [key for key, base in versioned if not _stands_at(key, base, found)]
        actual = await side_by_side(self._last_sequence, elsewhere)
        return expected | dict(zip(elsewhere, actual, strict=True))

    async def _last_sequence(self, key: AggregateKey) -> int:
        stream = places.all_of(places.stream_of(key))
        found = await self._table.query(stream, limit=1, descending=True, attributes=("sequence",))
        return int(found[0]["sequence"]) if found else 0


_SMALL: Final = ("head", "current_snapshot", "aggregate_id")


def _check_partition(chain: Chain, partitions: int) -> None:
    if not 0 <= chain.partition < partitions:
        message = f"the store has no partition {chain.partition}; check CQRS_ES_PARTITIONS"
        raise errors.PartitionsMismatch(message)


def _probes(chain: Chain) -> Iterator[Key]:
    """Name the events that tell whether an aggregate stands at a chain's base."""
    if chain.base_sequence is not None:
        yield places.event_key(chain.key, chain.base_sequence + 1)
        if chain.base_sequence:
            yield places.event_key(chain.key, chain.base_sequence)


def _stands_at(key: AggregateKey, base: int, found: frozenset[object]) -> bool:
    """Whether the base's event is there and the next is not; events are never deleted."""
    reached = not base or places.event_key(key, base) in found
    return reached and places.event_key(key, base + 1) not in found


# --- Writing -----------------------------------------------------------------


def _actions(
    chains: Sequence[Chain], state: AppendState, plan: AppendPlan, recorded_at: datetime
) -> list[Action]:
    return [
        *_events(plan.events),
        *(_head(p, state.heads[p], to) for p, to in plan.new_heads.items()),
        *_unmoved(chains, plan),
        *(_outcome(stored, ABSENT, recorded_at) for stored in plan.inserted_outcomes),
        *(_outcome(stored, _STILL_FAILED, recorded_at) for stored in plan.replaced_outcomes),
        *(_snapshot(snapshot, ABSENT) for snapshot in plan.inserted_snapshots),
        *(_snapshot(new, _is_number(new.number - 1)) for new in plan.replaced_snapshots),
        *(delete(places.attempts_key(id_)) for id_ in plan.settled_attempts),
        *(delete(places.letter_key(id_)) for id_ in plan.settled_letters),
        *(dead_letters.adding(letter) for letter in plan.dead_letters),
        *_moved_keys(chains, state, plan),
    ]


_STILL_FAILED: Final = condition("#outcome_status = :failed", failed="failed")


def _is_number(number: int) -> Condition:
    return condition("#current_snapshot = :number", number=number)


def _snapshot(snapshot: Snapshot, only_if: Condition) -> Action:
    return put(places.snapshot_key(snapshot.key), items.snapshot_fields(snapshot), only_if)


def _events(events: Sequence[StoredEvent]) -> Iterator[Action]:
    """Write events by aggregate, and an entry of the log for each aggregate's."""
    for event in events:
        yield put(places.event_key(event.key, event.sequence), items.event_fields(event), ABSENT)
    for key, group in itertools.groupby(events, lambda event: event.key):
        first, *rest = group
        fields = {
            "aggregate_type": key.type,
            "aggregate_id": key.id,
            "first_sequence": first.sequence,
            "events": 1 + len(rest),
            "log_offset": first.offset,
        }
        yield put(places.entry_key(first.partition, first.offset), fields, ABSENT)


def _head(partition: int, was: int, to: int) -> Action:
    change = condition("SET #head = :to", to=to)
    only_if = (
        condition("#head = :was", was=was) if was else condition("attribute_not_exists(#head)")
    )
    return update(places.head_key(partition), change, only_if)


def _unmoved(chains: Sequence[Chain], plan: AppendPlan) -> Iterator[Action]:
    """Check that what only rejections were decided on has not moved: no event does it for them."""
    for chain, result in zip(chains, plan.results, strict=True):
        silent = not any(command.events for command in chain.commands)
        if isinstance(result, Committed) and silent and chain.base_sequence is not None:
            yield check(places.event_key(chain.key, chain.base_sequence + 1), ABSENT)


def _moved_keys(chains: Sequence[Chain], state: AppendState, plan: AppendPlan) -> Iterator[Action]:
    """Change holders from those that were read; check also what is claimed and given up at once."""
    holders: dict[UniqueKey, str | None] = dict.fromkeys(plan.freed_keys)
    holders |= dict(plan.held_keys)
    for chain, result in zip(chains, plan.results, strict=True):
        if chain.moves is not None and isinstance(result, Committed):
            passing = chain.moves.claims - state.holders.keys()
            holders = {**dict.fromkeys(passing), **holders}
    for key, holder in holders.items():
        was, place = state.holders.get(key), places.unique_key(key)
        only_if = ABSENT if was is None else condition("#aggregate_id = :was", was=was)
        if holder is not None:
            yield put(place, {"aggregate_id": holder}, only_if)
        else:
            yield check(place, only_if) if was is None else delete(place, only_if)


def _outcome(stored: StoredOutcome, only_if: Condition, recorded_at: datetime) -> Action:
    key = places.outcome_key(stored.outcome.command_id)
    return put(key, items.outcome_fields(stored, recorded_at), only_if)
