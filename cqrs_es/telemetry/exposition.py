"""Metrics in the form that Prometheus reads; needs the extra `metrics`.

What the application itself counts with prometheus-client, in its default
registry, is shown beside them, as is what that tells of the process.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.registry import Collector

from cqrs_es.telemetry.metrics import PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.metrics_core import Metric as Family

    from cqrs_es.telemetry.metrics import Histogram, Metric, Metrics, Reading


class Exposition(Collector):
    """The metrics of this process as text."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        self._registry.register(REGISTRY)

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return the text and its content type, in the form that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Family]:
        """Yield each metric with its series; what prometheus-client calls."""
        for metric, series in self._metrics.counters.items():
            family = CounterMetricFamily(*_named(metric), labels=metric.labels)
            for labels, count in series.items():
                family.add_metric(labels, count)
            yield family
        for metric, histograms in self._metrics.histograms.items():
            yield _histograms(metric, histograms)
        for metric, readings in self._metrics.readings().items():
            yield _gauges(metric, readings)


def _named(metric: Metric) -> tuple[str, str]:
    return PREFIX + metric.name, metric.meaning


def _histograms(metric: Metric, series: dict[tuple[str, ...], Histogram]) -> Family:
    family = HistogramMetricFamily(*_named(metric), labels=metric.labels)
    bounds = [*map(str, metric.buckets), "+Inf"]
    for labels, histogram in series.items():
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family.add_metric(labels, buckets, histogram.sum)
    return family


def _gauges(metric: Metric, readings: list[Reading]) -> Family:
    family = GaugeMetricFamily(*_named(metric), labels=metric.labels)
    for reading in readings:
        family.add_metric(reading.labels, reading.value)
    return family
