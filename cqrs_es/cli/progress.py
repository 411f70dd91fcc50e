"""Showing how far a process has got: live on a terminal, one log line a second otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog
from rich.console import Console
from rich.live import Live
from rich.text import Text

from cqrs_es import errors
from cqrs_es.telemetry.masking import mask_credentials, printable

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from cqrs_es.runtime.supervisor import Supervisor

log = structlog.get_logger("cqrs_es.cli")

LOG_SECONDS: Final = 1.0
LIVE_SECONDS: Final = 0.25
# Seconds between looks at the store for the lag, while there is none and this process does nothing.
IDLE_SECONDS: Final = 30.0
# Looks that a rate is taken over.
RATE_LOOKS: Final = 9


@dataclass(frozen=True, slots=True)
class Look:
    """How far a process had got at one moment."""

    at: float
    commands: int
    events: int
    lag: int | None
    troubles: tuple[str, ...] = ()


class Display(ABC):
    """Looks at a supervisor again and again, and shows what it sees."""

    seconds: float

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._looks: deque[Look] = deque(maxlen=RATE_LOOKS)
        self._asked: tuple[int, float] = (-1, 0.0)
        self._lag: int | None = None

    async def run(self) -> None:
        """Show for ever; meant to be cancelled."""
        with self._showing():
            while True:
                await asyncio.sleep(self.seconds)
                self._looks.append(await self._look())
                self._show(self._looks[-1], self._rate())

    async def _look(self) -> Look:
        counts = self._supervisor.counts
        handled = counts.accepted + counts.rejected + counts.failed + counts.duplicate
        troubles = tuple(self._supervisor.troubles)
        try:
            lag = await self._find_lag(handled)
        except errors.CqrsError as exc:
            lag, troubles = None, (*troubles, exc.message)
        dead = self._supervisor.dead
        return Look(time.monotonic(), handled + dead, counts.events, lag, troubles)

    async def _find_lag(self, handled: int) -> int | None:
        """Return the lag: as it was, where nothing has happened since it was 0."""
        done = handled + self._supervisor.published + self._supervisor.projected
        (of, at), now = self._asked, time.monotonic()
        if self._lag != 0 or done != of or now - at > IDLE_SECONDS:
            self._lag = None
            self._lag = (await self._supervisor.progress()).lag
            self._asked = (done, now)
        return self._lag

    def _rate(self) -> float:
        """Return commands per second over the last looks."""
        first, last = self._looks[0], self._looks[-1]
        return (last.commands - first.commands) / ((last.at - first.at) or 1)

    @abstractmethod
    def _showing(self) -> AbstractContextManager[object]:
        """Begin and end showing."""

    @abstractmethod
    def _show(self, look: Look, rate: float) -> None:
        """Show a look."""


class LiveDisplay(Display):
    """One line at the bottom of the terminal, gone at the end."""

    seconds = LIVE_SECONDS

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor)
        # Log lines pass through this console: it must not break them.
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def _showing(self) -> Live:
        return self._live

    def _show(self, look: Look, rate: float) -> None:
        lag = "?" if look.lag is None else f"{look.lag:,}"
        text = Text(
            f"{look.commands:,} commands ({rate:,.0f}/s)  {look.events:,} events  lag {lag}"
        )
        for trouble in look.troubles:
            line = printable(mask_credentials(trouble))[: self._console.width - 1]
            text.append(f"\n{line}", style="yellow")
        self._live.update(text, refresh=True)


class LogDisplay(Display):
    """One log line a second while anything changes."""

    seconds = LOG_SECONDS

    def __init__(self, supervisor: Supervisor) -> None:
        super().__init__(supervisor)
        self._shown: tuple[object, ...] = (0, 0, 0, ())

    def _showing(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def _show(self, look: Look, rate: float) -> None:
        state = (look.commands, look.events, look.lag, look.troubles)
        if state == self._shown:
            return
        self._shown = state
        log.info(
            "progress",
            commands=look.commands,
            events=look.events,
            lag=look.lag,
            per_second=round(rate, 1),
            troubles=look.troubles,
        )


def display_for(supervisor: Supervisor) -> Display:
    """Make the display that stderr can show."""
    return (LiveDisplay if sys.stderr.isatty() else LogDisplay)(supervisor)
