"""What is said before the verb: finding the application, and opening it accordingly."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import os
import re
import sys
import tomllib
import traceback
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from urllib.parse import urlsplit

import msgspec

from cqrs_es import errors
from cqrs_es.settings import LogFormat, LogLevel, Settings

if TYPE_CHECKING:
    from types import ModuleType

    import typer

    from cqrs_es.application import Application
    from cqrs_es.opened import OpenApplication


T = TypeVar("T")


class Invocation(msgspec.Struct):
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


def refuse_memory(settings: Settings, *, broker: bool = True) -> None:
    """Raise `SettingsError` where other processes could not see what this one does."""
    urls = {"STORE": settings.store_url or "sqlite:"}
    if broker:
        urls["BROKER"] = settings.broker_url
    for what, url in urls.items():
        if urlsplit(url).scheme == "memory":
            message = (
                f"a {what.lower()} in memory ends with its process: set CQRS_ES_{what}_URL to a "
                "server's, or use `cqrs-es run`, which has every role in one process"
            )
            raise errors.SettingsError(message)


# --- Finding the application -------------------------------------------------


_PATH: Final = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_HOW: Final = "--app MODULE:ATTRIBUTE, CQRS_ES_APP, or app under [tool.cqrs-es] in pyproject.toml"


def application_path(given: str | None) -> str:
    """Return where the application is: as given, or as pyproject.toml says."""
    path = given or _path_in_project("app")
    if path is None:
        raise errors.ConfigurationError(f"no application is given: use {_HOW}")
    return check_path(path, "application", "worker.app:app")


def load_application(path: str) -> Application:
    """Import the application that a path such as `worker.app:app` names.

    The current directory comes first on the import path. Raises
    `ConfigurationError` with the reason where that fails.
    """
    from cqrs_es.application import Application

    found = load_attribute(path)
    if isinstance(found, Application):
        return found
    what = "has no such attribute" if found is None else f"finds a {type(found).__name__}"
    message = f"{path!r} {what}: name a cqrs_es.application.Application"
    raise errors.ConfigurationError(message)


def gateway_path() -> str | None:
    """Return where the HTTP gateway is, as pyproject.toml says; None for nowhere."""
    return _path_in_project("gateway")


def check_path(path: str, what: str, example: str) -> str:
    """Return a path such as `worker.app:app`; raise `ConfigurationError` for other text."""
    if _PATH.fullmatch(path):
        return path
    message = f"{path!r} names no {what}: write MODULE:ATTRIBUTE, such as {example}"
    raise errors.ConfigurationError(message)


def load_attribute(path: str) -> object:
    """Import what a path such as `worker.app:app` names, None where there is no such attribute.

    The current directory comes first on the import path.
    """
    module, _, attribute = path.partition(":")
    found: object = _import(module)
    for name in attribute.split("."):
        found = getattr(found, name, None)
    return found


def _path_in_project(key: str) -> str | None:
    file = Path("pyproject.toml")
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise errors.ConfigurationError(f"{file} can't be read: {exc}") from exc
    match project:
        case {"tool": {"cqrs-es": {"app": str(path)}}} if key == "app":
            return path
        case {"tool": {"cqrs-es": {"gateway": str(path)}}} if key == "gateway":
            return path
        case _:
            return None


def _import(module: str) -> ModuleType:
    here = str(Path.cwd())
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as exc:
        message = f"the application's module {module!r} does not import: {_reason(exc, module)}"
        raise errors.ConfigurationError(message) from exc


def _reason(exc: Exception, module: str) -> str:
    if isinstance(exc, ModuleNotFoundError) and f"{module}.".startswith(f"{exc.name}."):
        return f"there is no module {exc.name!r} here or among the installed ones"
    if isinstance(exc, errors.CqrsError):
        return exc.message
    return f"{type(exc).__name__}: {exc}{_place(exc)}"


def _place(exc: Exception) -> str:
    """Say where an error comes from; one in the syntax says so itself."""
    frames = traceback.extract_tb(exc.__traceback__)
    if isinstance(exc, SyntaxError) or not frames:
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})"
