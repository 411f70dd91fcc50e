"""Finding the application: from the flag, the environment or pyproject.toml."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cqrs_es import errors

if TYPE_CHECKING:
    from types import ModuleType

    from cqrs_es.application import Application

_PATH: Final = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_HOW: Final = "--app MODULE:ATTRIBUTE, CQRS_ES_APP, or app under [tool.cqrs-es] in pyproject.toml"


def application_path(given: str | None) -> str:
    """Return where the application is: as given, or as pyproject.toml says."""
    path = given or _path_in_project(Path("pyproject.toml"))
    if path is None:
        raise errors.ConfigurationError(f"no application is given: use {_HOW}")
    if not _PATH.fullmatch(path):
        message = f"{path!r} names no application: write MODULE:ATTRIBUTE, such as worker.app:app"
        raise errors.ConfigurationError(message)
    return path


def load_application(path: str) -> Application:
    """Import the application that a path such as `worker.app:app` names.

    The current directory comes first on the import path. Raises
    `ConfigurationError` with the reason where that fails.
    """
    module, _, attribute = path.partition(":")
    return _attribute(_import(module), attribute, path)


def _path_in_project(file: Path) -> str | None:
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise errors.ConfigurationError(f"{file} can't be read: {exc}") from exc
    match project:
        case {"tool": {"cqrs-es": {"app": str(path)}}}:
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


def _attribute(module: ModuleType, attribute: str, path: str) -> Application:
    from cqrs_es.application import Application

    found: object = module
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if isinstance(found, Application):
        return found
    what = "has no such attribute" if found is None else f"finds a {type(found).__name__}"
    message = f"{path!r} {what}: name a cqrs_es.application.Application"
    raise errors.ConfigurationError(message)
