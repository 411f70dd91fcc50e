"""Processes over several aggregates: what they hear, in which order, and what failures do."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from cqrs_es import wire
from cqrs_es.commands import new_command
from cqrs_es.stores import storage_for
from cqrs_es.testing import TestApp
from tests.transfers import (
    Account,
    Ask,
    Asked,
    Broken,
    Close,
    Deposited,
    Ended,
    Fund,
    Transfer,
    Withdraw,
    Withdrawn,
    bank,
    nothing,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def t(store_url: str) -> AsyncIterator[TestApp]:
    """Run the bank, with a hundred in account A, and accounts B and, closed, C."""
    storage = storage_for(store_url)
    try:
        async with TestApp(bank(), storage=storage) as t:
            await t.send(Account, "A", Fund(100))
            await t.send(Account, "C", Close())
            yield t
    finally:
        await storage.close()


async def balances(t: TestApp) -> list[int]:
    return [(await t.opened.load(Account, name)).state.balance for name in "ABC"]


async def ends(t: TestApp, transfer: str) -> list[str]:
    """Return how a transfer has ended: once, if all is well."""
    return [e.data.how for e in await t.events(Transfer, transfer) if isinstance(e.data, Ended)]


async def rows(t: TestApp) -> int:
    return len(await t.opened.storage.events.list_scheduled(None, 100))


async def test_money_arrives_or_comes_back(t: TestApp) -> None:
    """Each transfer ends once: done, refused for want of money, or refunded; no row is left."""
    await t.send(Account, "A", Ask("t1", "A", "B", 60))
    await t.drain()
    await t.send(Account, "A", Ask("t2", "A", "B", 60))
    await t.send(Account, "A", Ask("t3", "A", "C", 10))
    await t.drain()
    assert await balances(t) == [40, 60, 0]
    assert await ends(t, "t1") == ["done"]
    assert await ends(t, "t2") == ["refused: not_enough"]
    assert await ends(t, "t3") == ["refunded"]
    assert await rows(t) == 0
    assert await t.dead_letters() == []


async def test_what_a_process_causes_is_of_one_correlation(t: TestApp) -> None:
    """Every event has the first command's correlation id, and the id of what has caused it."""
    metadata = {"correlation_id": "order-17"}
    await t.send(Account, "A", Ask("t1", "A", "B", 60), metadata=metadata)
    await t.drain()
    withdrawn = (await t.events(Account, "A"))[-1]
    assert isinstance(withdrawn.data, Withdrawn)
    assert withdrawn.metadata["causation_id"] == "transfer/t1/1"
    assert withdrawn.metadata["process"] == "transfer/t1"
    events = [*await t.events(Transfer, "t1"), withdrawn, (await t.events(Account, "B"))[-1]]
    assert {event.metadata["correlation_id"] for event in events} == {"order-17"}


async def test_nobody_outside_can_address_a_process(t: TestApp) -> None:
    """A message for one, internal or not, gets `unknown_aggregate_type` or is no message at all."""
    message = new_command("transfer", "t1", "Elapsed", {"name": "too long"}, reply_to=t.reply_to)
    await t.enqueue(wire.encode_command(message))
    outcome = await t.reply(message.id)
    assert outcome.error is not None
    assert outcome.error.code == "unknown_aggregate_type"
    await t.enqueue(wire.encode_command(replace(message, type="$event")))
    await t.drain()
    assert await t.events(Transfer, "t1") == []
    letters = await t.dead_letters()
    assert len(letters) == 2
    for letter in letters:  # nor does an operator let them in
        if "$event" not in letter.body.decode():
            retried = await t.opened.retry_dead_letter(letter.id)
            assert retried.error is not None
            assert retried.error.code == "unknown_aggregate_type"


async def test_forged_metadata_is_not_believed(t: TestApp) -> None:
    """An event whose command says that a process has sent it is routed by the event itself."""
    forged = {"process": "transfer/t1", "process_mac": "0" * 64, "hops": "15"}
    await t.send(Account, "A", Ask("t9", "A", "B", 5), metadata=forged)
    await t.send(Account, "A", Withdraw(5), metadata=forged)
    await t.drain()
    assert await ends(t, "t9") == ["done"]
    assert await t.events(Transfer, "t1") == []


async def test_a_process_that_fails_waits_and_others_go_on(t: TestApp) -> None:
    """Its later inputs and its timer wait behind the one that failed; a retry lets all go on."""

    def fail(given: object) -> None:
        if given == Deposited(60):
            raise RuntimeError

    Broken.on = fail
    try:
        with t.expect_failures():
            await t.send(Account, "A", Ask("t1", "A", "B", 60))
            await t.drain()
            await t.advance(timedelta(hours=2))
            await t.send(Account, "A", Ask("t2", "A", "B", 10))
            await t.drain()
        assert await ends(t, "t1") == []
        assert await ends(t, "t2") == ["done"]
        assert await rows(t) == 1  # the timer of the one that waits
        (letter,) = await t.dead_letters()
        assert "RuntimeError" in letter.reason
    finally:
        Broken.on = nothing
    outcome = await t.opened.retry_dead_letter(letter.id)
    assert outcome.accepted
    await t.drain()
    assert await ends(t, "t1") == ["done"]
    assert await rows(t) == 0
    assert await t.dead_letters() == []


async def test_an_input_that_is_dropped_lets_the_process_go_on(t: TestApp) -> None:
    """The process does not hear of it, but what came after it is taken."""

    def fail(given: object) -> None:
        if isinstance(given, Asked) and given.transfer == "t1":
            raise RuntimeError

    Broken.on = fail
    try:
        with t.expect_failures():
            await t.send(Account, "A", Ask("t1", "A", "B", 60))
            await t.drain()
    finally:
        Broken.on = nothing
    (letter,) = await t.dead_letters()
    assert await t.opened.drop_dead_letter(letter.id)
    assert await t.dead_letters() == []
    outcome = await t.outcome(letter.id)
    assert outcome is not None
    assert outcome.error is not None
    assert (outcome.status, outcome.error.code) == ("rejected", "dropped")
    await t.send(Account, "A", Ask("t1", "A", "B", 10))
    await t.drain()
    assert await ends(t, "t1") == ["done"]


async def test_a_process_hears_that_its_failed_command_is_dropped(t: TestApp) -> None:
    """A command that fails tells nobody until an operator drops it: then it is refused."""
    Account.deposits_fail = True
    try:
        with t.expect_failures():
            await t.send(Account, "A", Ask("t1", "A", "B", 60))
            await t.drain()
        assert await ends(t, "t1") == []
        (letter,) = await t.dead_letters()
        assert await t.opened.drop_dead_letter(letter.id)
        await t.drain()
    finally:
        Account.deposits_fail = False
    assert await ends(t, "t1") == ["refunded"]
    assert await balances(t) == [100, 0, 0]


async def test_inputs_of_a_process_that_is_over_are_dropped(t: TestApp) -> None:
    """Whoever names an instance that has ended changes nothing, and nothing fails."""
    await t.send(Account, "A", Ask("t1", "A", "B", 60))
    await t.drain()
    before = len(await t.events(Transfer, "t1"))
    await t.send(Account, "A", Ask("t1", "A", "B", 1))
    await t.drain()
    assert len(await t.events(Transfer, "t1")) == before
    assert await balances(t) == [40, 60, 0]
