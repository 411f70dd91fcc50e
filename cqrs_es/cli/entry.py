"""Where the command line begins: it handles signals before the rest is imported."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

from cqrs_es import program

if TYPE_CHECKING:
    from types import FrameType

LONG_RUNNING: Final = frozenset({"run", "worker", "relay", "projector", "reactor"})
_OPTIONS_WITH_VALUE: Final = frozenset({"--app", "--log-level", "--log-format"})


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Do what the command line says and exit with the code that says how it went."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if verb_of(arguments) in LONG_RUNNING:
        _leave_when_told(program.INTERRUPTED if "--until-idle" in arguments else program.DONE)
    from cqrs_es.cli.main import main as go_on

    go_on(arguments)


def verb_of(arguments: Sequence[str]) -> str | None:
    """Return the first argument that is neither an option nor the value of one."""
    rest = iter(arguments)
    for argument in rest:
        if argument in _OPTIONS_WITH_VALUE:
            next(rest, None)
        elif not argument.startswith("-"):
            return argument
    return None


def _leave_when_told(code: int) -> None:
    """Exit at a signal that comes before any work has begun; later the verb handles them.

    Importing takes a good part of a second; Python's own answer to SIGTERM
    is an exit code that looks like a crash.
    """

    def leave(_number: int, _frame: FrameType | None) -> None:
        os._exit(code)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
