"""An application: a service's aggregates, views and projectors, and how it is opened."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cqrs_es import errors
from cqrs_es.aggregate import NO_RETRIES, Retries
from cqrs_es.brokers import broker_for
from cqrs_es.definitions import (
    define_aggregate,
    define_process,
    define_projector,
    define_reactor,
    define_recurring,
    define_remote,
    define_router,
    define_view,
    needs_services,
)
from cqrs_es.execution.executor import Executor
from cqrs_es.execution.policy import ExecutionPolicy as ExecutionPolicy  # for `policy`
from cqrs_es.execution.policy import Hooks, OnHandlerFailure
from cqrs_es.messages import NO_METADATA, Outcome, StoredEvent
from cqrs_es.opened import OpenApplication
from cqrs_es.ports.clock import Clock, SystemClock
from cqrs_es.ports.storage import check_service
from cqrs_es.projection.shared_log import SharedLog
from cqrs_es.registry import Registry
from cqrs_es.runtime.due import Timetable
from cqrs_es.runtime.log_watcher import LogWatcher
from cqrs_es.runtime.nudging import Nudger
from cqrs_es.runtime.process import Process, new_owner
from cqrs_es.runtime.waiting import Recent
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.telemetry.metrics import NO_METER, Meter
from cqrs_es.telemetry.tracing import tracing_for
from cqrs_es.types import NAME

if TYPE_CHECKING:
    from datetime import datetime

    from cqrs_es.aggregate import Aggregate, SourceOfTruth
    from cqrs_es.definitions import Kept, ServicesFactory
    from cqrs_es.intents import Send
    from cqrs_es.messages import CommandContext
    from cqrs_es.ports.broker import Broker
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import StoreInfo
    from cqrs_es.projector import Projector
    from cqrs_es.reactor import ProcessManager, Reactor
    from cqrs_es.telemetry.tracing import Tracing
    from cqrs_es.upcasting import Upcaster
    from cqrs_es.view import View

C = TypeVar("C")
E = TypeVar("E")
S = TypeVar("S")
Server = TypeVar("Server", "Storage", "Broker")

# How long a command is tried while the store is away, where somebody waits for its outcome.
PATIENCE_SECONDS: Final = 10.0

OnViewFailure = Callable[[StoredEvent, Exception], None]


class Application:
    """A service's aggregates, views and projectors, under the service's name."""

    def __init__(
        self,
        service: str,
        *,
        policy: ExecutionPolicy | None = None,
        retries: Retries | None = None,
    ) -> None:
        """Begin an application; of `policy` what is no setting of an operator's holds.

        `retries` are those of its handlers for what they name, `policy.retry_delays` for all else.
        """
        if not NAME.fullmatch(service):
            message = f"service name {service!r} must match {NAME.pattern}"
            raise errors.DefinitionError(message)
        self.service = service
        self.policy = policy or ExecutionPolicy()
        if retries is not None:
            self.policy = replace(self.policy, retries=retries)
        self.registry = Registry()
        self._open: list[OpenApplication] = []  # where it is open, last opened last

    def aggregate(  # noqa: PLR0913 - one argument for each thing that may be said of it
        self,
        cls: type[Aggregate[C, E, S]],
        *,
        services: Callable[[CommandContext], S] | None = None,
        source: SourceOfTruth | None = None,
        upcasters: Iterable[Upcaster] = (),
        command_upcasters: Iterable[Upcaster] = (),
        handler_timeout: float | None = None,
        retries: Retries = NO_RETRIES,
        outcomes: Kept = "for a time",
    ) -> None:
        """Register an aggregate.

        `services` makes what `handle` is given, for each command anew, from a
        `CommandContext`. `source` is `EventSourced()` unless given. `upcasters` lift its
        events, `command_upcasters` what older senders send. `retries` go before the
        application's. A command id is known for CQRS_ES_OUTCOME_RETENTION_DAYS, or with
        `outcomes="for ever"` always, of what is decided from then on; it costs a row for each
        command. Raises `DefinitionError`
        for anything that could not be run or stored.
        """
        factory: ServicesFactory | None = services
        definition = define_aggregate(
            cls,
            services=factory,
            source=source,
            upcasters=upcasters,
            command_upcasters=command_upcasters,
            handler_timeout=handler_timeout,
            retries=retries,
            outcomes=outcomes,
        )
        if factory is None and needs_services(cls):
            message = f"{cls.__qualname__} needs services: app.aggregate(…, services=…) makes them"
            raise errors.DefinitionError(message)
        self.registry.add_aggregate(definition)

    def view(self, cls: type[View[Any]]) -> None:
        """Register a view whose rows the framework keeps."""
        self.registry.add_projection(define_view(cls))

    def projector(self, cls: type[Projector[Any]], *, needed: bool = True) -> None:
        """Register a projector with tables and SQL of its own.

        On a store that has no SQL (DynamoDB) the application does not open, or
        does without the projector if it is not `needed`.
        """
        self.registry.add_projection(define_projector(cls, needed=needed))

    def every(
        self, cron: str, command: Send, *, zone: str = "UTC", name: str | None = None
    ) -> None:
        """Send a command at each time of a cron expression, in a zone such as Europe/Berlin.

            app.every("0 3 * * *", send(Report, "daily", Make()), zone="Europe/Berlin")

        Of times that were missed, while no worker ran, it is sent once. `name` is the command's
        unless given; it stays when the times are changed. Raises `DefinitionError`.
        """
        self.registry.add_recurring(define_recurring(cron, command, zone, name))

    def remote(self, service: str, *, url: str) -> None:
        """Name another service, so that commands can be sent to its aggregates.

            app.remote("billing", url="CQRS_ES_BILLING_URL")

        `url` is that of its broker, or an environment variable that has it. The relay sends
        what `send("billing:account", …)` asks for: at least once, and its id makes that once
        there, for as long as that service keeps outcomes; in order for each aggregate that
        sends. What becomes of it is not heard.
        Raises `DefinitionError`.
        """
        self.registry.add_remote(define_remote(service, url))

    def reactor(
        self, cls: type[Reactor[Any]], *, services: Callable[[CommandContext], Any] | None = None
    ) -> None:
        """Register a reactor; `services` makes what `react` is given, for each event anew."""
        self.registry.add_reactor(define_reactor(cls, services))

    def process_manager(
        self,
        cls: type[ProcessManager[Any, Any]],
        *,
        source: SourceOfTruth | None = None,
        upcasters: Iterable[Upcaster] = (),
        handler_timeout: float | None = None,
        retries: Retries = NO_RETRIES,
    ) -> None:
        """Register a process manager, and what routes events to its instances."""
        definition = define_process(
            cls,
            self.registry.aggregates,
            source=source,
            upcasters=upcasters,
            handler_timeout=handler_timeout,
            retries=retries,
        )
        self.registry.add_aggregate(definition)
        self.registry.add_reactor(define_router(cls, definition))

    def on_store_of(self, settings: Settings) -> Application:
        """Return what of the application runs on the store that the settings name.

        Where that is open this is open, too: handlers know the application as it was written.
        Raises `ConfigurationError` where that leaves out what is needed.
        """
        storage = make_storage(settings, settings.service or self.service, SystemClock())
        suited = Application(self.service, policy=self.policy)
        suited.registry = self.registry.suited(sql=storage.views.sql is not None)
        suited._open = self._open
        return suited

    # --- Opening -------------------------------------------------------------

    @asynccontextmanager
    async def open(  # noqa: PLR0913 - one argument for each part that may be given
        self,
        settings: Settings | None = None,
        *,
        storage: Storage | None = None,
        broker: Broker | None = None,
        clock: Clock | None = None,
        policy: ExecutionPolicy | None = None,
        initialise: bool | None = None,
        reach_broker: bool = True,
        on_handler_failure: OnHandlerFailure | None = None,
        on_view_failure: OnViewFailure | None = None,
        meter: Meter = NO_METER,
        remotes: Mapping[str, Broker] | None = None,
    ) -> AsyncGenerator[OpenApplication]:
        """Connect to the store and the broker.

        Settings come from the environment unless given; a store or broker that
        is given stays open afterwards. An embedded store (SQLite, memory) is
        initialised, with `initialise=True` a server store too, with False neither
        file nor server. Without `reach_broker` nothing is asked of the broker, which
        may be away: for work on the store alone. `remotes` are other services' brokers, in
        place of their URLs. Raises `StoreNotInitialised` for a
        store without tables, `WrongService` for another service's,
        `PartitionsMismatch` where a setting differs from the store.
        """
        from cqrs_es.telemetry import logs  # noqa: PLC0415 - structlog, which takes long to import

        logs.to_logging_unless_configured()
        self.registry.check()
        settings = settings or Settings.from_environment()
        settings.check_remotes([remote.url for remote in self.registry.remotes.values()])
        clock = clock or SystemClock()
        service = settings.service or self.service
        async with AsyncExitStack() as stack:
            storage = storage or _closing(stack, make_storage(settings, service, clock))
            broker = broker or _closing(stack, make_broker(settings, service))
            registry = self.registry.suited(sql=storage.views.sql is not None)
            await storage.open()
            if reach_broker:
                await broker.open()
            if initialise is None or not storage.durable:
                initialise = not storage.shared
            info = await _store_info(storage, settings, service, initialise=initialise)
            watcher, timetable = LogWatcher(storage.events), Timetable(storage.events)
            nudger = Nudger(broker if reach_broker else None, watcher, timetable)
            stack.push_async_callback(nudger.close)
            hooks = Hooks(
                on_failure=on_handler_failure,
                on_commit=nudger.committed,
                on_scheduled=nudger.scheduled,
                meter=meter,
                tracing=self._tracing(service, broker),
            )
            policy = policy or execution_policy(settings, self.policy)
            executor = _executor(registry, storage, info, clock, policy, hooks)
            process = Process(
                registry=registry,
                settings=settings,
                service=service,
                partitions=info.partitions,
                storage=storage,
                broker=broker,
                clock=clock,
                executor=executor,
                shared_log=SharedLog(storage.events),
                watcher=watcher,
                timetable=timetable,
                nudger=nudger,
                owner=new_owner(),
                info=Recent(storage.info),
                generations=Recent(storage.views.generations),
                remotes=remotes or {},
                on_view_failure=on_view_failure,
                meter=meter,
                tracing=hooks.tracing,
            )
            opened = OpenApplication(process)
            if initialise:
                await opened.initialise(declare=reach_broker)
            await stack.enter_async_context(executor)
            self._open.append(opened)
            stack.callback(self._open.remove, opened)
            stack.callback(opened.close)
            yield opened

    def _tracing(self, service: str, broker: Broker) -> Tracing:
        names = self.registry.command_names
        return tracing_for(service, broker.system, names, separator=broker.separator)

    async def execute(
        self,
        cls: type[Aggregate[C, Any, Any]],
        aggregate_id: str,
        command: C,
        *,
        command_id: str | None = None,
        metadata: Mapping[str, str] = NO_METADATA,
        expected_sequence: int | None = None,
    ) -> Outcome:
        """Execute a command in this process, where the application is open.

        See `OpenApplication.execute`.
        """
        return await self.opened.execute(
            cls,
            aggregate_id,
            command,
            command_id=command_id,
            metadata=metadata,
            expected_sequence=expected_sequence,
        )

    async def find(self, cls: type[Aggregate[Any, Any, Any]], **key: str) -> str | None:
        """Return the id of the aggregate that has a unique key, where the application is open.

        See `OpenApplication.find`.
        """
        return await self.opened.find(cls, **key)

    async def schedule(
        self,
        cls: type[Aggregate[C, Any, Any]],
        aggregate_id: str,
        command: C,
        *,
        at: datetime,
        command_id: str | None = None,
        metadata: Mapping[str, str] = NO_METADATA,
        expected_sequence: int | None = None,
    ) -> str:
        """Have a command decided at a moment, where the application is open; return its id.

        See `OpenApplication.schedule`.
        """
        return await self.opened.schedule(
            cls,
            aggregate_id,
            command,
            at=at,
            command_id=command_id,
            metadata=metadata,
            expected_sequence=expected_sequence,
        )

    @property
    def opened(self) -> OpenApplication:
        """The application as it is open now; raises `ConfigurationError` where it is not."""
        if not self._open:
            message = "the application is not open: async with app.open(): …"
            raise errors.ConfigurationError(message)
        return self._open[-1]


def _closing(stack: AsyncExitStack, server: Server) -> Server:
    """Have a store or broker closed at the end; return it."""
    stack.push_async_callback(server.close)
    return server


def make_storage(settings: Settings, service: str, clock: Clock) -> Storage:
    """Make the store that the settings name; it still has to be opened."""
    url = settings.url_of_store(service)
    return storage_for(url, clock=clock, lease_seconds=settings.lease_seconds)


def make_broker(settings: Settings, service: str) -> Broker:
    """Make the broker that the settings name; it still has to be opened."""
    return broker_for(
        settings.broker_url, service=service, event_retention=settings.event_retention
    )


def _executor(
    registry: Registry,
    storage: Storage,
    info: StoreInfo,
    clock: Clock,
    policy: ExecutionPolicy,
    hooks: Hooks,
) -> Executor:
    """Make what decides commands; raise `DefinitionError` for a recurring one that can't be."""
    executor = Executor(
        registry,
        storage.events,
        partitions=info.partitions,
        secret=info.secret,
        clock=clock,
        policy=policy,
        hooks=hooks,
    )
    for definition in registry.recurring.values():
        executor.causes.recurring(definition, clock.now())
    return executor


async def _store_info(
    storage: Storage, settings: Settings, service: str, *, initialise: bool
) -> StoreInfo:
    """Read what the store is, made if it is to be; a setting that differs is an error."""
    try:
        info = await storage.info()
    except errors.StoreNotInitialised as exc:
        if not initialise:
            raise
        partitions = exc.partitions or settings.partitions_or_default()
        info = await storage.initialise(partitions, service=service)
    check_service(info.service, service)
    if settings.partitions not in {None, info.partitions}:
        message = (
            f"the store has {info.partitions} partitions, CQRS_ES_PARTITIONS says "
            f"{settings.partitions}: P is fixed when a store is created, so unset the setting"
        )
        raise errors.PartitionsMismatch(message)
    return info


def execution_policy(
    settings: Settings, policy: ExecutionPolicy, *, patience: float | None = PATIENCE_SECONDS
) -> ExecutionPolicy:
    """Return a policy as the settings have it; `patience` is that with a store's absence."""
    return replace(
        policy,
        batch_size=settings.batch_size,
        cache_bytes=settings.cache_bytes,
        handler_timeout=settings.handler_timeout,
        max_event_bytes=settings.max_event_bytes,
        max_message_bytes=settings.max_message_bytes,
        patience=patience,
    )
