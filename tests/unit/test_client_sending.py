"""How the client's commands reach the broker: in order, together where several ask."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.client.sending import BYTES_AT_ONCE, SENT_AT_ONCE, Sender
from cqrs_es.ports.broker import OutgoingCommand

if TYPE_CHECKING:
    from collections.abc import Sequence


class Gate(MemoryBroker):
    """A broker that takes commands while its gate is open, and then may fail."""

    def __init__(self) -> None:
        super().__init__(event_retention=1)
        self.open_for_sending = asyncio.Event()
        self.open_for_sending.set()
        self.faults: list[Exception] = []
        self.batches: list[list[str]] = []

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        await self.open_for_sending.wait()
        self.batches.append([command.command_id for command in commands])
        if self.faults:
            raise self.faults.pop()


def commands(first: int, last: int, size: int = 1) -> list[OutgoingCommand]:
    return [OutgoingCommand(0, str(number), b"x" * size) for number in range(first, last + 1)]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def sender(gate: Gate) -> Sender:
    return Sender(gate)


async def test_what_is_asked_for_meanwhile_goes_together(gate: Gate, sender: Sender) -> None:
    """While one batch is on its way, others gather; nobody waits for a timer."""
    gate.open_for_sending.clear()
    asking = [asyncio.create_task(sender.send(commands(number, number))) for number in range(9)]
    await asyncio.sleep(0)  # all have asked, and the first batch is on its way
    await asyncio.sleep(0)
    late = [asyncio.create_task(sender.send(commands(number, number))) for number in (9, 10)]
    await asyncio.sleep(0)
    gate.open_for_sending.set()
    await asyncio.gather(*asking, *late)
    assert gate.batches == [[str(number) for number in range(9)], ["9", "10"]]


async def test_many_are_sent_in_bounded_batches(gate: Gate, sender: Sender) -> None:
    """Batches are bounded in commands, and stay in order."""
    await sender.send(commands(1, 2 * SENT_AT_ONCE + 1))
    assert [len(batch) for batch in gate.batches] == [SENT_AT_ONCE, SENT_AT_ONCE, 1]
    assert [one for batch in gate.batches for one in batch] == [
        str(n) for n in range(1, 2 * SENT_AT_ONCE + 2)
    ]


async def test_large_ones_are_sent_in_small_batches(gate: Gate, sender: Sender) -> None:
    """Batches are bounded in bytes; one that is larger than that goes alone."""
    await sender.send(commands(1, 5, BYTES_AT_ONCE // 2))
    await sender.send(commands(6, 7, BYTES_AT_ONCE + 1))
    assert gate.batches == [["1", "2"], ["3", "4"], ["5"], ["6"], ["7"]]


async def test_after_a_failure_nothing_more_is_sent(gate: Gate, sender: Sender) -> None:
    """Later commands must not overtake those that may have to be sent again."""
    gate.faults = [errors.BrokerUnavailable()]
    with pytest.raises(errors.BrokerUnavailable):
        await sender.send(commands(1, SENT_AT_ONCE + 1))
    assert len(gate.batches) == 1
    await sender.send(commands(1, 1))
    assert gate.batches[1] == ["1"]


async def test_a_failure_is_everybodys_who_waits(gate: Gate, sender: Sender) -> None:
    """All whose commands were in the batch are told, whatever the error."""
    gate.faults = [RuntimeError("a bug")]
    outcomes = await asyncio.gather(
        *(sender.send(commands(number, number)) for number in range(3)), return_exceptions=True
    )
    assert [str(outcome) for outcome in outcomes] == ["a bug"] * 3


async def test_who_stops_waiting_before_the_turn_sends_nothing(gate: Gate, sender: Sender) -> None:
    """A cancelled send that has not begun is left out."""
    gate.open_for_sending.clear()
    first = asyncio.create_task(sender.send(commands(1, 1)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second = asyncio.create_task(sender.send(commands(2, 2)))
    third = asyncio.create_task(sender.send(commands(3, 3)))
    await asyncio.sleep(0)
    second.cancel()
    gate.open_for_sending.set()
    await asyncio.gather(first, third)
    assert second.cancelled()
    assert gate.batches == [["1"], ["3"]]


async def test_closing_finishes_what_was_asked_for(gate: Gate, sender: Sender) -> None:
    """Who waits gets an answer."""
    gate.open_for_sending.clear()
    asking = asyncio.create_task(sender.send(commands(1, 1)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(sender.close())
    gate.open_for_sending.set()
    await closing
    await asking
    assert gate.batches == [["1"]]
    await sender.close()
