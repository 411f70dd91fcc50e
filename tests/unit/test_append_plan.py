"""What an append decides from what it read under its locks."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.messages import Outcome, Status
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import (
    Chain,
    Committed,
    Conflicted,
    DecidedCommand,
    KeyMoves,
    NewEvent,
    Snapshot,
    StoredOutcome,
    UniqueKey,
)
from cqrs_es.stores.append_plan import (
    AppendState,
    plan_append,
    wanted,
)
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.stores.append_plan import AppendPlan

NOW = datetime(2026, 11, 23, 7, tzinfo=UTC)
A, B, C = (AggregateKey("account", name) for name in "ABC")
EVENT = NewEvent("Deposited", "1.0", b"{}", b"{}")


def outcome(command_id: str, status: Status = Status.ACCEPTED) -> Outcome:
    return Outcome(command_id=command_id, status=status, aggregate_type="account", aggregate_id="A")


def command(command_id: str, events: int = 1) -> DecidedCommand:
    return DecidedCommand(
        outcome=outcome(command_id), content_hash=f"hash of {command_id}", events=(EVENT,) * events
    )


def chain(
    key: AggregateKey,
    base: int | None,
    *commands: DecidedCommand,
    partition: int = 0,
    snapshot: Snapshot | None = None,
) -> Chain:
    return Chain(
        key=key, partition=partition, base_sequence=base, commands=commands, snapshot=snapshot
    )


def letter(command_id: str) -> DeadLetter:
    return DeadLetter.of(
        b"{}", reason="crash", source="commands", seen_at=NOW, limit=9, command_id=command_id
    )


def state(
    heads: Mapping[int, int] | None = None,
    versions: Mapping[AggregateKey, int] | None = None,
    outcomes: Mapping[str, StoredOutcome] | None = None,
    snapshot_numbers: Mapping[AggregateKey, int] | None = None,
) -> AppendState:
    return AppendState(
        heads={0: 0} if heads is None else heads,
        versions=versions or {},
        outcomes=outcomes or {},
        snapshot_numbers=snapshot_numbers or {},
    )


def plan(*chains: Chain, found: AppendState | None = None) -> AppendPlan:
    return plan_append(chains, found or state(), NOW)


def known(command_id: str, status: Status) -> dict[str, StoredOutcome]:
    return {command_id: StoredOutcome(outcome(command_id, status), "hash")}


def test_events_go_on_from_the_base_and_the_head() -> None:
    """Sequences follow the chain's base, offsets the partition's head, in chain order."""
    made = plan(
        chain(A, 3, command("1", events=2), command("2"), partition=5),
        chain(B, 0, command("3"), partition=5),
        found=state(heads={5: 10}, versions={A: 3}),
    )
    assert [(e.key, e.sequence, e.partition, e.offset, e.command_id) for e in made.events] == [
        (A, 4, 5, 11, "1"),
        (A, 5, 5, 12, "1"),
        (A, 6, 5, 13, "2"),
        (B, 1, 5, 14, "3"),
    ]
    assert made.new_heads == {5: 14}
    assert {e.recorded_at for e in made.events} == {NOW}


def test_an_outcome_names_the_place_of_its_commands_own_last_event() -> None:
    """A command with events gets partition and offset; one without gets neither."""
    made = plan(chain(A, 0, command("1", events=2), command("2", events=0), command("3")))
    (result,) = made.results
    assert isinstance(result, Committed)
    assert [(o.partition, o.offset) for o in result.outcomes] == [(0, 2), (None, None), (0, 3)]


def test_outcomes_are_written_in_ascending_id() -> None:
    """Unsorted inserts of outcomes deadlock, so the plan sorts them across chains."""
    made = plan(chain(A, 0, command("3"), command("1")), chain(B, 0, command("2")))
    assert [s.outcome.command_id for s in made.inserted_outcomes] == ["1", "2", "3"]
    assert made.inserted_outcomes[0].content_hash == "hash of 1"


@pytest.mark.parametrize("actual", [2, 4])
def test_another_version_is_a_conflict_that_leaves_no_trace(actual: int) -> None:
    """A chain decided on another version writes nothing; its neighbours are written."""
    made = plan(
        chain(A, 3, command("1")),
        chain(B, 0, command("2")),
        found=state(versions={A: actual}),
    )
    assert made.results[0] == Conflicted(actual)
    assert isinstance(made.results[1], Committed)
    assert [(e.key, e.offset) for e in made.events] == [(B, 1)]
    assert [s.outcome.command_id for s in made.inserted_outcomes] == ["2"]


def test_an_unread_aggregate_has_no_version_to_check() -> None:
    """A failed command whose aggregate was not looked at commits whatever the version is."""
    made = plan(chain(A, None, command("1", events=0)), found=state(versions={A: 7}))
    assert isinstance(made.results[0], Committed)


@pytest.mark.parametrize("status", list(Status))
def test_a_known_outcome_is_a_conflict(status: Status) -> None:
    """Whatever its outcome was, a command is not decided twice by accident."""
    made = plan(chain(A, 0, command("1")), found=state(outcomes=known("1", status)))
    assert made.results == [Conflicted(0)]
    assert not made.writes


def retried(command_id: str, dead_letter: DeadLetter | None = None) -> DecidedCommand:
    return DecidedCommand(
        outcome=outcome(command_id),
        content_hash="hash",
        replaces_failed=True,
        attempted=True,
        dead_letter=dead_letter,
    )


def test_a_retry_replaces_a_failed_outcome_and_its_dead_letter() -> None:
    """The failed outcome is replaced, its letter and attempts are deleted."""
    made = plan(chain(A, 0, retried("1")), found=state(outcomes=known("1", Status.FAILED)))
    assert [s.outcome.status for s in made.replaced_outcomes] == [Status.ACCEPTED]
    assert made.inserted_outcomes == []
    assert made.settled_letters == ["1"]
    assert made.settled_attempts == ["1"]


def test_a_retry_that_fails_again_keeps_its_dead_letter() -> None:
    """The letter is added to, not deleted."""
    again = retried("1", letter("1"))
    made = plan(chain(A, 0, again), found=state(outcomes=known("1", Status.FAILED)))
    assert made.settled_letters == []
    assert made.dead_letters == [again.dead_letter]


@pytest.mark.parametrize("status", [Status.ACCEPTED, Status.REJECTED])
def test_a_retry_never_replaces_a_final_outcome(status: Status) -> None:
    """Accepted and rejected are final."""
    made = plan(chain(A, 0, retried("1")), found=state(outcomes=known("1", status)))
    assert made.results == [Conflicted(0)]


def test_of_two_chains_with_one_command_id_the_second_conflicts() -> None:
    """A command id gets one outcome, also within one append."""
    made = plan(chain(A, 0, command("1")), chain(B, 0, command("2"), command("1")))
    assert isinstance(made.results[0], Committed)
    assert made.results[1] == Conflicted(0)
    assert [e.key for e in made.events] == [A]


def test_a_conflicted_chain_claims_no_command_id() -> None:
    """The second of two chains with one id commits when the first did not."""
    made = plan(chain(A, 9, command("1")), chain(B, 0, command("1")))
    assert made.results[0] == Conflicted(0)
    assert isinstance(made.results[1], Committed)


def test_a_command_id_twice_in_one_chain_is_a_conflict() -> None:
    """Rather than an append that fails as a whole."""
    assert plan(chain(A, 0, command("1"), command("1"))).results == [Conflicted(0)]


@pytest.mark.parametrize(("number", "stored"), [(2, None), (2, 2), (1, 1), (3, 1)])
def test_another_snapshot_number_is_a_conflict(number: int, stored: int | None) -> None:
    """A snapshot replaces the one before it, or nothing is written (B12)."""
    numbers = {} if stored is None else {A: stored}
    made = plan(
        chain(A, 0, command("1"), snapshot=Snapshot(A, 1, number, b"{}")),
        found=state(snapshot_numbers=numbers),
    )
    assert made.results == [Conflicted(0)]


def test_snapshots_are_inserted_or_replaced() -> None:
    """The first of an aggregate is a new row, a later one takes the row's place."""
    first, later = Snapshot(A, 1, 1, b"{}"), Snapshot(B, 9, 4, b"{}")
    made = plan(
        chain(A, 0, command("1"), snapshot=first),
        chain(B, 8, command("2"), snapshot=later),
        found=state(versions={B: 8}, snapshot_numbers={B: 3}),
    )
    assert made.inserted_snapshots == [first]
    assert made.replaced_snapshots == [later]


def test_a_head_without_new_events_is_not_written() -> None:
    """A rejection locks a head but does not move it."""
    made = plan(
        chain(A, 0, command("1", events=0), partition=0),
        chain(B, 0, command("2"), partition=1),
        found=state(heads={0: 4, 1: 6}),
    )
    assert made.new_heads == {1: 7}


def test_an_unknown_partition_is_refused() -> None:
    """A chain computed with another P never gets into the log."""
    with pytest.raises(errors.PartitionsMismatch, match="partition 3"):
        plan(chain(A, 0, command("1"), partition=3))


def test_what_an_append_has_to_read() -> None:
    """Partitions ascending; ids sorted, once each; versions only where there is a base."""
    chains = [
        chain(B, 0, command("2"), partition=7, snapshot=Snapshot(B, 1, 1, b"{}")),
        chain(A, None, command("1", events=0), partition=3),
        chain(C, 0, command("2"), partition=7),
    ]
    found = wanted(chains)
    assert found.partitions == [3, 7]
    assert found.versions == [B, C]
    assert found.snapshots == [B]
    assert found.command_ids == ["1", "2"]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), max_size=20))
def test_offsets_have_no_holes(shapes: list[tuple[int, int, bool]]) -> None:
    """Whatever conflicts, each partition's new offsets are head + 1 … new head."""
    chains = [
        chain(AggregateKey("t", str(n)), int(stale), command(str(n), events), partition=partition)
        for n, (partition, events, stale) in enumerate(shapes)
    ]
    heads = {partition: partition * 10 for partition in range(4)}
    made = plan(*chains, found=state(heads=heads))
    for partition, head in heads.items():
        offsets = [e.offset for e in made.events if e.partition == partition]
        assert offsets == list(range(head + 1, made.new_heads.get(partition, head) + 1))


# --- Unique keys -------------------------------------------------------------

K, L = (UniqueKey("account", "email", name) for name in "kl")


def claiming(made: Chain, *claims: UniqueKey, releases: tuple[UniqueKey, ...] = ()) -> Chain:
    moves = KeyMoves(frozenset(claims), frozenset(releases), (7,))
    return msgspec.structs.replace(made, moves=moves)


def test_heads_of_the_partitions_of_keys_are_locked_too() -> None:
    """In one ascending order with those that grow, and without new heads of their own."""
    chains = [claiming(chain(A, 0, command("1"), partition=9), K)]
    assert wanted(chains).partitions == [7, 9]
    assert wanted(chains).unique_keys == [K]
    made = plan(*chains, found=state(heads={7: 3, 9: 5}, versions={A: 0}))
    assert made.new_heads == {9: 6}


def test_keys_pass_from_hand_to_hand_within_one_append() -> None:
    """What one chain releases the next may claim; a third is told that it is taken."""
    found = msgspec.structs.replace(state(versions={A: 0, B: 0, C: 0}), holders={K: "A"})
    made = plan(
        claiming(chain(A, 0, command("1")), L, releases=(K,)),
        claiming(chain(B, 0, command("2")), K),
        claiming(chain(C, 0, command("3")), K, L),
        found=found,
    )
    assert made.results[2] == Conflicted(0, frozenset({K, L}))
    assert list(made.freed_keys) == [K]
    assert list(made.held_keys) == [(K, "B"), (L, "A")]


def test_a_chain_that_conflicts_moves_no_key() -> None:
    """Nor is it told what is taken: it was decided on another state."""
    found = msgspec.structs.replace(state(versions={A: 4}), holders={K: "B"})
    made = plan(claiming(chain(A, 0, command("1")), K, L), found=found)
    assert made.results == [Conflicted(4)]
    assert not made.freed_keys
    assert not made.held_keys
