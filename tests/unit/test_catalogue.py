"""The catalogue of metrics: names that Prometheus takes, in base units."""

from __future__ import annotations

import re

import pytest

from cqrs_es.telemetry.metrics import EVERY, Kind, Metric, sample_names
from tests.bank_data import PROJECT


def by_name(metric: Metric) -> str:
    return metric.name


@pytest.mark.parametrize("metric", EVERY, ids=by_name)
def test_names_are_prometheus_names(metric: Metric) -> None:
    """Lower-case words; a counter's own name has no _total, which its sample gets."""
    for name in (metric.name, *metric.labels):
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
    assert not metric.name.endswith("_total")


@pytest.mark.parametrize("metric", EVERY, ids=by_name)
def test_only_histograms_have_buckets(metric: Metric) -> None:
    """Ascending, each bound once."""
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert sorted(set(metric.buckets)) == list(metric.buckets)


def test_sample_names() -> None:
    """What dashboards and alerts may name."""
    names = sample_names()
    assert {
        "cqrs_es_commands_total",
        "cqrs_es_batch_phase_seconds_bucket",
        "cqrs_es_batch_commands_sum",
        "cqrs_es_queue_wait_seconds_count",
        "cqrs_es_relay_lag_seconds",
        "cqrs_es_ready",
    } < names
    assert len({metric.name for metric in EVERY}) == len(EVERY)


def test_the_page_on_operations_lists_them_all() -> None:
    """Each with its kind, its labels and what it says, and no other."""
    page = (PROJECT / "docs" / "operations.md").read_text()
    listed = re.findall(r"^\| `(cqrs_es_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", page, re.MULTILINE)
    assert listed == [
        (
            metric.samples[0].removesuffix("_bucket"),
            metric.kind.name.lower(),
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.meaning,
        )
        for metric in EVERY
    ]
