"""What is said before the verb, and opening the application accordingly."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from cqrs_es import errors
from cqrs_es.cli.loading import application_path, load_application
from cqrs_es.settings import LogFormat, LogLevel, Settings

if TYPE_CHECKING:
    import typer

    from cqrs_es.application import Application
    from cqrs_es.opened import OpenApplication

T = TypeVar("T")


@dataclass(slots=True)
class Invocation:
    """One call of the command line: its global options, filled in before the verb runs."""

    app: str | None = None
    log_level: LogLevel | None = None
    log_format: LogFormat | None = None

    @property
    def debugging(self) -> bool:
        """Whether tracebacks are wanted."""
        level = self.log_level or os.environ.get("CQRS_ES_LOG_LEVEL", "")
        return level.lower() == "debug"

    def settings(self) -> Settings:
        """Read the settings, the options over the environment, and set up the logs."""
        settings = Settings.from_environment()
        settings = dataclasses.replace(
            settings,
            app=self.app or settings.app,
            log_level=self.log_level or settings.log_level,
            log_format=self.log_format or settings.log_format,
        )
        _set_up_logs(settings)
        return settings

    def load(self) -> tuple[Settings, Application]:
        """Read the settings and import the application that they name."""
        settings = self.settings()
        path = application_path(settings.app)
        app = load_application(path)
        _name_service(settings.service or app.service)
        return dataclasses.replace(settings, app=path), app


def invocation_of(context: typer.Context) -> Invocation:
    """Return what was said before the verb."""
    found = context.find_object(Invocation)
    assert found is not None  # noqa: S101 - main() puts it there
    return found


def _set_up_logs(settings: Settings) -> None:
    from cqrs_es.telemetry import logs

    logs.configure(settings.log_level, settings.log_format)


def _name_service(service: str) -> None:
    from cqrs_es.telemetry import logs

    logs.name_process(service=service)


def with_application(
    context: typer.Context,
    work: Callable[[OpenApplication], Awaitable[T]],
    *,
    durable: bool = False,
    initialise: bool = False,
    broker: bool = False,
) -> T:
    """Open the application for a verb's work and close it again.

    With `durable`, a store or broker in memory is refused. Without `broker` the
    verb works on the store alone, also while the broker is away.
    """
    settings, app = invocation_of(context).load()
    if durable:
        refuse_memory(settings)
    return asyncio.run(_work_with(app, settings, work, initialise=initialise, broker=broker))


async def _work_with(
    app: Application,
    settings: Settings,
    work: Callable[[OpenApplication], Awaitable[T]],
    *,
    initialise: bool,
    broker: bool,
) -> T:
    async with app.open(settings, initialise=initialise, reach_broker=broker) as opened:
        return await work(opened)


def refuse_memory(settings: Settings) -> None:
    """Raise `SettingsError` where other processes could not see what this one does."""
    urls = {"STORE": settings.store_url or "sqlite:", "BROKER": settings.broker_url}
    for what, url in urls.items():
        if urlsplit(url).scheme == "memory":
            message = (
                f"a {what.lower()} in memory ends with its process: set CQRS_ES_{what}_URL to a "
                "server's, or use `cqrs-es run`, which has every role in one process"
            )
            raise errors.SettingsError(message)
