"""Verbs that show what there is: `status`, `stream`, `view`, `outcome`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import JsonFlag, print_fields, print_json, print_table, print_text
from cqrs_es.cli.showing import event_writer, print_outcome
from cqrs_es.projection.generations import FIRST
from cqrs_es.projection.replay import stored_stream
from cqrs_es.projector import physical_name
from cqrs_es.registry import ProjectorDefinition, ViewDefinition
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.views import ViewRow

PAGE: Final = 500
RELAY_MARK: Final = "$relay"
# What an item of a table's definition begins with when it is no column.
TABLE_CONSTRAINTS: Final = {"PRIMARY", "UNIQUE", "CONSTRAINT", "CHECK", "FOREIGN", "KEY", "INDEX"}


def status(context: typer.Context, json: JsonFlag = False) -> None:
    """Show how far log, relay and projectors are, and who works.

    Example: cqrs-es status
    """
    found = with_application(context, read_status)
    if json:
        print_json(found)
    else:
        _print_status(found)


async def read_status(opened: OpenApplication) -> dict[str, Any]:
    """Return the object of CONTRACT §6."""
    storage = opened.storage
    heads = await storage.events.heads()
    return {
        "partitions": await _partitions(opened, dict(heads)),
        "members": [
            {"role": m.role, "owner": m.owner, "fit": m.fit, "expires_at": m.expires_at}
            for m in await storage.leases.members()
        ],
        "leases": [
            {"role": ls.role, "partition": ls.partition, "owner": ls.owner, "epoch": ls.epoch}
            for ls in await storage.leases.held()
        ],
        "dead_letters": await storage.dead_letters.count(),
        "parked": len(await opened.parked()),
    }


async def _partitions(opened: OpenApplication, heads: dict[int, int]) -> list[dict[str, Any]]:
    views = opened.storage.views
    relayed = await views.checkpoints(RELAY_MARK)
    projected = {
        name: await views.checkpoints(await opened.table(name))
        for name in opened.registry.projections
    }
    return [
        {
            "partition": partition,
            "head": str(head),
            "relay": str(relayed.get(partition, 0)),
            "projectors": {
                name: str(offsets.get(partition, 0)) for name, offsets in projected.items()
            },
        }
        for partition, head in sorted(heads.items())
    ]


def _print_status(found: dict[str, Any]) -> None:
    partitions = found["partitions"]
    names = list(partitions[0]["projectors"]) if partitions else []
    print_table(
        ["partition", "head", "relay", *names],
        [
            [int(p["partition"]), int(p["head"]), int(p["relay"])]
            + [int(p["projectors"][name]) for name in names]
            for p in partitions
        ],
    )
    print_text("")
    held = [(lease["role"], lease["owner"]) for lease in found["leases"]]
    rows = [
        [m["role"], m["owner"], held.count((m["role"], m["owner"])), m["fit"]]
        for m in found["members"]
    ]
    print_table(["role", "member", "partitions", "fit"], rows)
    print_text("")
    print_fields({"dead letters": found["dead_letters"], "parked": found["parked"]})


def view(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The view's name.")],
    view_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One row's id.")] = None,
    json: JsonFlag = False,
) -> None:
    """Read a view: one row by its id, or all rows.

    Example: cqrs-es view account_query ACCT-001
    """
    if view_id is None:
        with_application(context, lambda opened: _print_rows(opened, name, as_json=json))
        return
    row = with_application(context, lambda opened: _read_row(opened, name, view_id))
    if json:
        print_json(row.payload)
    else:
        print_text(orjson.dumps(orjson.loads(row.payload), option=orjson.OPT_INDENT_2).decode())


async def _read_row(opened: OpenApplication, name: str, view_id: str) -> ViewRow:
    _require_rows_of_json(opened, name)
    row = await opened.storage.views.get(await opened.table(name), view_id)
    if row is None:
        raise errors.NotFound(f"view {name} has no row {view_id!r}; is its projector behind?")
    return row


def _require_rows_of_json(opened: OpenApplication, name: str) -> None:
    if not isinstance(opened.projection(name), ViewDefinition):
        message = f"{name} has rows of its own columns, not ids: leave the id out"
        raise errors.ConfigurationError(message)


async def _print_rows(opened: OpenApplication, name: str, *, as_json: bool) -> None:
    definition = opened.projection(name)
    if isinstance(definition, ProjectorDefinition):
        await _print_tables(opened, definition, as_json=as_json)
    elif as_json:
        async for row in _rows(opened, name):
            payload = orjson.Fragment(row.payload)
            print_json({"view_id": row.view_id, "version": row.version, "payload": payload})
    else:
        rows = [[r.view_id, r.version, r.payload] async for r in _rows(opened, name)]
        print_table(["view_id", "version", "payload"], rows)


async def _rows(opened: OpenApplication, name: str) -> AsyncIterator[ViewRow]:
    after = ""
    while page := await opened.view_rows(name, after=after, limit=PAGE):
        for row in page:
            yield row
        after = page[-1].view_id


async def _print_tables(
    opened: OpenApplication, definition: ProjectorDefinition, *, as_json: bool
) -> None:
    """Print the rows of a projector's own tables, by their own columns."""
    for table, definitions in definition.cls.tables.items():
        columns = column_names(definitions)
        live = (await opened.storage.views.generations()).get(definition.name, FIRST)
        physical = physical_name(table, live)
        sql = f"SELECT {', '.join(columns)} FROM {physical} ORDER BY 1"  # noqa: S608 - our own names
        rows = await opened.storage.views.query(sql)
        if not as_json:
            print_table(columns, rows)
            continue
        for row in rows:
            print_json(dict(zip(columns, row, strict=True)))


def column_names(definitions: str) -> list[str]:
    """Return the names of the columns that a table's definition lists."""
    flat = re.sub(r"\([^()]*\)", "", definitions)
    first_words = [item.split()[0] for item in flat.split(",") if item.strip()]
    return [word for word in first_words if word.upper() not in TABLE_CONSTRAINTS]


def stream(
    context: typer.Context,
    aggregate_type: Annotated[str, typer.Argument(metavar="TYPE", help="The aggregate's type.")],
    aggregate_id: Annotated[str, typer.Argument(metavar="ID", help="The aggregate's id.")],
    json: JsonFlag = False,
) -> None:
    """Show an aggregate's events.

    Example: cqrs-es stream account ACCT-001
    """
    key = AggregateKey(aggregate_type, aggregate_id)

    async def work(opened: OpenApplication) -> None:
        events = await stored_stream(opened.storage.events, key)
        if not events:
            message = f"there is no aggregate {key}; its type and id are case-sensitive"
            raise errors.NotFound(message)
        write = await event_writer(opened, as_json=json)
        for event in events:
            write(event)

    with_application(context, work)


def outcome(
    context: typer.Context,
    command_id: Annotated[str, typer.Argument(help="The command's id, a UUID.")],
    json: JsonFlag = False,
) -> None:
    """Show what became of a command.

    Example: cqrs-es outcome 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    found = with_application(context, lambda opened: opened.outcome(command_id))
    if found is None:
        message = (
            f"command {command_id} has no outcome: it was not sent, waits still, "
            "or was decided longer ago than CQRS_ES_OUTCOME_RETENTION_DAYS"
        )
        raise errors.NotFound(message)
    print_outcome(found, as_json=json)
