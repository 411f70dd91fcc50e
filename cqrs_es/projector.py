"""What authors subclass to build a view with SQL of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, TypeVar
from uuid import UUID

from cqrs_es import errors
from cqrs_es.types import VIEW_NAME

if TYPE_CHECKING:
    from cqrs_es.messages import Envelope

E = TypeVar("E")
SqlValue: TypeAlias = int | float | str | bytes | Decimal | date | datetime | UUID | None
"""What a projector gives and gets; `bool` too, which is an `int`. A `datetime` is aware."""
NO_CHANGES: Mapping[str, str] = MappingProxyType({})
SqlRow: TypeAlias = tuple[Any, ...]
"""A row of values of the types of `SqlValue`, as the columns have them."""


class SqlSession(ABC):
    """Plain SQL inside a projector's transaction."""

    @abstractmethod
    async def execute(self, sql: str, parameters: Sequence[SqlValue] = ()) -> int:
        """Run a statement with `?` placeholders; return how many rows it touched."""

    @abstractmethod
    async def fetch(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        """Run a query with `?` placeholders; return its rows."""

    @abstractmethod
    async def upsert(
        self,
        table: str,
        key: Sequence[str],
        rows: Sequence[Mapping[str, SqlValue]],
        changes: Mapping[str, str] = NO_CHANGES,
    ) -> None:
        """Insert rows, or change those that are there; one statement for many, in order of keys.

        `key` names the columns of the table's primary key. All rows give the
        same columns. Where a row is there already, the others get the new
        row's values, or those that `changes` says, in SQL over `old.<column>`
        and `new.<column>`: `{"total": "old.total + new.total"}`.
        """


class Projector(ABC, Generic[E]):
    """A view kept with SQL of its own, in the transaction that moves its checkpoint.

    `tables` maps each table's name to its column definitions, in SQL that all
    stores understand; `init` creates them. Values come back as they were given
    from columns of these types: BIGINT, DOUBLE PRECISION, VARCHAR(n), TEXT,
    BOOLEAN (bool), DATE (date), TIMESTAMP (datetime, in UTC), DECIMAL(p, s)
    (Decimal), UUID (UUID), BLOB (bytes). A rebuild fills tables of the next
    generation beside the live ones, so write `self.table("name")`, never the
    name itself. Rows that events of several partitions touch are to be updated
    in ascending key order: that is what keeps projectors from deadlocking.
    """

    name: ClassVar[str]
    tables: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            cls.name = check_view_name(name)

    def __init__(self, generation: int = 1) -> None:
        self.generation = generation

    def table(self, name: str) -> str:
        """Return the physical name of one of the projector's tables."""
        return physical_name(name, self.generation)

    @abstractmethod
    async def project(self, events: Sequence[Envelope[E]], sql: SqlSession) -> None:
        """Write what these events mean; they are of one partition, in the order of the log."""


def physical_name(name: str, generation: int) -> str:
    """Return the name of a table or checkpoint key of one generation of a view."""
    return f"{name}__{generation}"


def view_of(key: str) -> str:
    """Return the name of the view that a table's or checkpoint's name is of."""
    return key.rpartition("__")[0]


def generation_of(key: str) -> int:
    """Return the generation that a table's or checkpoint's name is of."""
    return int(key.rpartition("__")[2])


def check_view_name(name: str) -> str:
    """Return a view's or table's name; raise `DefinitionError` for one that is no name."""
    if not VIEW_NAME.fullmatch(name) or "__" in name:
        message = f"view name {name!r} must match {VIEW_NAME.pattern} and have no '__'"
        raise errors.DefinitionError(message)
    return name
