"""What an append does, decided from what it read under its locks; no I/O (G2 to G5).

Every store runs the same steps: lock the heads of the partitions that are `wanted`, read
an `AppendState`, call `plan_append`, write the plan. So the rules are written and tested
once. On an SQL server what it would read may be expected instead, and checked under the locks.
Most appends are plain: events and outcomes, nothing else is read or written.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.messages import Outcome, Status
from cqrs_es.ports.store import Committed, Conflicted, StoredEvent, StoredOutcome

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.ports.store import (
        Chain,
        ChainResult,
        DecidedCommand,
        KeyMoves,
        ScheduledCommand,
        Snapshot,
        UniqueKey,
    )
    from cqrs_es.types import AggregateKey


MOST_TIMERS: Final = 1_000
"""How many timers an aggregate may have."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What an append locks and reads, of all its chains.

    `partitions`: whose heads it locks, in that order. `command_ids`: whose outcomes it looks
    up, each once. `versions`, `snapshots`: the aggregates whose last sequence and snapshot
    number it reads. `scheduled`: the ids that it takes from `outgoing_commands`. `timers`: the
    aggregates whose timers it sets or ends. `unique_keys`: whose holders it reads.
    `counts_from_now`: it has to know the store's time.
    """

    partitions: Sequence[int]
    command_ids: Sequence[str]
    versions: Sequence[AggregateKey]
    snapshots: Sequence[AggregateKey]
    scheduled: Sequence[str]
    timers: Sequence[AggregateKey]
    unique_keys: Sequence[UniqueKey]
    counts_from_now: bool


def wanted(chains: Sequence[Chain]) -> Wanted:
    """Say what an append locks and reads; numbers, ids and keys ascending."""
    partitions: set[int] = set()
    ids: set[str] = set()
    scheduled: list[str] = []
    timers: list[AggregateKey] = []
    keys: set[UniqueKey] = set()
    from_now = False
    for chain in chains:
        partitions.add(chain.partition)
        if chain.moves is not None:
            partitions.update(chain.moves.partitions)
            keys |= chain.moves.claims | chain.moves.releases
        timed = False
        for command in chain.commands:
            ids.add(command.outcome.command_id)
            if command.scheduled:
                scheduled.append(command.outcome.command_id)
            timed = timed or bool(command.cancels)
            for caused in command.causes:
                timed = timed or caused.timer is not None
                from_now = from_now or isinstance(caused.due, timedelta)
        if timed:
            timers.append(chain.key)
    return Wanted(
        partitions=sorted(partitions),
        command_ids=sorted(ids),
        versions=[chain.key for chain in chains if chain.base_sequence is not None],
        snapshots=[chain.key for chain in chains if chain.snapshot is not None],
        scheduled=sorted(scheduled),
        timers=timers,
        unique_keys=sorted(keys),
        counts_from_now=from_now,
    )


_NOTHING: Final[Mapping[Any, Any]] = MappingProxyType({})


class AppendState(msgspec.Struct, frozen=True, kw_only=True):
    """What the transaction read under its locks, or expects to find there.

    `heads`: of every locked partition. `versions`: the last sequence of each
    aggregate that has events. `snapshot_numbers`: of the aggregates in
    `Wanted.snapshots` that have one. `scheduled`: those of `Wanted.scheduled` that have a
    row. `now` is the store's time, needed where `counts_from_now`. `timers`: the timers of
    the aggregates in `Wanted.timers`, by name, as the ids of their rows. `holders`: of those of
    `Wanted.unique_keys` that are held.
    """

    heads: Mapping[int, int]
    versions: Mapping[AggregateKey, int]
    outcomes: Mapping[str, StoredOutcome]
    snapshot_numbers: Mapping[AggregateKey, int] = _NOTHING
    scheduled: Collection[str] = ()
    now: datetime | None = None
    holders: Mapping[UniqueKey, str] = _NOTHING
    timers: Mapping[AggregateKey, Mapping[str, str]] = _NOTHING


class AppendPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What the transaction writes, and what it answers.

    Outcomes are sorted by command id: unsorted inserts deadlock. `new_heads`
    has only the partitions that grow. `settled_letters` and
    `settled_attempts` are command ids whose rows are to be deleted, before
    `dead_letters` are added. `consumed` are ids of rows of `outgoing_commands` to be
    deleted, before `scheduled` are added. Rows for the targets `held_back` are held back
    from now on, those for the targets `let_go` no longer. `freed_keys` are deleted
    before `held_keys` are added, each with its holder.
    """

    results: Sequence[ChainResult]
    events: Sequence[StoredEvent]
    new_heads: Mapping[int, int]
    inserted_outcomes: Sequence[StoredOutcome]
    replaced_outcomes: Sequence[StoredOutcome] = ()
    inserted_snapshots: Sequence[Snapshot] = ()
    replaced_snapshots: Sequence[Snapshot] = ()
    dead_letters: Sequence[DeadLetter] = ()
    settled_letters: Sequence[str] = ()
    settled_attempts: Sequence[str] = ()
    consumed: Sequence[str] = ()
    scheduled: Sequence[ScheduledCommand] = ()
    held_back: Sequence[AggregateKey] = ()
    let_go: Sequence[AggregateKey] = ()
    freed_keys: Sequence[UniqueKey] = ()
    held_keys: Sequence[tuple[UniqueKey, str]] = ()

    @property
    def writes(self) -> bool:
        """Whether there is anything to commit."""
        return any(isinstance(result, Committed) for result in self.results)

    @property
    def commits_all(self) -> bool:
        """Whether no chain conflicts."""
        return all(isinstance(result, Committed) for result in self.results)

    @property
    def is_plain(self) -> bool:
        """Whether it writes nothing but events and new outcomes, as most do."""
        return not (
            self.inserted_snapshots
            or self.replaced_snapshots
            or self.replaced_outcomes
            or self.settled_attempts
            or self.settled_letters
            or self.dead_letters
            or self.consumed
            or self.scheduled
            or self.held_back
            or self.let_go
            or self.freed_keys
            or self.held_keys
        )


def plan_append(chains: Sequence[Chain], state: AppendState, recorded_at: datetime) -> AppendPlan:
    """Decide which chains conflict, and give the others their sequences and offsets."""
    draft = _Draft(state, recorded_at, dict(state.heads))
    results = [draft.settle(chain) for chain in chains]
    return draft.finish(results)


class _Draft(msgspec.Struct):
    """A plan in the making: chains that pass are added to it one by one."""

    state: AppendState
    recorded_at: datetime
    heads: dict[int, int]
    taken: set[str] = set()
    events: list[StoredEvent] = []
    inserted: list[StoredOutcome] = []
    replaced: list[StoredOutcome] = []
    snapshots: list[Snapshot] = []
    dead_letters: list[DeadLetter] = []
    settled_letters: list[str] = []
    settled_attempts: list[str] = []
    consumed: list[str] = []
    timers: dict[tuple[AggregateKey, str], ScheduledCommand] = {}
    sent: list[ScheduledCommand] = []
    held_back: set[AggregateKey] = set()
    let_go: set[AggregateKey] = set()
    holders: dict[UniqueKey, str | None] = {}

    def settle(self, chain: Chain) -> ChainResult:
        """Add a chain whole, or answer that it conflicts and add nothing of it."""
        if self._conflicts(chain):
            return Conflicted(self._actual(chain))
        if chain.moves is not None and (taken := self._taken(chain.key, chain.moves)):
            return Conflicted(self._actual(chain), taken)
        outcomes = self._add_commands(chain)
        if self.timers:
            self._check_timers(chain)
        if chain.snapshot is not None:
            self.snapshots.append(chain.snapshot)
        if chain.moves is not None:
            self._move_keys(chain.key, chain.moves)
        return Committed(tuple(outcomes))

    def finish(self, results: list[ChainResult]) -> AppendPlan:
        """Put what was added in the order in which it is written."""
        plan = AppendPlan(
            results=results,
            events=self.events,
            new_heads={p: h for p, h in self.heads.items() if h != self.state.heads[p]},
            inserted_outcomes=sorted(self.inserted, key=_command_id),
        )
        return plan if self._is_plain else self._finish(plan)

    @property
    def _is_plain(self) -> bool:
        return not (
            self.replaced
            or self.snapshots
            or self.dead_letters
            or self.settled_letters
            or self.settled_attempts
            or self.consumed
            or self.timers
            or self.sent
            or self.held_back
            or self.let_go
            or self.holders
        )

    def _finish(self, plan: AppendPlan) -> AppendPlan:
        numbers, before = self.state.snapshot_numbers, self.state.holders
        moved = sorted(key for key, id_ in self.holders.items() if before.get(key) != id_)
        return replace(
            plan,
            replaced_outcomes=sorted(self.replaced, key=_command_id),
            inserted_snapshots=[s for s in self.snapshots if s.key not in numbers],
            replaced_snapshots=[s for s in self.snapshots if s.key in numbers],
            dead_letters=self.dead_letters,
            settled_letters=sorted(self.settled_letters),
            settled_attempts=sorted(self.settled_attempts),
            consumed=sorted(set(self.consumed)),
            scheduled=[*self.sent, *self.timers.values()],
            held_back=sorted(self.held_back),
            let_go=sorted(self.let_go - self.held_back),
            freed_keys=[key for key in moved if key in before],
            held_keys=[(key, id_) for key in moved if (id_ := self.holders[key]) is not None],
        )

    # --- Conflicts ---

    def _conflicts(self, chain: Chain) -> bool:
        return (
            self._actual(chain) != chain.base_sequence
            or (chain.snapshot is not None and self._number(chain) != chain.snapshot.number - 1)
            or self._is_in_the_way(chain)
        )

    def _actual(self, chain: Chain) -> int | None:
        if chain.base_sequence is None:
            return None
        return self.state.versions.get(chain.key, 0)

    def _number(self, chain: Chain) -> int:
        return self.state.snapshot_numbers.get(chain.key, 0)

    def _is_in_the_way(self, chain: Chain) -> bool:
        """Whether a command of the chain has an outcome, or its row is gone.

        It has one here or earlier in this append; its row was deleted by whoever cancelled it,
        or has decided it.
        """
        ids: set[str] = set()
        for command in chain.commands:
            id_ = command.outcome.command_id
            if id_ in self.taken or id_ in ids:
                return True
            ids.add(id_)
            known = self.state.outcomes.get(id_)
            if known is not None and not _is_replaced(known, command):
                return True
            if command.scheduled and id_ not in self.state.scheduled:
                return True
        return False

    def _taken(self, key: AggregateKey, moves: KeyMoves) -> frozenset[UniqueKey]:
        """Return what a chain claims and another holds, here or earlier in this append."""
        mine = {None, key.id}
        return frozenset(claimed for claimed in moves.claims if self._holder(claimed) not in mine)

    def _holder(self, key: UniqueKey) -> str | None:
        return self.holders.get(key, self.state.holders.get(key))

    # --- Additions ---

    def _move_keys(self, key: AggregateKey, moves: KeyMoves) -> None:
        """Hold what a chain claims, then give up what it releases, as far as that is its own."""
        self.holders |= dict.fromkeys(moves.claims, key.id)
        for released in moves.releases:
            if self._holder(released) == key.id:
                self.holders[released] = None

    def _add_commands(self, chain: Chain) -> list[Outcome]:
        if chain.partition not in self.heads:
            message = f"the store has no partition {chain.partition}; check CQRS_ES_PARTITIONS"
            raise errors.PartitionsMismatch(message)
        outcomes: list[Outcome] = []
        sequence = chain.base_sequence or 0
        for command in chain.commands:
            outcome = command.outcome
            if command.events:
                self._add_events(chain, command, sequence)
                outcome = outcome.placed(chain.partition, self.heads[chain.partition])
                sequence += len(command.events)
            self._add_outcome(StoredOutcome(outcome, command.content_hash, chain.keeps_outcomes))
            if command.attempted or command.dead_letter is not None or command.replaces_failed:
                self._add_cares(chain, command)
            if command.scheduled or command.causes or command.cancels:
                self._add_causes(chain, command)
            outcomes.append(outcome)
        return outcomes

    def _add_events(self, chain: Chain, command: DecidedCommand, sequence: int) -> None:
        offset = self.heads[chain.partition]
        for place, event in enumerate(command.events, start=1):
            stored = StoredEvent(
                key=chain.key,
                sequence=sequence + place,
                event_type=event.event_type,
                event_version=event.event_version,
                payload=event.payload,
                metadata=event.metadata,
                partition=chain.partition,
                offset=offset + place,
                command_id=command.outcome.command_id,
                recorded_at=self.recorded_at,
            )
            self.events.append(stored)
        self.heads[chain.partition] = offset + len(command.events)

    def _add_outcome(self, stored: StoredOutcome) -> None:
        known = stored.outcome.command_id in self.state.outcomes
        (self.replaced if known else self.inserted).append(stored)
        self.taken.add(stored.outcome.command_id)

    def _add_cares(self, chain: Chain, command: DecidedCommand) -> None:
        """Note the dead letter and attempts that come or go with a command's outcome.

        And whether what is scheduled for the aggregate waits for the dead letter.
        """
        command_id = command.outcome.command_id
        if command.attempted:
            self.settled_attempts.append(command_id)
        if command.dead_letter is not None:
            self.dead_letters.append(command.dead_letter)
            if command.holds_back:
                self.held_back.add(chain.key)
        elif command.replaces_failed:
            self.settled_letters.append(command_id)
            if command.holds_back:
                self.let_go.add(chain.key)

    def _add_causes(self, chain: Chain, command: DecidedCommand) -> None:
        """Delete the row that the command came from, and its timers; add what it causes.

        A timer that an earlier command of the chain set was never written.
        """
        if command.scheduled:
            self.consumed.append(command.outcome.command_id)
        for name in command.cancels:
            self._end_timer(chain.key, name)
        for caused in command.causes:
            if caused.timer is None:
                self.sent.append(self._at_its_moment(caused))
            else:
                self._end_timer(caused.key, caused.timer)
                self.timers[caused.key, caused.timer] = self._at_its_moment(caused)

    def _check_timers(self, chain: Chain) -> None:
        """Raise `TooLarge` where an aggregate would have too many timers."""
        added = sum(key == chain.key for key, _ in self.timers)
        if added:
            before = set(self.state.timers.get(chain.key, {}).values())
            if len(before.difference(self.consumed)) + added > MOST_TIMERS:
                message = f"{chain.key} would have more than {MOST_TIMERS} timers: cancel some"
                raise errors.TooLarge(message)

    def _end_timer(self, key: AggregateKey, name: str) -> None:
        row = self.state.timers.get(key, {}).get(name)
        if row is not None:
            self.consumed.append(row)
        self.timers.pop((key, name), None)

    def _at_its_moment(self, caused: ScheduledCommand) -> ScheduledCommand:
        if not isinstance(caused.due, timedelta):
            return caused
        assert self.state.now is not None  # noqa: S101 - see `counts_from_now`
        return replace(caused, due=self.state.now + caused.due)


def _is_replaced(known: StoredOutcome, command: DecidedCommand) -> bool:
    return command.replaces_failed and known.outcome.status is Status.FAILED


def _command_id(stored: StoredOutcome) -> str:
    return stored.outcome.command_id
