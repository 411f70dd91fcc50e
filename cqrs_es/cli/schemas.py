"""Verbs about schemas: `schema export`, `schema check`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import invocation_of, with_application
from cqrs_es.cli.output import JsonFlag, complain, print_json, print_table, print_text
from cqrs_es.program import DONE, FAILED

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.application import Application
    from cqrs_es.opened import OpenApplication
    from cqrs_es.schema.compare import Finding
    from cqrs_es.settings import Settings
    from cqrs_es.stored import Unreadable

COMMITTED: Final = "schemas.json"
AUDIENCES: Final = "stored,senders,subscribers"
GIT_SECONDS: Final = 30.0

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
            raise errors.ConfigurationError(message)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[name])
        print_json({"file": str(path)}) if json else print_text(str(path))


def exported(app: Application, settings: Settings) -> dict[str, bytes]:
    """Return the files that describe an application, by name."""
    from cqrs_es.schema import asyncapi, describe, json_schemas, openapi

    registry, service = app.registry, settings.service or app.service
    documents = {
        COMMITTED: describe(registry, service),
        "openapi.json": openapi(registry, service),
        "asyncapi.json": asyncapi(registry, service, settings.broker_url),
        **{f"json-schema/{name}.json": one for name, one in json_schemas(registry).items()},
    }
    option = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
    return {name: orjson.dumps(document, option=option) for name, document in documents.items()}


# --- check -------------------------------------------------------------------


@schema.command()
def check(
    context: typer.Context,
    against: Annotated[
        str | None,
        typer.Option(metavar="FILE|GITREF", help="A schemas.json, or where git has an older one."),
    ] = None,
    path: Annotated[
        str, typer.Option(help="With a GITREF: the file, from the repository's top.")
    ] = COMMITTED,
    audiences: Annotated[
        str, typer.Option("--for", metavar="LIST", help="Who may not be broken.")
    ] = AUDIENCES,
    store: Annotated[
        bool,
        typer.Option(
            "--store", help="Read what is stored, too, some of each kind; see check --stored."
        ),
    ] = False,
    json: JsonFlag = False,
) -> None:
    """Say what changes of the code break, for whom, and what to do; exits 1 for a break.

    Example: cqrs-es schema check --against origin/main --for stored,senders
    """
    if against is None and not store:
        message = "there is nothing to check: give --against FILE|GITREF, --store, or both"
        raise errors.ConfigurationError(message)
    wanted = set(audiences.split(","))
    if unknown := wanted - set(AUDIENCES.split(",")):
        message = f"--for {', '.join(sorted(unknown))}: a list of {AUDIENCES}"
        raise errors.ConfigurationError(message)
    findings = [] if against is None else compared(context, against, path)
    if store:
        findings += with_application(context, stored)
    findings = [finding for finding in findings if finding.audience.value in wanted]
    _print(findings, as_json=json)
    broken = any(finding.verdict.value == "break" for finding in findings)
    raise typer.Exit(FAILED if broken else DONE)


def _print(findings: Iterable[Finding], *, as_json: bool) -> None:
    columns = ["verdict", "audience", "type", "field", "what", "remedy"]
    rows: list[list[Any]] = [
        [f.verdict.value, f.audience.value, f.type, f.field, f.what, f.remedy] for f in findings
    ]
    if as_json:
        for row in rows:
            print_json(dict(zip(columns, row, strict=True)))
    elif rows:
        print_table(columns, rows)
    else:
        complain("nothing has changed that anybody would notice")


def compared(context: typer.Context, against: str, path: str) -> list[Finding]:
    """Compare what is committed, or in a file, with the code."""
    from cqrs_es.schema import compare, describe

    settings, app = invocation_of(context).load()
    app.registry.check()
    body = Path(against).read_bytes() if Path(against).is_file() else _committed(against, path)
    try:
        old: Any = orjson.loads(body)
        return compare(old, describe(app.registry, settings.service or app.service))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as exc:
        message = f"{against} is no schemas.json: `cqrs-es schema export` writes one"
        raise errors.ConfigurationError(message) from exc


def _committed(reference: str, path: str) -> bytes:
    """Read a file as git has it; raise `ConfigurationError` that says what there is not."""
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{reference}^{{commit}}")
    if found is None:
        message = f"--against {reference}: there is no such file, and no such commit of git here"
        raise errors.ConfigurationError(message)
    body = _git("show", f"{found.decode().strip()}:{path}")
    if body is None:
        message = (
            f"{reference} has no {path}: commit what `cqrs-es schema export` writes, or say with"
            " --path where it is, from the repository's top"
        )
        raise errors.ConfigurationError(message)
    return body


def _git(*arguments: str) -> bytes | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise errors.ConfigurationError(f"git can't be run: {exc}") from exc
    return done.stdout if done.returncode == 0 else None


# --- What is stored ----------------------------------------------------------


async def stored(opened: OpenApplication) -> list[Finding]:
    """Try to read some of each kind of what is stored, as `check --stored` does."""
    from cqrs_es.schema.compare import Audience, Finding, Verdict
    from cqrs_es.stored import Examination

    def finding(each: Unreadable) -> Finding:
        what = f"{each.count} stored can't be read; the first: {each.reason}"
        if not each.lost:
            return Finding(Verdict.WARNING, Audience.STORED, each.what, "", what, "")
        if each.what.startswith("view "):
            return Finding(Verdict.REBUILD, Audience.STORED, each.what, "", what, "rebuild it")
        return Finding(Verdict.BREAK, Audience.STORED, each.what, "", what, "add an upcaster")

    found = await Examination(opened.process.registry, opened.storage).run()
    return [finding(each) for each in found]
