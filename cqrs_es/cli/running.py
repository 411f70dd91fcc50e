"""Verbs that run until they are told to stop: `run`, and one for each kind of role."""

from __future__ import annotations

import dataclasses
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Final

import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import invocation_of, refuse_memory
from cqrs_es.cli.output import JsonFlag, complain, print_fields, print_json
from cqrs_es.program import INTERRUPTED
from cqrs_es.projector import projector_role
from cqrs_es.runtime.roles import RELAY, WORKER
from cqrs_es.settings import address
from cqrs_es.telemetry.masking import mask_credentials, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator

    from cqrs_es.application import Application
    from cqrs_es.registry import Registry
    from cqrs_es.runtime.supervisor import Supervisor
    from cqrs_es.service import Report, Show
    from cqrs_es.settings import Settings

STDIN: Final = "-"
STDIN_DESCRIPTOR: Final = 0
LIVE_SECONDS: Final = 0.25

CommandsFile = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Feed command messages, one JSON object per line; - reads stdin.",
    ),
]
UntilIdle = Annotated[
    bool,
    typer.Option(
        "--until-idle", help="Exit when all is handled, published and projected; 4 if cut short."
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Exit 1 if a command failed or became a dead letter, or an aggregate is parked.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Run only this projector; may be given several times."),
]
OnlyReactor = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Run only this reactor; may be given several times."),
]
HealthPort = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Serve /live, /ready and /metrics, to everybody unless a host is given: "
        "127.0.0.1:8000 for this machine alone. Overrides CQRS_ES_HEALTH_PORT.",
    ),
]


def run(
    context: typer.Context,
    commands: CommandsFile = None,
    until_idle: UntilIdle = False,
    strict: Strict = False,
    health_port: HealthPort = None,
    json: JsonFlag = False,
) -> None:
    """Run every role in one process: worker, relay, and what follows.

    Initialises a SQLite or memory store by itself.

    Example: cqrs-es run --commands commands.jsonl --until-idle
    """
    settings, app = _load(context, health_port)
    from cqrs_es import service

    with opened_commands(commands) as source:
        task = service.Task(commands=source, until_idle=until_idle, strict=strict)
        report = service.run(app, settings, task, show=_display())
    if json:
        print_json(_summary(report))
    else:
        print_fields(_readable_summary(report))
    if report.failures and strict:
        complain(f"{report.failures}; see `cqrs-es dead list` and `cqrs-es parked list`")
    if report.code == INTERRUPTED:
        complain("interrupted before all was done; run it again: nothing is done twice")
    raise typer.Exit(report.code)


def worker(context: typer.Context, health_port: HealthPort = None) -> None:
    """Run the command worker, which decides; any number of copies.

    The copies share the partitions.

    Waits for a store or broker that is away. Stops cleanly on SIGTERM or ctrl-C.

    Example: cqrs-es worker
    """
    _serve_roles(context, health_port, lambda _: {WORKER})


def relay(context: typer.Context, health_port: HealthPort = None) -> None:
    """Run the relay, which publishes the log; any number of copies.

    Example: cqrs-es relay
    """
    _serve_roles(context, health_port, lambda _: {RELAY})


def projector(context: typer.Context, only: Only = None, health_port: HealthPort = None) -> None:
    """Run the projectors, which keep the views; any number of copies.

    Example: cqrs-es projector --only account_query
    """
    _serve_roles(context, health_port, lambda registry: _projector_roles(registry, only))


def reactor(
    context: typer.Context, only: OnlyReactor = None, health_port: HealthPort = None
) -> None:
    """Run the reactors and process managers; any number of copies.

    Example: cqrs-es reactor --only transfer
    """
    _serve_roles(context, health_port, lambda registry: _reactor_roles(registry, only))


def _reactor_roles(registry: Registry, only: Collection[str] | None) -> set[str]:
    known = registry.reactors
    if not known:
        message = "the application has no reactor and no process manager"
        raise errors.ConfigurationError(message)
    for name in only or ():
        if name not in known:
            message = f"there is no reactor {name!r}; there are {', '.join(known)}"
            raise errors.ConfigurationError(message)
    from cqrs_es.reactor import reactor_role

    return {reactor_role(name) for name in only or known}


def _projector_roles(registry: Registry, only: Collection[str] | None) -> set[str]:
    known = registry.projections
    for name in only or ():
        if name not in known:
            message = f"there is no projector {name!r}; there are {', '.join(known) or 'none'}"
            raise errors.ConfigurationError(message)
    return {projector_role(name) for name in only or known}


def _load(context: typer.Context, health_port: str | None) -> tuple[Settings, Application]:
    settings, app = invocation_of(context).load()
    app = app.on_store_of(settings)
    return with_health_port(settings, health_port), app


def with_health_port(settings: Settings, health_port: str | None) -> Settings:
    """Return the settings with the port that the command line gives; raise `SettingsError`."""
    if health_port is None:
        return settings
    try:
        return dataclasses.replace(settings, health_port=address(health_port))
    except ValueError as exc:
        raise errors.SettingsError(f"--health-port {exc}") from exc


def _serve_roles(
    context: typer.Context, health_port: str | None, roles_of: Callable[[Registry], set[str]]
) -> None:
    settings, app = _load(context, health_port)
    refuse_memory(settings)
    from cqrs_es import service

    task = service.Task(roles=roles_of(app.registry))
    report = service.run(app, settings, task, show=_display())
    raise typer.Exit(report.code)


def _display() -> Show | None:
    return _show_live if sys.stderr.isatty() else None


async def _show_live(supervisor: Supervisor) -> None:
    """Show how far the process is in a line below the log of a terminal, gone at the end."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from cqrs_es import service

    # Log lines pass through this console: it must not break them.
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        async for look in service.looks(supervisor, LIVE_SECONDS):
            commands, events = look.commands, look.counts.events
            lag = "?" if look.lag is None else f"{look.lag:,}"
            rate = f"{look.per_second:,.0f}/s"
            text = Text(f"{commands:,} commands ({rate})  {events:,} events  lag {lag}")
            for trouble in look.troubles:
                line = printable(mask_credentials(trouble))[: console.width - 1]
                text.append(f"\n{line}", style="yellow")
            live.update(text, refresh=True)


@contextmanager
def opened_commands(path: str | None) -> Generator[int | None]:
    """Open a file to feed from, stdin for `-`; raise `ConfigurationError`."""
    if path is None:
        yield None
        return
    descriptor = _open(path)
    try:
        yield descriptor
    finally:
        if descriptor != STDIN_DESCRIPTOR:
            os.close(descriptor)


def _open(path: str) -> int:
    try:
        descriptor = STDIN_DESCRIPTOR if path == STDIN else os.open(path, os.O_RDONLY)
        os.read(descriptor, 0)  # a folder opens, but can't be read
    except OSError as exc:
        message = f"--commands {path}: {exc.strerror}"
        raise errors.ConfigurationError(message) from exc
    return descriptor


def _summary(report: Report) -> dict[str, object]:
    """Return what `--json` prints."""
    counts, dead = report.progress.counts, report.progress.dead
    return {
        "commands": {
            "accepted": counts.accepted,
            "rejected": counts.rejected,
            "failed": counts.failed,
            "duplicate": counts.duplicate,
            "dead": dead,
        },
        "events": counts.events,
        "seconds": report.seconds,
    }


def _readable_summary(report: Report) -> dict[str, object]:
    counts = report.progress.counts
    by_outcome = {
        "accepted": counts.accepted,
        "rejected": counts.rejected,
        "failed": counts.failed,
        "duplicate": counts.duplicate,
        "dead letters": report.progress.dead,
    }
    commands = sum(by_outcome.values())
    of_which = ", ".join(f"{number:,} {name}" for name, number in by_outcome.items() if number)
    rate = f"{commands / report.seconds:,.0f}/s" if report.seconds else "none"
    return {
        "commands": f"{commands:,}" + (f": {of_which}" if of_which else ""),
        "events": f"{counts.events:,}",
        **({"parked": report.parked} if report.parked else {}),
        **{f"view {name}": f"{rows:,} rows" for name, rows in report.rows.items()},
        "rate": rate,
        "seconds": f"{report.seconds:.2f}",
    }
