"""The pump: whatever follows from what is committed, done until nothing is left or time is up.

    events ──▶ views, and reactors, which add due rows ──▶ commands ──▶ events …
       └─────▶ the topic                └─▶ commands to other services

It holds no leases. Checkpoints and the relay's mark move by compare-and-set, due rows go with
the append that decides them, so what two pumps do at once is done once; but only one of them
should run, or they do it in vain. One that is killed leaves checkpoints and rows to the next.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import msgspec

from cqrs_es import errors
from cqrs_es.ports.broker import Delivery
from cqrs_es.projection.applying import READ_LIMIT
from cqrs_es.runtime.due import keep_recurring
from cqrs_es.runtime.handed import consumed, unleased
from cqrs_es.runtime.projection_loop import GENERATION_SECONDS, ProjectorLoop, ReactorLoop
from cqrs_es.runtime.relay_loop import Relay
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import lane_of

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from cqrs_es.projection.applying import Applier
    from cqrs_es.runtime.consumer import CommandWorker
    from cqrs_es.runtime.process import Process

Work: TypeAlias = Callable[[], Awaitable[int]]

log = get_logger("cqrs_es.pump")

# Of the rows of a partition so many are decided before its events are looked at again.
ROWS_AT_ONCE: Final = 100
SIDE_BY_SIDE: Final = 16
SESSIONS: Final = 4
"""So much goes on side by side on SQL, where each takes a session, and a proxy has so many."""
PUMP: Final = "$pump"
"""The name of a checkpoint that is odd while rows are in hand: of whoever died it stays so."""


class Pumped(msgspec.Struct):
    """What was done: how many events each follower has seen, how many rows were decided."""

    done: Counter[str] = msgspec.field(default_factory=Counter[str])
    failed: dict[str, Exception] = msgspec.field(default_factory=dict[str, Exception])
    idle: bool = False


class _Applying(msgspec.Struct, frozen=True):
    """An applier and since when it is had: after a while another generation may be live."""

    applier: Applier
    since: float


class Pump:
    """Does what projectors, reactors, relay and the due rows' worker do where those run."""

    def __init__(self, process: Process, worker: CommandWorker) -> None:
        self._process = process
        self._worker = worker
        self._relay = Relay(process) if process.broker.durable else None
        if self._relay is not None:
            self._relay.check()
        registry = process.registry
        self._followers: list[ProjectorLoop | ReactorLoop] = [
            *(ProjectorLoop(process, each) for each in registry.projections.values()),
            *(ReactorLoop(process, each) for each in registry.reactors.values()),
        ]
        self._applying: dict[tuple[str, int], _Applying] = {}
        self._lanes = {
            lane_of(service, partition): (service, partition)
            for service in registry.remotes
            for partition in range(process.partitions)
        }
        on_sql = process.storage.views.sql is not None
        self._room = asyncio.Semaphore(SESSIONS if on_sql else SIDE_BY_SIDE)
        self._broker_open = False

    async def chores(self) -> None:
        """Do what is due now and then: next rows of recurring commands, old outcomes."""
        for definition in self._process.registry.recurring.values():
            await keep_recurring(self._process, definition)
        await self._worker.try_prune()

    async def run(self, seconds: float) -> Pumped:
        """Go on until nothing is left, or so many seconds have passed.

        What fails keeps nothing else from going on; the first error is raised at the end.
        """
        pumped, end = Pumped(), asyncio.get_running_loop().time() + seconds
        self._applying.clear()
        try:
            async with asyncio.timeout_at(end):
                await self._process.info.get(0)  # it may have been frozen for any time
                while await self._round(pumped, end):
                    pass
                pumped.idle = True
        except TimeoutError:
            pass  # what was not finished is as if it had not been begun
        log.info("pumped", idle=pumped.idle, failed=[*pumped.failed], **pumped.done)
        for error in pumped.failed.values():
            raise error
        return pumped

    async def _round(self, pumped: Pumped, end: float) -> bool:
        """Do the next of all that there is to be done; return whether there was any."""
        works, before = await self._works(end), pumped.done.total()

        async def attempt(name: str, work: Work) -> None:
            try:
                async with self._room:
                    done = await work()
                pumped.done[name.partition(" ")[0]] += done
            except errors.Conflict as exc:
                log.info("another pump is at work", work=name, error=exc.message)
            except Exception as exc:  # whatever it is, the others go on
                expected = isinstance(exc, errors.CqrsError)
                error, trace = str(exc), None if expected else exc
                log.warning("not pumped", work=name, error=error, exc_info=trace)
                pumped.failed[name] = exc

        async with asyncio.TaskGroup() as group:
            for name, work in works.items():
                if name not in pumped.failed:
                    group.create_task(attempt(name, work))
        return pumped.done.total() > before

    async def _works(self, end: float) -> dict[str, Work]:
        """Look what is behind the log, and which rows are due."""
        process = self._process
        readers = [*self._followers, *([self._relay] if self._relay else [])]
        numbers = range(process.partitions)
        lanes = self._lanes if self._relay else {}
        # A checkpoint that is read before the head is not beyond it, unless the log is broken.
        due = await process.storage.events.next_due([*numbers, *lanes])
        offsets = await asyncio.gather(*(reader.offsets() for reader in readers))
        await process.watcher.look()
        works: dict[str, Work] = {}
        for reader, reached in zip(readers, offsets, strict=True):
            for number in numbers:
                offset = reached.get(number, 0)
                if process.watcher.head(number) != offset:
                    works[f"{reader.name} {number}"] = partial(self._read, reader, number, offset)
        for reader in self._followers:
            if isinstance(reader, ProjectorLoop) and not await reader.promoted():
                works[f"{reader.name} promotion"] = reader.promote
        late = [number for number, seconds in due.items() if seconds <= 0]
        for number in lanes.keys() & late:
            works[" ".join(map(str, lanes[number]))] = partial(self._send, *lanes[number])
        if mine := sorted(number for number in late if number >= 0):
            works["due"] = partial(self._decide, mine, end)
        return works

    # --- The log -------------------------------------------------------------

    async def _read(
        self, reader: ProjectorLoop | ReactorLoop | Relay, partition: int, offset: int
    ) -> int:
        """Have a reader see some more of a partition; return how many events."""
        if isinstance(reader, Relay):
            await self._open_broker()
            return await reader.publish_some(partition, offset)
        applier = await self._applier(reader, partition)
        first = await applier.read_checkpoint()
        await applier.catch_up(most=first + READ_LIMIT)
        return applier.checkpoint - first

    async def _applier(self, reader: ProjectorLoop | ReactorLoop, partition: int) -> Applier:
        key, now = (reader.name, partition), asyncio.get_running_loop().time()
        known = self._applying.get(key)
        if known is None or now - known.since > GENERATION_SECONDS:
            applier = await reader.applier(unleased(self._process, reader.name, partition))
            known = self._applying[key] = _Applying(applier, now)
        return known.applier

    async def _open_broker(self) -> None:
        if not self._broker_open:
            await self._process.broker.open()
            self._broker_open = True

    async def _send(self, service: str, partition: int) -> int:
        assert self._relay is not None  # noqa: S101 - see `_works`
        return await self._relay.remote.send_some(service, partition)

    # --- Due rows ------------------------------------------------------------

    async def _decide(self, partitions: Sequence[int], end: float) -> int:
        """Have the first due rows of partitions decided; return how many were settled."""
        process = self._process
        died = await self._take_in_hand()
        try:
            groups: defaultdict[Hashable, list[Delivery]] = defaultdict(list)
            for partition in partitions:
                for row in await process.storage.events.due(partition, ROWS_AT_ONCE):
                    groups[row.key].append(
                        Delivery(partition, row.body, row.command_id, died, scheduled=row)
                    )
            seconds = end - asyncio.get_running_loop().time()
            left = await consumed(self._worker, process, groups.values(), seconds)
        finally:
            await asyncio.shield(self._let_go())
        return sum(map(len, groups.values())) - len(left)

    async def _take_in_hand(self) -> bool:
        """Note that rows are in hand; return whether somebody died who had some."""
        mark = await self._mark()
        await self._move_mark(mark, mark + 1 + mark % 2)
        return mark % 2 == 1

    async def _let_go(self) -> None:
        mark = await self._mark()
        if mark % 2:
            await self._move_mark(mark, mark + 1)

    async def _mark(self) -> int:
        return (await self._process.storage.views.checkpoints(PUMP)).get(0, 0)

    async def _move_mark(self, mark: int, to: int) -> None:
        async with self._process.storage.views.transaction() as transaction:
            await transaction.advance(PUMP, 0, mark, to)
