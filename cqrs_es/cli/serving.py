"""The verb `serve`: the HTTP gateway as a process of its own."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Annotated

import typer

from cqrs_es import errors
from cqrs_es.cli.invocation import (
    Invocation,
    check_path,
    gateway_path,
    invocation_of,
    load_attribute,
    refuse_memory,
)
from cqrs_es.cli.running import HealthPort, with_health_port

if TYPE_CHECKING:
    from cqrs_es.http import Gateway
    from cqrs_es.settings import Settings


class Via(enum.StrEnum):
    """Who decides commands."""

    STORE = "store"
    QUEUE = "queue"


def serve(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="The port; 0 for any.")] = 8000,
    gateway: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:ATTRIBUTE",
            help="A Gateway of your own; else gateway under [tool.cqrs-es] in pyproject.toml.",
        ),
    ] = None,
    via: Annotated[
        Via | None,
        typer.Option(help="Without a Gateway of your own: who decides, this process or workers."),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Serve everybody, without a Gateway of your own.")
    ] = False,
    health_port: HealthPort = None,
) -> None:
    """Serve the application over HTTP; any number of copies.

    Example: cqrs-es serve --port 8000
    """
    settings, made = _gateway(invocation_of(context), gateway, via, public=public)
    settings = with_health_port(settings, health_port)
    refuse_memory(settings, broker=made.via == "queue")
    from cqrs_es.http import serving

    raise typer.Exit(serving.run(made, settings, host, port))


def _gateway(
    invocation: Invocation, given: str | None, via: Via | None, *, public: bool
) -> tuple[Settings, Gateway]:
    """Find the gateway that is named, or make one of the application."""
    from cqrs_es.http import Gateway

    if given is not None:
        if via is not None or public:
            message = f"{given} says by itself whom it serves: leave --via and --public out"
            raise errors.ConfigurationError(message)
        settings = invocation.settings()
        return dataclasses.replace(settings, app=settings.app or given), _load(given)
    settings, app = invocation.load()
    path = gateway_path()
    if path is not None and via is None and not public:
        found = _load(path)
        if found.app is app:  # not of another application than the one that is asked for
            return settings, found
    return settings, Gateway(app, via=(via or Via.STORE).value, public=public)


def _load(path: str) -> Gateway:
    from cqrs_es.http import Gateway

    found = load_attribute(check_path(path, "gateway", "worker.http:gateway"))
    if not isinstance(found, Gateway):
        message = f"{path!r} names no cqrs_es.http.Gateway"
        raise errors.ConfigurationError(message)
    return found
