"""Verbs about schemas: `schema export`, `schema check`."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer evaluates annotations
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from cqrs_es.cli.invocation import invocation_of
from cqrs_es.cli.output import JsonFlag, print_json, print_text

if TYPE_CHECKING:
    from cqrs_es.application import Application
    from cqrs_es.settings import Settings

schema = typer.Typer(
    help="Describe what the application takes, stores and publishes.",
    no_args_is_help=True,
)

Only = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="FILE", help="Write these only, such as schemas.json."),
]


@schema.command()
def export(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where they are written.")],
    only: Only = None,
    json: JsonFlag = False,
) -> None:
    """Write schemas.json, which is to be committed, JSON Schema, OpenAPI and AsyncAPI.

    Nothing is asked of a store or a broker.

    Example: cqrs-es schema export schemas
    """
    settings, app = invocation_of(context).load()
    app.registry.check()
    files = exported(app, settings)
    for name in only or files:
        if name not in files:
            message = f"--only {name}: there are {', '.join(files)}"
            raise typer.BadParameter(message)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
        print_json({"file": str(path)}) if json else print_text(str(path))


def exported(app: Application, settings: Settings) -> dict[str, bytes]:
    """Return the files that describe an application, by name."""
    from cqrs_es.schema import asyncapi, describe, json_schemas, openapi

    registry, service = app.registry, settings.service or app.service
    documents = {
        "schemas.json": describe(registry, service),
        "openapi.json": openapi(registry, service),
        "asyncapi.json": asyncapi(registry, service, settings.broker_url),
        **{f"json-schema/{name}.json": one for name, one in json_schemas(registry).items()},
    }
    option = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return {name: orjson.dumps(document, option=option) for name, document in documents.items()}
