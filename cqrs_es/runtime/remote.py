"""Commands to other services: rows in lanes beside the log, which the relay sends.

A row lies in a lane of its service and of its origin's partition. The relay that holds that
partition sends the rows that are due, in order, has them confirmed, and deletes them. One
that ends in between leaves them to be sent again: their ids make that harmless there.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cqrs_es import errors, wire
from cqrs_es.brokers import broker_for
from cqrs_es.execution.retry import Retry
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.runtime.due import NOTHING_DUE, overdue
from cqrs_es.runtime.waiting import cancelled, unless
from cqrs_es.telemetry import metrics
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.metrics import Reading
from cqrs_es.types import lane_of

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cqrs_es.definitions import Remote
    from cqrs_es.ports.broker import Broker
    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process
    from cqrs_es.settings import Settings

log = get_logger("cqrs_es.relay")

SENT_AT_ONCE: Final = 200
# How long what is being sent has to be confirmed when the process stops.
ENDING_SECONDS: Final = 5.0


class RemoteQueue:
    """The command queue of another service, connected when the first command is for it."""

    def __init__(self, remote: Remote, settings: Settings, given: Broker | None = None) -> None:
        self.service = remote.service
        self._remote = remote
        self._settings = settings
        self._given = given
        self._broker = given
        self._partitions: int | None = None
        self._connecting = asyncio.Lock()

    def url(self) -> str:
        """Return its broker's URL; raise `SettingsError` where nothing says it."""
        variable = self._remote.variable
        url = self._settings.remote_urls.get(variable) if variable else self._remote.url
        if url is None:
            message = f"{variable} is not set: the relay sends commands to {self.service} there"
            raise errors.SettingsError(message)
        return url

    def check(self) -> None:
        """Raise `SettingsError` where nobody can be reached: before anything is sent."""
        if self._given is None and not self._made().durable:
            message = f"{self.service} is another service: a broker in memory does not reach it"
            raise errors.SettingsError(message)

    def _made(self) -> Broker:
        return broker_for(self.url(), service=self.service)

    async def send(self, rows: Sequence[ScheduledCommand]) -> None:
        """Enqueue commands, in order; raises `BrokerUnavailable` when some may be missing."""
        try:
            broker, partitions = await self.connected()
            await broker.send([_outgoing(row, partitions) for row in rows])
        except errors.CqrsError:
            self._partitions = None  # whatever comes back may be another one
            raise

    async def connected(self) -> tuple[Broker, int]:
        """Return its broker, open, and how many partitions it has; raise `BrokerUnavailable`."""
        async with self._connecting:
            if self._broker is None:
                broker = self._made()
                await broker.open()
                self._broker = broker
            if self._partitions is None:
                topology = await self._broker.topology()
                if topology is None:
                    message = f"{self.service} has no queues yet: run its `cqrs-es init`"
                    raise errors.BrokerUnavailable(message)
                self._partitions = topology.partitions
            return self._broker, self._partitions

    async def close(self) -> None:
        """Close the connection, unless the broker was given."""
        if self._broker is not None and self._given is None:
            await self._broker.close()


def _outgoing(row: ScheduledCommand, partitions: int) -> OutgoingCommand:
    key = wire.parse_command(row.body, len(row.body)).key
    return OutgoingCommand(key.partition(partitions), row.command_id, row.body)


class RemoteSender:
    """Sends what is for other services, from each partition that the relay holds."""

    def __init__(self, process: Process) -> None:
        self._events = process.storage.events
        self._clock = process.clock
        self._meter = process.meter
        self._timetable = process.timetable
        self._queues = [
            RemoteQueue(remote, process.settings, process.remotes.get(name))
            for name, remote in process.registry.remotes.items()
        ]

    def check(self) -> None:
        """Raise `SettingsError` where a service can't be reached, whatever its state."""
        for queue in self._queues:
            queue.check()

    async def watch(self) -> None:
        """Look when commands are due, for as long as the relay is had; then close connections."""
        if not self._queues:
            return
        try:
            await self._timetable.run()
        finally:
            for queue in self._queues:
                await queue.close()

    async def run(self, assignment: Assignment) -> None:
        """Send what a partition causes until it is to stop; raises `StoreUnusable`."""
        async with asyncio.TaskGroup() as group:
            for queue in self._queues:
                group.create_task(self._send_forever(queue, assignment))

    async def _send_forever(self, queue: RemoteQueue, assignment: Assignment) -> None:
        stopping = assignment.stopping
        lane = lane_of(queue.service, assignment.lease.partition)
        retry = Retry(log, f"commands to {queue.service} not sent", clock=self._clock)
        with self._timetable.taking(lane) as due:
            while not stopping.is_set():
                due.clear()
                try:
                    sent = await self._send_due(queue, lane)
                except errors.StoreUnusable:
                    raise
                except Exception as exc:  # noqa: BLE001 - whatever it is, the others go on
                    await unless(stopping, retry.pause(exc))
                    continue
                retry.over()
                if not sent:
                    self._timetable.nothing_due()
                    await unless(stopping, due.wait())

    async def send_some(self, service: str, partition: int) -> bool:
        """Send the first commands that a partition has for a service; return whether it had any."""
        (queue,) = (queue for queue in self._queues if queue.service == service)
        return await self._send_due(queue, lane_of(service, partition))

    async def _send_due(self, queue: RemoteQueue, lane: int) -> bool:
        """Send the first rows that are due, and delete them; return whether there were any."""
        rows = await self._events.due(lane, SENT_AT_ONCE)
        if rows:
            await queue.send(rows)
            await self._events.unschedule([row.command_id for row in rows])
            self._meter.sent_away(queue.service, len(rows))
            log.info("commands sent", service=queue.service, commands=len(rows))
        return bool(rows)

    async def figures(self, held: Collection[int]) -> list[Reading]:
        """Ask how much waits for each service."""
        readings: list[Reading] = []
        for queue in self._queues:
            lanes = {lane_of(queue.service, number): number for number in held}
            late = await overdue(self._events, lanes)
            for lane, number in lanes.items():
                labels = (queue.service, str(number))
                figure = late.get(lane, NOTHING_DUE)
                readings.append(Reading(metrics.REMOTE_WAITING, figure.rows, labels))
                readings.append(Reading(metrics.REMOTE_OVERDUE_SECONDS, figure.seconds, labels))
        return readings


async def ended(sending: asyncio.Task[None], *, cleanly: bool) -> None:
    """Wait for a partition's sending to end; what takes long then is sent again by the next."""
    if cleanly:
        await asyncio.wait({sending}, timeout=ENDING_SECONDS)
    await cancelled(sending)
