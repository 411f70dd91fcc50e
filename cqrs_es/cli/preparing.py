"""Verbs for before anything runs: `init`, `check`, `settings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import JsonFlag, print_fields, print_json

if TYPE_CHECKING:
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.store import StoreInfo

NewEpoch = Annotated[
    bool,
    typer.Option(
        "--new-epoch",
        help="After a restore from a backup: begin a new life of the log, published afresh.",
    ),
]


def init(
    context: typer.Context,
    new_epoch: NewEpoch = False,
    json: JsonFlag = False,
) -> None:
    """Create or migrate the tables, the views and the broker's topology; safe to repeat.

    Example: cqrs-es init
    """

    async def work(opened: OpenApplication) -> StoreInfo:
        return await opened.initialise(new_epoch=new_epoch)

    info = with_application(context, work, initialise=True)
    fields: dict[str, object] = {
        "partitions": info.partitions,
        "logepoch": info.log_epoch,
        "schema_version": info.schema_version,
    }
    if json:
        print_json(fields)
    else:
        print_fields(fields)
