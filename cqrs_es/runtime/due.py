"""Scheduled commands on their way to the executor: beside the queue, as a queue of their own.

A row of `outgoing_commands` that is due is taken by whoever holds its partition, like a
message; it is settled by the append that decides it, which deletes it. So rows
need no broker, and nothing is lost or doubled between a row and its decision.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors
from cqrs_es.execution.retry import Retry
from cqrs_es.ports.broker import ANY_SIZE, CommandIntake, Delivery
from cqrs_es.ports.store import IMMEDIATELY
from cqrs_es.runtime.nudging import Reliance
from cqrs_es.runtime.waiting import within
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import time_of

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Sequence

    from cqrs_es.definitions import Recurring
    from cqrs_es.execution.causes import Causes
    from cqrs_es.ports.store import EventStore, ScheduledCommand
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.worker")

# What another process schedules is noticed within so many seconds: where nudges tell of it too,
# and where they do not.
NUDGED_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 1.0
LISTED_AT_ONCE: Final = 500


class Overdue(msgspec.Struct, frozen=True):
    """How many rows of a partition are due, and for how many seconds the first has been."""

    rows: int
    seconds: float


NOTHING_DUE: Final = Overdue(0, 0.0)


async def overdue(events: EventStore, partitions: Collection[int]) -> dict[int, Overdue]:
    """Look what is due and not decided."""
    found: dict[int, Overdue] = {}
    for partition, rows in (await events.count_due(partitions)).items():
        for first in await events.due(partition, 1):
            found[partition] = Overdue(rows, _waits_for(first))
    return found


def _waits_for(row: ScheduledCommand) -> float:
    """Return how long a row has been due; one that was due at once since its id was made."""
    due = row.moment
    if due == IMMEDIATELY:
        due = time_of(row.command_id) or due
    return max(0.0, (row.moment + row.late - due).total_seconds())


async def keep_recurring(process: Process, definition: Recurring) -> None:
    """Have one row for a recurring command: the first, and another when its code was changed.

    One row follows another in the append that decides it; see `Causes.renewed`.
    """
    events, causes = process.storage.events, process.executor.causes
    while True:
        following = causes.recurring(definition, process.clock.now())
        id_ = following.command_id
        if (await events.find_scheduled([id_])).get(id_) == following:
            return
        rows = await _rows_of(events, following)
        late = [row for row in rows if row.moment <= process.clock.now()]
        right = [row for row in rows if _is_right(row, definition, causes)]
        kept = (late or right)[:1]
        if not (others := [row.command_id for row in rows if row not in kept]):
            break
        await events.unschedule(others)
        # The kept row may have been decided since it was listed, and its successor may be among
        # those deleted: look again.
    if not kept:
        await events.schedule([following])
        process.nudger.scheduled({following.partition})


async def _rows_of(events: EventStore, wanted: ScheduledCommand) -> list[ScheduledCommand]:
    """Read the rows of a recurring command."""
    found: list[ScheduledCommand] = []
    after = None
    while page := await events.list_scheduled(after, LISTED_AT_ONCE, wanted.key):
        found += [row for row in page if row.timer == wanted.timer]
        after = page[-1].moment, page[-1].command_id
    return found


def _is_right(row: ScheduledCommand, definition: Recurring, causes: Causes) -> bool:
    """Tell whether a row is one that the code as it is now would make."""
    before = row.moment - timedelta(seconds=1)
    return definition.is_at(row.moment) and row == causes.recurring(definition, before)


class Timetable:
    """Knows when the next row of each partition that this process takes is due.

    It looks once for all partitions, when the next row is due that it knows of, when nudges tell
    of those of other processes, and now and then; those of this process are told to it.
    """

    def __init__(self, events: EventStore) -> None:
        self._events = events
        self._due: dict[int, asyncio.Event] = {}
        self._look_now = asyncio.Event()
        self.reliance = Reliance()
        self._hinted = True
        self._next_at = 0.0

    def hint(self) -> None:
        """Look now: another process has scheduled something, or may have."""
        self._hinted = True
        self._look_now.set()

    def poke(self, partitions: Collection[int] | None = None) -> None:
        """Wake who takes these partitions, or all: rows were added, or the clock was set."""
        for partition in self._due if partitions is None else partitions:
            if partition in self._due:
                self._due[partition].set()

    @contextmanager
    def taking(self, partition: int) -> Generator[asyncio.Event]:
        """Look after a partition during the block; give what is set when a row may be due."""
        due = self._due[partition] = asyncio.Event()
        try:
            yield due
        finally:
            del self._due[partition]

    def nothing_due(self) -> None:
        """Note that some partition waits for its next row from now on."""
        self._look_now.set()

    async def run(self) -> None:
        """Look for ever; meant to be cancelled. Raises `StoreUnusable`."""
        retry = Retry(log, "due commands unreadable", bears=errors.CqrsError)
        while True:
            self._look_now.clear()
            async with retry:
                seconds = await self._look()
                await within(seconds, self._look_now.wait())

    async def _look(self) -> float:
        """Wake who has something due; return after how many seconds to look again."""
        hinted, self._hinted = self._hinted, False
        waiting = {number for number, due in self._due.items() if not due.is_set()}
        if not waiting:
            return self._pause
        now = asyncio.get_running_loop().time()
        found = (await self._events.next_due(waiting)).items()
        due, later = [n for n, left in found if left <= 0], [left for _, left in found if left > 0]
        if due and not hinted and now < self._next_at:
            self.reliance.missed()
        self._next_at = now + min(later, default=math.inf)
        self.poke(due)
        return min([self._pause, *later])

    @property
    def _pause(self) -> float:
        return NUDGED_SECONDS if self.reliance.justified else LOOK_SECONDS


class DueIntake(CommandIntake):
    """The due rows of one partition, as messages.

    Where the partition's last holder has not let go of it, it may have died of a row. Which
    rows it had is not known: the first are taken for delivered again, as many as there can
    have been in hand.

    A look reads what is in hand too, and takes as long as what it reads: it comes when no more
    than a batch is in hand, and brings one at most. So one is committed while another is decided.
    """

    def __init__(
        self,
        events: EventStore,
        timetable: Timetable,
        due: asyncio.Event,
        assignment: Assignment,
        batch: int,
        most: int,
    ) -> None:
        self._events = events
        self._timetable = timetable
        self._due = due
        self._partition = assignment.lease.partition
        self._assignment = assignment
        if assignment.suspects is None:
            assignment.suspects = most if assignment.lease.inherited else 0
        self._in_hand: set[object] = set()
        self._batch = batch
        self._more = False
        self._settled = asyncio.Event()

    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Delivery]:
        """Wait for rows that are due and not in hand; return at least one."""
        while len(self._in_hand) > self._batch:
            self._settled.clear()
            await self._settled.wait()
        while not (fresh := await self._fresh(min(limit, self._batch))):
            if self._in_hand:
                # They are due too, so that the timetable can't tell of new ones.
                await within(LOOK_SECONDS, self._due.wait())
            else:
                self._timetable.nothing_due()
                await self._due.wait()
            self._assignment.suspects = 0
        received: list[Delivery] = []
        for row in fresh:
            most_bytes -= len(row.body)
            if received and most_bytes < 0:
                break
            self._in_hand.add(row.command_id)
            suspects = self._assignment.suspects or 0
            self._assignment.suspects = max(0, suspects - 1)
            again = suspects > 0
            received.append(
                Delivery(self._partition, row.body, row.command_id, again, scheduled=row)
            )
        return received

    async def _fresh(self, limit: int) -> list[ScheduledCommand]:
        """Read rows that are due and not in hand."""
        self._due.clear()
        if self._in_hand and not self._more:
            # Counting is a look at the index; reading brings every row that is in hand again.
            count = await self._events.count_due([self._partition])
            if count.get(self._partition, 0) <= len(self._in_hand):
                return []
        asked = len(self._in_hand) + limit
        rows = await self._events.due(self._partition, asked)
        self._more = len(rows) == asked
        return [row for row in rows if row.command_id not in self._in_hand][:limit]

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Let go of rows that are there no more: whatever settled them has deleted them."""
        self._in_hand.difference_update(each.tag for each in deliveries)
        self._settled.set()

    async def close(self) -> None:
        """Do nothing: rows that were not settled are still there."""
