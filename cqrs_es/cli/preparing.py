"""Verbs for before anything runs: `init`, `check`, `settings`."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from cqrs_es.cli.explaining import explain
from cqrs_es.cli.invocation import invocation_of, with_application
from cqrs_es.cli.output import JsonFlag, print_fields, print_json, print_table
from cqrs_es.program import DONE

if TYPE_CHECKING:
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.store import StoreInfo

NewEpoch = Annotated[
    bool,
    typer.Option(
        "--new-epoch",
        help="After a restore from a backup: begin a new epoch of the log, published anew.",
    ),
]


def init(
    context: typer.Context,
    new_epoch: NewEpoch = False,
    json: JsonFlag = False,
) -> None:
    """Create or migrate tables, views and topology; safe to repeat.

    Example: cqrs-es init
    """

    async def work(opened: OpenApplication) -> StoreInfo:
        return await opened.initialise(new_epoch=new_epoch)

    info = with_application(context, work, initialise=True, broker=True)
    fields: dict[str, object] = {
        "partitions": info.partitions,
        "logepoch": info.log_epoch,
        "schema_version": info.schema_version,
    }
    if json:
        print_json(fields)
    else:
        print_fields(fields)


def check(context: typer.Context, json: JsonFlag = False) -> None:
    """Verify settings, handlers, schema, views and servers.

    Changes nothing. Exits with the code of the first check that fails.

    Example: cqrs-es check
    """
    settings, app = invocation_of(context).load()
    from cqrs_es.cli.checking import check_everything

    findings = asyncio.run(check_everything(app, settings))
    if json:
        for finding in findings:
            print_json({"check": finding.check, "ok": finding.ok, "detail": finding.detail})
    else:
        print_table(["check", "ok", "detail"], [[f.check, f.ok, f.detail] for f in findings])
    raise typer.Exit(next((finding.code for finding in findings if not finding.ok), DONE))


def settings(context: typer.Context, json: JsonFlag = False) -> None:
    """List the settings with their values, defaults and meaning.

    They are environment variables; <NAME>_FILE reads a value from a file, for secrets.

    Example: cqrs-es settings
    """
    explained = [asdict(one) for one in explain(invocation_of(context).settings())]
    if json:
        for one in explained:
            print_json(one)
    else:
        columns = ["name", "value", "default", "meaning"]
        print_table(columns, [list(one.values()) for one in explained])
