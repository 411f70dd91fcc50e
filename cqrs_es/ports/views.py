"""Views and checkpoints: what projectors write, in one transaction (G7).

Names given to these methods are physical: those of one generation of a view,
`<name>__<n>`, for tables and checkpoint keys alike. `generations` says which
one is live; readers go through it.

A transaction sees its own writes. Rows that it loads stay locked until it
ends; a store without locks (DynamoDB) makes sure when it ends that nobody has
changed them, and raises `Conflict` where somebody has, or `TooLarge` where
that is more than it takes at once: nothing was written then. Leaving its block
without an error commits, durably; any error, also cancellation, rolls
everything back. `StoreUnavailable` from the commit leaves it unknown whether
it happened: read the checkpoint to find out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import msgspec

from cqrs_es.projector import (
    NO_CHANGES as NO_CHANGES,  # these four are part of this port's vocabulary
)
from cqrs_es.projector import SqlRow as SqlRow  # noqa: TC001 - stores import it from here
from cqrs_es.projector import SqlSession as SqlSession  # noqa: TC001
from cqrs_es.projector import SqlValue as SqlValue  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.types import AggregateKey


class ViewRow(msgspec.Struct, frozen=True):
    """One row of a view; `version` counts its writes from 1, `payload` is JSON."""

    view_id: str
    version: int
    payload: bytes


class ParkedAggregate(msgspec.Struct, frozen=True):
    """An aggregate whose events a projector does not apply until it is fixed (G9)."""

    projector: str
    key: AggregateKey
    from_sequence: int
    partition: int
    reason: str
    attempts: int = 1


class ViewTransaction(ABC):
    """One transaction of a projector."""

    @property
    def sql(self) -> SqlSession | None:
        """SQL in this transaction; None where the store has none."""
        return None

    @abstractmethod
    async def checkpoint(self, projector: str, partition: int) -> int:
        """Lock and return a checkpoint; 0 before the first."""

    @abstractmethod
    async def advance(self, projector: str, partition: int, expected: int, to: int) -> None:
        """Move a checkpoint; raise `Conflict` when it is not at `expected`."""

    @abstractmethod
    async def load(self, table: str, view_ids: Collection[str]) -> dict[str, ViewRow]:
        """Lock and return the rows there are, locking in ascending id."""

    @abstractmethod
    async def save(self, table: str, rows: Sequence[ViewRow]) -> None:
        """Write rows, each over its version minus one; raise `Conflict` where that is not so."""

    @abstractmethod
    async def delete(self, table: str, view_ids: Collection[str]) -> None:
        """Delete rows; those that are not there are no error."""

    @abstractmethod
    async def parked(
        self, projector: str, keys: Collection[AggregateKey]
    ) -> dict[AggregateKey, ParkedAggregate]:
        """Return the markers of those aggregates that are parked.

        Whoever parks an aggregate moves, in the same transaction, the
        checkpoint of its partition; so none is added unnoticed by
        another transaction that does.
        """

    @abstractmethod
    async def park(self, marker: ParkedAggregate) -> None:
        """Set or replace an aggregate's marker."""

    @abstractmethod
    async def unpark(self, projector: str, key: AggregateKey) -> None:
        """Clear an aggregate's marker."""

    @abstractmethod
    async def forget(self, projector: str) -> None:
        """Delete a projector's checkpoints, parked markers and row of `generations`."""

    @abstractmethod
    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        """Add rows to `outgoing_commands`, under ids that no row or outcome has."""

    @abstractmethod
    async def generations(self, name: str | None = None) -> dict[str, int]:
        """Lock and return what `ViewStore.generations` returns; do it before anything else.

        With `name`, only what is noted of that view has to stay as it is.
        """

    @abstractmethod
    async def set_generation(self, projector: str, live: int) -> None:
        """Note a number under a key: under a view's name, which generation is live."""


class SqlTables(ABC):
    """What stores with SQL have beside rows: tables of projectors' own, and names that show them.

    Raises `StoreError` for SQL that the database refuses.
    """

    @abstractmethod
    async def create(self, table: str, columns: str, indexes: Sequence[str] = ()) -> None:
        """Create a table unless it is there, and its indexes unless they are.

        Column definitions are as `Projector.tables` has them, indexes as `Projector.indexes`.
        """

    @abstractmethod
    async def columns(self, table: str) -> list[str]:
        """Return the names of a table's columns, in order; none where there is no such table."""

    @abstractmethod
    async def count_indexes(self, table: str) -> int:
        """Return how many indexes a table has that `create` has made."""

    @abstractmethod
    async def publish(self, name: str, table: str) -> None:
        """Make `name` an SQL view that shows `table`, in place of what it showed."""

    @abstractmethod
    async def unpublish(self, name: str) -> None:
        """Drop the SQL view `name` if it is there; refused where something depends on it."""

    @abstractmethod
    async def query(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        """Run a query with `?` placeholders outside any transaction."""


class ViewStore(ABC):
    """The views of a store; see the module for what is promised."""

    @property
    def sql(self) -> SqlTables | None:
        """The store's SQL, by which projectors may keep tables of their own; None without."""
        return None

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[ViewTransaction]:
        """Open a transaction; it commits when its block ends without an error."""

    @abstractmethod
    async def create_table(self, table: str) -> None:
        """Create a table of rows unless it is there."""

    @abstractmethod
    async def list_tables(self) -> list[str]:
        """Return the names of all tables, in the case that the database gives them."""

    @abstractmethod
    async def drop_table(self, table: str) -> None:
        """Drop a table if it is there."""

    @abstractmethod
    async def get(self, table: str, view_id: str) -> ViewRow | None:
        """Return one row, None when there is none."""

    @abstractmethod
    async def page(self, table: str, *, after: str = "", limit: int = 100) -> list[ViewRow]:
        """Return up to `limit` rows with an id above `after`, by id."""

    @abstractmethod
    async def count(self, table: str) -> int:
        """Return how many rows a view has."""

    @abstractmethod
    async def checkpoints(self, projector: str) -> dict[int, int]:
        """Return a projector's checkpoints by partition; those at 0 may be absent."""

    @abstractmethod
    async def generations(self) -> Mapping[str, int]:
        """Return what is noted of generations; see `projection.generations` for the keys."""

    @abstractmethod
    async def list_parked(self, projector: str | None = None) -> list[ParkedAggregate]:
        """Return the markers there are, of one projector or of all."""
