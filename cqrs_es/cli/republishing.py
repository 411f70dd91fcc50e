"""The verb that fills the topic again: `republish`."""

from __future__ import annotations

from typing import Annotated

import typer

from cqrs_es.cli.invocation import with_application
from cqrs_es.cli.output import JsonFlag, print_fields, print_json


def republish(
    context: typer.Context,
    partition: Annotated[int, typer.Argument(min=0, metavar="PARTITION", help="Its number.")],
    start: Annotated[
        int, typer.Option("--from", min=1, metavar="OFFSET", help="The first event to publish.")
    ],
    json: JsonFlag = False,
) -> None:
    """Publish a partition's events again.

    For subscribers of a broker that lost data.

    On Redis the stream is made anew and keeps what it has; consumer groups get the events again.

    Example: cqrs-es republish 3 --from 1200
    """
    last = with_application(
        context, lambda opened: opened.republish(partition, start), durable=True, broker=True
    )
    done: dict[str, object] = {"partition": partition, "from": str(start), "to": str(last)}
    if json:
        print_json(done)
    else:
        print_fields(done)
