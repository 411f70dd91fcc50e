"""Checking, before anything is sent, that everything is there and fits together."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cqrs_es import errors
from cqrs_es.application import make_broker, make_storage
from cqrs_es.definitions import ViewDefinition
from cqrs_es.execution.keys import due
from cqrs_es.messages import CommandContext
from cqrs_es.ports.clock import SystemClock
from cqrs_es.ports.storage import check_service
from cqrs_es.program import DONE, exit_code, sentence
from cqrs_es.projection.folding import folding_for
from cqrs_es.projection.generations import generations_of, require_tables
from cqrs_es.settings import masked
from cqrs_es.types import new_command_id

if TYPE_CHECKING:
    from cqrs_es.application import Application
    from cqrs_es.definitions import AggregateDefinition
    from cqrs_es.ports.broker import Topology
    from cqrs_es.ports.storage import Storage
    from cqrs_es.settings import Settings

Check: TypeAlias = "Callable[[], Awaitable[str]]"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found; `code` is the exit code that it asks for."""

    check: str
    detail: str
    code: int = DONE

    @property
    def ok(self) -> bool:
        """Whether all is well."""
        return self.code == DONE


async def check_everything(app: Application, settings: Settings) -> list[Finding]:
    """Check definitions, handlers, store, schema, views and broker; change nothing."""
    async with AsyncExitStack() as stack:
        checks = _Checks(app, settings, stack)
        named: dict[str, Check] = {"definitions": checks.definitions}
        for definition in app.registry.aggregates.values():
            named[f"aggregate {definition.type}"] = checks.handlers_of(definition)
        named |= {"store": checks.store, "views": checks.views}
        if any(definition.has_keys for definition in app.registry.aggregates.values()):
            named["unique keys"] = checks.keys
        named["broker"] = checks.broker
        return [await _find(name, check) for name, check in named.items()]


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

    async def definitions(self) -> str:
        registry = self._app.registry
        registry.check()
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
        """Look at the tables of every view's live generation, and read from them."""
        if self._storage is None:
            return "not looked at: there is no store yet"
        views = self._storage.views
        generations = await views.generations()
        registry = self._app.registry.suited(sql=views.sql is not None)
        for name, definition in registry.projections.items():
            folding = folding_for(definition, generations_of(generations, name).live)
            await require_tables(views, folding)
            if isinstance(definition, ViewDefinition):
                await views.page(folding.key, limit=1)
        left_out = ", ".join(registry.left_out)
        return f"{len(registry.projections)} with their tables" + (
            f"; left out, as the store has no SQL: {left_out}" if left_out else ""
        )

    async def keys(self) -> str:
        """Compare what the unique keys were made by with what `keys()` is today."""
        with_keys = [d for d in self._app.registry.aggregates.values() if d.has_keys]
        if self._storage is None:
            return "not looked at: there is no store yet"
        if types := due(with_keys, (await self._storage.info()).keys):
            verbs = ", ".join(f"`cqrs-es keys rebuild {type_}`" for type_ in types)
            message = f"keys() is new or has changed, so keys are to be made anew: run {verbs}"
            raise errors.ConfigurationError(message)
        return f"of {', '.join(d.type for d in with_keys)}, as keys() says"

    async def broker(self) -> str:
        broker = make_broker(self._settings, self._service)
        self._stack.push_async_callback(broker.close)
        await broker.open()
        await self._compare(await broker.topology(), durable=broker.durable)
        waiting = sum((await broker.queue_depth()).values())
        seen = await broker.examine()
        answers = f"{masked(self._settings.broker_url)} answers; {waiting} commands wait"
        return f"{answers}; {seen}" if seen else answers

    async def _compare(self, topology: Topology | None, *, durable: bool) -> None:
        """Make sure that a server has the queues of as many partitions as the store."""
        if self._storage is None or not durable:
            return
        wanted = (await self._storage.info()).partitions
        found = 0 if topology is None else topology.partitions
        if found != wanted:
            message = f"the broker has {found} of {wanted} partitions: run `cqrs-es init`"
            raise errors.ConfigurationError(message)
