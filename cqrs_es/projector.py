"""What authors subclass to build a view with SQL of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, TypeAlias, TypeVar
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

    `indexes` lists, for a table, the columns of each index that it has beside its
    key: `{"days": ["month", "month, branch"]}`. When tables or indexes change, the
    tables are made anew; when only what is in them does, say so:
    `class Days(Projector[Event], name="days", version="2")`.
    """

    name: ClassVar[str]
    version: ClassVar[str] = ""
    tables: ClassVar[Mapping[str, str]] = {}
    indexes: ClassVar[Mapping[str, Sequence[str]]] = {}

    def __init_subclass__(cls, *, name: str | None = None, version: str | None = None) -> None:
        super().__init_subclass__()
        if name is not None:
            cls.name = check_view_name(name)
        if version is not None:
            cls.version = version

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


CONSTRAINTS: Final = frozenset({"PRIMARY", "UNIQUE", "CHECK", "CONSTRAINT", "FOREIGN"})


def column_definitions(columns: str) -> Iterator[str]:
    """Cut column definitions at the commas that are in no parentheses."""
    depth = start = 0
    for at, character in enumerate(columns):
        depth += (character == "(") - (character == ")")
        if character == "," and not depth:
            yield columns[start:at]
            start = at + 1
    yield columns[start:]


def column_names(columns: str) -> frozenset[str]:
    """Return the names of the columns that definitions have, in lower case."""
    words = (definition.split(maxsplit=1) for definition in column_definitions(columns))
    names = (found[0] for found in words if found)
    return frozenset(n.strip('"').lower() for n in names if n.upper() not in CONSTRAINTS)


def check_view_name(name: str) -> str:
    """Return a view's or table's name; raise `DefinitionError` for one that is no name."""
    if not VIEW_NAME.fullmatch(name) or "__" in name:
        message = f"view name {name!r} must match {VIEW_NAME.pattern} and have no '__'"
        raise errors.DefinitionError(message)
    return name


# --- Roles -------------------------------------------------------------------

FINGERPRINT_DIGITS: Final = 12
"""In hexadecimal: as many as the name of a role has room for."""


def projector_role(name: str) -> str:
    """Return the role of the projector of a view."""
    return f"projector:{name}"


def code_role(role: str, fingerprint: int) -> str:
    """Return what those members of a role are called whose code has a fingerprint."""
    return f"{role}@{fingerprint:0{FINGERPRINT_DIGITS}x}"


def role_of(leased_as: str) -> tuple[str, str | None]:
    """Return a member's role, and the fingerprint of its code in hexadecimal if it has one."""
    role, _, code = leased_as.partition("@")
    return role, code or None


def is_other_code(leased_as: str, own: str) -> bool:
    """Tell whether a member has a role, but other code; older processes say nothing of theirs."""
    return leased_as != own and role_of(leased_as)[0] == role_of(own)[0]
