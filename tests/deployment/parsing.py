"""Parsing a command line with the program's own parser, without doing what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer.main

from cqrs_es.cli.main import PROGRAM, cli
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def parse(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the verb and its parameters; raises a usage error as the program would."""
    command: Any = typer.main.get_command(cli)
    context = command.make_context(PROGRAM, list(arguments))
    path: list[str] = []
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        path.append(str(name))
    return " ".join(path), dict(context.params)


FOLLOWERS = {"projector": set(app.registry.projections), "reactor": set(app.registry.reactors)}
"""The names that `--only` may have, by verb."""


VERBS = {"serve": "gateway"}
"""What runs a verb, where it is not called by it."""


def followers(calls: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, list[str]]:
    """Return which names calls of these verbs have, sorted, by verb."""
    found = {verb: list[str]() for verb in FOLLOWERS}
    for verb, parameters in calls:
        if verb in FOLLOWERS:
            found[verb] += parameters["only"]
    return {verb: sorted(names) for verb, names in found.items()}
