"""What dashboard, alerts and scaling name: metrics that exist, pages that exist."""

from __future__ import annotations

import re

import orjson
import pytest
import yaml

from cqrs_es.telemetry.metrics import EVERY, sample_names
from tests.bank_data import PROJECT
from tests.deployment.files import (
    CONFIG,
    DASHBOARD,
    alert_rules,
    compose,
    dashboard_queries,
    scaling_queries,
)

# Those of prometheus-client on Linux.
PROCESS = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
}
QUERIES = {
    **{f"panel {name}": query for name, query in dashboard_queries().items()},
    **{f"alert {name}": rule["expr"] for name, rule in alert_rules().items()},
    **{f"scaling {name}": query for name, query in scaling_queries().items()},
}


def names_in(query: str) -> set[str]:
    """Return the metrics that a query asks for."""
    return set(re.findall(r"\b(?:cqrs_es|process)_\w+", query))


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_every_metric_exists(query: str) -> None:
    """A query names metrics of the catalogue, with labels that they have."""
    assert names_in(query)
    assert names_in(query) <= sample_names() | PROCESS
    # `process` is added by config/prometheus.yml and the PodMonitor.
    labels = {
        "job",
        "instance",
        "process",
        "le",
        *(label for metric in EVERY for label in metric.labels),
    }
    grouped = re.findall(r"\b(?:by|on|ignoring|without) \(([^)]*)\)", query)
    matched = re.findall(r"(\w+)\s*=~?\"", query)
    used = {label.strip() for group in grouped for label in group.split(",")} | set(matched)
    assert used <= labels


def test_every_metric_is_shown() -> None:
    """The dashboard leaves nothing out that there is to know."""
    shown = {name for query in dashboard_queries().values() for name in names_in(query)}
    hidden = {metric.name for metric in EVERY if not shown & set(metric.samples)}
    assert not hidden


def test_the_dashboard_can_be_provisioned() -> None:
    """It has what Grafana wants, panels that do not overlap, and no data source of its own."""
    board = orjson.loads(DASHBOARD.read_bytes())
    assert board["uid"]
    assert board["title"]
    assert board["schemaVersion"] >= 36
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [cell for panel in board["panels"] for cell in _cells(panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    sources = {
        target["datasource"]["uid"] for panel in board["panels"] for target in _targets(panel)
    }
    assert sources == {"${datasource}"}
    assert {one["name"] for one in board["templating"]["list"]} == {"datasource", "service"}


def test_the_dashboard_is_where_grafana_looks() -> None:
    """The provider's folder is the one that compose mounts, and the home page is in it."""
    grafana = compose()["services"]["grafana"]
    provider = CONFIG / "grafana" / "provisioning" / "dashboards" / "dashboards.yml"
    (entry,) = yaml.safe_load(provider.read_text())["providers"]
    folder = entry["options"]["path"]
    assert f"./config/grafana/dashboards:{folder}:ro" in grafana["volumes"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/{DASHBOARD.name}"


@pytest.mark.parametrize("name", alert_rules())
def test_every_alert_has_a_runbook(name: str) -> None:
    """An alert says how bad it is and what it is; its link finds a section of the runbook."""
    rule = alert_rules()[name]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (PROJECT / page).read_text(), re.MULTILINE)
    assert anchor == name.lower()
    assert name in headings


def _targets(panel: dict[str, list[dict[str, dict[str, str]]]]) -> list[dict[str, dict[str, str]]]:
    return panel.get("targets", [])


def _cells(place: dict[str, int]) -> list[tuple[int, int]]:
    """Return the cells of the grid that a panel covers."""
    columns = range(place["x"], place["x"] + place["w"])
    assert columns.stop <= 24
    return [(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])]
