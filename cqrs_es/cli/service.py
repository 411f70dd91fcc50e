"""A process that runs roles until it is told to stop, or has nothing left to do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

import structlog

from cqrs_es import errors
from cqrs_es.application import PATIENCE_SECONDS, execution_policy
from cqrs_es.cli import exits
from cqrs_es.cli.feeding import Feeder
from cqrs_es.cli.probes import Probes, probed
from cqrs_es.cli.progress import display_for
from cqrs_es.cli.version import version
from cqrs_es.definitions import ViewDefinition
from cqrs_es.execution.executor import CANCELLATION_SECONDS
from cqrs_es.execution.report import Counts
from cqrs_es.execution.retry import backoff
from cqrs_es.projection.generations import live_name
from cqrs_es.runtime.garbage import collect_less_often
from cqrs_es.runtime.roles import known_roles
from cqrs_es.runtime.signals import run_until_stopped, stop_on_signals
from cqrs_es.runtime.waiting import unless, within
from cqrs_es.runtime.watchdog import watched
from cqrs_es.settings import masked
from cqrs_es.telemetry import logs
from cqrs_es.telemetry.metrics import NO_METER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.application import Application
    from cqrs_es.opened import OpenApplication
    from cqrs_es.runtime.signals import Stopping
    from cqrs_es.runtime.supervisor import Supervisor
    from cqrs_es.settings import Settings

T = TypeVar("T")
log = structlog.get_logger("cqrs_es.cli")

IDLE_POLL_SECONDS: Final = 0.02
# How long the store may take for the summary; it may be away by then.
SUMMARY_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a process is to do: its roles (None for all), what to feed, when to end.

    `commands` is the descriptor of an open file. With `strict`, failures make
    the exit code 1.
    """

    roles: Collection[str] | None = None
    commands: int | None = None
    until_idle: bool = False
    strict: bool = False


@dataclass(slots=True)
class Report:
    """What a process did, and what its views hold in the end, if it got that far."""

    code: int = exits.DONE
    reason: str = "asked to stop"
    counts: Counts = field(default_factory=Counts)
    dead: int = 0
    published: int = 0
    projected: int = 0
    seconds: float = 0.0
    rows: Mapping[str, int] = field(default_factory=dict[str, int])
    parked: int = 0

    @property
    def failures(self) -> str:
        """What went wrong with commands and views, in words; empty for nothing."""
        counts = {
            "failed": self.counts.failed,
            "dead letters": self.dead,
            "parked aggregates": self.parked,
        }
        return ", ".join(f"{what}: {count}" for what, count in counts.items() if count)


def run_to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Run as `asyncio.run` does, but end also where tasks ignore their cancellation."""
    runner = asyncio.Runner()
    try:
        return runner.run(work)
    finally:
        if _all_ended(runner.get_loop()):
            runner.close()


def _all_ended(loop: asyncio.AbstractEventLoop) -> bool:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=CANCELLATION_SECONDS))
    return all(task.done() for task in tasks)


async def serve(app: Application, settings: Settings, task: Task) -> Report:
    """Run a process's roles until a signal, or until idle; report what became of it."""
    collect_less_often()
    with stop_on_signals() as stopping:
        async with probed(app, settings, task.roles, stopping.asked) as probes:
            service = Service(app, settings, task, stopping, probes)
            return await _run_to_its_end(service, settings, stopping)


async def _run_to_its_end(service: Service, settings: Settings, stopping: Stopping) -> Report:
    try:
        ended = await run_until_stopped(service.run(), stopping, settings.shutdown_timeout)
    except Exception as exc:
        log_end(service.report(clean=False), exc)
        raise
    report = service.report(clean=ended)
    log_end(report)
    return report


def log_end(report: Report, exc: Exception | None = None) -> None:
    """Say why a process ends, what it did, and with which exit code."""
    counts = report.counts
    say = log.info if exc is None else log.error
    say(
        "ended",
        reason=report.reason if exc is None else exits.sentence(errors.innermost(exc)),
        exit_code=report.code if exc is None else exits.exit_code(errors.innermost(exc)),
        accepted=counts.accepted,
        rejected=counts.rejected,
        failed=counts.failed,
        duplicate=counts.duplicate,
        dead=report.dead,
        events=counts.events,
        published=report.published,
        projected=report.projected,
        seconds=report.seconds,
    )


class Service:
    """One process from its start to its end."""

    def __init__(
        self,
        app: Application,
        settings: Settings,
        task: Task,
        stopping: Stopping,
        probes: Probes,
    ) -> None:
        self._app = app
        self._settings = settings
        self._task = task
        self._stopping = stopping
        self._probes = probes
        self._supervisor: Supervisor | None = None
        self._idle = False
        self._report = Report()
        self._started = self._ended = time.monotonic()

    async def run(self) -> None:
        """Open the application, wait for its servers if need be, and run its roles."""
        async with AsyncExitStack() as stack:
            opening = open_patiently(self._app, self._settings, stack, self._probes)
            opened = await unless(self._stopping.asked, opening)
            if opened is None:
                return
            self._supervisor = opened.supervisor(self._task.roles)
            self._announce(opened)
            self._started = time.monotonic()
            try:
                # Not before: drivers are imported meanwhile, and there is no lease yet.
                async with watched(self._settings.lease_seconds):
                    await self._run_roles(opened, self._supervisor)
            finally:
                self._ended = time.monotonic()
            with suppress(errors.Unavailable):  # it was a clean end all the same
                await within(SUMMARY_SECONDS, self._sum_up(opened))

    async def _sum_up(self, opened: OpenApplication) -> None:
        self._report.rows = await _count_rows(opened)
        self._report.parked = len(await opened.parked())

    def report(self, *, clean: bool) -> Report:
        """Say what was done so far, and with which exit code the process is to end."""
        report = self._report
        if self._idle:
            report.reason = "idle"
        if not clean:
            report.reason = "stopped before all in hand was finished"
        if self._task.until_idle and not self._idle:
            report.code = exits.INTERRUPTED
        elif not clean:
            report.code = exits.FAILED
        if self._supervisor is not None:
            report.counts = self._supervisor.counts
            report.dead = self._supervisor.dead
            report.published = self._supervisor.published
            report.projected = self._supervisor.projected
            report.seconds = round(self._ended - self._started, 3)
        if self._task.strict and report.failures:
            report.code = report.code or exits.FAILED
        return report

    def _announce(self, opened: OpenApplication) -> None:
        process, settings = opened.process, self._settings
        logs.name_process(owner=process.owner)
        log.info(
            "started",
            version=version(),
            app=settings.app,
            service=process.service,
            store=masked(settings.url_of_store(process.service)),
            broker=masked(settings.broker_url),
            roles=sorted(self._task.roles or known_roles(process.registry)),
            partitions=process.partitions,
            owner=process.owner,
        )

    # --- Working -------------------------------------------------------------

    async def _run_roles(self, opened: OpenApplication, supervisor: Supervisor) -> None:
        stop = self._stopping.asked
        async with asyncio.TaskGroup() as group:
            showing = group.create_task(display_for(supervisor).run())
            probing = group.create_task(self._probes.follow(opened.process, supervisor))
            running = group.create_task(supervisor.run(stop))
            await unless(stop, self._do_task(opened, supervisor))
            stop.set()
            await running
            showing.cancel()
            probing.cancel()

    async def _do_task(self, opened: OpenApplication, supervisor: Supervisor) -> None:
        """Feed what there is to feed; return once idle, or never."""
        process = opened.process
        if self._task.commands is not None:
            feeder = Feeder(process.broker, process.partitions, self._settings.max_message_bytes)
            await feeder.feed(self._task.commands)
        if not self._task.until_idle:
            await asyncio.Event().wait()
        while not await _is_idle(supervisor):
            if supervisor.stuck is not None:
                raise supervisor.stuck
            await asyncio.sleep(IDLE_POLL_SECONDS)
        self._idle = True


async def open_patiently(
    app: Application,
    settings: Settings,
    stack: AsyncExitStack,
    probes: Probes | None = None,
    *,
    reach_broker: bool = True,
    initialise: bool | None = None,
) -> OpenApplication:
    """Open the application, again and again while a server is away; `stack` closes it.

    A locked SQLite file is no server: `StoreLocked` is raised. Nor is its store
    waited for as long as it takes, which a queue on a server can be asked to do.
    """
    failures = 0
    patience = PATIENCE_SECONDS if settings.embedded else None
    policy = execution_policy(settings, app.policy, patience=patience)
    while True:
        try:
            meter = NO_METER if probes is None else probes.meter
            opening = app.open(
                settings,
                policy=policy,
                initialise=initialise,
                reach_broker=reach_broker,
                meter=meter,
            )
            return await stack.enter_async_context(opening)
        except errors.StoreLocked:
            raise
        except errors.Unavailable as exc:
            failures += 1
            delay = backoff(failures)
            if probes is not None:
                probes.health.waiting_for = exc.message
            log.warning("waiting for a server", error=exc.message, retry_in=round(delay, 2))
            await asyncio.sleep(delay)


async def _is_idle(supervisor: Supervisor) -> bool:
    try:
        return await supervisor.idle()
    except errors.Unavailable:
        return False


async def _count_rows(opened: OpenApplication) -> dict[str, int]:
    """Count the rows of the application's views; those kept by SQL of their own are left out."""
    views = opened.storage.views
    generations = await views.generations()
    rows: dict[str, int] = {}
    for name, definition in opened.registry.projections.items():
        if isinstance(definition, ViewDefinition):
            rows[name] = await views.count(live_name(generations, name))
    return rows
