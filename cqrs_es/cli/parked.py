"""Verbs about parked aggregates: `parked list`, `retry`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import JsonFlag, print_json, print_table, print_text
from cqrs_es.program import DONE, FAILED
from cqrs_es.projector import generation_of, view_of
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.views import ParkedAggregate

parked = typer.Typer(
    help="Deal with parked aggregates: a projector fails on their events.", no_args_is_help=True
)


@parked.command("list")
def list_parked(context: typer.Context, json: JsonFlag = False) -> None:
    """List the aggregates whose events a projector does not apply.

    Example: cqrs-es parked list
    """
    markers = with_application(context, lambda opened: opened.parked())
    if json:
        for marker in markers:
            print_json(_marker_fields(marker))
        return
    columns = ["view", "aggregate", "from sequence", "attempts", "reason"]
    rows = [[view_of(m.projector), m.key, m.from_sequence, m.attempts, m.reason] for m in markers]
    print_table(columns, rows)


@parked.command("retry")
def retry_parked(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The view or projector.")],
    aggregate: Annotated[
        tuple[str, str] | None,
        typer.Option("--aggregate", metavar="TYPE ID", help="Only this one; else all parked."),
    ] = None,
    json: JsonFlag = False,
) -> None:
    """Apply parked aggregates' events to a view again, in order, once the view is fixed.

    Exits 1 when any of them stays parked.

    Example: cqrs-es parked retry account_query
    """
    wanted = AggregateKey(*aggregate) if aggregate else None

    async def work(opened: OpenApplication) -> bool:
        markers = [m for m in await opened.parked(name) if wanted in {None, m.key}]
        if wanted is not None and not markers:
            raise errors.NotFound(f"{wanted} is not parked for {name}; see `cqrs-es parked list`")
        if not markers and not json:
            print_text(f"nothing is parked for {name}")
        results = [await _retry_parked(opened, name, marker, as_json=json) for marker in markers]
        return all(results)

    raise typer.Exit(DONE if with_application(context, work) else FAILED)


async def _retry_parked(
    opened: OpenApplication, name: str, marker: ParkedAggregate, *, as_json: bool
) -> bool:
    """Retry one aggregate; return whether it has caught up."""
    caught_up = await opened.retry_parked(name, marker)
    if as_json:
        print_json({"projector": name, "aggregate": str(marker.key), "parked": not caught_up})
    else:
        print_text(f"{marker.key} {'has caught up' if caught_up else 'failed again'}")
    return caught_up


def _marker_fields(marker: ParkedAggregate) -> dict[str, object]:
    return {
        "projector": view_of(marker.projector),
        "generation": generation_of(marker.projector),
        "aggregate_type": marker.key.type,
        "aggregate_id": marker.key.id,
        "from_sequence": marker.from_sequence,
        "partition": marker.partition,
        "attempts": marker.attempts,
        "reason": marker.reason,
    }
