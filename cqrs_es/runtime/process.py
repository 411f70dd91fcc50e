"""What the roles of one process share."""

from __future__ import annotations

import os
import secrets
import socket
from typing import TYPE_CHECKING

import msgspec

from cqrs_es.execution.retry import Outage
from cqrs_es.telemetry.metrics import NO_METER, Meter
from cqrs_es.telemetry.tracing import NO_TRACING, Tracing
from cqrs_es.types import lane_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cqrs_es.execution.executor import Executor
    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import Broker
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import StoreInfo
    from cqrs_es.projection.shared_log import SharedLog
    from cqrs_es.registry import Registry
    from cqrs_es.runtime.due import Timetable
    from cqrs_es.runtime.log_watcher import LogWatcher
    from cqrs_es.runtime.nudging import Nudger
    from cqrs_es.runtime.waiting import Recent
    from cqrs_es.settings import Settings


def new_owner() -> str:
    """Name this process as a member: host, process id, and something no other process has."""
    return f"{socket.gethostname()[:80]}-{os.getpid()}-{secrets.token_hex(4)}"


class Process(msgspec.Struct, frozen=True, kw_only=True):
    """An application with its servers connected, as one member of each of its roles.

    `info` and `generations` are for those who ask the store for them again and again.
    """

    registry: Registry
    settings: Settings
    service: str
    partitions: int
    storage: Storage
    broker: Broker
    clock: Clock
    executor: Executor
    shared_log: SharedLog
    watcher: LogWatcher
    timetable: Timetable
    nudger: Nudger
    owner: str
    info: Recent[StoreInfo]
    generations: Recent[Mapping[str, int]]
    remotes: Mapping[str, Broker] = msgspec.field(default_factory=dict["str", "Broker"])
    """Brokers of other services that were given, by their names; the others have URLs."""
    on_view_failure: Callable[[StoredEvent, Exception], None] | None = None
    meter: Meter = NO_METER
    tracing: Tracing = NO_TRACING

    @property
    def lanes(self) -> list[int]:
        """Where commands to other services lie."""
        services, numbers = self.registry.remotes, range(self.partitions)
        return [lane_of(service, number) for service in services for number in numbers]

    def outage(self) -> Outage:
        """Make what waits for the store for as long as it takes."""
        return Outage(self.clock, None, self.meter)
