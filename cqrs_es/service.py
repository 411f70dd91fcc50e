"""A process that runs roles until it is told to stop, or has nothing left to do."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.application import PATIENCE_SECONDS, execution_policy
from cqrs_es.definitions import ViewDefinition
from cqrs_es.execution.executor import CANCELLATION_SECONDS
from cqrs_es.execution.retry import Retry
from cqrs_es.program import DONE, FAILED, INTERRUPTED, exit_code, sentence, version
from cqrs_es.runtime.feeding import Feeder
from cqrs_es.runtime.health import Probes, probed
from cqrs_es.runtime.roles import known_roles
from cqrs_es.runtime.stopping import run_until_stopped, stop_on_signals, watched
from cqrs_es.runtime.supervisor import Progress, Supervisor
from cqrs_es.runtime.waiting import unless, within
from cqrs_es.settings import Settings, masked
from cqrs_es.telemetry import logs
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.metrics import NO_METER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.application import Application
    from cqrs_es.opened import OpenApplication
    from cqrs_es.runtime.stopping import Stopping

T = TypeVar("T")
log = get_logger("cqrs_es.service")

IDLE_POLL_SECONDS: Final = 0.02
# How long the store may take for the summary; it may be away by then.
SUMMARY_SECONDS: Final = 5.0
LOG_SECONDS: Final = 1.0
# Seconds between looks at the store for the lag, at most, while this process does nothing: where
# it stays as it is, and where there is none. Whoever makes some tells of it at once.
LAG_SECONDS: Final = 30.0
NO_LAG_SECONDS: Final = 300.0
# Looks that a rate is taken over.
RATE_LOOKS: Final = 9
# Objects made between two looks for unreachable cycles, and such looks between two at older ones.
# By Python's own 700 a batch, whose objects are all reachable, costs a worker a third of its time
# (81 µs of CPU for a command instead of 57).
YOUNG_OBJECTS: Final = 50_000
YOUNG_LOOKS: Final = 20

Show: TypeAlias = Callable[[Supervisor], Coroutine[Any, Any, None]]


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


EVERYTHING: Final = Task()


class Report(msgspec.Struct):
    """What a process did, and what its views hold in the end, if it got that far.

    `code` is the exit code that the process is to end with.
    """

    code: int = DONE
    reason: str = "asked to stop"
    progress: Progress = msgspec.field(default_factory=Progress)
    seconds: float = 0.0
    rows: Mapping[str, int] = msgspec.field(default_factory=dict[str, int])
    parked: int = 0

    @property
    def failures(self) -> str:
        """What went wrong with commands and views, in words; empty for nothing."""
        counts = {
            "failed": self.progress.counts.failed,
            "dead letters": self.progress.dead,
            "parked aggregates": self.parked,
        }
        return ", ".join(f"{what}: {count}" for what, count in counts.items() if count)


# --- From the start to the end -----------------------------------------------


def run(
    app: Application,
    settings: Settings | None = None,
    task: Task = EVERYTHING,
    *,
    show: Show | None = None,
) -> Report:
    """Run roles in this process until SIGINT or SIGTERM, or until idle: see `serve`.

    For a process that does nothing else. It ends also where tasks ignore their
    cancellation.
    """
    return run_to_end(serve(app, settings, task, show=show))


def run_to_end(work: Coroutine[Any, Any, T]) -> T:
    """Run what a process does, and nothing else; it ends whatever tasks do."""
    gc.collect()
    gc.freeze()  # what there is now is code, and stays
    gc.set_threshold(YOUNG_OBJECTS, YOUNG_LOOKS)
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


async def serve(
    app: Application,
    settings: Settings | None = None,
    task: Task = EVERYTHING,
    *,
    show: Show | None = None,
    stopping: Stopping | None = None,
) -> Report:
    """Run roles until told to stop, or until idle; report what became of it.

    Waits for a store or broker that is away, serves probes where the settings
    say so, and ends the process when the event loop is blocked for longer than a
    lease. Told to stop it is by signals, for which it has to be in the main
    thread, or by a `Stopping` of your own. `show` is run beside the roles; unless
    given it logs the progress.
    """
    settings = settings or Settings.from_environment()
    app = app.on_store_of(settings)
    logs.to_logging_unless_configured()
    with nullcontext(stopping) if stopping else stop_on_signals() as told:
        service = Service(app, settings, task, told, show or log_progress)
        async with probed(service.probes, settings.health_address):
            return await _run_to_its_end(service, settings, told)


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
    progress, counts = report.progress, report.progress.counts
    say = log.info if exc is None else log.error
    say(
        "ended",
        reason=report.reason if exc is None else sentence(errors.innermost(exc)),
        exit_code=report.code if exc is None else exit_code(errors.innermost(exc)),
        accepted=counts.accepted,
        rejected=counts.rejected,
        failed=counts.failed,
        duplicate=counts.duplicate,
        dead=progress.dead,
        events=counts.events,
        published=progress.published,
        projected=progress.projected,
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
        show: Show,
    ) -> None:
        self._app = app
        self._settings = settings
        self._task = task
        self._stopping = stopping
        self._show = show
        self._roles = sorted(task.roles or known_roles(app.registry))
        service = settings.service or app.service
        self.probes = Probes(app.registry, settings, service, self._roles, stopping.asked)
        self._supervisor: Supervisor | None = None
        self._idle = False
        self._report = Report()
        self._started = self._ended = time.monotonic()

    async def run(self) -> None:
        """Open the application, wait for its servers if need be, and run its roles."""
        async with AsyncExitStack() as stack:
            opening = open_patiently(self._app, self._settings, stack, self.probes)
            opened = await unless(self._stopping.asked, opening)
            if opened is None:
                return
            self._supervisor = opened.supervisor(self._task.roles)
            self._started = time.monotonic()
            try:
                # Not before: drivers are imported meanwhile, and there is no lease yet.
                async with watched(self._settings.lease_seconds):
                    self._announce(opened)
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
            report.code = INTERRUPTED
        elif not clean:
            report.code = FAILED
        if self._supervisor is not None:
            report.progress = self._supervisor.progress
            report.seconds = round(self._ended - self._started, 3)
        if self._task.strict and report.failures:
            report.code = report.code or FAILED
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
            roles=self._roles,
            partitions=process.partitions,
            owner=process.owner,
        )

    # --- Working -------------------------------------------------------------

    async def _run_roles(self, opened: OpenApplication, supervisor: Supervisor) -> None:
        stop = self._stopping.asked
        async with asyncio.TaskGroup() as group:
            showing = group.create_task(self._show(supervisor))
            probing = group.create_task(self.probes.follow(opened.process, supervisor))
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
    answering: bool = False,
) -> OpenApplication:
    """Open the application, again and again while a server is away; `stack` closes it.

    With `answering`, somebody waits for what it does, and is told of a store that is away.

    A locked SQLite file is no server: `StoreLocked` is raised. Nor is its store
    waited for as long as it takes, which a queue on a server can be asked to do.
    """
    patience = PATIENCE_SECONDS if settings.embedded or answering else None
    policy = execution_policy(settings, app.policy, patience=patience)

    async def opened() -> OpenApplication:
        opening = app.open(
            settings,
            policy=policy,
            initialise=initialise,
            reach_broker=reach_broker,
            meter=NO_METER if probes is None else probes.meter,
        )
        try:
            return await stack.enter_async_context(opening)
        except errors.Unavailable as exc:
            if probes is not None:
                probes.health.waiting_for = exc.message
            raise

    retry = Retry(log, "waiting for a server", never=errors.StoreLocked)
    return await retry.wait_out(opened)


async def _is_idle(supervisor: Supervisor) -> bool:
    try:
        return await supervisor.idle()
    except errors.Unavailable:
        return False


async def _count_rows(opened: OpenApplication) -> dict[str, int]:
    """Count the rows of the application's views; those kept by SQL of their own are left out."""
    rows: dict[str, int] = {}
    for name, definition in opened.registry.projections.items():
        if isinstance(definition, ViewDefinition):
            rows[name] = await opened.storage.views.count(await opened.table(name))
    return rows


# --- Progress ----------------------------------------------------------------


async def looks(supervisor: Supervisor, seconds: float) -> AsyncIterator[Progress]:
    """Look how far a process is, again and again, for ever."""
    lately = deque[tuple[float, int]](maxlen=RATE_LOOKS)
    known, asked, lag, pause = -1, 0.0, None, seconds
    while True:
        await asyncio.sleep(seconds)
        now, look = time.monotonic(), supervisor.progress
        done, troubles = look.commands + look.published + look.projected, look.troubles
        if done != known or now - asked >= pause:
            try:
                before, lag = lag, await supervisor.lag()
                # One that stays is asked for less and less often: that reader may not even run.
                pause = 2 * pause if (done, lag) == (known, before) else seconds
                pause = NO_LAG_SECONDS if lag == 0 else min(pause, LAG_SECONDS)
                known, asked = done, now
            except errors.CqrsError as exc:
                lag, troubles = None, (*troubles, exc.message)
        lately.append((now, look.commands))
        since, before = lately[0]
        rate = (look.commands - before) / ((now - since) or 1)
        yield replace(look, troubles=troubles, lag=lag, per_second=rate)


async def log_progress(supervisor: Supervisor) -> None:
    """Write a log line a second while anything changes, for ever."""
    shown: tuple[object, ...] = (0, 0, 0, ())
    async for look in looks(supervisor, LOG_SECONDS):
        commands, events = look.commands, look.counts.events
        state = (commands, events, look.lag, look.troubles)
        if state == shown:
            continue
        shown = state
        log.info(
            "progress",
            commands=commands,
            events=events,
            lag=look.lag,
            per_second=round(look.per_second, 1),
            troubles=look.troubles,
        )
