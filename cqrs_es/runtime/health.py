"""What a process answers on its health port: `/live`, `/ready` and `/metrics`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors
from cqrs_es.program import version
from cqrs_es.projection.generations import views_behind
from cqrs_es.runtime.leases import LOOK_PART
from cqrs_es.runtime.roles import WORKER
from cqrs_es.runtime.sampling import Sampler
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.runtime.web import Answer, WebServer, json_answer
from cqrs_es.telemetry import metrics
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.masking import mask_credentials
from cqrs_es.telemetry.metrics import NO_METER, Meter, Metrics, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from cqrs_es.registry import Registry
    from cqrs_es.runtime.process import Process
    from cqrs_es.runtime.roles import Position
    from cqrs_es.runtime.supervisor import Supervisor
    from cqrs_es.settings import Settings
    from cqrs_es.telemetry.exposition import Exposition

log = get_logger("cqrs_es.runtime")

TICK_SECONDS: Final = 0.25
VIEWS_SECONDS: Final = 1.0
# For so long a blocked event loop is told of afterwards: longer than most probes are apart.
REMEMBERED_SECONDS: Final = 15.0


class Health:
    """Knows why a process is not ready, from its start to its end.

    `waiting_for` is what keeps the application from being open, until `follow`;
    `views_behind`, which views this code has not, or not up to date, where that is
    waited for: None before anybody has looked. Who serves readers waits unless told not to.
    """

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        stopping: asyncio.Event,
        *,
        serves_readers: bool = False,
    ) -> None:
        self._stopping = stopping
        self._most_loop_lag = settings.lease_seconds * LOOK_PART
        self._patience = settings.lease_seconds
        self._worker_patience = settings.lease_seconds + _longest_handler(settings, registry)
        self._stalls = Stalls(self._patience_with)
        self._supervisor: Supervisor | None = None
        self._lag = 0.0
        self._lagged_at = 0.0
        self.waiting_for = "starting"
        asked = settings.wait_for_views
        waits = serves_readers if asked is None else asked
        self.views_behind: list[str] | None = None if waits else []

    def _patience_with(self, role: str) -> float:
        """Return for how long a role may not move: a worker's handlers may take their time."""
        return self._worker_patience if role == WORKER else self._patience

    def follow(self, supervisor: Supervisor) -> None:
        """Judge by a supervisor from now on: the application is open."""
        self._supervisor = supervisor

    async def watch(self) -> None:
        """Look at the progress and at the event loop, for ever; meant to be cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._note_lag(now - before - TICK_SECONDS, now)
            self._stalls.look(self._supervisor.positions() if self._supervisor else (), now)

    def _note_lag(self, lag: float, now: float) -> None:
        if lag >= self._lag or now - self._lagged_at > REMEMBERED_SECONDS:
            self._lag, self._lagged_at = lag, now

    # --- What is answered ------------------------------------------------------

    def reasons(self) -> list[str]:
        """Say why the process is not ready; nothing when it is."""
        return [mask_credentials(reason) for reason in self._reasons()]

    def _reasons(self) -> Iterator[str]:
        if self._stopping.is_set():
            yield "stopping"
        if self._lag > self._most_loop_lag:
            yield f"the event loop was blocked for {self._lag:.1f} s"
        if self._supervisor is None:
            yield f"not open yet: {self.waiting_for}"
            return
        yield from self._supervisor.troubles
        yield from (f"{role} has not joined yet" for role in self._supervisor.absent)
        yield from self._stalls.reasons
        if self.views_behind is None:
            yield "view_behind: not looked at yet"
        yield from (
            f"view_behind: {name} is not up to date for this code"
            for name in self.views_behind or ()
        )

    def live(self, _accept: str) -> Answer:
        """Answer `/live`: that this is answered at all is what it says."""
        return json_answer(HTTPStatus.OK, {"live": True})

    def ready(self, _accept: str) -> Answer:
        """Answer `/ready`: 200, or 503 with the reasons."""
        reasons = self.reasons()
        status = HTTPStatus.SERVICE_UNAVAILABLE if reasons else HTTPStatus.OK
        return json_answer(status, {"ready": not reasons, "reasons": reasons})


def _longest_handler(settings: Settings, registry: Registry) -> float:
    own = (definition.handler_timeout for definition in registry.aggregates.values())
    return max((seconds or settings.handler_timeout for seconds in own), default=0.0)


class _Seen(msgspec.Struct, frozen=True):
    offset: int | None
    since: float


class Stalls:
    """Remembers since when the work on each partition has not moved while it had a backlog.

    `patience` says for how many seconds a role may do so.
    """

    def __init__(self, patience: Callable[[str], float]) -> None:
        self._patience = patience
        self._seen: dict[tuple[str, int], _Seen] = {}
        self._now = 0.0

    def look(self, positions: Iterable[Position], now: float) -> None:
        """Compare with what was seen before; to be called often."""
        self._now = now
        self._seen = {
            (position.role, position.partition): self._compared(position, now)
            for position in positions
            if position.backlog
        }

    def _compared(self, position: Position, now: float) -> _Seen:
        before = self._seen.get((position.role, position.partition))
        if before is not None and before.offset == position.offset:
            return before
        return _Seen(position.offset, now)

    @property
    def reasons(self) -> list[str]:
        """Say what has not moved for longer than it may."""
        return [
            f"{role} on partition {partition}: no progress for {self._now - seen.since:.0f} s "
            "though there is something to be done"
            for (role, partition), seen in sorted(self._seen.items())
            if self._now - seen.since > self._patience(role)
        ]


class Probes:
    """The health of one process and, where prometheus-client is installed, its metrics."""

    def __init__(
        self,
        registry: Registry,
        settings: Settings,
        service: str,
        roles: Collection[str],
        stopping: asyncio.Event,
    ) -> None:
        self._roles = sorted(roles)
        self._info = (version(), service, settings.app or "")
        self._supervisor: Supervisor | None = None
        self._sampler: Sampler | None = None
        self._exposition: Exposition | None = None
        self.health = Health(settings, registry, stopping, serves_readers=not roles)
        self.meter: Meter = NO_METER
        self._wanted = settings.health_port is not None
        if self._wanted:
            self._measure(Metrics(registry, roles=self._roles))

    def _measure(self, metrics: Metrics) -> None:
        try:
            from cqrs_es.telemetry.exposition import Exposition  # noqa: PLC0415 - an extra
        except ModuleNotFoundError:  # the extra is not installed: /metrics says so
            return
        self.meter = metrics
        metrics.gauges.append(self._readings)
        self._exposition = Exposition(metrics)

    async def follow(self, process: Process, supervisor: Supervisor) -> None:
        """Judge by a supervisor from now on, looking at its servers for ever."""
        if not self._wanted:
            return
        self._supervisor, self._sampler = supervisor, Sampler(process, supervisor)
        self.health.follow(supervisor)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._sampler.run())
            group.create_task(self._wait_for_views(process))

    async def _wait_for_views(self, process: Process) -> None:
        """Look which views are behind until none is; what comes later is the projectors' lag."""
        definitions = process.registry.projections.values()
        while self.health.views_behind != []:
            with suppress(errors.CqrsError):
                numbers = await process.generations.get(VIEWS_SECONDS)
                self.health.views_behind = await views_behind(
                    process.storage.views, numbers, definitions
                )
            await asyncio.sleep(VIEWS_SECONDS)

    def _readings(self) -> Iterator[Reading]:
        yield Reading(metrics.INFO, 1.0, self._info)
        yield Reading(metrics.READY, float(not self.health.reasons()))
        held = {} if self._supervisor is None else self._supervisor.held
        for role in self._roles:
            yield Reading(metrics.PARTITIONS_HELD, len(held.get(role, ())), (role,))
        if self._sampler is not None:
            yield from self._sampler.readings

    def metrics(self, accept: str) -> Answer:
        """Answer `/metrics`."""
        if self._exposition is None:
            remedy = b"prometheus-client is not installed; run: pip install 'cqrs-es[metrics]'\n"
            return Answer(HTTPStatus.NOT_IMPLEMENTED, remedy, "text/plain; charset=utf-8")
        body, content_type = self._exposition.render(accept)
        return Answer(HTTPStatus.OK, body, content_type)


@asynccontextmanager
async def probed(probes: Probes, address: tuple[str, int] | None) -> AsyncGenerator[None]:
    """Serve probes at an address during the block."""
    if address is None:
        yield
        return
    pages = {"/live": probes.health.live, "/ready": probes.health.ready, "/metrics": probes.metrics}
    server = WebServer(pages)
    port = await server.start(*address)
    log.info("probes served", host=address[0], port=port)
    watching = asyncio.create_task(probes.health.watch())
    try:
        yield
    finally:
        await cancelled(watching)
        await server.close()
