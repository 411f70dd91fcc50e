"""The command line's entry point: global options, the verbs, errors as exit codes."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Final, NoReturn

import typer

from cqrs_es import errors, program
from cqrs_es.cli import (
    inspecting,
    preparing,
    repairing,
    running,
    scheduled,
    schemas,
    sending,
    serving,
    views,
)
from cqrs_es.cli.invocation import Invocation, invocation_of
from cqrs_es.cli.output import complain, print_text
from cqrs_es.settings import LogFormat, LogLevel  # noqa: TC001 - typer evaluates annotations
from cqrs_es.telemetry.masking import mask_credentials

PROGRAM: Final = "cqrs-es"

cli = typer.Typer(
    name=PROGRAM,
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help, and a tenth of a second sooner
    pretty_exceptions_enable=False,  # they print variables, and so secrets
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Settings are environment variables: `cqrs-es settings` explains them all.",
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 - what typer calls it with
    if wanted:
        print_text(f"{PROGRAM} {program.version()}")
        raise typer.Exit


@cli.callback()
def options(
    context: typer.Context,
    app: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:ATTRIBUTE",
            help="The application; else CQRS_ES_APP, else app under [tool.cqrs-es] in "
            "pyproject.toml.",
        ),
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="Overrides CQRS_ES_LOG_LEVEL.")] = None,
    log_format: Annotated[
        LogFormat | None, typer.Option(help="Overrides CQRS_ES_LOG_FORMAT.")
    ] = None,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Run, watch and repair an event-sourced service.

    Data goes to stdout, everything else to stderr. Exit codes: 0 done; 1 failed or not found;
    2 wrong usage or settings; 3 a server can't be reached; 4 interrupted before the end.
    """
    invocation = invocation_of(context)
    invocation.app, invocation.log_level, invocation.log_format = app, log_level, log_format


for _verb in (
    running.run,
    running.worker,
    running.relay,
    running.projector,
    running.reactor,
    serving.serve,
    preparing.init,
    preparing.check,
    preparing.settings,
    sending.send,
    inspecting.status,
    inspecting.view,
    inspecting.stream,
    inspecting.tail,
    inspecting.outcome,
    views.rebuild,
    repairing.republish,
):
    cli.command()(_verb)
cli.add_typer(repairing.dead, name="dead")
cli.add_typer(repairing.parked, name="parked")
cli.add_typer(repairing.keys, name="keys")
cli.add_typer(views.views, name="views")
cli.add_typer(scheduled.scheduled, name="scheduled")
cli.add_typer(schemas.schema, name="schema")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Do what the command line says and exit with the code that says how it went."""
    sys.exit(_run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> int:
    invocation = Invocation()
    try:
        typer.main.get_command(cli).main(argv, prog_name=PROGRAM, obj=invocation)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else program.DONE
    except Exception as exc:  # noqa: BLE001 - the last place to turn an error into a sentence
        if invocation.debugging:
            sys.stderr.write(mask_credentials("".join(traceback.format_exception(exc))))
        error = errors.innermost(exc)
        complain(program.sentence(error))
        return program.exit_code(error)
    return program.DONE
