"""Short ways to write what the contract suite stores."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import orjson

from cqrs_es.messages import Outcome, OutcomeError, OutcomeEvent, Status
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import (
    Chain,
    Committed,
    Conflicted,
    DecidedCommand,
    EventStore,
    LoadedAggregate,
    LoadRequest,
    NewEvent,
    Snapshot,
    StoredEvent,
)
from cqrs_es.types import AggregateKey, new_command_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.ports.storage import Storage

PARTITIONS = 4
NOW = datetime(2026, 11, 23, 7, 0, 0, 123456, tzinfo=UTC)

# Ids that are all different, and that a careless store takes for each other or for SQL.
AWKWARD_IDS = (
    "a",
    "A",
    "á",
    "a ",
    " a",
    "a  ",
    "ss",
    "ß",
    "İ",
    "i",
    "Å",  # one code point
    "A\u030a",  # two, for the same letter
    "ACCT'); DROP TABLE events; --",
    'say "hi"',
    "`tick`",
    "../../etc/passwd",
    "100%",
    "a%",
    "a_",
    "%s",
    "%(id)s",
    "?",
    ":id",
    "$1",
    "back\\slash",
    "\\'",
    "a/b",
    "🏦💸",
    "ünïcode-7",
    "日本語",
    "\u200b",  # a zero-width space
    "\u00a0",  # a no-break space
    "null",
    "0",
    "00",
    "é" * 255,
    "🏦" * 255,
)


def account(id_: str = "1") -> AggregateKey:
    """Name an aggregate of the test type."""
    return AggregateKey("account", id_)


def account_in(partition: int, nth: int = 0) -> AggregateKey:
    """Name the nth aggregate that falls in a partition."""
    keys = (account(f"{partition}-{number}") for number in itertools.count())
    fitting = (key for key in keys if key.partition(PARTITIONS) == partition)
    return next(itertools.islice(fitting, nth, None))


def event(number: int = 1, event_type: str = "Happened", **payload: object) -> NewEvent:
    """Make an event with a number to know it by."""
    body = orjson.dumps({"number": number, **payload})
    return NewEvent(event_type, "1.0", body, b'{"correlation_id":"order-17"}')


def events(count: int, first: int = 1) -> tuple[NewEvent, ...]:
    """Make events numbered from `first`."""
    return tuple(event(number) for number in range(first, first + count))


def accepted(
    key: AggregateKey,
    base: int | None,
    made: Sequence[NewEvent] = (),
    *,
    command_id: str | None = None,
    attempted: bool = False,
    replaces_failed: bool = False,
) -> DecidedCommand:
    """Decide a command that was accepted with these events."""
    first = (base or 0) + 1
    outcome = Outcome(
        command_id=command_id or new_command_id(),
        status=Status.ACCEPTED,
        aggregate_type=key.type,
        aggregate_id=key.id,
        sequence=None if base is None else base + len(made),
        events=tuple(OutcomeEvent(e.event_type, n) for n, e in enumerate(made, start=first)),
    )
    return DecidedCommand(
        outcome=outcome,
        content_hash="c0ffee",
        events=tuple(made),
        attempted=attempted,
        replaces_failed=replaces_failed,
    )


def refused(
    key: AggregateKey,
    base: int | None,
    *,
    status: Status = Status.REJECTED,
    command_id: str | None = None,
    dead_letter: DeadLetter | None = None,
    replaces_failed: bool = False,
) -> DecidedCommand:
    """Decide a command that was rejected, or that failed."""
    outcome = Outcome(
        command_id=command_id or new_command_id(),
        status=status,
        aggregate_type=key.type,
        aggregate_id=key.id,
        sequence=base,
        error=OutcomeError("funds_not_available", "no “funds” 💸"),
    )
    return DecidedCommand(
        outcome=outcome,
        content_hash="c0ffee",
        dead_letter=dead_letter,
        replaces_failed=replaces_failed,
    )


def failed(
    key: AggregateKey, *, command_id: str, reason: str = "crashed", replaces_failed: bool = False
) -> DecidedCommand:
    """Decide a command that failed, with its dead letter."""
    return refused(
        key,
        None,
        status=Status.FAILED,
        command_id=command_id,
        dead_letter=letter(command_id, reason=reason),
        replaces_failed=replaces_failed,
    )


def chain(
    key: AggregateKey,
    base: int | None,
    *commands: DecidedCommand,
    snapshot: Snapshot | None = None,
    keeps_outcomes: bool = False,
) -> Chain:
    """Put decided commands together, one upon the other."""
    return Chain(
        key=key,
        partition=key.partition(PARTITIONS),
        base_sequence=base,
        commands=commands,
        snapshot=snapshot,
        keeps_outcomes=keeps_outcomes,
    )


def one(key: AggregateKey, base: int, count: int = 1, *, snapshot: Snapshot | None = None) -> Chain:
    """Make a chain of one command with so many events, numbered like their sequences."""
    return chain(key, base, accepted(key, base, events(count, base + 1)), snapshot=snapshot)


def snapshot(key: AggregateKey, sequence: int, number: int, **state: object) -> Snapshot:
    """Make a snapshot."""
    return Snapshot(key, sequence, number, orjson.dumps(state))


def letter(
    letter_id: str | None = None, *, reason: str = "crashed", body: bytes = b"{}", attempts: int = 1
) -> DeadLetter:
    """Make a dead letter that was seen now."""
    return DeadLetter.of(
        body,
        reason=reason,
        source="commands",
        seen_at=NOW,
        limit=1000,
        command_id=letter_id,
        attempts=attempts,
    )


# --- Doing -------------------------------------------------------------------


async def commit(storage: Storage, *chains: Chain) -> list[Outcome]:
    """Append chains that must all pass; return their outcomes."""
    results = await storage.events.append(chains, NOW)
    assert all(isinstance(result, Committed) for result in results), results
    return [o for result in results if isinstance(result, Committed) for o in result.outcomes]


async def conflict(storage: Storage, doomed: Chain) -> int | None:
    """Append a chain that must conflict; return the sequence that stood in the way."""
    [result] = await storage.events.append([doomed], NOW)
    assert isinstance(result, Conflicted), result
    return result.actual


async def stream(storage: Storage, key: AggregateKey, after: int = 0) -> list[StoredEvent]:
    """Read the events of an aggregate."""
    [loaded] = await load_whole(storage.events, [LoadRequest(key, after)])
    return list(loaded.events)


async def stored_snapshot(storage: Storage, key: AggregateKey) -> Snapshot | None:
    """Read the snapshot of an aggregate."""
    [loaded] = await storage.events.load([LoadRequest(key, snapshot=True)])
    return loaded.snapshot


async def whole_log(storage: Storage) -> dict[int, list[StoredEvent]]:
    """Read every partition from its start to its head."""
    heads = await storage.events.heads()
    return {p: await storage.events.read_log(p, 0, head + 1) for p, head in heads.items()}


def assert_complete(log: dict[int, list[StoredEvent]]) -> None:
    """Check the arithmetic: offsets and sequences are 1, 2, 3 … in the order of the log."""
    sequences: dict[AggregateKey, int] = {}
    for found in log.values():
        assert [e.offset for e in found] == list(range(1, len(found) + 1))
        for e in found:
            assert e.sequence == sequences.get(e.key, 0) + 1
            sequences[e.key] = e.sequence


async def load_whole(events: EventStore, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
    """Read aggregates to their ends, page by page; all their events are in memory at once."""
    whole = await events.load(requests)
    while rest := [nth for nth, found in enumerate(whole) if found.more]:
        more = [LoadRequest(requests[nth].key, whole[nth].events[-1].sequence) for nth in rest]
        for nth, page in zip(rest, await events.load(more), strict=True):
            found = whole[nth]
            whole[nth] = LoadedAggregate(found.snapshot, [*found.events, *page.events], page.more)
    return whole
