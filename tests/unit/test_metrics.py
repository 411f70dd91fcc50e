"""Metrics as the work tells them, and as Prometheus reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cqrs_es.telemetry import metrics as catalogue
from cqrs_es.telemetry.exposition import Exposition
from cqrs_es.telemetry.metrics import Metrics, Reading
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Mapping

NOW = 1_790_000_000.0
TEXT = "text/plain"


def made() -> Metrics:
    return Metrics(app.registry, roles=["worker"], now=lambda: NOW)


def read(metrics: Metrics) -> Mapping[tuple[str, ...], float]:
    """Read samples as Prometheus does: by name and label values."""
    text, _ = Exposition(metrics).render(TEXT)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_commands_by_registered_names() -> None:
    """What is registered goes by its names; whatever a sender makes up is `unknown`."""
    metrics = made()
    metrics.command("account", "DepositMoney", "accepted")
    metrics.command("account", "DepositMoney", "accepted")
    for number in range(1000):
        metrics.command("account", f"Evil{number}", "failed")
        metrics.command(f"evil{number}", "DepositMoney", "failed")
    found = read(metrics)
    name = "cqrs_es_commands_total"
    assert found[name, "account", "DepositMoney", "accepted"] == 2
    assert found[name, "account", "unknown", "failed"] == 1000
    assert found[name, "unknown", "unknown", "failed"] == 1000
    registered = sum(len(known.commands) for known in app.registry.aggregates.values())
    assert sum(key[0] == name for key in found) == 4 * registered + 2


def test_what_can_be_foreseen_is_there_from_the_start() -> None:
    """A series that began at 1 would hide its first increase from `rate`."""
    found = read(made())
    assert found["cqrs_es_commands_total", "account", "OpenAccount", "rejected"] == 0
    assert found["cqrs_es_leases_lost_total", "worker"] == 0
    assert found["cqrs_es_events_projected_total", "bank_totals"] == 0


def test_histograms_are_cumulative() -> None:
    """Each bucket counts all up to its bound, the bound included."""
    metrics = made()
    for commands in (1, 2, 300, 20_000):
        metrics.batch(commands)
    found = read(metrics)
    assert found["cqrs_es_batch_commands_bucket", "1.0"] == 1
    assert found["cqrs_es_batch_commands_bucket", "200.0"] == 2
    assert found["cqrs_es_batch_commands_bucket", "500.0"] == 3
    assert found["cqrs_es_batch_commands_bucket", "+Inf"] == 4
    assert found["cqrs_es_batch_commands_count",] == 4
    assert found["cqrs_es_batch_commands_sum",] == 20_303


def test_phases_are_timed_also_when_they_fail() -> None:
    """A failed append took its time too."""
    metrics = made()
    with pytest.raises(ZeroDivisionError), metrics.phase("append"):
        raise ZeroDivisionError
    assert read(metrics)["cqrs_es_batch_phase_seconds_count", "append"] == 1


@pytest.mark.parametrize(
    ("queued_at", "sent_at", "waited"),
    [
        (NOW - 2.5, None, 2.5),
        (NOW - 2.5, "2001-01-01T00:00:00Z", 2.5),
        (None, "2026-09-21T14:13:18Z", 2.0),
        (None, "2026-09-21T14:13:18", 2.0),
        (NOW + 1, None, 0.0),  # clocks differ a little
        (None, None, None),
        (None, "yesterday", None),
        (None, "0001-01-01T00:00:00+14:00", None),
        (None, "2001-01-01T00:00:00Z", None),
        (None, "2036-01-01T00:00:00Z", None),
    ],
)
def test_the_wait_in_the_queue(
    queued_at: float | None, sent_at: str | None, waited: float | None
) -> None:
    """Since the broker got it, else since its sender says; what can't be true is left out."""
    metrics = made()
    metrics.delivered(queued_at, sent_at)
    found = read(metrics)
    assert found["cqrs_es_queue_wait_seconds_count",] == (waited is not None)
    assert found["cqrs_es_queue_wait_seconds_sum",] == (waited or 0.0)


def test_gauges_are_asked_when_somebody_reads() -> None:
    """Series come and go with what the sources yield."""
    metrics = made()
    held = [Reading(catalogue.PARTITIONS_HELD, 3.0, ("worker",))]
    metrics.gauges.append(lambda: held)
    assert read(metrics)["cqrs_es_partitions_held", "worker"] == 3
    held.clear()
    assert ("cqrs_es_partitions_held", "worker") not in read(metrics)


def test_no_sample_has_a_name_outside_the_catalogue() -> None:
    """Those of the process and of the interpreter apart."""
    metrics = made()
    metrics.reacted("welcome", 1)
    metrics.closed_input("transfer")
    metrics.sent_away("billing", 1)
    every = [
        Reading(metric, 1.0, tuple(metric.labels))
        for metric in catalogue.EVERY
        if metric.kind is catalogue.Kind.GAUGE
    ]
    metrics.gauges.append(lambda: every)
    names = {key[0] for key in read(metrics)}
    own = {name for name in names if name.startswith(catalogue.PREFIX)}
    assert own == catalogue.sample_names()
    assert "process_cpu_seconds_total" in names


def test_open_metrics_are_given_where_they_are_asked_for() -> None:
    """Prometheus prefers that form; anything else gets plain text."""
    exposition = Exposition(made())
    text, content_type = exposition.render("application/openmetrics-text;version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    _, content_type = exposition.render("")
    assert content_type.startswith("text/plain")
