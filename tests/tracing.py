"""An OpenTelemetry provider for one test, and a look at the spans that it got."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import SpanContext
    from opentelemetry.util.types import AttributeValue


class Recorder:
    """A provider that is not global yet, and the spans that have ended."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        found = self.named(name)
        assert len(found) == 1, f"{name}: {[span.name for span in self.spans]}"
        return found[0]

    def tree(self) -> dict[str, set[str]]:
        """Return the names of the spans by the name of their parent, "" without one here."""
        names = {context_of(span).span_id: span.name for span in self.spans}
        found: dict[str, set[str]] = defaultdict(set)
        for span in self.spans:
            parent = "" if span.parent is None else names.get(span.parent.span_id, "")
            found[parent].add(span.name)
        return dict(found)


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def attributes_of(span: ReadableSpan) -> Mapping[str, AttributeValue]:
    return span.attributes or {}


def links_of(span: ReadableSpan) -> set[int]:
    """Return the ids of the spans that a span is linked with."""
    return {link.context.span_id for link in span.links}


def traceparent_of(span: ReadableSpan) -> str:
    context = context_of(span)
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
