"""What the original's own suite asks of aggregates and sources of truth (A1, A14–A16)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.aggregate import AggregateSourced, EventSourced, SnapshotEvery, SourceOfTruth
from cqrs_es.application import Application
from cqrs_es.settings import Settings
from cqrs_es.testing import Scenario, TestApp
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
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture(params=[EventSourced(), AggregateSourced(), SnapshotEvery(2)], ids=str)
async def running(store_url: str, request: pytest.FixtureRequest) -> AsyncIterator[TestApp]:
    """Run T with a view, on every store and with every source of truth."""
    app = Application("t")
    app.aggregate(T, source=request.param)
    app.view(Seen)
    async with TestApp(app, settings=Settings(store_url=store_url)) as running:
        yield running


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


async def test_a14_events_are_stored_and_fold(running: TestApp) -> None:
    """A14: one event, then three more; the fold shows all of them."""
    await running.send(T, "id_A", CreateTest("id_A"))
    assert len(await running.events(T, "id_A")) == 1
    for command in (ConfirmTest("test A"), ConfirmTest("test B"), DoSomethingElse("else")):
        await running.send(T, "id_A", command)
    events = await running.events(T, "id_A")
    assert [(e.sequence, e.data) for e in events] == [
        (1, Created("id_A")),
        (2, Confirmed("test A")),
        (3, Confirmed("test B")),
        (4, SomethingElse("else")),
    ]
    folded = T()
    for envelope in events:
        folded.apply(envelope.data)
    assert folded == T("id_A", "else", ["test A", "test B"])


async def test_a15_a_test_is_performed_once(running: TestApp) -> None:
    """A15: what is accepted is stored and reaches the view; what is rejected does not."""

    async def seen() -> list[str]:
        await running.drain()
        view = await running.view(Seen, "id_A")
        return view.events if view else []

    await running.send(T, "id_A", ConfirmTest("x"))
    assert await seen() == ["1 Tested"]
    await running.send(T, "id_A", ConfirmTest("TEST_A"))
    assert await seen() == ["1 Tested", "2 Tested"]
    again = await running.send(T, "id_A", ConfirmTest("TEST_A"))
    with pytest.raises(errors.CommandRejected, match=r"^test already performed$"):
        again.ensure_accepted()
    assert len(await running.events(T, "id_A")) == 2
    assert await seen() == ["1 Tested", "2 Tested"]


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
