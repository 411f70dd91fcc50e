"""Spans of OpenTelemetry, by its conventions for messaging; its API only.

A message's own span is a child of its sender's: the trace shows its way. Work
on many messages at once is one span, a child of the first message's that is
recorded, and linked with the others both ways. Timings are those of the work.
"""

from __future__ import annotations

import traceback
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

import orjson
from msgspec.structs import replace
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cqrs_es import errors, wire
from cqrs_es.telemetry.masking import mask_credentials
from cqrs_es.telemetry.tracing import CommandSpan, Tracing

if TYPE_CHECKING:
    import asyncio

    from opentelemetry.util.types import AttributeValue

    from cqrs_es.messages import CommandMessage, Outcome, StoredEvent

INSTRUMENTATION: Final = "cqrs_es"
UNKNOWN: Final = "unknown"
TRACEPARENT: Final = "traceparent"
_IN_JSON: Final = b'"traceparent"'
_W3C: Final = TraceContextTextMapPropagator()

_Attributes = dict[str, "AttributeValue"]


class RecordedCommand(CommandSpan):
    """One command's way, from its arrival to its outcome."""

    def __init__(self, span: Span) -> None:
        self.span = span

    def handling(self) -> AbstractContextManager[object]:
        """Make the span current; it goes on after the block."""
        return _current(self.span)

    def failed(self, exc: BaseException) -> None:
        """Record the exception."""
        _record(self.span, exc)

    def conflicted(self) -> None:
        """Record that the command is decided again."""
        self.span.add_event("conflict")

    def end(self, answer: asyncio.Future[Outcome]) -> None:
        """End with the outcome's attributes; only what was not decided, or failed, is an error."""
        if answer.cancelled():
            self.span.set_status(Status(StatusCode.ERROR, "cancelled"))
        elif exc := answer.exception():
            _fail(self.span, exc)
        elif self.span.is_recording():
            _set_outcome(self.span, answer.result())
        self.span.end()


class Spans(Tracing):
    """Traces a service's messages over one broker."""

    def __init__(
        self, service: str, system: str, separator: str, commands: Collection[str] | None
    ) -> None:
        self._tracer = trace.get_tracer(INSTRUMENTATION)
        self._service = service
        self._system = system
        self._separator = separator
        self._known = commands

    # --- Commands ------------------------------------------------------------

    @contextmanager
    def sending(self, messages: Sequence[CommandMessage]) -> Generator[Sequence[CommandMessage]]:
        """Span `send <command>` of each message whose sender gave no context of their own."""
        with ExitStack() as stack:
            yield [self._sent(message, stack) for message in messages]

    def _sent(self, message: CommandMessage, stack: ExitStack) -> CommandMessage:
        if TRACEPARENT in message.metadata:
            return message
        attributes = self._messaging("send", "send", "commands") | _about(message)
        span = self._start(f"send {message.type}", SpanKind.PRODUCER, None, attributes)
        stack.enter_context(_ended(span))
        return _carrying(message, trace.set_span_in_context(span))

    def executing(self, message: CommandMessage) -> tuple[CommandMessage, CommandSpan]:
        """Span `execute <command>`, a child of the caller's unless the metadata says otherwise."""
        context = _context_of(message.metadata)
        name = f"execute {self._name(message)}"
        span = self._start(name, SpanKind.INTERNAL, context, _about(message))
        if TRACEPARENT not in message.metadata and not message.body:
            message = _carrying(message, trace.set_span_in_context(span))
        return message, RecordedCommand(span)

    def processing(self, message: CommandMessage, partition: int) -> CommandSpan:
        """Span `process <command>`, a child of the sender's."""
        context = _context_of(message.metadata) or Context()
        attributes = self._messaging("process", "process", "commands", partition) | _about(message)
        attributes["messaging.message.body.size"] = len(message.body)
        name = f"process {self._name(message)}"
        return RecordedCommand(self._start(name, SpanKind.CONSUMER, context, attributes))

    def _name(self, message: CommandMessage) -> str:
        return message.type if self._known is None or message.type in self._known else UNKNOWN

    @contextmanager
    def appending(self, spans: Iterable[CommandSpan]) -> Generator[None]:
        """Span `append events` below the first command that is recorded."""
        recorded = [
            known.span
            for known in spans
            if isinstance(known, RecordedCommand) and known.span.is_recording()
        ]
        attributes: _Attributes = {"cqrs_es.commands.traced": len(recorded)}
        with self._batch("append events", SpanKind.INTERNAL, recorded, attributes):
            yield

    # --- Events --------------------------------------------------------------

    @contextmanager
    def publishing(self, partition: int, events: Sequence[StoredEvent]) -> Generator[None]:
        """Span `publish events` below the first sender's whose trace is recorded."""
        found = (_sampled_context_of(event) for event in events)
        senders = [trace.get_current_span(context) for context in found if context is not None]
        attributes = self._messaging("publish", "send", "events", partition) | _batch_of(events)
        with self._batch("publish events", SpanKind.PRODUCER, senders, attributes):
            yield

    @contextmanager
    def projecting(self, view: str, events: Sequence[StoredEvent]) -> Generator[None]:
        """Span `project <event>` of each event, below its sender's; `project <view>` of all."""
        spans = [
            self._projected(view, event, context)
            for event in events
            if (context := _sampled_context_of(event)) is not None
        ]
        attributes = {"cqrs_es.view": view} | _batch_of(events)
        try:
            with self._batch(f"project {view}", SpanKind.INTERNAL, spans, attributes):
                yield
        except Exception as exc:
            for span in spans:
                span.set_attribute("cqrs_es.applied", value=False)
                if len(events) == 1:
                    _fail(span, exc)
            raise
        finally:
            for span in spans:
                span.end()

    def _projected(self, view: str, event: StoredEvent, context: Context) -> Span:
        attributes = self._messaging("project", "process", "events", event.partition) | {
            "messaging.message.id": f"{event.partition}-{event.offset}",
            "cqrs_es.view": view,
            "cqrs_es.event.type": event.event_type,
            "cqrs_es.aggregate.type": event.key.type,
            "cqrs_es.aggregate.id": event.key.id,
            "cqrs_es.aggregate.sequence": event.sequence,
        }
        return self._start(f"project {event.event_type}", SpanKind.CONSUMER, context, attributes)

    # --- Parts ---------------------------------------------------------------

    @contextmanager
    def _batch(
        self, name: str, kind: SpanKind, members: Sequence[Span], attributes: _Attributes
    ) -> Generator[None]:
        if not members:
            yield
            return
        first, *others = members
        span = self._tracer.start_span(
            name,
            context=trace.set_span_in_context(first),
            kind=kind,
            links=[Link(member.get_span_context()) for member in others],
            attributes=attributes,
        )
        for member in others:
            member.add_link(span.get_span_context())
        with _ended(span), _current(span):
            yield

    def _start(
        self,
        name: str,
        kind: SpanKind,
        context: Context | None,
        attributes: Mapping[str, AttributeValue],
    ) -> Span:
        return self._tracer.start_span(name, context=context, kind=kind, attributes=attributes)

    def _messaging(
        self, operation: str, kind: str, what: str, partition: int | None = None
    ) -> _Attributes:
        attributes: _Attributes = {
            "messaging.system": self._system,
            "messaging.operation.name": operation,
            "messaging.operation.type": kind,
            "messaging.destination.name": f"{self._service}{self._separator}{what}",
        }
        if partition is not None:
            attributes["messaging.destination.partition.id"] = str(partition)
        return attributes


def _about(message: CommandMessage) -> _Attributes:
    attributes: _Attributes = {
        "messaging.message.id": message.id,
        "cqrs_es.command.type": message.type,
        "cqrs_es.aggregate.type": message.aggregate_type,
        "cqrs_es.aggregate.id": message.aggregate_id,
    }
    if (correlation_id := message.metadata.get("correlation_id")) is not None:
        attributes["messaging.message.conversation_id"] = correlation_id
    return attributes


def _batch_of(events: Sequence[StoredEvent]) -> _Attributes:
    return {
        "messaging.batch.message_count": len(events),
        "cqrs_es.partition": events[0].partition,
        "cqrs_es.offset.first": events[0].offset,
        "cqrs_es.offset.last": events[-1].offset,
    }


def _set_outcome(span: Span, outcome: Outcome) -> None:
    span.set_attribute("cqrs_es.outcome", outcome.status.value)
    span.set_attribute("cqrs_es.duplicate", outcome.duplicate)
    span.set_attribute("cqrs_es.events", len(outcome.events))
    if outcome.error is not None:
        span.set_attribute("cqrs_es.outcome.code", outcome.error.code)
    if outcome.error is not None and outcome.status == "failed":
        span.set_attribute("error.type", outcome.error.code)
        span.set_status(Status(StatusCode.ERROR, outcome.error.message))


def _current(span: Span) -> AbstractContextManager[object]:
    return trace.use_span(
        span, end_on_exit=False, record_exception=False, set_status_on_exception=False
    )


@contextmanager
def _ended(span: Span) -> Generator[None]:
    """End a span with the block, and with what the block raises."""
    try:
        yield
    except Exception as exc:
        _fail(span, exc)
        raise
    finally:
        span.end()


def _fail(span: Span, exc: BaseException) -> None:
    _record(span, exc)
    span.set_attribute("error.type", type(exc).__qualname__)
    span.set_status(Status(StatusCode.ERROR, mask_credentials(str(exc))))


def _record(span: Span, exc: BaseException) -> None:
    """Record an exception as the API does, but without the passwords of URLs."""
    if not span.is_recording():
        return
    lines = traceback.format_exception(exc)
    masked: _Attributes = {
        "exception.message": mask_credentials(str(exc)),
        "exception.stacktrace": mask_credentials("".join(lines)),
    }
    span.record_exception(exc, masked)


# --- The context of a trace, in the metadata of commands and events ----------------
# Always in the form of W3C Trace Context, whatever the process uses elsewhere.
# What a sender made up is read as no context at all.


def _context_of(metadata: Mapping[str, str]) -> Context | None:
    """Return the context that metadata has, None where it has none that is valid."""
    if TRACEPARENT not in metadata:
        return None
    context = _W3C.extract(metadata, Context())
    return context if _span_context(context).is_valid else None


def _sampled_context_of(event: StoredEvent) -> Context | None:
    """Return the context that an event's command was sent in, None unless it is recorded."""
    if _IN_JSON not in event.metadata:
        return None
    context = _context_of(orjson.loads(event.metadata))
    return context if context is not None and _span_context(context).trace_flags.sampled else None


def _span_context(context: Context) -> SpanContext:
    return trace.get_current_span(context).get_span_context()


def _carrying(message: CommandMessage, context: Context) -> CommandMessage:
    """Return a message that carries a context; as it is, where its metadata has no room for one."""
    carrier = dict(message.metadata)
    _W3C.inject(carrier, context)
    try:
        return replace(message, metadata=wire.check_metadata(dict(carrier)), body=b"")
    except errors.InvalidMessage:
        return message
