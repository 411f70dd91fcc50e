"""What an append does, decided from what it read under its locks; no I/O (G2 to G5).

Every store runs the same steps: lock the heads of `locked_partitions`, read an
`AppendState`, call `plan_append`, write the plan. So the rules are written and
tested once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

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
        NewEvent,
        ScheduledCommand,
        Snapshot,
        UniqueKey,
    )
    from cqrs_es.types import AggregateKey


MOST_TIMERS: Final = 1_000
"""How many timers an aggregate may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendState:
    """What the transaction read under its locks.

    `heads`: of every locked partition. `versions`: the last sequence of each
    aggregate that has events. `snapshot_numbers`: of the aggregates in
    `snapshot_keys` that have one. `scheduled`: those of `scheduled_ids` that have a
    row. `now` is the store's time, needed where `counts_from_now`. `timers`: the timers of
    the aggregates in `timer_keys`, by name, as the ids of their rows. `holders`: of those of
    `unique_keys` that are held.
    """

    heads: Mapping[int, int]
    versions: Mapping[AggregateKey, int]
    outcomes: Mapping[str, StoredOutcome]
    snapshot_numbers: Mapping[AggregateKey, int]
    scheduled: Collection[str] = ()
    now: datetime | None = None
    holders: Mapping[UniqueKey, str] = field(default_factory=dict["UniqueKey", str])
    timers: Mapping[AggregateKey, Mapping[str, str]] = field(
        default_factory=dict["AggregateKey", "Mapping[str, str]"]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendPlan:
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
    replaced_outcomes: Sequence[StoredOutcome]
    inserted_snapshots: Sequence[Snapshot]
    replaced_snapshots: Sequence[Snapshot]
    dead_letters: Sequence[DeadLetter]
    settled_letters: Sequence[str]
    settled_attempts: Sequence[str]
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


def locked_partitions(chains: Sequence[Chain]) -> list[int]:
    """Return the partitions whose heads an append locks, in the order it locks them."""
    moved = {partition for c in chains if c.moves for partition in c.moves.partitions}
    return sorted(moved | {chain.partition for chain in chains})


def versioned_keys(chains: Sequence[Chain]) -> list[AggregateKey]:
    """Return the aggregates whose versions an append has to read."""
    return [chain.key for chain in chains if chain.base_sequence is not None]


def snapshot_keys(chains: Sequence[Chain]) -> list[AggregateKey]:
    """Return the aggregates whose snapshot numbers an append has to read."""
    return [chain.key for chain in chains if chain.snapshot is not None]


def command_ids(chains: Sequence[Chain]) -> list[str]:
    """Return the command ids whose outcomes an append has to look up, sorted, each once."""
    return sorted({c.outcome.command_id for chain in chains for c in chain.commands})


def scheduled_ids(chains: Sequence[Chain]) -> list[str]:
    """Return the command ids that an append takes from `outgoing_commands`, sorted."""
    return sorted(c.outcome.command_id for chain in chains for c in chain.commands if c.scheduled)


def unique_keys(chains: Sequence[Chain]) -> list[UniqueKey]:
    """Return the keys whose holders an append has to read, sorted."""
    return sorted({key for c in chains if c.moves for key in c.moves.claims | c.moves.releases})


def counts_from_now(chains: Sequence[Chain]) -> bool:
    """Tell whether an append has to know the store's time."""
    return any(
        isinstance(caused.due, timedelta)
        for chain in chains
        for command in chain.commands
        for caused in command.causes
    )


def timer_keys(chains: Sequence[Chain]) -> list[AggregateKey]:
    """Return the aggregates whose timers an append has to read: those that it sets or ends."""
    return [
        chain.key
        for chain in chains
        if any(
            command.cancels or any(caused.timer is not None for caused in command.causes)
            for command in chain.commands
        )
    ]


def plan_append(chains: Sequence[Chain], state: AppendState, recorded_at: datetime) -> AppendPlan:
    """Decide which chains conflict, and give the others their sequences and offsets."""
    draft = _Draft(state, recorded_at, dict(state.heads))
    results = [draft.settle(chain) for chain in chains]
    return draft.finish(results)


@dataclass(slots=True)
class _Draft:
    """A plan in the making: chains that pass are added to it one by one."""

    state: AppendState
    recorded_at: datetime
    heads: dict[int, int]
    taken: set[str] = field(default_factory=set[str])
    events: list[StoredEvent] = field(default_factory=list[StoredEvent])
    inserted: list[StoredOutcome] = field(default_factory=list[StoredOutcome])
    replaced: list[StoredOutcome] = field(default_factory=list[StoredOutcome])
    snapshots: list[Snapshot] = field(default_factory=list["Snapshot"])
    dead_letters: list[DeadLetter] = field(default_factory=list["DeadLetter"])
    settled_letters: list[str] = field(default_factory=list[str])
    settled_attempts: list[str] = field(default_factory=list[str])
    consumed: list[str] = field(default_factory=list[str])
    timers: dict[tuple[AggregateKey, str], ScheduledCommand] = field(
        default_factory=dict["tuple[AggregateKey, str]", "ScheduledCommand"]
    )
    sent: list[ScheduledCommand] = field(default_factory=list["ScheduledCommand"])
    held_back: set[AggregateKey] = field(default_factory=set["AggregateKey"])
    let_go: set[AggregateKey] = field(default_factory=set["AggregateKey"])
    holders: dict[UniqueKey, str | None] = field(default_factory=dict["UniqueKey", "str | None"])

    def settle(self, chain: Chain) -> ChainResult:
        """Add a chain whole, or answer that it conflicts and add nothing of it."""
        if self._conflicts(chain):
            return Conflicted(self._actual(chain))
        if taken := self._taken(chain):
            return Conflicted(self._actual(chain), taken)
        outcomes = self._add_commands(chain)
        self._check_timers(chain)
        if chain.snapshot is not None:
            self.snapshots.append(chain.snapshot)
        self._move_keys(chain)
        return Committed(tuple(outcomes))

    def finish(self, results: list[ChainResult]) -> AppendPlan:
        """Put what was added in the order in which it is written."""
        numbers, before = self.state.snapshot_numbers, self.state.holders
        moved = sorted(key for key, id_ in self.holders.items() if before.get(key) != id_)
        return AppendPlan(
            results=results,
            events=self.events,
            new_heads={p: h for p, h in self.heads.items() if h != self.state.heads[p]},
            inserted_outcomes=sorted(self.inserted, key=_command_id),
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
            self._version_differs(chain)
            or self._snapshot_differs(chain)
            or self._outcome_exists(chain)
            or self._row_is_gone(chain)
        )

    def _actual(self, chain: Chain) -> int | None:
        if chain.base_sequence is None:
            return None
        return self.state.versions.get(chain.key, 0)

    def _version_differs(self, chain: Chain) -> bool:
        return self._actual(chain) != chain.base_sequence

    def _snapshot_differs(self, chain: Chain) -> bool:
        if chain.snapshot is None:
            return False
        return self.state.snapshot_numbers.get(chain.key, 0) != chain.snapshot.number - 1

    def _outcome_exists(self, chain: Chain) -> bool:
        """Whether a command of the chain has an outcome, here or earlier in this append."""
        ids = {command.outcome.command_id for command in chain.commands}
        if len(ids) < len(chain.commands) or not self.taken.isdisjoint(ids):
            return True
        known = ids & self.state.outcomes.keys()
        return bool(known) and any(map(self._stands_in_the_way, chain.commands))

    def _stands_in_the_way(self, command: DecidedCommand) -> bool:
        known = self.state.outcomes.get(command.outcome.command_id)
        if known is None:
            return False
        return not (command.replaces_failed and known.outcome.status is Status.FAILED)

    def _row_is_gone(self, chain: Chain) -> bool:
        """Whether a command of the chain was cancelled, or decided by another process."""
        return any(
            command.scheduled and command.outcome.command_id not in self.state.scheduled
            for command in chain.commands
        )

    def _taken(self, chain: Chain) -> frozenset[UniqueKey]:
        """Return what the chain claims and another holds, here or earlier in this append."""
        if chain.moves is None:
            return frozenset()
        mine = {None, chain.key.id}
        return frozenset(key for key in chain.moves.claims if self._holder(key) not in mine)

    def _holder(self, key: UniqueKey) -> str | None:
        return self.holders.get(key, self.state.holders.get(key))

    # --- Additions ---

    def _move_keys(self, chain: Chain) -> None:
        """Hold what the chain claims, then give up what it releases, as far as that is its own."""
        if chain.moves is None:
            return
        self.holders |= dict.fromkeys(chain.moves.claims, chain.key.id)
        for key in chain.moves.releases:
            if self._holder(key) == chain.key.id:
                self.holders[key] = None

    def _add_commands(self, chain: Chain) -> list[Outcome]:
        if chain.partition not in self.heads:
            message = f"the store has no partition {chain.partition}; check CQRS_ES_PARTITIONS"
            raise errors.PartitionsMismatch(message)
        outcomes: list[Outcome] = []
        sequence = chain.base_sequence or 0
        for command in chain.commands:
            outcomes.append(self._add_command(chain, command, sequence))
            sequence += len(command.events)
        return outcomes

    def _add_command(self, chain: Chain, command: DecidedCommand, sequence: int) -> Outcome:
        self._add_events(chain, command, sequence)
        outcome = self._completed(chain, command)
        self._add_outcome(StoredOutcome(outcome, command.content_hash, chain.keeps_outcomes))
        self._add_cares(chain, command)
        if command.scheduled or command.causes or command.cancels:
            self._add_causes(chain, command)
        return outcome

    def _add_events(self, chain: Chain, command: DecidedCommand, sequence: int) -> None:
        offset = self.heads[chain.partition]
        for place, event in enumerate(command.events, start=1):
            self.events.append(
                self._stored(chain, command, event, sequence + place, offset + place)
            )
        self.heads[chain.partition] = offset + len(command.events)

    def _stored(
        self, chain: Chain, command: DecidedCommand, event: NewEvent, sequence: int, offset: int
    ) -> StoredEvent:
        return StoredEvent(
            key=chain.key,
            sequence=sequence,
            event_type=event.event_type,
            event_version=event.event_version,
            payload=event.payload,
            metadata=event.metadata,
            partition=chain.partition,
            offset=offset,
            command_id=command.outcome.command_id,
            recorded_at=self.recorded_at,
        )

    def _completed(self, chain: Chain, command: DecidedCommand) -> Outcome:
        """Return the outcome with the place of the command's own last event, if it has one."""
        if not command.events:
            return command.outcome
        return command.outcome.placed(chain.partition, self.heads[chain.partition])

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


def _command_id(stored: StoredOutcome) -> str:
    return stored.outcome.command_id
