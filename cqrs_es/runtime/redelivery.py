"""Commands that are delivered again: which of them may go on, and beside whom (G9).

A message comes again because the process that had it died, or because that
process is alive and let go of it: it stopped, lost the partition or its
connection. Only a death can be a command's fault, and only of a command that
was being handled. So an attempt at a redelivered command is recorded before it
is made, and taken back by whoever survives it: a record that is found is of a
process that died. The number in `command_attempts` says what else was at hand:

    none   it was out when something happened; nothing is known of it
    -1     a process died while it was among the many that were tried together
    0      a process died while it was among the few that were tried together
    1, 2   so many processes died while nothing but it was tried

    none ──────▶ 1   tried alone, where few came again and the process has time for that,
    none ──────▶ -1  else together with many
    -1   ──────▶ 0   tried together with a few
    0    ──────▶ 1   tried alone
    1 ── wait ─▶ 2   tried alone, once the process has lived for a while without it
    2                fails without being tried

    answered     ▶ none   in the transaction that writes its outcome
    not answered ▶ what it was before, when whoever tried it lets go and is alive

The wait tells a deadly command from a process that dies anyway, by a limit on
its memory for example: that one dies in the wait, at which nothing is counted.

A number is written, never added to: after a lost answer the statement is
repeated and counts nothing more.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from cqrs_es import errors
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cqrs_es.execution.stages import Answer
    from cqrs_es.messages import CommandMessage
    from cqrs_es.ports.broker import Delivery
    from cqrs_es.runtime.process import Process
    from cqrs_es.types import AggregateKey

log = get_logger("cqrs_es.worker")

# A command that so many processes died of, alone, fails.
MOST_DEATHS: Final = 2
# So many are tried together at first: nearly as fast as what was never out. Then so few.
MANY: Final = 512
FEW: Final = 64
AMONG_MANY: Final = -1
AMONG_FEW: Final = 0
# So long may a process try commands alone of which nothing is known.
ALONE_SECONDS: Final = 5.0
# So long a process has to live before a command that one died of is tried again.
WAIT_SECONDS: Final = 10.0
# So long a process that lets go tries to take its attempts back.
TAKE_BACK_SECONDS: Final = 3.0


class Redelivered(msgspec.Struct, frozen=True):
    """A command that was out before; `attempts` is its number, None where there is none."""

    delivery: Delivery
    message: CommandMessage
    attempts: int | None = None
    answered: bool = False

    @property
    def may_be_deadly(self) -> bool:
        """Whether a process died of it alone, so that it waits before it is tried once more."""
        return not self.answered and AMONG_FEW < (self.attempts or 0) < MOST_DEATHS


Submit: TypeAlias = "Callable[[Redelivered, int, str | None], Answer]"
"""Hand a command to the executor: how often it was attempted, and why it must fail."""


class Gate:
    """The way into the executor: open to all, or to one attempt with nothing beside it.

    `seconds_left` is the time for attempts alone at commands of which nothing is known.
    """

    def __init__(self, process: Process) -> None:
        self._executor, self._clock = process.executor, process.clock
        self._began = self._clock.monotonic()
        self._lock = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()
        self.seconds_left = ALONE_SECONDS

    @property
    def wait_seconds(self) -> float:
        """Seconds until this process has lived for as long as it must before a second attempt."""
        return max(0.0, self._began + WAIT_SECONDS - self._clock.monotonic())

    async def wait_open(self) -> None:
        """Wait until nothing is tried by itself; submit before awaiting anything else."""
        while not self._open.is_set():
            await self._open.wait()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Keep everybody else out, once those who are in have been answered."""
        async with self._lock:
            self._open.clear()
            try:
                await self._executor.drain()
                yield
            finally:
                self._open.set()


class Redelivery:
    """Submits what one partition's queue delivers again, in order."""

    def __init__(self, process: Process, gate: Gate, submit: Submit) -> None:
        self._outage, self._clock = process.outage(), process.clock
        self._events = process.storage.events
        self._gate = gate
        self._submit = submit
        # What there was, None for nothing, before the attempts that are not answered.
        self._before: dict[str, int | None] = {}

    async def take(self, commands: Sequence[tuple[Delivery, CommandMessage]]) -> None:
        """Submit commands that were out before, and wait for those that may be deadly.

        Only their aggregates wait before that: where processes live for less than the wait,
        others get on all the same.
        """
        suspects = await self._look_up(commands)
        log.info("commands redelivered", commands=len(suspects))
        few = len(suspects) <= FEW
        at_once, after_the_wait = _apart(suspects)
        await self._take(at_once, few=few)
        if after_the_wait:
            wait = self._gate.wait_seconds
            for it in after_the_wait:
                if it.may_be_deadly:
                    id_ = it.message.id
                    log.warning("a process died of a command", command_id=id_, wait=round(wait, 1))
            await self._clock.sleep(wait)
            await self._take(after_the_wait, few=few)

    async def _take(self, suspects: Sequence[Redelivered], *, few: bool) -> None:
        while suspects:
            together = self._first_together(suspects, few=few)
            suspects = suspects[len(together) :]
            if len(together) > 1:
                await self._try_together(together)
            else:
                await self._try_one(together[0])

    async def _look_up(
        self, commands: Sequence[tuple[Delivery, CommandMessage]]
    ) -> list[Redelivered]:
        """Find what is known of commands; forget attempts at those that have an outcome."""
        ids = {message.id for _, message in commands}
        answered = (await self._outage.wait_out(lambda: self._events.find_outcomes(ids))).keys()
        attempts = await self._outage.wait_out(lambda: self._events.find_attempts(ids))
        await self._forget(attempts.keys() & answered)
        return [
            Redelivered(delivery, message, attempts.get(message.id), message.id in answered)
            for delivery, message in commands
        ]

    def _first_together(
        self, suspects: Sequence[Redelivered], *, few: bool
    ) -> Sequence[Redelivered]:
        """Return those at the front that are tried together: as much is known of each."""
        attempts = suspects[0].attempts
        if attempts is None:
            most = 1 if few and self._gate.seconds_left > 0 else MANY
        else:
            most = FEW if attempts == AMONG_MANY else 1
        alike = itertools.takewhile(
            lambda it: it.attempts == attempts and not it.answered, suspects[:most]
        )
        return list(alike) or suspects[:1]

    async def _try_together(self, suspects: Sequence[Redelivered]) -> None:
        async with self._gate.alone():
            number = AMONG_MANY if len(suspects) > FEW else AMONG_FEW
            await self._record({it.message.id: (it.attempts, number) for it in suspects})
            await _answered([self._submit(it, 1, None) for it in suspects])

    async def _try_one(self, suspect: Redelivered) -> None:
        attempts = max(AMONG_FEW, suspect.attempts or 0)
        if suspect.answered:
            await self._gate.wait_open()
            _ = self._submit(suspect, 0, None)
        elif attempts >= MOST_DEATHS:
            await self._gate.wait_open()
            reason = f"the process died at {attempts} attempts to handle the command alone"
            _ = self._submit(suspect, attempts, reason)
        else:
            await self._try_alone(suspect, attempts)

    async def _try_alone(self, suspect: Redelivered, attempts: int) -> None:
        command_id = suspect.message.id
        async with self._gate.alone():
            began = self._clock.monotonic()
            await self._record({command_id: (suspect.attempts, attempts + 1)})
            await _answered([self._submit(suspect, attempts + 1, None)])
            if suspect.attempts is None:
                self._gate.seconds_left -= self._clock.monotonic() - began

    # --- What is recorded ----------------------------------------------------

    async def _record(self, attempts: Mapping[str, tuple[int | None, int]]) -> None:
        """Record attempts durably, each as what there was before and its own number."""
        for command_id, (before, _) in attempts.items():
            self._before.setdefault(command_id, before)
        numbers = {command_id: number for command_id, (_, number) in attempts.items()}
        await self._outage.wait_out(lambda: self._events.record_attempts(numbers))

    async def settle(self, decided: Collection[str], answered: Collection[str]) -> None:
        """Note commands whose attempts are over: `decided` by this process, which deleted them.

        Those `answered` from the store, or by another command's outcome, have theirs left.
        """
        over = {command_id for command_id in answered if command_id in self._before}
        for command_id in (*decided, *answered):
            self._before.pop(command_id, None)
        await self._forget(over)

    async def take_back(self) -> bool:
        """Record what there was before of every attempt that is not answered.

        The process lets go of those commands and is alive: it has not died of
        them. Where the store does not take that in time they stay recorded: False.
        """
        before, self._before = self._before, {}
        again = {command_id: number for command_id, number in before.items() if number is not None}
        try:
            async with asyncio.timeout(TAKE_BACK_SECONDS):
                await self._forget(before.keys() - again.keys())
                if again:
                    await self._outage.wait_out(lambda: self._events.record_attempts(again))
        except (TimeoutError, errors.CqrsError) as exc:
            log.warning("attempts not taken back", commands=len(before), error=str(exc))
            return False
        return True

    async def _forget(self, command_ids: Collection[str]) -> None:
        if command_ids:
            await self._outage.wait_out(lambda: self._events.forget_attempts(command_ids))


def _apart(
    suspects: Sequence[Redelivered],
) -> tuple[Sequence[Redelivered], Sequence[Redelivered]]:
    """Part what goes at once from what waits.

    That is a command that a process died of, alone, and those behind it for its aggregate.
    """
    waiting: set[AggregateKey] = set()
    at_once: list[Redelivered] = []
    after_the_wait: list[Redelivered] = []
    for it in suspects:
        if it.may_be_deadly:
            waiting.add(it.message.key)
        waits = it.message.key in waiting and not it.answered
        (after_the_wait if waits else at_once).append(it)
    return at_once, after_the_wait


async def _answered(answers: Sequence[Answer]) -> None:
    """Wait until all have an outcome; for ever where one gets none: its consumer is to end.

    What comes after it must not be decided before it.
    """
    await asyncio.wait(answers)
    if any(answer.cancelled() or answer.exception() for answer in answers):
        await asyncio.Event().wait()
