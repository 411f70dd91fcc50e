"""What a process answers on `--health-port`, from its start to its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

import structlog

from cqrs_es.cli.version import version
from cqrs_es.runtime.health import Health
from cqrs_es.runtime.roles import known_roles
from cqrs_es.runtime.sampling import Sampler
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.runtime.web import Answer, WebServer
from cqrs_es.telemetry import metrics
from cqrs_es.telemetry.metrics import NO_METER, Meter, Metrics, Reading

if TYPE_CHECKING:
    from collections.abc import Collection

    from cqrs_es.application import Application
    from cqrs_es.runtime.process import Process
    from cqrs_es.runtime.supervisor import Supervisor
    from cqrs_es.settings import Settings
    from cqrs_es.telemetry.exposition import Exposition

log = structlog.get_logger("cqrs_es.cli")


class Probes:
    """The health of one process and, where prometheus-client is installed, its metrics."""

    def __init__(
        self,
        app: Application,
        settings: Settings,
        roles: Collection[str] | None,
        stopping: asyncio.Event,
    ) -> None:
        self._roles = sorted(roles or known_roles(app.registry))
        self._info = (version(), settings.service or app.service, settings.app or "")
        self._supervisor: Supervisor | None = None
        self._sampler: Sampler | None = None
        self._exposition: Exposition | None = None
        self.health = Health(settings, app.registry, stopping)
        self.meter: Meter = NO_METER
        self._wanted = settings.health_port is not None
        if self._wanted:
            self._measure(Metrics(app.registry, roles=self._roles))

    def _measure(self, metrics: Metrics) -> None:
        try:
            from cqrs_es.telemetry.exposition import Exposition
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
        await self._sampler.run()

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
async def probed(
    app: Application,
    settings: Settings,
    roles: Collection[str] | None,
    stopping: asyncio.Event,
) -> AsyncGenerator[Probes]:
    """Serve probes during the block, where the settings name a port for them."""
    probes = Probes(app, settings, roles, stopping)
    address = settings.health_address
    if address is None:
        yield probes
        return
    pages = {"/live": probes.health.live, "/ready": probes.health.ready, "/metrics": probes.metrics}
    server = WebServer(pages)
    port = await server.start(*address)
    log.info("probes served", host=address[0], port=port)
    watching = asyncio.create_task(probes.health.watch())
    try:
        yield probes
    finally:
        await cancelled(watching)
        await server.close()
