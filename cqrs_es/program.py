"""What a process says of itself: its version, its exit code, its last words.

Which error ends in which code: docs/contract.md, Command line.
"""

from __future__ import annotations

from typing import Final

from cqrs_es import errors

DONE: Final = 0
FAILED: Final = 1
WRONG_USAGE: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 4


def version() -> str:
    """Return the version, as `pip` knows it; `unknown` in a tree that is not installed."""
    from importlib import metadata  # noqa: PLC0415 - a sixth of what --help takes

    try:
        return metadata.version("cqrs-es")
    except metadata.PackageNotFoundError:
        return "unknown"


def exit_code(exc: Exception) -> int:
    """Return the code that a process ends with when a verb raises this."""
    match exc:
        case errors.StoreMissing():  # what was named is not found
            return FAILED
        case errors.ConfigurationError() | errors.InvalidMessage():
            return WRONG_USAGE
        case errors.Unavailable():
            return UNREACHABLE
        case _:
            return FAILED


def sentence(exc: Exception) -> str:
    """Say in one line what went wrong."""
    match exc:
        case errors.CqrsError() | errors.DomainError():
            text = exc.message
        case OSError():
            text = f"the system refused: {exc}"
        case _:
            text = (
                f"unexpected {type(exc).__name__}: {exc}; "
                "--log-level debug before the verb shows where"
            )
    return " ".join(text.split())
