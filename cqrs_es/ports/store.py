"""The event store: the log of events, the outcomes of commands, and snapshots.

The one contract that every store keeps (G2–G5):

- `append` is one transaction. It locks the heads of the partitions of every
  chain it is given, in ascending order, then in later statements checks
  outcomes, versions and snapshot numbers. Chains that pass are written
  whole; chains that do not are returned as `Conflicted` and leave no trace.
  Where a transaction is bounded (DynamoDB) it is several, each chain whole in
  one; and instead of locks each takes place only if nothing it read has changed.
- Offsets of a partition are 1, 2, 3 … in commit order. Whoever has read
  offset n has read everything before it.
- Everything returned as `Committed` is durable.

Every method may raise `StoreUnavailable` (try again later), `UndecodableRow`,
or another `StoreError`. After `StoreUnavailable` from `append` any chain
may or may not have been committed: look the outcomes up. Cancelling a call
leaves the store usable; a cancelled `append` may have been committed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

# Part of this port's vocabulary, so it can be had from here.
import msgspec

from cqrs_es.messages import StoredEvent as StoredEvent  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.types import AggregateKey


LOAD_LIMIT: Final = 10_000
"""About how many events one `load` returns at most, of all aggregates together."""
PAGE_LIMIT: Final = 1_000
"""How many events of one aggregate a `load` returns at most."""
NOT_LATE: Final = timedelta(0)


class NewEvent(msgspec.Struct, frozen=True, gc=False):
    """An event that a command gave rise to; the store gives it its sequence and offset."""

    event_type: str
    event_version: str
    payload: bytes
    metadata: bytes


class Snapshot(msgspec.Struct, frozen=True):
    """An aggregate's state after event `last_sequence`; `number` counts its snapshots from 1."""

    key: AggregateKey
    last_sequence: int
    number: int
    payload: bytes


class LoadRequest(msgspec.Struct, frozen=True, gc=False):
    """What to read of one aggregate: its events above `after`, and its snapshot if wanted.

    Where a snapshot is wanted and there is one, only events above it are read.
    """

    key: AggregateKey
    after: int = 0
    snapshot: bool = False


class LoadedAggregate(msgspec.Struct, frozen=True):
    """What a `LoadRequest` found: a page of events, in ascending sequence.

    `more`: the page is full. What follows is had by another request, with the
    last event's sequence as `after`.
    """

    snapshot: Snapshot | None
    events: Sequence[StoredEvent]
    more: bool = False


def page_size(requests: int) -> int:
    """Return how many events of each aggregate a `load` of so many returns at most."""
    return max(1, min(PAGE_LIMIT, LOAD_LIMIT // max(1, requests)))


class StoredOutcome(msgspec.Struct, frozen=True):
    """The outcome that a command id has, and the hash of the content it was given for.

    One that is to be `kept` for ever is not pruned; only of one to be written, not as read.
    """

    outcome: Outcome
    content_hash: str
    kept: bool = False


class ScheduledCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `outgoing_commands`: a command that is to be decided at `due`, or at once.

    `key` is its target, `partition` that of the target; for another service its type is
    `<service>:<type>` and `partition` is a lane, see `lane_of`. `due` may be a span, which counts
    from when the row is written; what is read has the moment. `body` is the command message.
    `timer` is the name of a timer of the target; there is one of a name at a time. `late` is how
    long it had been due when it was found due, by the store's clock.
    """

    command_id: str
    key: AggregateKey
    partition: int
    due: datetime | timedelta
    body: bytes
    timer: str | None = None
    late: timedelta = NOT_LATE

    @classmethod
    def of(cls, message: CommandMessage, due: datetime, partitions: int) -> ScheduledCommand:
        """Make the row of a command that was sent to be decided at a moment."""
        return cls(
            command_id=message.id,
            key=message.key,
            partition=message.key.partition(partitions),
            due=due,
            body=message.body,
        )

    @property
    def moment(self) -> datetime:
        """When it is due; only of a row that is to be written as it is, or was read."""
        assert isinstance(self.due, datetime)  # noqa: S101 - see `append_plan`
        return self.due


SECRET_BYTES: Final = 32
HELD_BACK: Final = "$held_back"
"""Under this name, as a projector's, those are parked whose rows are held back."""
FOR_EVER: Final = datetime(9999, 12, 31, tzinfo=UTC)
"""As which moment an outcome is recorded that is never pruned, by code of any age."""
IMMEDIATELY: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""When a command is due that is to be decided at once: before any clock's time."""


class UniqueKey(msgspec.Struct, frozen=True, order=True, gc=False):
    """A value that one aggregate of a type has under a name, as `unique_keys` has it: hashed."""

    aggregate_type: str
    name: str
    value_hash: str


class KeyMoves(msgspec.Struct, frozen=True):
    """How a chain moves keys: `claims` are checked, and held but for those in `releases`.

    `partitions` are those whose heads are locked for it: whoever moves a key locks the
    same one, so two that want a key never look at the same time.
    """

    claims: frozenset[UniqueKey]
    releases: frozenset[UniqueKey]
    partitions: tuple[int, ...]


class DecidedCommand(msgspec.Struct, frozen=True, kw_only=True):
    """A command's outcome (its `partition` and `offset` still None) and what goes with it.

    `replaces_failed`: a stored outcome `failed` does not stand in the way and
    is replaced, and its dead letter deleted. `dead_letter` is stored with a
    failed outcome. `attempted`: there are recorded attempts to delete.

    `scheduled`: the command was taken from `outgoing_commands`: its row is deleted, and
    where there is none any more the chain conflicts. `causes` are the rows to be added;
    one that is a timer replaces the timer of its name. `cancels` are names of timers of
    the aggregate that end.

    `holds_back`: while the command stands as failed, no row whose target is the aggregate is
    found or due. That ends when its outcome is replaced.
    """

    outcome: Outcome
    content_hash: str
    events: tuple[NewEvent, ...] = ()
    dead_letter: DeadLetter | None = None
    replaces_failed: bool = False
    attempted: bool = False
    scheduled: bool = False
    causes: tuple[ScheduledCommand, ...] = ()
    cancels: tuple[str, ...] = ()
    holds_back: bool = False


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """Commands for one aggregate, decided one upon the other; committed whole or not at all.

    `base_sequence` is the aggregate's sequence that the first decision was made
    on, None when the aggregate was not looked at (there is then no version to
    check and no event to write). `snapshot` replaces number `snapshot.number - 1`.
    A chain without commands only moves keys. `keeps_outcomes`: they are never pruned.
    """

    key: AggregateKey
    partition: int
    base_sequence: int | None
    commands: tuple[DecidedCommand, ...]
    snapshot: Snapshot | None = None
    moves: KeyMoves | None = None
    keeps_outcomes: bool = False


class Committed(msgspec.Struct, frozen=True):
    """The chain is in the log; its outcomes are complete, in the chain's order."""

    outcomes: tuple[Outcome, ...]


class Conflicted(msgspec.Struct, frozen=True):
    """The chain was not written: decide it again on what the store holds now.

    `actual` is the aggregate's sequence in the store. When it equals the
    chain's base, an outcome or the snapshot stood in the way, or what is `taken`: keys
    that it claims and that another aggregate holds.
    """

    actual: int | None
    taken: frozenset[UniqueKey] = frozenset()


ChainResult: TypeAlias = Committed | Conflicted


@dataclass(frozen=True, slots=True)
class StoreInfo:
    """What `init` fixed: the number of partitions, the log's epoch, a UUID, and whose log it is.

    `secret` is the key of what the framework signs or derives; never shown or sent.
    `service` is None in a store that nobody has claimed yet.
    `keys` says, for aggregate types, which `keys()` their unique keys were made by.
    """

    partitions: int
    log_epoch: str
    schema_version: int
    secret: bytes = field(default=b"", repr=False)
    service: str | None = None
    keys: Mapping[str, str] = field(default_factory=dict[str, str])


class EventStore(ABC):
    """The log, its outcomes and snapshots; see the module for what is promised."""

    look_seconds: ClassVar[float] = 0.05
    """How long a relay waits between looks at the heads; longer where each look is billed."""

    @abstractmethod
    async def load(self, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
        """Read a page of each aggregate, `page_size(len(requests))` events at most.

        Results are in the order of `requests`. A statement that reads a page
        takes as long for a long stream as for a short one.
        """

    @abstractmethod
    async def append(self, chains: Sequence[Chain], recorded_at: datetime) -> list[ChainResult]:
        """Write what passes its checks, each chain whole; results in the order of `chains`.

        Events of one partition get their offsets in the order of `chains`. No
        two chains are for one aggregate. Raises `TooLarge`, having written
        nothing, when a chain can't fit in a transaction of this store.
        """

    @abstractmethod
    async def find_outcomes(self, command_ids: Collection[str]) -> dict[str, StoredOutcome]:
        """Look up the outcomes of those ids that have one."""

    @abstractmethod
    async def prune_outcomes(self, before: datetime, limit: int) -> int:
        """Delete at most `limit` outcomes recorded before a moment; return how many.

        Not those that failed, nor those that are kept for ever.
        """

    @abstractmethod
    async def find_attempts(self, command_ids: Collection[str]) -> dict[str, int]:
        """Look up which attempt was recorded last for those ids that have one."""

    @abstractmethod
    async def record_attempts(self, attempts: Mapping[str, int]) -> None:
        """Record durably, by command id, which attempt is made; repeating it changes nothing."""

    @abstractmethod
    async def forget_attempts(self, command_ids: Collection[str]) -> None:
        """Delete what was recorded; ids that were not attempted are no error."""

    # --- Unique keys -----------------------------------------------------------

    @abstractmethod
    async def find_holders(self, keys: Collection[UniqueKey]) -> dict[UniqueKey, str]:
        """Look up the ids of the aggregates that hold those keys that are held, as committed."""

    @abstractmethod
    async def list_keys(
        self, aggregate_type: str, after: UniqueKey | None, limit: int
    ) -> list[tuple[UniqueKey, str]]:
        """Read up to `limit` keys of a type above `after`, and who holds them, in their order."""

    # --- Commands that events cause, and those for later ---------------------

    @abstractmethod
    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        """Add rows; an id that has a row or an outcome already is passed over."""

    @abstractmethod
    async def find_scheduled(self, command_ids: Collection[str]) -> dict[str, ScheduledCommand]:
        """Look up the rows of those ids that have one, but for those that are held back."""

    @abstractmethod
    async def due(self, partition: int, limit: int) -> list[ScheduledCommand]:
        """Read up to `limit` rows of a partition that are due by the store's clock.

        In the order of their moments, then of their ids; without those that are held back.
        """

    @abstractmethod
    async def next_due(self, partitions: Collection[int]) -> dict[int, float]:
        """Return, for each partition that has rows, the seconds until the first is due.

        Zero or less where one is due. Rows that are held back do not count.
        """

    @abstractmethod
    async def count_due(self, partitions: Collection[int]) -> dict[int, int]:
        """Count the rows of each partition that are due, where there are any."""

    @abstractmethod
    async def unschedule(self, command_ids: Collection[str]) -> set[str]:
        """Delete rows, each under its partition's lock; return the ids of those there were."""

    @abstractmethod
    async def hasten(self, command_ids: Collection[str]) -> set[str]:
        """Make rows due now, by the store's clock; return the ids of those there were."""

    @abstractmethod
    async def list_scheduled(
        self,
        after: tuple[datetime, str] | None,
        limit: int,
        key: AggregateKey | None = None,
        lanes: Collection[int] = (),
    ) -> list[ScheduledCommand]:
        """Read up to `limit` rows in the order of `due`, of one target or of all.

        `after` is the moment and the id of the last one read. Stores that can't list
        all rows look at `lanes` beside the partitions.
        """

    @abstractmethod
    async def read_log(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read up to `limit` events of a partition above offset `after`, ascending.

        Contiguous from `after + 1`, or `BrokenLog`: also when `after` is beyond the head.
        """

    @abstractmethod
    async def heads(self) -> Mapping[int, int]:
        """Return every partition's head: the offset of its last event, 0 when it is empty."""
