"""What a batch of events does to a view's rows, or to a projector's own tables.

`Folding` is one generation of a view: its tables, and how events are folded into
them. `write` has a batch folded within a transaction; the rest says what may go
wrong with that, and what is then no fault of the event.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cqrs_es import errors
from cqrs_es.definitions import ProjectorDefinition, ViewDefinition
from cqrs_es.execution.retry import backoff
from cqrs_es.ports.views import ViewRow
from cqrs_es.projector import column_names, physical_name
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import shown, storable, text_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from cqrs_es.definitions import AnyView, ProjectionDefinition
    from cqrs_es.messages import Envelope, StoredEvent
    from cqrs_es.ports.views import ViewStore, ViewTransaction
    from cqrs_es.registry import Registry

log = get_logger("cqrs_es.projection")

T = TypeVar("T")

MAX_VIEW_ID_CHARACTERS: Final = 255
# Of a generation that nobody has signed: enough to know other code by its rows.
ROWS_LOOKED_AT: Final = 20
# A batch collides once for each row that another partition inserts first: rarely more than one.
MOST_COLLISIONS: Final = 5
# Not the event's fault: the store's, another process's, or the deployment's.
NOT_POISON: Final = (
    errors.Unavailable,
    errors.Conflict,
    errors.StoreUnusable,
    errors.NeedsNewerCode,
    errors.ViewMisfit,
)


class Folding(ABC):
    """One generation of a view or projector, seen as something that events are written to."""

    def __init__(
        self,
        name: str,
        event_classes: frozenset[type[object]],
        generation: int,
        fingerprint: int | None = None,
    ) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.generation = generation
        self.key = physical_name(name, generation)
        self.event_classes = event_classes

    @property
    @abstractmethod
    def tables(self) -> Mapping[str, str | None]:
        """The tables' names, without the generation, and their columns: None for rows of JSON."""

    @property
    def indexes(self) -> Mapping[str, Sequence[str]]:
        """The columns of each index of a table."""
        return {}

    async def create_tables(self, views: ViewStore) -> None:
        """Create the generation's tables, unless they are there."""
        for name, columns in self.tables.items():
            if columns is None:
                await views.create_table(self._physical(name))
            else:
                sql, indexes = required(views.sql, self.name), self.indexes.get(name, ())
                await sql.create(self._physical(name), columns, indexes)

    async def missing_tables(self, views: ViewStore) -> list[str]:
        """Return the names of those of the generation's tables that are not there."""
        there = {table.lower() for table in await views.list_tables()}
        tables = [self._physical(name) for name in self.tables]
        return [table for table in tables if table.lower() not in there]

    async def lacks_indexes(self, views: ViewStore) -> bool:
        """Tell whether somebody was killed between making a table and its indexes."""
        return any(
            [
                len(indexes) > await required(views.sql, self.name).count_indexes(self._physical(n))
                for n, indexes in self.indexes.items()
            ]
        )

    async def unlike_tables(self, views: ViewStore) -> list[str]:
        """Return those of the generation's tables that have other columns than they should."""
        found: list[str] = []
        for name, columns in self.tables.items():
            if columns is not None and views.sql is not None:
                listed = await views.sql.columns(self._physical(name))
                there = frozenset(column.lower() for column in listed)
                if there and there != column_names(columns):
                    found.append(self._physical(name))
        return found

    async def looks_right(self, views: ViewStore) -> bool:
        """Tell whether what there is of it could have been made by this code."""
        return not await self.unlike_tables(views)

    async def drop_tables(self, views: ViewStore) -> None:
        """Drop the generation's tables."""
        for name in self.tables:
            await views.drop_table(self._physical(name))

    async def publish_tables(self, views: ViewStore) -> None:
        """Make the tables' own names show this generation, where the store has SQL."""
        if views.sql is not None:
            for name in self.tables:
                await views.sql.publish(name, self._physical(name))

    def _physical(self, name: str) -> str:
        return physical_name(name, self.generation)

    async def prepare(
        self, registry: Registry, views: ViewStore, events: Sequence[StoredEvent]
    ) -> None:
        """Do what of the work needs no transaction."""
        del registry, views, events

    @abstractmethod
    async def fold(self, events: Sequence[Envelope[Any]], transaction: ViewTransaction) -> None:
        """Write what the events mean; raises whatever the author's code raises."""


class ViewFolding(Folding):
    """Folds events into rows of JSON."""

    def __init__(self, definition: ViewDefinition, generation: int) -> None:
        made = definition.fingerprint
        super().__init__(definition.name, definition.event_classes, generation, made)
        self._definition = definition

    @property
    def tables(self) -> Mapping[str, str | None]:
        """The one table of rows, called like the view."""
        return {self.name: None}

    async def looks_right(self, views: ViewStore) -> bool:
        """Tell whether its first rows are as this code would store them."""
        if await self.missing_tables(views):
            return True
        try:
            for row in await views.page(self.key, limit=ROWS_LOOKED_AT):
                self._definition.state.decode_exactly(row.payload)
        except ValueError:
            return False
        return True

    async def fold(self, events: Sequence[Envelope[Any]], transaction: ViewTransaction) -> None:
        """Load every row that the events touch, update them in order, save what changed."""
        targets = [(event, _view_ids(self._definition.cls, event)) for event in events]
        wanted = sorted({view_id for _, view_ids in targets for view_id in view_ids})
        if not wanted:
            return
        rows = _Rows(self._definition, await transaction.load(self.key, wanted))
        for event, view_ids in targets:
            for view_id in view_ids:
                rows.update(view_id, event)
        await rows.write(self.key, transaction)


class _Rows:
    """The rows that a batch touches, as typed views."""

    def __init__(self, definition: ViewDefinition, stored: dict[str, ViewRow]) -> None:
        self._definition = definition
        self._stored = stored
        self._views: dict[str, AnyView | None] = {}

    def update(self, view_id: str, event: Envelope[Any]) -> None:
        view = self._views.get(view_id)
        if view is None:
            view = self._definition.cls() if view_id in self._views else self._read(view_id)
        view.update(event)
        self._views[view_id] = None if view.deleted else view

    def _read(self, view_id: str) -> AnyView:
        row = self._stored.get(view_id)
        if row is None:
            return self._definition.cls()
        try:
            view: AnyView = self._definition.state.decode(row.payload)
        except ValueError as exc:
            name, cls = self._definition.name, self._definition.cls.__qualname__
            message = f"row {view_id!r} of {name} is not as {cls} makes it: {exc}"
            raise errors.ViewMisfit(f"{message}; run `cqrs-es rebuild {name}`") from exc
        return view

    async def write(self, table: str, transaction: ViewTransaction) -> None:
        gone = [view_id for view_id, view in self._views.items() if view is None]
        kept = [
            ViewRow(view_id, self._version(view_id) + 1, self._definition.state.encode(view))
            for view_id, view in sorted(self._views.items())
            if view is not None
        ]
        if gone:
            await transaction.delete(table, gone)
        if kept:
            await transaction.save(table, kept)

    def _version(self, view_id: str) -> int:
        row = self._stored.get(view_id)
        return 0 if row is None else row.version


class SqlFolding(Folding):
    """Hands events to a projector that writes its own tables."""

    def __init__(self, definition: ProjectorDefinition, generation: int) -> None:
        made = definition.fingerprint
        super().__init__(definition.name, definition.event_classes, generation, made)
        self._tables = definition.cls.tables
        self._indexes = definition.cls.indexes
        self._projector = definition.cls(generation)

    @property
    def tables(self) -> Mapping[str, str | None]:
        """The projector's tables."""
        return self._tables

    @property
    def indexes(self) -> Mapping[str, Sequence[str]]:
        """The projector's indexes."""
        return self._indexes

    async def fold(self, events: Sequence[Envelope[Any]], transaction: ViewTransaction) -> None:
        """Call the projector once with all events."""
        await self._projector.project(events, required(transaction.sql, self.name))


def required(sql: T | None, what: str) -> T:
    """Return the SQL of a store, or of a transaction; raise `ConfigurationError` without."""
    if sql is None:
        message = f"{what} needs SQL, which the store does not have: use a view"
        raise errors.ConfigurationError(f"{message}, or PostgreSQL, MySQL or SQLite")
    return sql


def folding_for(definition: ProjectionDefinition, generation: int) -> Folding:
    """Make the folding of one generation of a view or projector."""
    if isinstance(definition, ViewDefinition):
        return ViewFolding(definition, generation)
    return SqlFolding(definition, generation)


def _view_ids(cls: type[AnyView], event: Envelope[Any]) -> list[str]:
    """Return the rows an event belongs to, each once; raise `ViewFailed` for what is no id."""
    found = cls.view_id(event)
    if found is None:
        return []
    view_ids = [found] if isinstance(found, str) else list(dict.fromkeys(found))
    for view_id in view_ids:
        _check_view_id(cls, view_id)
    return view_ids


def _check_view_id(cls: type[AnyView], view_id: object) -> None:
    """Refuse what some store could not hold, or would never list."""
    if not isinstance(view_id, str) or not 1 <= len(view_id) <= MAX_VIEW_ID_CHARACTERS:
        most = MAX_VIEW_ID_CHARACTERS
        message = (
            f"{cls.__qualname__}.view_id gave {shown(view_id)}, not text of 1 to {most} characters"
        )
        raise errors.ViewFailed(message)


# --- Writing, and what may go wrong ------------------------------------------


async def write(
    registry: Registry,
    folding: Folding,
    events: Sequence[StoredEvent],
    transaction: ViewTransaction,
    on_followed: Callable[[Sequence[StoredEvent]], object] | None = None,
) -> None:
    """Write what events mean to a view, but for those of parked aggregates.

    `on_followed` is told before which of them are written: those that the view follows.
    """
    parked = await transaction.parked(folding.key, {event.key for event in events})
    unparked = [event for event in events if event.key not in parked]
    await write_all(registry, folding, unparked, transaction, on_followed)


async def write_all(
    registry: Registry,
    folding: Folding,
    events: Sequence[StoredEvent],
    transaction: ViewTransaction,
    on_followed: Callable[[Sequence[StoredEvent]], object] | None = None,
) -> None:
    """Write what events mean to a view; raises whatever the author's code raises."""
    followed = [
        (event, envelopes) for event in events if (envelopes := relevant(registry, folding, event))
    ]
    if not followed:
        return
    if on_followed is not None:
        on_followed([event for event, _ in followed])
    envelopes = [envelope for _, envelopes in followed for envelope in envelopes]
    await guarded(folding.name, folding.fold(envelopes, transaction))


async def guarded(name: str, work: Awaitable[T]) -> T:
    """Await the author's code; what it raises that is no `Exception` must not end the process."""
    try:
        return await work
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as exc:
        if isinstance(exc, asyncio.CancelledError) and _being_cancelled():
            raise
        message = f"{name} raised {text_of(exc)}"
        raise errors.ViewFailed(message) from exc


def _being_cancelled() -> bool:
    """Tell a cancellation of this task from a CancelledError that a view raised itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def relevant(registry: Registry, folding: Folding, event: StoredEvent) -> list[Envelope[Any]]:
    """Decode what a view folds of an event: nothing where it does not follow it."""
    return [
        envelope
        for envelope in registry.envelopes(event)
        if type(envelope.data) in folding.event_classes
    ]


async def past_collisions(work: Callable[[], Awaitable[T]], view: str) -> T:
    """Do a transaction's work; again where a row or a lock stood in its way, a few times.

    Views and projectors look for a row and insert it where there is none:
    another partition may do the same in between. The next try finds its row.
    """
    for _ in range(MOST_COLLISIONS):
        try:
            return await work()
        except (errors.CheckpointMoved, errors.StoreUnusable, errors.TooLarge):
            raise
        except (errors.Conflict, errors.StoreError, errors.RolledBack) as exc:
            log.debug("projection refused", view=view, error=exc.message)
            if isinstance(exc, errors.RolledBack):  # so that the two do not collide again
                await asyncio.sleep(backoff(1))
    return await work()


def reason_of(exc: Exception) -> str:
    """Say for an operator why an event was not applied."""
    return storable(f"{type(exc).__name__}: {text_of(exc, str)}")
