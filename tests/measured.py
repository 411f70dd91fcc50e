"""A whole application that runs in this process with its metrics on, read as Prometheus does."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson
from prometheus_client.parser import text_string_to_metric_families

from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.runtime.sampling import Sampler
from cqrs_es.settings import Settings
from cqrs_es.telemetry.exposition import Exposition
from cqrs_es.telemetry.metrics import PREFIX, Metrics
from cqrs_es.types import new_command_id
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping

    from cqrs_es.application import Application
    from cqrs_es.execution.policy import ExecutionPolicy
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage
    from cqrs_es.runtime.supervisor import Supervisor

Samples = dict[tuple[str, ...], float]


def parsed(text: str) -> Samples:
    """Return our own samples: by name without the prefix, and labels in their names' order."""
    return {
        (
            sample.name.removeprefix(PREFIX),
            *(sample.labels[name] for name in sorted(sample.labels)),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


@dataclass(slots=True)
class Measured:
    """An application with its roles running."""

    opened: OpenApplication
    supervisor: Supervisor
    metrics: Metrics
    sampler: Sampler

    def read(self) -> Samples:
        """Read every sample."""
        text, _ = Exposition(self.metrics).render("")
        return parsed(text.decode())

    async def send(self, name: str, number: int = 1, **fields: object) -> str:
        """Enqueue a command for a counter as another program would; return its id."""
        message = {
            "id": new_command_id(),
            "type": name,
            "aggregate_type": "counter",
            "aggregate_id": "A",
            "payload": {"n": number},
        } | fields
        await self.send_bytes(orjson.dumps(message))
        return str(message["id"])

    async def send_bytes(self, body: bytes) -> None:
        """Enqueue anything."""
        await self.opened.process.broker.send([OutgoingCommand(0, new_command_id(), body)])

    async def shows(self, *key: str, value: float) -> None:
        """Wait until a sample has a value."""

        async def shown() -> bool:
            return self.read().get(key) == value

        await eventually(shown)

    async def samples(self, expected: Mapping[tuple[str, ...], float]) -> None:
        """Wait until looks at the servers show these values."""

        async def shown() -> bool:
            await self.sampler.look()
            return expected.items() <= self.read().items()

        await eventually(shown)


@asynccontextmanager
async def measured(
    app: Application,
    *,
    storage: Storage | None = None,
    settings: Settings | None = None,
    roles: Collection[str] | None = None,
    policy: ExecutionPolicy | None = None,
) -> AsyncGenerator[Measured]:
    """Run an application, in memory unless told otherwise."""
    metrics = Metrics(app.registry)
    opening = app.open(
        settings or Settings(store_url="memory://"),
        storage=storage,
        meter=metrics,
        policy=policy,
        initialise=True,
        on_view_failure=lambda _event, _exc: None,
    )
    async with opening as opened, opened.running(roles) as supervisor:
        sampler = Sampler(opened.process, supervisor)
        metrics.gauges.append(lambda: sampler.readings)
        yield Measured(opened, supervisor, metrics, sampler)
