"""Calling the command line on a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

from tests.bank_data import PROJECT
from tests.command_line import TIMEOUT_SECONDS, environment

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(*arguments: str, columns: int = 160, **settings: str) -> str:
    """Call the command line with stdout and stderr on a terminal; return what is written to it."""
    ours, theirs = pty.openpty()
    variables = environment(settings) | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        variables.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, "-m", "cqrs_es.cli", *arguments],
        cwd=PROJECT,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b"".join(iter(lambda: _read(ours), b""))
    os.close(ours)
    assert process.wait(TIMEOUT_SECONDS) == 0, written.decode()
    return written.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end is closed
        return b""


def without_escapes(text: str) -> str:
    """Return the text as a file would have it."""
    return _ESCAPE.sub("", text)
