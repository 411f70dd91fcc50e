"""The way of a message as spans: what the work calls, and tracing that keeps nothing.

`tracing_for` gives the real thing, `telemetry.spans`, where the process has set
up an OpenTelemetry provider; otherwise nothing of OpenTelemetry is imported, and
each call here costs a fraction of a microsecond.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio

    from cqrs_es.messages import CommandMessage, Outcome, StoredEvent

_NOT_TRACED: Final = nullcontext()


class CommandSpan:
    """One command's way through a process; this one is not recorded."""

    def handling(self) -> AbstractContextManager[object]:
        """Run a block as part of the span: spans that it starts are its children."""
        return _NOT_TRACED

    def failed(self, exc: BaseException) -> None:
        """Note that the handler failed; the command may be tried again."""

    def conflicted(self) -> None:
        """Note that the command is decided again."""

    def end(self, answer: asyncio.Future[Outcome]) -> None:
        """End with what became of the command."""


NO_SPAN: Final = CommandSpan()


class Tracing:
    """Traces nothing: what the work is given where nobody has set tracing up."""

    def sending(
        self, messages: Sequence[CommandMessage]
    ) -> AbstractContextManager[Sequence[CommandMessage]]:
        """Give a span to each message that has none yet; lend messages that carry its context.

        The spans last as long as the block. A message that was changed has no body.
        """
        return nullcontext(messages)

    def executing(self, message: CommandMessage) -> tuple[CommandMessage, CommandSpan]:
        """Begin a command's way within this process; as with `sending` it carries the context."""
        return message, NO_SPAN

    def processing(self, message: CommandMessage, partition: int) -> CommandSpan:
        """Begin the way of a command that came from the queue."""
        del message, partition
        return NO_SPAN

    def appending(self, spans: Iterable[CommandSpan]) -> AbstractContextManager[object]:
        """Trace the one transaction that these commands are committed in."""
        del spans
        return _NOT_TRACED

    def publishing(
        self, partition: int, events: Sequence[StoredEvent]
    ) -> AbstractContextManager[object]:
        """Trace the publication of a chunk of the log."""
        del partition, events
        return _NOT_TRACED

    def projecting(
        self, view: str, events: Sequence[StoredEvent]
    ) -> AbstractContextManager[object]:
        """Trace the transaction in which a view takes these events in."""
        del view, events
        return _NOT_TRACED


NO_TRACING: Final = Tracing()


def tracing_for(
    service: str,
    system: str,
    commands: Collection[str] | None = None,
    *,
    separator: str = ":",
) -> Tracing:
    """Return what traces a service's messages over a broker, by OpenTelemetry's name of it.

    `separator` is what the broker's names have behind the service's.
    `commands` are the names that spans may have, all unless given: those that
    anybody may send would be without end. A provider that is set later is not
    noticed.
    """
    if not _is_set_up():
        return NO_TRACING
    from cqrs_es.telemetry.spans import Spans  # noqa: PLC0415 - only where it is installed

    return Spans(service, system, separator, commands)


def _is_set_up() -> bool:
    """Tell whether a provider is set, without importing what nobody else has imported."""
    api = sys.modules.get("opentelemetry.trace")
    return api is not None and not isinstance(api.get_tracer_provider(), api.ProxyTracerProvider)
