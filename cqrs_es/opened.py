"""An application connected to its store and broker: what code in its process can ask of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from cqrs_es import errors, wire
from cqrs_es.commands import new_command
from cqrs_es.definitions import ViewDefinition
from cqrs_es.execution.baselines import first_page, replayed
from cqrs_es.execution.keys import KeysRebuild, KeysRebuilt, due, fingerprint
from cqrs_es.messages import NO_METADATA, CommandMessage, Envelope, Outcome, is_reused
from cqrs_es.ports.dead_letters import RECEIVED_AT
from cqrs_es.ports.store import ScheduledCommand
from cqrs_es.projection.folding import folding_for
from cqrs_es.projection.generations import (
    Generations,
    generations_of,
    prepared,
    publish,
    remove,
    require_tables,
    views_behind,
    views_of,
)
from cqrs_es.projection.parking import ParkedRetry, Tracebacks
from cqrs_es.projection.reacting import ReactorFolding, make_sure_of_beginning
from cqrs_es.projection.rebuild import Rebuild
from cqrs_es.projection.replay import replay, stored_stream
from cqrs_es.projection.seen import wait_until_seen
from cqrs_es.projector import (
    check_view_name,
    code_role,
    generation_of,
    physical_name,
    projector_role,
    role_of,
)
from cqrs_es.reactor import reactor_role
from cqrs_es.runtime.topic import republish
from cqrs_es.runtime.waiting import Home
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.tracing import NO_SPAN
from cqrs_es.types import (
    AggregateKey,
    parse_command_id,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection
    from datetime import datetime

    from cqrs_es.aggregate import Aggregate, Stateful
    from cqrs_es.definitions import (
        AggregateDefinition,
        ProjectionDefinition,
        ReactorDefinition,
    )
    from cqrs_es.execution.baselines import Baseline
    from cqrs_es.execution.stages import Answer
    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import StoreInfo
    from cqrs_es.ports.views import ParkedAggregate, ViewRow
    from cqrs_es.projection.folding import Folding
    from cqrs_es.projection.rebuild import RebuildProgress
    from cqrs_es.registry import Registry
    from cqrs_es.runtime.process import Process
    from cqrs_es.runtime.supervisor import Supervisor
    from cqrs_es.telemetry.tracing import CommandSpan
    from cqrs_es.view import View

log = get_logger("cqrs_es.application")

C = TypeVar("C")
E = TypeVar("E")
R = TypeVar("R")
A = TypeVar("A", bound="Stateful[Any]")
V = TypeVar("V", bound="View[Any]")


class Loaded(msgspec.Struct, Generic[A], frozen=True):
    """An aggregate as the store holds it; `snapshot` is its snapshot's number, 0 for none."""

    state: A
    sequence: int
    snapshot: int


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A generation of a view that the store has; `state` as `cqrs-es views list` explains it.

    `own`: this code projects into it. `code` is its fingerprint in hexadecimal, None where
    that is not known; `members`, how many processes with that code project.
    """

    view: str
    number: int
    state: str
    own: bool
    code: str | None
    behind: int
    members: int


class OpenApplication:
    """Executes commands, reads events, outcomes and views, and runs roles."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._tracebacks = Tracebacks()
        self._home = Home("the application")

    @property
    def storage(self) -> Storage:
        """The store that the application is connected to."""
        return self.process.storage

    @property
    def registry(self) -> Registry:
        """What the application consists of."""
        return self._process.registry

    @property
    def process(self) -> Process:
        """What the roles of this process share.

        Raises `ConfigurationError`, as all else does, in another event loop than
        that which opened the application, after a fork, and when it is closed.
        """
        self._home.check()
        return self._process

    def close(self) -> None:
        """Let nobody use it any more; whoever opened it closes its servers."""
        self._home.left = True

    # --- Initialising --------------------------------------------------------

    async def initialise(self, *, new_epoch: bool = False, declare: bool = True) -> StoreInfo:
        """Create or migrate tables, views and, with `declare`, the topology; idempotent."""
        process = self.process
        info = await self.storage.initialise(
            process.partitions, service=process.service, new_epoch=new_epoch
        )
        for definition in self.registry.projections.values():
            await self._initialise_view(definition)
        await self._note_new_keys()
        for reactor in self.registry.reactors.values():
            await make_sure_of_beginning(self.storage, reactor)
        if declare:
            await self.process.broker.declare(info.partitions, info.log_epoch)
        return info

    async def _initialise_view(self, definition: ProjectionDefinition) -> None:
        await prepared(self.storage.views, definition)
        await publish(self.storage.views, definition)

    def projection(self, name: str) -> ProjectionDefinition:
        """Return the definition of a view or projector; raise `NotFound`."""
        definition = self.registry.projections.get(name)
        if definition is None and self._reactor(name) is not None:
            message = f"{name} is a reactor: nothing can replay it, it would send again"
            raise errors.ConfigurationError(message)
        if definition is None:
            known = ", ".join(self.registry.projections) or "none"
            message = f"there is no view {name!r}; the application's are {known}"
            raise errors.NotFound(message)
        return definition

    def _reactor(self, name: str) -> ReactorDefinition | None:
        """Return a reactor by its name or its role."""
        return self.registry.reactors.get(name.removeprefix("reactor:"))

    # --- Commands ------------------------------------------------------------

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
        """Execute a command and return its outcome, on the path that messages take.

        With a `command_id` of your own, executing again gives the same outcome,
        marked `duplicate`, for as long as outcomes are kept (CQRS_ES_OUTCOME_RETENTION_DAYS, or
        `outcomes="for ever"` of the aggregate). Raises `IdReused` where that id was another
        command's, `InvalidMessage` for an id or metadata that no message may have,
        `StoreUnavailable` when the store stays away.
        """
        process = self.process
        process.registry.aggregate_of(cls)
        message = new_command(
            cls,
            aggregate_id,
            command,
            command_id=command_id,
            metadata=metadata,
            expected_sequence=expected_sequence,
        )
        fresh = command_id is None
        traced, span = process.tracing.executing(message)
        answer = process.executor.submit(
            wire.completed(traced, process.settings.max_message_bytes),
            received_at=process.clock.now() if fresh else None,
            fresh=fresh,
            span=span,
        )
        outcome = await _kept(answer, span)
        if is_reused(outcome):
            raise errors.IdReused(outcome.command_id)
        return outcome

    async def submit(
        self,
        message: CommandMessage,
        *,
        retrying: bool = False,
        untrusted: bool = False,
        dropped: bool = False,
        received_at: datetime | None = None,
        fresh: bool = False,
    ) -> Outcome:
        """Execute a command message; with `retrying`, also one whose outcome is `failed`.

        See `Submission` for the others.
        """
        process = self.process
        traced, span = process.tracing.executing(message)
        if not traced.body:
            body = wire.encode_command(traced)
            traced = wire.parse_command(body, process.settings.max_message_bytes)
        answer = process.executor.submit(
            traced,
            retrying=retrying,
            untrusted=untrusted,
            dropped=dropped,
            received_at=received_at,
            fresh=fresh,
            span=span,
        )
        return await _kept(answer, span)

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
        """Have a command decided by the workers at a moment; return its id, once it is stored.

        With a `command_id` of your own, scheduling again changes nothing, for as long as the
        command waits and then its outcome is kept. Raises
        `InvalidMessage` for what no message may hold and for a moment without a time zone,
        more than a day ago or ten years ahead.
        """
        self.registry.aggregate_of(cls)
        message = new_command(
            cls,
            aggregate_id,
            command,
            command_id=command_id,
            metadata=metadata,
            expected_sequence=expected_sequence,
        )
        process = self.process
        due = wire.check_due(at, process.clock.now())
        complete = wire.completed(message, process.settings.max_message_bytes)
        row = ScheduledCommand.of(complete, due, process.partitions)
        await self.storage.events.schedule([row])
        process.nudger.scheduled({row.partition})
        return row.command_id

    async def unschedule(self, command_id: str) -> bool:
        """Cancel a scheduled command, of a recurring one this time; return whether there was one.

        After False it may have an outcome.
        """
        events, known = self.storage.events, parse_command_id(command_id)
        rows = await events.find_scheduled([known])
        following = [self.process.executor.causes.renewed(row) for row in rows.values()]
        if not await events.unschedule([known]):
            return False
        await events.schedule([row for row in following if row is not None])
        return True

    async def outcome(self, command_id: str) -> Outcome | None:
        """Look up what became of a command."""
        known = parse_command_id(command_id)
        found = await self.storage.events.find_outcomes([known])
        return found[known].outcome if known in found else None

    async def retry_dead_letter(self, letter_id: str) -> Outcome:
        """Decide a dead letter's command again; when it is accepted or rejected the letter goes.

        Raises `NotFound` without such a letter, `InvalidMessage` when its body
        is no valid command message.
        """
        letter = await self.storage.dead_letters.get(letter_id)
        if letter is None:
            message = f"there is no dead letter {letter_id!r}; see `cqrs-es dead list`"
            raise errors.NotFound(message)
        command, caused = self._command_of(letter)
        outcome = await self.submit(
            command,
            retrying=True,
            untrusted=not caused,
            received_at=wire.moment_or_none(letter.headers.get(RECEIVED_AT)),
        )
        if outcome.status != "failed":
            await self.storage.dead_letters.drop(letter_id)
        return outcome

    async def drop_dead_letter(self, letter_id: str) -> bool:
        """Forget a dead letter; return whether there was one. A failed outcome stays failed.

        Not so that of a command which an event or a timer has caused: it is rejected, with the
        code `dropped`, and the process manager that has sent it hears of it.
        """
        letter = await self.storage.dead_letters.get(letter_id)
        if letter is None:
            return False
        with contextlib.suppress(errors.InvalidMessage):
            command, caused = self._command_of(letter)
            if caused:
                await self.submit(command, retrying=True, dropped=True)
        await self.storage.dead_letters.drop(letter_id)
        return True

    def _command_of(self, letter: DeadLetter) -> tuple[CommandMessage, bool]:
        """Read the command of a letter, and whether the framework itself has sent it.

        Raises `InvalidMessage`, also for an internal command that somebody else has sent.
        """
        process = self.process
        if letter.body_length != len(letter.body):
            message = f"dead letter {letter.id} was cut at {len(letter.body)} bytes; drop it"
            raise errors.InvalidMessage(message)
        command = wire.parse_command(letter.body, process.settings.max_message_bytes, trusted=True)
        caused = process.executor.causes.signed(command.id, command.metadata)
        if wire.is_internal(command.type) and not caused:
            message = f"{command.type} is no command that anybody may send; drop it"
            raise errors.InvalidMessage(message)
        return command, caused

    # --- Aggregates and events -----------------------------------------------

    async def load(self, cls: type[A], aggregate_id: str) -> Loaded[A]:
        """Load an aggregate as a handler would find it; in its first state if it has no events."""
        definition = self.registry.aggregate_of(cls)
        baseline = await self._baseline(definition, AggregateKey(definition.type, aggregate_id))
        state: A = baseline.thaw(definition)
        return Loaded(state, baseline.sequence, baseline.snapshot)

    async def _baseline(self, definition: AggregateDefinition, key: AggregateKey) -> Baseline:
        events = self.storage.events
        (first,) = await events.load([first_page(definition, key)])
        return await replayed(definition, key, first, events.load)

    async def events(self, cls: type[Stateful[E]], aggregate_id: str) -> list[Envelope[E]]:
        """Read an aggregate's events, upcast to what the code knows."""
        key = AggregateKey(self.registry.aggregate_of(cls).type, aggregate_id)
        return [
            envelope
            async for event in stored_stream(self.storage.events, key)
            for envelope in self.registry.envelopes(event)
        ]

    def replay(self) -> AsyncIterator[Envelope[Any]]:
        """Read every event in the log, partition by partition; see `projection.replay`."""
        return replay(self.registry, self.storage.events)

    # --- Unique keys ---------------------------------------------------------

    async def find(self, cls: type[Aggregate[Any, Any, Any]], **key: str) -> str | None:
        """Return the id of the aggregate that has a unique key, `email="a@x.org"` for example.

        None where none has it. The value is that which `keys()` returns, in its spelling.
        Sees everything that is committed. Raises `DefinitionError` for a class without
        `keys()` and for anything but one name with a value.
        """
        definition = self._with_keys(cls)
        if len(key) != 1:
            message = f"find({cls.__qualname__}, …) takes one key by its name, not {len(key)}"
            raise errors.DefinitionError(message)
        ((name, value),) = key.items()
        wanted = self.process.executor.keys.key(definition, name, value)
        return (await self.storage.events.find_holders([wanted])).get(wanted)

    async def rebuild_keys(self, cls: type[Stateful[Any]]) -> KeysRebuilt:
        """Make the unique keys of a type those that its aggregates claim today."""
        definition = self._with_keys(cls)
        return await KeysRebuild(definition, self.storage, self.process.executor.keys).run()

    def _with_keys(self, cls: type[Stateful[Any]]) -> AggregateDefinition:
        definition = self.registry.aggregate_of(cls)
        if not definition.has_keys:
            message = f"{cls.__qualname__} has no unique keys: define keys(self) to say what it has"
            raise errors.DefinitionError(message)
        return definition

    async def _note_new_keys(self) -> None:
        """Record by what `keys()` keys are made, in a store in which there is nothing yet."""
        every = self.registry.aggregates
        types = due(every.values(), (await self.storage.info()).keys)
        if not types or any((await self.storage.events.heads()).values()):
            return
        for type_ in types:
            await self.storage.note_keys(type_, fingerprint(every[type_]))

    # --- Views ---------------------------------------------------------------

    async def view(self, cls: type[V], view_id: str) -> V | None:
        """Read one row of a view, None when there is none."""
        definition = self._view_definition(cls)
        now = await self._generations(definition.name)
        row = await self._read(definition, now, lambda of: self.storage.views.get(of, view_id))
        if row is None:
            return None
        view: V = _decoded(definition, row, now)
        return view

    async def _generations(self, name: str) -> Generations:
        return generations_of(await self.storage.views.generations(), name)

    async def view_page(
        self, cls: type[V], *, after: str = "", limit: int = 100
    ) -> list[tuple[str, V]]:
        """Read up to `limit` rows of a view with an id above `after`: ids and views, by id."""
        definition = self._view_definition(cls)
        now = await self._generations(definition.name)
        rows = await self._read(
            definition, now, lambda of: self.storage.views.page(of, after=after, limit=limit)
        )
        return [(row.view_id, _decoded(definition, row, now)) for row in rows]

    async def view_rows(self, name: str, *, after: str = "", limit: int = 100) -> list[ViewRow]:
        """Read up to `limit` rows of a view with an id above `after`, by id, as JSON."""
        definition, now = self._of_json(name), await self._generations(name)
        rows = await self._read(
            definition, now, lambda of: self.storage.views.page(of, after=after, limit=limit)
        )
        for row in rows:
            _check_fits(definition, row, now)
        return rows

    async def view_row(self, name: str, view_id: str) -> ViewRow | None:
        """Read one row of a view as JSON, None when there is none."""
        definition, now = self._of_json(name), await self._generations(name)
        row = await self._read(definition, now, lambda of: self.storage.views.get(of, view_id))
        if row is not None:
            _check_fits(definition, row, now)
        return row

    def _of_json(self, name: str) -> ViewDefinition:
        definition = self.projection(name)
        if not isinstance(definition, ViewDefinition):
            message = f"{name} is a projector: its rows are in tables of its own, read by SQL"
            raise errors.ConfigurationError(message)
        return definition

    async def _read(
        self, definition: ViewDefinition, now: Generations, read: Callable[[str], Awaitable[R]]
    ) -> R:
        """Read a table of a view; raise `ViewBehind` where nobody has made any yet."""
        number = now.read_by(definition.fingerprint)
        try:
            return await read(physical_name(definition.name, number))
        except errors.StoreError as exc:
            try:
                await require_tables(self.storage.views, folding_for(definition, number))
            except errors.StoreNotInitialised as missing:
                message = f"{missing.message}, or one of its projectors"
                raise errors.ViewBehind(message) from exc
            raise

    async def table(self, name: str) -> str:
        """Return the name of the table that holds the generation of a view that is read here."""
        return physical_name(name, await self.generation(name))

    async def generation(self, name: str) -> int:
        """Return the generation of a view that is read here.

        The one that its projectors keep for this code; until that is filled, the live one.
        """
        return _read_here(await self.storage.views.generations(), self.registry, name)

    async def views_behind(self) -> list[str]:
        """Return the views that are not filled for this code, or are far behind the live rows."""
        views = self.storage.views
        return await views_behind(
            views, await views.generations(), self.registry.projections.values()
        )

    async def wait_for(self, name: str, outcome: Outcome, seconds: float = 10.0) -> None:
        """Wait until a view has seen an outcome's events, to read one's own writes.

        Raises `WaitTimeout`, and `ViewFailed` when the aggregate is parked.
        """
        made = self.projection(name).fingerprint
        await wait_until_seen(self.storage.views, name, outcome, seconds, made)

    def _view_definition(self, cls: type[View[Any]]) -> ViewDefinition:
        definition = self.registry.projections.get(getattr(cls, "view_name", ""))
        if not isinstance(definition, ViewDefinition) or definition.cls is not cls:
            message = f"{cls.__qualname__} is not registered: app.view({cls.__name__})"
            raise errors.DefinitionError(message)
        return definition

    # --- Repairing views -----------------------------------------------------

    def rebuild(
        self, name: str, on_progress: Callable[[RebuildProgress], None] | None = None
    ) -> Rebuild:
        """Make what rebuilds a view, or changes between its generations; raise `NotFound`."""
        return Rebuild(self.registry, self.storage, self.projection(name), on_progress=on_progress)

    async def remove_view(self, name: str) -> list[str]:
        """Drop every generation of a view or table that the application has no more.

        Returns the tables that were dropped. Raises `ConfigurationError` for a name that it
        still has, `NotFound` where nothing is left of one.
        """
        if self.registry.has_name(check_view_name(name)):
            message = f"the application has {name}: take it out before you remove its tables"
            raise errors.ConfigurationError(message)
        return await remove(self.storage.views, name)

    async def generations(self) -> list[Kept]:
        """Return every generation that the store has of a view, also of views that are no more."""
        views, heads = self.storage.views, await self.storage.events.heads()
        noted, tables = await views.generations(), await views.list_tables()
        roles = [member.role for member in await self.storage.leases.members()]
        found: list[Kept] = []
        for name in views_of(noted):
            now = generations_of(noted, name)
            own = self.registry.projections.get(name)
            with_tables = {n for n in range(1, now.last + 1) if _has_table(tables, name, n)}
            for number in sorted({now.live, *now.made_by, *with_tables}):
                key = physical_name(name, number)
                seen = sum((await views.checkpoints(key)).values())
                made = now.made_by.get(number)
                role = projector_role(name)
                leased_as = role if made is None else code_role(role, made)
                kept = Kept(
                    view=name,
                    number=number,
                    state=now.state(number) if own is not None else "removed",
                    own=own is not None and now.projected_by(own.fingerprint) == number,
                    code=role_of(leased_as)[1],
                    behind=sum(heads.values()) - seen,
                    members=roles.count(leased_as),
                )
                found.append(kept)
        return found

    async def prune_views(self, *, dry_run: bool = False) -> AsyncIterator[Kept]:
        """Drop the generations that nobody needs; return each. See `cqrs-es views prune`."""
        removed: set[str] = set()
        kept = await self.generations()
        in_use = {each.view for each in kept if each.members}
        for each in kept:
            gone = each.state == "removed" and each.view not in in_use
            if not gone and (each.state not in {"filled", "filling"} or each.own or each.members):
                continue
            if gone and not dry_run and each.view not in removed:
                removed.add(each.view)
                await remove(self.storage.views, each.view)
            elif not gone and not dry_run:
                await self.rebuild(each.view).drop(each.number)
            yield each

    async def parked(self, name: str | None = None) -> list[ParkedAggregate]:
        """Return what is parked for the view that is read here, for a reactor, or for all."""
        generations = await self.storage.views.generations()
        names = [*self.registry.projections, *map(reactor_role, self.registry.reactors)]
        if name is not None:
            reactor = None if name in self.registry.projections else self._reactor(name)
            names = [reactor_role(reactor.name) if reactor else self.projection(name).name]
        read = {physical_name(n, _read_here(generations, self.registry, n)) for n in names}
        every = await self.storage.views.list_parked()
        return [marker for marker in every if marker.projector in read]

    async def retry_parked(self, name: str, marker: ParkedAggregate) -> bool:
        """Apply a parked aggregate's events to a view or reactor; return whether it caught up.

        Raises `StoreUnavailable` while the store is away; what was applied is kept.
        """
        folding = self._folding(name, generation_of(marker.projector))
        retry = ParkedRetry(self.registry, self.storage, folding, marker, self._tracebacks)
        return await retry.run()

    def _folding(self, name: str, generation: int) -> Folding:
        reactor = None if name in self.registry.projections else self._reactor(name)
        if reactor is None:
            return folding_for(self.projection(name), generation)
        process = self.process
        return ReactorFolding(reactor, process.executor.causes, process.settings.handler_timeout)

    # --- The topic -----------------------------------------------------------

    async def republish(self, partition: int, start: int) -> int:
        """Publish a partition's events from an offset on again; return the last one's.

        Raises `NotFound` for a start beyond the log's end.
        """
        return await republish(self.process, partition, start)

    # --- Roles ---------------------------------------------------------------

    def supervisor(self, roles: Collection[str] | None = None) -> Supervisor:
        """Make what runs roles in this process: those named, or all there are."""
        from cqrs_es.runtime.supervisor import Supervisor  # noqa: PLC0415 - only roles need it

        if self.registry.left_out:
            log.warning("projectors left out", why="no SQL", names=self.registry.left_out)
        return Supervisor(self.process, roles)

    @asynccontextmanager
    async def running(self, roles: Collection[str] | None = None) -> AsyncGenerator[Supervisor]:
        """Run roles beside the block's own code, all there are unless named; stop them after it."""
        stopping = asyncio.Event()
        supervisor = self.supervisor(roles)
        async with asyncio.TaskGroup() as group:
            group.create_task(supervisor.run(stopping))
            try:
                yield supervisor
            finally:
                stopping.set()


def _has_table(tables: Collection[str], name: str, number: int) -> bool:
    return physical_name(name, number).lower() in {table.lower() for table in tables}


def _read_here(numbers: Mapping[str, int], registry: Registry, name: str) -> int:
    """Return the generation that is read of a view; of a reactor, the one that it has."""
    definition = registry.projections.get(name)
    made = None if definition is None else definition.fingerprint
    return generations_of(numbers, name).read_by(made)


def _is_of_other_code(definition: ViewDefinition, now: Generations) -> bool:
    """Tell whether what is read is what other code has made: this code's own is not filled yet."""
    return now.made_by.get(now.read_by(definition.fingerprint)) != definition.fingerprint


def _check_fits(definition: ViewDefinition, row: ViewRow, now: Generations) -> None:
    """Raise `ViewBehind` for a row that other code has made otherwise than this code would."""
    if _is_of_other_code(definition, now):
        _decoded(definition, row, now)


def _decoded(definition: ViewDefinition, row: ViewRow, now: Generations) -> Any:
    try:
        return definition.state.decode(row.payload)
    except ValueError as exc:
        name, cls = definition.name, definition.cls.__qualname__
        message = f"row {row.view_id!r} of view {name} does not fit {cls}: {exc}"
        if _is_of_other_code(definition, now):
            message = f"{message}; no projector has filled the view for this code yet"
            raise errors.ViewBehind(
                f"{message}: run one with it, and see `cqrs-es status`"
            ) from exc
        message = f"{message}; `cqrs-es rebuild {name}` makes its rows anew"
        raise errors.UndecodableRow(message) from exc


def _kept(answer: Answer, span: CommandSpan) -> Answer:
    """Return what to await: who goes away does not take the command along, nor end its span."""
    return answer if span is NO_SPAN else asyncio.shield(answer)
