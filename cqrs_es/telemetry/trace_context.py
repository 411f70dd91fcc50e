"""The context of a trace, as it travels in the metadata of commands and events.

Always in the form of W3C Trace Context, whatever the process uses elsewhere.
What a sender made up is read as no context at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import orjson
from opentelemetry.context import Context
from opentelemetry.trace import SpanContext, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cqrs_es import errors, wire

if TYPE_CHECKING:
    from cqrs_es.messages import CommandMessage, StoredEvent

TRACEPARENT: Final = "traceparent"
_IN_JSON: Final = b'"traceparent"'
_W3C: Final = TraceContextTextMapPropagator()


def context_of(metadata: Mapping[str, str]) -> Context | None:
    """Return the context that metadata has, None where it has none that is valid."""
    if TRACEPARENT not in metadata:
        return None
    context = _W3C.extract(metadata, Context())
    return context if get_current_span(context).get_span_context().is_valid else None


def sampled_context_of(event: StoredEvent) -> Context | None:
    """Return the context that an event's command was sent in, None unless it is recorded."""
    if _IN_JSON not in event.metadata:
        return None
    context = context_of(orjson.loads(event.metadata))
    return context if context is not None and span_context(context).trace_flags.sampled else None


def span_context(context: Context) -> SpanContext:
    """Return whose context it is."""
    return get_current_span(context).get_span_context()


def carrying(message: CommandMessage, context: Context) -> CommandMessage:
    """Return a message that carries a context; as it is, where its metadata has no room for one."""
    carrier = dict(message.metadata)
    _W3C.inject(carrier, context)
    try:
        return replace(message, metadata=wire.check_metadata(dict(carrier)), body=b"")
    except errors.InvalidMessage:
        return message
