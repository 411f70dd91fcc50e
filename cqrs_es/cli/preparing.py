"""Verbs for before anything runs: `init`, `check`, `settings`."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

import msgspec
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import invocation_of, with_application
from cqrs_es.cli.output import JsonFlag, print_fields, print_json, print_table
from cqrs_es.messages import CommandContext
from cqrs_es.program import DONE, FAILED, exit_code, sentence
from cqrs_es.settings import PREFIX, Settings, masked, shown_setting
from cqrs_es.types import new_command_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.application import Application
    from cqrs_es.definitions import AggregateDefinition, ProjectionDefinition, Remote
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import Broker, Topology
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import StoreInfo
    from cqrs_es.registry import Registry

SAMPLE: Final = 100
NewEpoch = Annotated[
    bool,
    typer.Option(
        "--new-epoch",
        help="After a restore from a backup: begin a new epoch of the log, published anew.",
    ),
]


def init(
    context: typer.Context,
    new_epoch: NewEpoch = False,
    json: JsonFlag = False,
) -> None:
    """Create or migrate tables, views and topology; safe to repeat.

    Example: cqrs-es init
    """

    async def work(opened: OpenApplication) -> StoreInfo:
        return await opened.initialise(new_epoch=new_epoch)

    info = with_application(context, work, initialise=True, broker=True)
    fields: dict[str, object] = {
        "partitions": info.partitions,
        "logepoch": info.log_epoch,
        "schema_version": info.schema_version,
    }
    if json:
        print_json(fields)
    else:
        print_fields(fields)


def check(
    context: typer.Context,
    stored: Annotated[
        bool, typer.Option("--stored", help="Also try to read what is stored and what waits.")
    ] = False,
    sample: Annotated[
        int, typer.Option(min=0, metavar="N", help="How many of each kind; 0: all, held in memory.")
    ] = SAMPLE,
    json: JsonFlag = False,
) -> None:
    """Verify settings, handlers, schema, views and servers.

    With --stored, before a deployment: whether this code can read what is stored, by event type and
    version, the aggregates, snapshots, rows of views, and commands that are queued, scheduled or
    dead. The log is read from end to end.

    Changes nothing. Exits with the code of the first check that fails.

    Example: cqrs-es check --stored --sample 1000
    """
    settings, app = invocation_of(context).load()
    findings = asyncio.run(check_everything(app, settings, sample if stored else None))
    if json:
        for finding in findings:
            print_json({"check": finding.check, "ok": finding.ok, "detail": finding.detail})
    else:
        print_table(["check", "ok", "detail"], [[f.check, f.ok, f.detail] for f in findings])
    raise typer.Exit(next((finding.code for finding in findings if not finding.ok), DONE))


def settings(context: typer.Context, json: JsonFlag = False) -> None:
    """List the settings with their values, defaults and meaning.

    They are environment variables; <NAME>_FILE reads a value from a file, for secrets.

    Example: cqrs-es settings
    """
    explained = [msgspec.structs.asdict(one) for one in explain(invocation_of(context).settings())]
    if json:
        for one in explained:
            print_json(one)
    else:
        columns = ["name", "value", "default", "meaning"]
        print_table(columns, [list(one.values()) for one in explained])


# --- check -------------------------------------------------------------------


Check: TypeAlias = "Callable[[], Awaitable[str]]"


class Finding(msgspec.Struct, frozen=True):
    """What one check found; `code` is the exit code that it asks for."""

    check: str
    detail: str
    code: int = DONE

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return self.code == DONE


async def check_everything(
    app: Application, settings: Settings, sample: int | None = None
) -> list[Finding]:
    """Check definitions, handlers, store, schema, views and broker; change nothing.

    With a `sample` also what is stored: so many of each kind.
    """
    async with AsyncExitStack() as stack:
        checks = _Checks(app, settings, stack)
        named: dict[str, Check] = {"definitions": checks.definitions}
        for definition in app.registry.aggregates.values():
            named[f"aggregate {definition.type}"] = checks.handlers_of(definition)
        named |= {"store": checks.store, "views": checks.views}
        if any(definition.has_keys for definition in app.registry.aggregates.values()):
            named["unique keys"] = checks.keys
        named["broker"] = checks.broker
        for remote in app.registry.remotes.values():
            named[f"remote {remote.service}"] = checks.remote(remote)
        found = [await _find(name, check) for name, check in named.items()]
        if sample is not None:
            found += await checks.stored(sample)
        return found


async def _find(name: str, check: Check) -> Finding:
    try:
        return Finding(name, await check())
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is a finding
        return Finding(name, sentence(exc), exit_code(exc))


class _Checks:
    def __init__(self, app: Application, settings: Settings, stack: AsyncExitStack) -> None:
        self._app = app
        self._settings = settings
        self._stack = stack
        self._service = settings.service or app.service
        self._storage: Storage | None = None
        self._broker: Broker | None = None

    async def definitions(self) -> str:
        registry = self._app.registry
        registry.check()
        self._settings.check_remotes([remote.url for remote in registry.remotes.values()])
        aggregates = ", ".join(registry.aggregates) or "none"
        views = ", ".join(registry.projections) or "none"
        return f"aggregates: {aggregates}; views: {views}"

    def handlers_of(self, definition: AggregateDefinition) -> Check:
        async def check() -> str:
            try:
                definition.services(CommandContext(new_command_id(), definition.type, "check"))
            except Exception as exc:
                message = f"its services can't be made: {type(exc).__name__}: {exc}"
                raise errors.ConfigurationError(message) from exc
            commands = ", ".join(definition.commands)
            return f"handles {commands}; {len(definition.events)} events; services can be made"

        return check

    async def store(self) -> str:
        """Open the store and compare what it was made with to the settings."""
        from cqrs_es.application import make_storage
        from cqrs_es.ports.clock import SystemClock
        from cqrs_es.ports.storage import check_service

        storage = make_storage(self._settings, self._service, SystemClock())
        self._stack.push_async_callback(storage.close)
        await storage.open()
        try:
            info = await storage.check()
        except errors.StoreNotInitialised:
            if storage.shared:
                raise
            return "not made yet: the first `cqrs-es run` does that"
        check_service(info.service, self._service)
        self._storage = storage
        if self._settings.partitions not in {None, info.partitions}:
            message = f"the store has {info.partitions} partitions: unset CQRS_ES_PARTITIONS"
            raise errors.PartitionsMismatch(message)
        return f"schema {info.schema_version}, {info.partitions} partitions"

    async def views(self) -> str:
        """Look at the tables of every view's generation for this code, and read from them.

        Says which views have none: their projectors will fill them anew.
        """
        if self._storage is None:
            return "not looked at: there is no store yet"
        from cqrs_es.definitions import ViewDefinition
        from cqrs_es.projection.folding import folding_for
        from cqrs_es.projection.generations import generations_of, require_tables, taken_over

        views = self._storage.views
        numbers = await views.generations()
        registry = self._app.registry.suited(sql=views.sql is not None)
        to_fill: list[ProjectionDefinition] = []
        for name, definition in registry.projections.items():
            now = generations_of(numbers, name)
            number = await taken_over(views, definition, now)
            if number is None and name in numbers:
                to_fill.append(definition)
                continue
            folding = folding_for(definition, number or now.live)
            await require_tables(views, folding)
            if not now.is_live_or_filled(folding.generation):
                to_fill.append(definition)
            if isinstance(definition, ViewDefinition):
                await views.page(folding.key, limit=1)
        left_out = ", ".join(registry.left_out)
        filled = [await self._to_be_filled(registry, numbers, each) for each in to_fill]
        return "; ".join(
            [
                f"{len(registry.projections) - len(to_fill)} with their tables",
                *filled,
                *([f"left out, as the store has no SQL: {left_out}"] if left_out else []),
            ]
        )

    async def stored(self, sample: int) -> list[Finding]:
        """Try to read what store and broker hold; one finding for each thing that can't be read."""
        from cqrs_es.stored import Examination

        if self._storage is None:
            return [Finding("stored", "not looked at: there is no store yet")]
        registry = self._app.registry.suited(sql=self._storage.views.sql is not None)
        examination = Examination(registry, self._storage, sample)
        try:
            found = await examination.run(self._broker)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is a finding
            return [Finding("stored", sentence(exc), exit_code(exc))]
        counts = (f"{count} {what}" for what, count in examination.looked_at.items())
        unseen = "" if "queued commands" in examination.looked_at else "; not what is queued"
        code = FAILED if any(each.lost for each in found) else DONE
        return [
            Finding("stored", f"looked at {', '.join(counts)}{unseen}", code),
            *(
                Finding(each.what, f"{each.count}: {each.reason}", FAILED if each.lost else DONE)
                for each in found
            ),
        ]

    async def _to_be_filled(
        self, registry: Registry, numbers: Mapping[str, int], definition: ProjectionDefinition
    ) -> str:
        """Say that a view will be filled anew, and about how long that takes."""
        from cqrs_es.projection.rebuild import expected_fill

        assert self._storage is not None  # noqa: S101 - `views` asks
        events, rate, how = await expected_fill(registry, self._storage, numbers, definition)
        seconds = timedelta(seconds=math.ceil(events / rate)) if rate else "no time"
        pace = f" ({events:,} events at {rate:,} a second, {how})" if rate else ""
        return f"{definition.name} will be filled anew by its projectors in about {seconds}{pace}"

    async def keys(self) -> str:
        """Compare what the unique keys were made by with what `keys()` is today."""
        with_keys = [d for d in self._app.registry.aggregates.values() if d.has_keys]
        if self._storage is None:
            return "not looked at: there is no store yet"
        from cqrs_es.execution.keys import due

        if types := due(with_keys, (await self._storage.info()).keys):
            verbs = ", ".join(f"`cqrs-es keys rebuild {type_}`" for type_ in types)
            message = f"keys() is new or has changed, so keys are to be made anew: run {verbs}"
            raise errors.ConfigurationError(message)
        return f"of {', '.join(d.type for d in with_keys)}, as keys() says"

    async def broker(self) -> str:
        from cqrs_es.application import make_broker

        broker = make_broker(self._settings, self._service)
        self._stack.push_async_callback(broker.close)
        await broker.open()
        await self._compare(await broker.topology(), durable=broker.durable)
        self._broker = broker
        waiting = sum((await broker.queue_depth()).values())
        seen = await broker.examine()
        answers = f"{masked(self._settings.broker_url)} answers; {waiting} commands wait"
        return f"{answers}; {seen}" if seen else answers

    def remote(self, remote: Remote) -> Check:
        async def check() -> str:
            from cqrs_es.runtime.remote import RemoteQueue

            queue = RemoteQueue(remote, self._settings)
            queue.check()
            self._stack.push_async_callback(queue.close)
            _, partitions = await queue.connected()
            return f"its broker answers; commands can be sent to {partitions} partitions"

        return check

    async def _compare(self, topology: Topology | None, *, durable: bool) -> None:
        """Make sure that a server has the queues of as many partitions as the store."""
        if self._storage is None or not durable:
            return
        wanted = (await self._storage.info()).partitions
        found = 0 if topology is None else topology.partitions
        if found != wanted:
            message = f"the broker has {found} of {wanted} partitions: run `cqrs-es init`"
            raise errors.ConfigurationError(message)


# --- settings ----------------------------------------------------------------


# Where the default is not a value but a rule.
_DEFAULTS: Final[Mapping[str, str]] = {
    "store_url": "sqlite:///<service>.db",
    "service": "the application's own",
    "partitions": "16; SQLite and memory 1",
    "health_port": "none are served",
}
MEANINGS: Final[Mapping[str, str]] = {
    "app": "the application, as MODULE:ATTRIBUTE",
    "store_url": "the event store: sqlite:///bank.db, mysql://user:pw@host:3306/db, postgresql://…",
    "broker_url": "the broker: memory://, redis://host:6379/0, amqp://user:pw@host:5672/vhost, "
    "sqs://region/prefix",
    "service": "the name that queues and topics begin with",
    "partitions": "how many partitions `init` gives a new store; fixed from then on",
    "batch_size": "commands in one transaction, at most",
    "cache_bytes": "bytes of memory for the states of the aggregates used last, at most",
    "handler_timeout": "seconds that a handler may take",
    "lease_seconds": "seconds after which the partitions of a dead process are taken over",
    "outcome_retention_days": "days for which a command's id is remembered",
    "event_retention": "events that the topic keeps per partition, about",
    "max_message_bytes": "bytes of a command message, at most",
    "max_event_bytes": "bytes of an event, at most",
    "shutdown_timeout": "seconds that a process has to stop cleanly",
    "health_port": "[HOST:]PORT for /live, /ready, /metrics, to everybody unless HOST narrows it",
    "wait_for_views": "/ready says no until all views are filled for this code, true or false; "
    "unless set only that of a gateway does",
    "log_level": "debug, info, warning or error",
    "log_format": "auto (console on a terminal, else JSON), console or json",
}


class Explanation(msgspec.Struct, frozen=True):
    """One setting: its variable, its value now (passwords masked), its default, its meaning."""

    name: str
    value: object
    default: object
    meaning: str


def explain(settings: Settings) -> list[Explanation]:
    """Explain every setting; those of a URL are shown without passwords."""
    return [
        Explanation(
            PREFIX + field.name.upper(),
            shown_setting(field.name, getattr(settings, field.name)),
            _DEFAULTS.get(field.name, field.default),
            MEANINGS[field.name],
        )
        for field in fields(Settings)
        if field.name in MEANINGS
    ] + [
        Explanation(variable, masked(url), None, "the broker of another service")
        for variable, url in settings.remote_urls.items()
    ]
