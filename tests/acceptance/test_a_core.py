"""What the original's own suite asks of aggregates and sources of truth (A1, A14–A16)."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es import Envelope, errors
from cqrs_es.aggregate import AggregateSourced, EventSourced, SnapshotEvery, SourceOfTruth
from cqrs_es.execution.executor import Executor
from cqrs_es.messages import CommandMessage, Outcome
from cqrs_es.ports.clock import SystemClock
from cqrs_es.ports.store import LoadRequest
from cqrs_es.registry import Registry, define_aggregate
from cqrs_es.stores import storage_for
from cqrs_es.testing import Scenario
from cqrs_es.types import AggregateKey, new_command_id
from tests.acceptance.confirming import (
    AlreadyPerformed,
    Confirmed,
    ConfirmTest,
    Created,
    CreateTest,
    DoSomethingElse,
    Seen,
    SomethingElse,
    T,
    TCommand,
)

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage


class Bench:
    """T on a store, through the path that every command takes."""

    key = AggregateKey("t", "id_A")

    def __init__(self, storage: Storage) -> None:
        self.registry = Registry()
        self.definition = define_aggregate(T)
        self.registry.add_aggregate(self.definition)
        self._storage = storage
        self._executor = Executor(self.registry, storage.events, partitions=1, clock=SystemClock())

    async def execute(self, *commands: TCommand) -> list[Outcome]:
        """Execute commands, in order, as one batch."""
        async with self._executor:
            answers = [self._executor.submit(self._message(command)) for command in commands]
            return [await answer for answer in answers]

    def _message(self, command: TCommand) -> CommandMessage:
        payload = dataclasses.asdict(command)
        name = type(command).__name__
        return CommandMessage(new_command_id(), name, self.key.type, self.key.id, payload)

    async def stored(self) -> list[Envelope[Any]]:
        """Read the aggregate's events from the store."""
        (loaded,) = await self._storage.events.load([LoadRequest(self.key)])
        return [e for row in loaded.events for e in self.registry.envelopes(row)]

    async def state(self) -> T:
        """Fold what is stored."""
        folded = T()
        for envelope in await self.stored():
            folded.apply(envelope.data)
        return folded

    async def view(self) -> Seen:
        """Fold the whole log into the view."""
        seen = Seen()
        for row in await self._storage.events.read_log(0, 0, 100):
            for envelope in self.registry.envelopes(row):
                seen.update(envelope)
        return seen


@pytest.fixture
async def bench(store_url: str) -> AsyncIterator[Bench]:
    storage = storage_for(store_url)
    await storage.open()
    await storage.initialise(1)
    yield Bench(storage)
    await storage.close()


# --- A1: snapshot boundaries -------------------------------------------------


@pytest.mark.parametrize(
    ("source", "new", "covered"),
    [
        (EventSourced(), 3, 0),
        (AggregateSourced(), 3, 3),
        (SnapshotEvery(5), 3, 0),
        (SnapshotEvery(4), 3, 3),
        (SnapshotEvery(4), 4, 3),
        (SnapshotEvery(4), 8, 7),
    ],
)
def test_a1_how_many_new_events_a_snapshot_covers(
    source: SourceOfTruth, new: int, covered: int
) -> None:
    """A1: at current sequence 5."""
    at = source.snapshot_at(5, new)
    assert (0 if at is None else at - 5) == covered


@pytest.mark.parametrize("source", [EventSourced(), AggregateSourced(), SnapshotEvery(1)])
def test_a1_no_events_take_no_snapshot(source: SourceOfTruth) -> None:
    """A command without events leaves the snapshot alone, in every mode."""
    assert source.snapshot_at(5, 0) is None


def test_b9_a_snapshot_every_0_events_is_refused() -> None:
    """B9: at construction."""
    with pytest.raises(errors.DefinitionError, match="every 1 or more"):
        SnapshotEvery(0)


# --- A14–A16: T --------------------------------------------------------------


async def test_a14_events_are_stored_and_fold(bench: Bench) -> None:
    """A14: one event, then three more; the fold shows all of them."""
    await bench.execute(CreateTest("id_A"))
    assert len(await bench.stored()) == 1
    await bench.execute(
        ConfirmTest("test A"), ConfirmTest("test B"), DoSomethingElse("something else")
    )
    assert [(e.sequence, e.data) for e in await bench.stored()] == [
        (1, Created("id_A")),
        (2, Confirmed("test A")),
        (3, Confirmed("test B")),
        (4, SomethingElse("something else")),
    ]
    assert await bench.state() == T("id_A", "something else", ["test A", "test B"])


async def test_a15_a_test_is_performed_once(bench: Bench) -> None:
    """A15: what is accepted is stored and reaches the view; what is rejected does not."""
    await bench.execute(ConfirmTest("x"))
    assert (await bench.view()).events == ["1 Tested"]
    await bench.execute(ConfirmTest("TEST_A"))
    assert (await bench.view()).events == ["1 Tested", "2 Tested"]
    (again,) = await bench.execute(ConfirmTest("TEST_A"))
    assert again.error is not None
    assert again.error.message == "test already performed"
    assert len(await bench.stored()) == 2
    assert (await bench.view()).events == ["1 Tested", "2 Tested"]


def test_a16_given_when_then() -> None:
    """A16: the same rule, as a scenario."""
    created = Scenario(T, None).given(Created("id_A"))
    created.when(ConfirmTest("test A")).then_expect_events(Confirmed("test A"))
    (
        created.and_(Confirmed("test A"))
        .when(ConfirmTest("test A"))
        .then_expect_error(AlreadyPerformed)
        .then_expect_error_message("test already performed")
    )
