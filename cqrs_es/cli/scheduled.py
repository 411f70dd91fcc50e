"""Verbs about scheduled commands: `scheduled list`, `cancel`, `run`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import (
    JsonFlag,
    complain,
    print_json,
    print_outcome,
    print_table,
    print_text,
)
from cqrs_es.cloudevents import timestamp
from cqrs_es.program import FAILED
from cqrs_es.types import AggregateKey, parse_command_id, partition_of_lane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.messages import Outcome
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.store import ScheduledCommand

PAGE: Final = 500

scheduled = typer.Typer(
    help="Deal with commands that wait until they are due.",
    no_args_is_help=True,
)

Id = Annotated[str, typer.Argument(metavar="ID", help="The command's id.")]


@scheduled.command("list")
def list_scheduled(
    context: typer.Context,
    due: Annotated[bool, typer.Option("--due", help="Those that are due.")] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Those that wait since an earlier one failed.")
    ] = False,
    target: Annotated[
        str | None, typer.Option("--for", metavar="TYPE/ID", help="Those for one aggregate.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """List the scheduled commands in the order in which they are due.

    Example: cqrs-es scheduled list --for account/ACCT-001
    """
    key = None if target is None else _key(target)

    async def work(opened: OpenApplication) -> None:
        rows: list[list[object]] = []
        async for row, held_back in _rows(opened, key, due=due):
            if failed and not held_back:
                continue
            fields = _fields(row, held_back=held_back)
            if json:
                print_json(fields)
            else:
                rows.append([fields[name] for name in ("id", "due", "target", "type", "timer")])
        if not json:
            print_table(["id", "due", "for", "command", "timer"], rows)

    with_application(context, work)


def _key(target: str) -> AggregateKey:
    aggregate_type, slash, aggregate_id = target.partition("/")
    if not slash:
        raise errors.ConfigurationError(f"--for {target}: give TYPE/ID, such as account/ACCT-001")
    return AggregateKey(aggregate_type, aggregate_id)


async def _rows(
    opened: OpenApplication, key: AggregateKey | None, *, due: bool
) -> AsyncIterator[tuple[ScheduledCommand, bool]]:
    """Read rows, each with whether it is held back."""
    events = opened.storage.events
    after: tuple[datetime, str] | None = None
    now = await _now(opened) if due else None
    while page := await events.list_scheduled(after, PAGE, key, opened.process.lanes):
        free = await events.find_scheduled([row.command_id for row in page])
        for row in page:
            if now is not None and row.moment > now:
                return
            yield row, row.command_id not in free
        after = page[-1].moment, page[-1].command_id


async def _now(opened: OpenApplication) -> datetime:
    """Return the store's time where something is due; where nothing is, the beginning of time."""
    for partition in (*range(opened.process.partitions), *opened.process.lanes):
        for first in await opened.storage.events.due(partition, 1):
            return first.moment + first.late
    return datetime.min.replace(tzinfo=UTC)


def _fields(row: ScheduledCommand, *, held_back: bool) -> dict[str, Any]:
    from cqrs_es.ports.store import IMMEDIATELY

    return {
        "id": row.command_id,
        "due": None if row.moment == IMMEDIATELY else timestamp(row.moment),
        "target": str(row.key),
        "type": orjson.loads(row.body)["type"],
        "timer": row.timer,
        "partition": partition_of_lane(row.partition),
        "failed": held_back,
        "command": orjson.loads(row.body),
    }


@scheduled.command("cancel")
def cancel_scheduled(context: typer.Context, command_id: Id, json: JsonFlag = False) -> None:
    """Cancel a scheduled command; exits 1, with its outcome, where it was decided.

    A recurring command is left out this time only: to end it, take it out of the code.

    Example: cqrs-es scheduled cancel 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    known = parse_command_id(command_id)

    async def work(opened: OpenApplication) -> tuple[bool, Outcome | None]:
        return await opened.unschedule(known), await opened.outcome(known)

    found, outcome = with_application(context, work)
    _report(known, "cancelled", outcome, found=found, as_json=json)


@scheduled.command("run")
def run_scheduled(context: typer.Context, command_id: Id, json: JsonFlag = False) -> None:
    """Make a scheduled command due now; exits 1, with its outcome, where it was decided.

    Example: cqrs-es scheduled run 0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f
    """
    known = parse_command_id(command_id)

    async def work(opened: OpenApplication) -> tuple[bool, Outcome | None]:
        found = await opened.storage.events.hasten([known])
        return bool(found), await opened.outcome(known)

    found, outcome = with_application(context, work)
    _report(known, "due", outcome, found=found, as_json=json)


def _report(
    command_id: str, done: str, outcome: Outcome | None, *, found: bool, as_json: bool
) -> None:
    """Say that it is done; else what became of the command."""
    if found:
        print_json({"id": command_id, done: True}) if as_json else print_text(
            f"{command_id} {done}"
        )
        return
    if outcome is None:
        text = f"there is no scheduled command {command_id}; see `cqrs-es scheduled list`"
        raise errors.NotFound(text)
    complain(f"{command_id} was decided already")
    print_outcome(outcome, as_json=as_json)
    raise typer.Exit(FAILED)
