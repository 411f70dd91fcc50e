"""What the work tells of itself while it goes on: the hooks, and a meter that keeps nothing.

Execution, projection and runtime call these on their hot paths, so each does
next to nothing, raises nothing, and waits for nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, TypeAlias

Phase: TypeAlias = Literal["lookup", "load", "decide", "append", "reply", "settle"]
RetryReason: TypeAlias = Literal["handler", "store"]

_NOT_TIMED: Final = nullcontext()


class Meter:
    """Keeps nothing: what the work is given where no metrics are wanted."""

    def command(self, aggregate_type: str, command: str, outcome: str) -> None:
        """Note that a command was answered; the names are its sender's, checked for form only."""

    def dead_message(self) -> None:
        """Note that a message was buried."""

    def batch(self, commands: int) -> None:
        """Note that so many commands were committed together."""

    def phase(self, phase: Phase) -> AbstractContextManager[object]:
        """Time a block."""
        del phase
        return _NOT_TIMED

    def took(self, phase: Phase, seconds: float) -> None:
        """Note what a phase took, where it was timed by others."""

    def conflict(self) -> None:
        """Note that an aggregate's commands are decided again."""

    def retry(self, reason: RetryReason) -> None:
        """Note that something failed and will be tried again."""

    def delivered(self, queued_at: float | None, sent_at: str | None) -> None:
        """Note that a command arrived; when the broker got it, and when its sender says it left.

        `queued_at` is in seconds since 1970, `sent_at` whatever text the message has.
        """

    def published(self, events: int) -> None:
        """Note that the topic has confirmed so many more events."""

    def projected(self, view: str, events: int) -> None:
        """Note that a view's checkpoint has moved past so many more events."""

    def lease_lost(self, role: str) -> None:
        """Note that a partition was taken from this process, or given up unasked."""


NO_METER: Final = Meter()
