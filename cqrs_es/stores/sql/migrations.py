"""The schema, as numbered migrations of idempotent steps; old code survives each of them.

Steps are idempotent because MySQL commits at every DDL statement: a migration
that was interrupted is simply run again. For the same reason a database that
the Rust crates made is adopted by the first migration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.ports.storage import check_service
from cqrs_es.stores.sql.tables import FRAMEWORK, STORE_INFO

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cqrs_es.stores.sql.session import Session
    from cqrs_es.stores.sql.tables import Table

VIEW_COLUMNS: Final = """
    view_id {id} NOT NULL,
    version {integer} NOT NULL,
    payload {json} NOT NULL,
    PRIMARY KEY (view_id)"""


class Step(ABC):
    """One change of the schema that may have been made already."""

    @abstractmethod
    async def apply(self, session: Session) -> None:
        """Make the change unless it is made."""


@dataclass(frozen=True, slots=True)
class CreateTable(Step):
    """Create a table; `definition` names types by their keys in `Dialect.types`."""

    name: str
    definition: str

    async def apply(self, session: Session) -> None:
        """Create the table unless it is there."""
        dialect = session.dialect
        columns = self.definition.format_map(dialect.types)
        await session.execute(
            f"CREATE TABLE IF NOT EXISTS {dialect.quoted(self.name)} ({columns})"
            f"{dialect.table_options}"
        )


@dataclass(frozen=True, slots=True)
class AddColumn(Step):
    """Add a column that may be NULL."""

    table: str
    name: str
    type: str

    async def apply(self, session: Session) -> None:
        """Add the column unless it is there."""
        dialect = session.dialect
        if (self.name,) in await session.fetch(dialect.list_columns, (self.table,)):
            return
        await session.execute(
            f"ALTER TABLE {self.table} ADD COLUMN {self.name} {dialect.types[self.type]}"
        )


@dataclass(frozen=True, slots=True)
class CompareByBytes(Step):
    """Give a table that somebody else made a collation for which ids are bytes."""

    table: str

    async def apply(self, session: Session) -> None:
        """Convert the table unless it has the collation, or the database needs none."""
        dialect = session.dialect
        if dialect.collation is None:
            return
        if (dialect.collation,) in await session.fetch(dialect.list_collations, (self.table,)):
            return
        await session.execute(
            f"ALTER TABLE {self.table} CONVERT TO CHARACTER SET utf8mb4 COLLATE {dialect.collation}"
        )


@dataclass(frozen=True, slots=True)
class AddIndex(Step):
    """Add an index."""

    table: str
    name: str
    columns: str
    unique: bool = False

    async def apply(self, session: Session) -> None:
        """Add the index unless it is there."""
        if (self.name,) in await session.fetch(session.dialect.list_indexes, (self.table,)):
            return
        kind = "UNIQUE INDEX" if self.unique else "INDEX"
        table = session.dialect.quoted(self.table)
        await session.execute(f"CREATE {kind} {self.name} ON {table} ({self.columns})")


@dataclass(frozen=True, slots=True)
class OneSnapshotEach(Step):
    """Take `last_sequence` out of the key of snapshots, where the Rust crates put it there.

    Only PostgreSQL's has it. Of each aggregate's snapshots the last one stays.
    """

    async def apply(self, session: Session) -> None:
        """Change the key unless it is changed."""
        if session.dialect.list_key is None:
            return
        key = [
            column for (column,) in await session.fetch(session.dialect.list_key, ("snapshots",))
        ]
        if "last_sequence" not in key:
            return
        await session.execute(
            """
            DELETE FROM snapshots USING snapshots AS later
            WHERE later.aggregate_type = snapshots.aggregate_type
            AND later.aggregate_id = snapshots.aggregate_id
            AND later.last_sequence > snapshots.last_sequence;
            ALTER TABLE snapshots DROP CONSTRAINT snapshots_pkey;
            ALTER TABLE snapshots ADD PRIMARY KEY (aggregate_type, aggregate_id)"""
        )


@dataclass(frozen=True, slots=True)
class DueRowsTogether(Step):
    """Keep rows of `outgoing_commands` in the order in which they are due.

    Where a row lies by its primary key, reading what is due took a page for each row.
    """

    async def apply(self, session: Session) -> None:
        """Change the key unless it is changed, or rows lie in no order."""
        dialect = session.dialect
        if not dialect.rows_by_key:
            return
        if ("outgoing_commands_id",) in await session.fetch(
            dialect.list_indexes, ("outgoing_commands",)
        ):
            return
        await session.execute(
            """
            ALTER TABLE outgoing_commands
            DROP PRIMARY KEY, ADD PRIMARY KEY (log_partition, due_at, command_id),
            ADD UNIQUE INDEX outgoing_commands_id (command_id),
            DROP INDEX outgoing_commands_due"""
        )


MIGRATIONS: Final[tuple[tuple[Step, ...], ...]] = (
    (
        CreateTable(
            "events",
            """
            aggregate_type {name} NOT NULL,
            aggregate_id {id} NOT NULL,
            sequence {integer} NOT NULL,
            event_type {name} NOT NULL,
            event_version {name} NOT NULL,
            payload {json} NOT NULL,
            metadata {json} NOT NULL,
            log_partition {integer},
            log_offset {integer},
            command_id {name},
            recorded_at {time},
            PRIMARY KEY (aggregate_type, aggregate_id, sequence)""",
        ),
        CompareByBytes("events"),
        AddColumn("events", "log_partition", "integer"),
        AddColumn("events", "log_offset", "integer"),
        AddColumn("events", "command_id", "name"),
        AddColumn("events", "recorded_at", "time"),
        AddIndex("events", "events_log", "log_partition, log_offset", unique=True),
        CreateTable(
            "snapshots",
            """
            aggregate_type {name} NOT NULL,
            aggregate_id {id} NOT NULL,
            last_sequence {integer} NOT NULL,
            current_snapshot {integer} NOT NULL,
            payload {json} NOT NULL,
            PRIMARY KEY (aggregate_type, aggregate_id)""",
        ),
        CompareByBytes("snapshots"),
        OneSnapshotEach(),
        CreateTable(
            "log_partitions",
            """
            log_partition {integer} NOT NULL,
            head {integer} NOT NULL,
            PRIMARY KEY (log_partition)""",
        ),
        CreateTable("store_info", "name {name} NOT NULL, value {id} NOT NULL, PRIMARY KEY (name)"),
        CreateTable(
            "command_outcomes",
            """
            command_id {name} NOT NULL,
            request_hash {name} NOT NULL,
            outcome {json} NOT NULL,
            recorded_at {time} NOT NULL,
            PRIMARY KEY (command_id)""",
        ),
        AddIndex("command_outcomes", "command_outcomes_recorded_at", "recorded_at"),
        CreateTable(
            "command_attempts",
            """
            command_id {name} NOT NULL,
            attempts {integer} NOT NULL,
            last_error {text},
            PRIMARY KEY (command_id)""",
        ),
        CreateTable(
            "checkpoints",
            """
            projector {name} NOT NULL,
            log_partition {integer} NOT NULL,
            log_offset {integer} NOT NULL,
            PRIMARY KEY (projector, log_partition)""",
        ),
        CreateTable(
            "members",
            """
            role {name} NOT NULL,
            owner {id} NOT NULL,
            fit {integer} NOT NULL,
            expires_at {time} NOT NULL,
            PRIMARY KEY (role, owner)""",
        ),
        CreateTable(
            "leases",
            """
            role {name} NOT NULL,
            log_partition {integer} NOT NULL,
            owner {id},
            epoch {integer} NOT NULL,
            expires_at {time} NOT NULL,
            PRIMARY KEY (role, log_partition)""",
        ),
        CreateTable(
            "dead_letters",
            """
            id {name} NOT NULL,
            source {id} NOT NULL,
            reason {text} NOT NULL,
            body {blob} NOT NULL,
            body_hash {name} NOT NULL,
            body_length {integer} NOT NULL,
            headers {json} NOT NULL,
            attempts {integer} NOT NULL,
            first_seen_at {time} NOT NULL,
            last_seen_at {time} NOT NULL,
            PRIMARY KEY (id)""",
        ),
        CreateTable(
            "generations",
            "projector {name} NOT NULL, live {integer} NOT NULL, PRIMARY KEY (projector)",
        ),
        CreateTable(
            "parked",
            """
            projector {name} NOT NULL,
            aggregate_type {name} NOT NULL,
            aggregate_id {id} NOT NULL,
            from_sequence {integer} NOT NULL,
            log_partition {integer} NOT NULL,
            reason {text} NOT NULL,
            attempts {integer} NOT NULL,
            PRIMARY KEY (projector, aggregate_type, aggregate_id)""",
        ),
    ),
    (
        CreateTable(
            "outgoing_commands",
            """
            log_partition {integer} NOT NULL,
            due_at {time} NOT NULL,
            command_id {name} NOT NULL,
            aggregate_type {name} NOT NULL,
            aggregate_id {id} NOT NULL,
            timer {id},
            body {text} NOT NULL,
            PRIMARY KEY (command_id)""",
        ),
        AddIndex("outgoing_commands", "outgoing_commands_due", "log_partition, due_at, command_id"),
        AddIndex(
            "outgoing_commands",
            "outgoing_commands_target",
            "aggregate_type, aggregate_id, timer",
        ),
        CreateTable(
            "unique_keys",
            """
            aggregate_type {name} NOT NULL,
            name {name} NOT NULL,
            value_hash {name} NOT NULL,
            aggregate_id {id} NOT NULL,
            PRIMARY KEY (aggregate_type, name, value_hash)""",
        ),
    ),
    (DueRowsTogether(),),
)
SCHEMA_VERSION: Final = 1
"""What code must know to use the store: raised by a migration that older code does not survive."""


_ADDED_LATER: Final = frozenset(
    (step.table, step.name) for steps in MIGRATIONS for step in steps if isinstance(step, AddColumn)
)


async def migrate(session: Session, service: str | None) -> None:
    """Bring the schema up to date; raise `SchemaTooNew` where it is ahead of this code.

    Migrations of newer code that this code survives are left alone. Nothing is
    changed where the tables are another service's, or another program's.
    """
    await check_tables(session, [STORE_INFO], complete=False)
    known = await _read_versions(session)
    check_schema(known.get("schema_version", 0))
    if known:
        check_service(await stored_service(session), service)
    done = migrations_done(known)
    await check_tables(session, FRAMEWORK, complete=done >= len(MIGRATIONS))
    for number, steps in enumerate(MIGRATIONS[done:], start=done + 1):
        for step in steps:
            await step.apply(session)
        rows = [("schema_version", str(SCHEMA_VERSION)), ("schema_migrations", str(number))]
        await session.write(session.dialect.upsert(STORE_INFO), rows)


async def check_tables(session: Session, tables: Iterable[Table], *, complete: bool) -> None:
    """Raise `ForeignTable` for a table by one of our names that does not have our columns.

    Where the schema is not `complete`, a table may be missing, or lack what migrations add to it.
    """
    for table in tables:
        listed = await session.fetch(session.dialect.list_columns, (table.name,))
        found = {column.lower() for (column,) in listed}
        optional = () if complete else [c for c in table.columns if (table.name, c) in _ADDED_LATER]
        lacking = [c for c in table.columns if c not in found and c not in optional]
        if complete and not found:
            message = f"the store has no table {table.name} any more: restore it from a backup"
            raise errors.StoreError(message)
        if found and lacking:
            message = (
                f"the table {table.name} has no column {lacking[0]}, so it belongs to another"
                " program: use a database, or a schema, of the service's own"
            )
            raise errors.ForeignTable(message)


async def stored_service(session: Session) -> str | None:
    """Return the name of the service that the store belongs to."""
    rows = await session.fetch("SELECT value FROM store_info WHERE name = 'service'")
    return rows[0][0] if rows else None


async def _read_versions(session: Session) -> dict[str, int]:
    try:
        rows = await session.fetch(
            "SELECT name, value FROM store_info"
            " WHERE name IN ('schema_version', 'schema_migrations')"
        )
    except errors.StoreNotInitialised:
        return {}
    return {name: int(value) for name, value in rows}


def migrations_done(known: Mapping[str, int]) -> int:
    """Return how many migrations were made; code that did not count them made the first."""
    return known.get("schema_migrations", known.get("schema_version", 0))


def check_schema(version: int) -> None:
    """Raise `SchemaTooNew` for a schema that this code does not know."""
    if version > SCHEMA_VERSION:
        message = (
            f"the store has schema {version}, this program knows {SCHEMA_VERSION}:"
            " upgrade this program"
        )
        raise errors.SchemaTooNew(message)
