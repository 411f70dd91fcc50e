"""The verb that reads views: `view`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final

import orjson
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import JsonFlag, print_json, print_table, print_text
from cqrs_es.definitions import ProjectorDefinition
from cqrs_es.projector import physical_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.views import ViewRow

PAGE: Final = 500
PATIENCE_SECONDS: Final = 10.0


def view(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="The view's name.")],
    view_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="One row's id.")] = None,
    after: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Only rows with a higher id: the last one of a page."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many rows; else all.")
    ] = None,
    wait_for: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND_ID",
            help="Wait until the view has seen this command, 10 s at most.",
        ),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Read a view: one row by its id, or all rows, by id.

    Example: cqrs-es view account_query --after ACCT-001 --limit 20
    """
    if view_id is not None and (after is not None or limit is not None):
        raise errors.ConfigurationError("--after and --limit are for rows without an id given")
    page = Page(after or "", limit)

    async def work(opened: OpenApplication) -> None:
        opened.projection(name)
        if wait_for is not None:
            await _wait_for(opened, name, wait_for)
        if view_id is None:
            await _print_rows(opened, name, page, as_json=json)
        else:
            _print_row(await _read_row(opened, name, view_id), as_json=json)

    with_application(context, work)


@dataclass(frozen=True, slots=True)
class Page:
    """Which rows of a view to print: those with an id above `after`, None for all of them."""

    after: str
    limit: int | None


async def _wait_for(opened: OpenApplication, name: str, command_id: str) -> None:
    """Wait until a command has an outcome, then until the view has seen it."""
    from cqrs_es.projection.seen import wait_for_outcome

    looking = wait_for_outcome(lambda: opened.outcome(command_id), command_id, PATIENCE_SECONDS)
    await opened.wait_for(name, await looking, PATIENCE_SECONDS)


# --- One row -----------------------------------------------------------------


async def _read_row(opened: OpenApplication, name: str, view_id: str) -> ViewRow:
    if isinstance(opened.projection(name), ProjectorDefinition):
        message = f"{name} has rows of its own columns, not ids: leave the id out"
        raise errors.ConfigurationError(message)
    row = await opened.storage.views.get(await opened.table(name), view_id)
    if row is None:
        raise errors.NotFound(f"view {name} has no row {view_id!r}; is its projector behind?")
    return row


def _print_row(row: ViewRow, *, as_json: bool) -> None:
    if as_json:
        print_json(row.payload)
    else:
        print_text(orjson.dumps(orjson.loads(row.payload), option=orjson.OPT_INDENT_2).decode())


# --- Many rows ---------------------------------------------------------------


async def _print_rows(opened: OpenApplication, name: str, page: Page, *, as_json: bool) -> None:
    definition = opened.projection(name)
    if isinstance(definition, ProjectorDefinition):
        await _print_tables(opened, definition, page, as_json=as_json)
    elif as_json:
        async for row in _rows(opened, name, page):
            payload = orjson.Fragment(row.payload)
            print_json({"view_id": row.view_id, "version": row.version, "payload": payload})
    else:
        rows = [[r.view_id, r.version, r.payload] async for r in _rows(opened, name, page)]
        print_table(["view_id", "version", "payload"], rows)


async def _rows(opened: OpenApplication, name: str, page: Page) -> AsyncIterator[ViewRow]:
    after, left = page.after, page.limit
    while left is None or left > 0:
        limit = PAGE if left is None else min(PAGE, left)
        rows = await opened.view_rows(name, after=after, limit=limit)
        for row in rows:
            yield row
        if len(rows) < limit:
            return
        after, left = rows[-1].view_id, None if left is None else left - len(rows)


async def _print_tables(
    opened: OpenApplication, definition: ProjectorDefinition, page: Page, *, as_json: bool
) -> None:
    """Print the rows of a projector's own tables, by their own columns, in order of the first."""
    if page.after:
        raise errors.ConfigurationError(f"{definition.name} has no ids to go on after: use --limit")
    views = opened.storage.views
    from cqrs_es.projection.folding import required
    from cqrs_es.projection.generations import read_generations

    sql = required(views.sql, definition.name)
    live = (await read_generations(views, definition.name)).live
    for name in definition.cls.tables:
        table = physical_name(name, live)
        columns = await sql.columns(table)
        most = "" if page.limit is None else f" LIMIT {page.limit}"
        rows = await sql.query(f"SELECT * FROM {table} ORDER BY 1{most}")  # noqa: S608 - our names
        if not as_json:
            print_table(columns, rows)
            continue
        for row in rows:
            print_json(dict(zip(columns, row, strict=True)))
