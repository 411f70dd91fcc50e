"""Dashboard, alerts and scaling ask a real Prometheus, which asks the running bank."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.deployment.conftest import running_bank
from tests.deployment.files import (
    ALERTS,
    CONFIG,
    DASHBOARD,
    alert_rules,
    dashboard_queries,
    scaling_queries,
)
from tests.servers import free_port, installed, launch
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.deployment.composition import Composition
    from tests.deployment.image import Image
    from tests.servers import Server

pytestmark = pytest.mark.timeout(300)  # the image is built first
PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A Prometheus that watches the bank."""

    server: Server
    bank: Composition

    def get(self, path: str, **parameters: str) -> Any:
        """Ask its HTTP interface; fail where it answers with an error."""
        query = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.server.port}/api/v1/{path}?{query}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now."""
        found: list[dict[str, Any]] = self.get("query", query=expression)["result"]
        return found

    def rules(self) -> list[dict[str, Any]]:
        """Return its rules, as it last evaluated them."""
        return [rule for group in self.get("rules")["groups"] for rule in group["rules"]]

    def alerts(self) -> set[tuple[str, str | None]]:
        """Return the alerts that are pending or fire, with the role that each is about."""
        found = self.get("alerts")["alerts"]
        return {(one["labels"]["alertname"], one["labels"].get("role")) for one in found}


@pytest.fixture(scope="module")
def prometheus(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Run the bank and a Prometheus with the configuration that the compose file mounts."""
    with running_bank(image, "rabbitmq", tmp_path_factory) as bank:
        folder = tmp_path_factory.mktemp("prometheus")
        (folder / "prometheus.yml").write_text(configuration(bank))
        (folder / "alerts.yml").write_text(ALERTS.read_text())
        port = free_port()
        command = [
            installed("prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        server = launch(command, port, folder / "prometheus.log")
        try:
            until(lambda: is_ready(port), within_seconds=PATIENCE_SECONDS)
            yield Prometheus(server, bank)
        finally:
            server.stop()


def is_ready(port: int) -> bool:
    """Tell whether Prometheus has read what it has on disk: it listens before that."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=10) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except urllib.error.HTTPError:
        return False


def configuration(bank: Composition) -> str:
    """Return config/prometheus.yml with the names of services resolved, and in a hurry."""
    loaded = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    loaded["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = loaded["scrape_configs"]
    (discovery,) = job.pop("dns_sd_configs")
    job["static_configs"] = [
        {
            "targets": [f"127.0.0.1:{one.port}" for one in bank.containers if one.service == name],
            "labels": {"__meta_dns_name": name},
        }
        for name in discovery["names"]
    ]
    return json.dumps(loaded)  # which is YAML too


@pytest.fixture(scope="module")
def watched(prometheus: Prometheus) -> Prometheus:
    """Have commands of each outcome decided, and wait until Prometheus has seen it."""
    ask = prometheus.bank.ask
    # A rate is of what has changed since the first look.
    until(lambda: prometheus.query("cqrs_es_commands_total == 0"), within_seconds=PATIENCE_SECONDS)
    for number in range(3):
        to = ("send", "account", f"ACCT-{number}")
        opening = [*to, "OpenAccount", f'{{"account_id": "ACCT-{number}"}}', "--wait"]
        assert ask(*opening)["status"] == "accepted"
        assert ask(*to, "WithdrawMoney", '{"amount": "1", "atm_id": "A"}', "--wait") is None
        assert ask(*to, "NoSuchCommand", "{}", "--wait") is None

    def seen() -> bool:
        found = prometheus.query("sum by (outcome) (cqrs_es_commands_total) == 3")
        outcomes = {one["metric"]["outcome"] for one in found}
        return outcomes >= {"accepted", "rejected", "failed"}

    until(seen, within_seconds=PATIENCE_SECONDS)
    return prometheus


def test_every_process_is_asked(watched: Prometheus) -> None:
    """Prometheus reaches each copy of each service, and knows which it is."""
    copies = {
        "worker": "2",
        "relay": "1",
        "projector-account-query": "1",
        "projector-bank-totals": "1",
        "reactor-transfer": "1",
        "gateway": "1",
    }

    def asked() -> bool:
        found = watched.query("count by (process) (up == 1)")
        return {one["metric"]["process"]: one["value"][1] for one in found} == copies

    until(asked, within_seconds=PATIENCE_SECONDS)


def test_the_service_can_be_chosen(watched: Prometheus) -> None:
    """The dashboard's variable finds the bank."""
    board = json.loads(DASHBOARD.read_text())
    (variable,) = [one for one in board["templating"]["list"] if one["name"] == "service"]
    asked = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert asked is not None
    metric, label = asked.groups()
    values = watched.get(f"label/{label}/values", **{"match[]": metric})
    assert values == ["bank"]


# The bank sends to no other service: of that it shows that queries are taken.
NOT_OF_THE_BANK = "cqrs_es_remote_"


@pytest.mark.parametrize("panel", dashboard_queries())
def test_panels_have_data(watched: Prometheus, panel: str) -> None:
    """Every query is one that Prometheus takes, and shows something, be it that nothing happens."""
    expression = dashboard_queries()[panel]
    replaced = expression.replace("$service", "bank").replace("$__rate_interval", "1h")
    if NOT_OF_THE_BANK in expression:
        assert watched.query(replaced) == []
        return
    until(lambda: watched.query(replaced), within_seconds=PATIENCE_SECONDS)


@pytest.mark.parametrize("name", scaling_queries())
def test_scaling_has_one_number(watched: Prometheus, name: str) -> None:
    """KEDA wants one value from a query."""
    query = scaling_queries()[name]
    until(lambda: watched.query(query), within_seconds=PATIENCE_SECONDS)
    (found,) = watched.query(query)
    assert float(found["value"][1]) >= 0


def test_alerts_are_quiet(watched: Prometheus) -> None:
    """Prometheus evaluates each without an error; where all is well none is on its way."""

    def quiet() -> bool:
        rules = watched.rules()
        return (
            {rule["name"] for rule in rules} == set(alert_rules())
            and all(rule["health"] == "ok" for rule in rules)
            # A third of the commands failed: the tests' own.
            and {name for name, _ in watched.alerts()} <= {"CqrsEsCommandsFailing"}
        )

    until(quiet, within_seconds=PATIENCE_SECONDS)


def test_a_role_that_nobody_has_is_noticed(watched: Prometheus) -> None:
    """The only relay is killed: its partitions count as held by nobody, though it tells nothing."""
    (relay,) = [one for one in watched.bank.containers if one.service == "relay"]
    relay.process.kill()
    expected = ("CqrsEsPartitionsUnheld", "relay")
    until(lambda: expected in watched.alerts(), within_seconds=PATIENCE_SECONDS)
    assert ("CqrsEsPartitionsUnheld", "worker") not in watched.alerts()
