"""Accounts of `tests.transfers` in a process that is killed once as it stores commands for later.

`DIES` says when, before they are stored or after, and `DIED` names a file that is there once it
has died.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from cqrs_es.stores.sql.events import SqlEvents
from tests.transfers import bank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.ports.store import ScheduledCommand

_store = SqlEvents.schedule


def _die(moment: str) -> None:
    died = Path(os.environ["DIED"])
    if os.environ["DIES"] == moment and not died.exists():
        died.touch()
        os.kill(os.getpid(), signal.SIGKILL)


async def _schedule(self: SqlEvents, commands: Sequence[ScheduledCommand]) -> None:
    _die("before")
    await _store(self, commands)
    _die("after")


SqlEvents.schedule = _schedule  # type: ignore[method-assign]  # this process is a test's
app = bank()
