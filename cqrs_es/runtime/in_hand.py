"""What a worker holds of one partition, from the queue's hand to its settlement; and how much."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.execution.stages import Answer
    from cqrs_es.messages import CommandMessage
    from cqrs_es.ports.broker import Delivery
    from cqrs_es.runtime.leases import Assignment

# Bytes of messages of one partition in hand, beside the number of commands: a queue of large
# ones must not become the process's memory.
MOST_BYTES_IN_HAND: Final = 16 * 1024 * 1024


@dataclass(slots=True, eq=False)
class Held:
    """A delivery on its way to being settled; `answer` is None for a buried one."""

    delivery: Delivery
    message: CommandMessage | None = None
    answer: Answer | None = None
    attempted: bool = False

    @property
    def trouble(self) -> BaseException | None:
        """Why an answered command got no outcome, None when it got one."""
        if self.answer is None or self.answer.cancelled():
            return None
        return self.answer.exception()


class InHand:
    """Counts what is held, on the partition's assignment too, and collects what is done."""

    def __init__(self, assignment: Assignment, most: int) -> None:
        self._assignment = assignment
        assignment.in_hand = 0
        self._most = most
        self._bytes = 0
        self._done: list[Held] = []
        self._something_done = asyncio.Event()
        self._some_settled = asyncio.Condition()

    async def room(self) -> int:
        """Wait until more may be taken; return how many."""
        async with self._some_settled:
            await self._some_settled.wait_for(self._has_room)
        return self._most - self._assignment.in_hand

    def _has_room(self) -> bool:
        return self._assignment.in_hand < self._most and self._bytes < MOST_BYTES_IN_HAND

    def add(self, held: Held) -> None:
        """Hold a delivery until it is settled."""
        self._assignment.in_hand += 1
        self._bytes += len(held.delivery.body)

    def note_done(self, held: Held) -> None:
        """Note that one can be settled: its command is answered, or it is buried."""
        if held.answer is not None and not held.answer.cancelled():
            # Where all of a batch fail of one cause only the first is raised: note them all.
            held.answer.exception()
        self._done.append(held)
        self._something_done.set()

    async def take_done(self) -> list[Held]:
        """Wait for what can be settled; return all of it, in the order in which it was done."""
        await self._something_done.wait()
        self._something_done.clear()
        done, self._done = self._done, []
        return done

    async def settled(self, done: Sequence[Held]) -> None:
        """Let go of what is settled."""
        async with self._some_settled:
            self._assignment.in_hand -= len(done)
            self._bytes -= sum(len(held.delivery.body) for held in done)
            self._some_settled.notify_all()

    async def drain(self) -> None:
        """Wait until everything taken is settled."""
        async with self._some_settled:
            await self._some_settled.wait_for(lambda: self._assignment.in_hand == 0)
