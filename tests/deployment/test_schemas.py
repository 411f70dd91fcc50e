"""What `make check` asks of the deployment's files: each against the schema of its reader.

The schemas come with packages, so nothing is asked of a network.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import kubernetes_validate
import orjson
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.bank_data import PROJECT
from tests.deployment.files import (
    ALERTS,
    COMPOSE,
    CONFIG,
    DASHBOARD,
    DEPLOY,
    Document,
    documents,
    manifest_files,
)
from tests.servers import installed, unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

# The oldest that the manifests are meant for.
KUBERNETES = "1.30"


# Kinds that Kubernetes itself does not know.
CUSTOM: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "custom_resources.yaml").read_text()
)


def test_dockerfile() -> None:
    """Hadolint has nothing to say."""
    run(beside_python("hadolint"), "Dockerfile")


def test_compose_file() -> None:
    """It fits the Compose Specification."""
    schema = ("--builtin-schema", "vendor.compose-spec")
    run(beside_python("check-jsonschema"), *schema, str(COMPOSE))


@pytest.mark.parametrize("path", manifest_files(), ids=str)
def test_manifests(path: Path) -> None:
    """Every manifest is of a known kind and has no unknown field."""
    for document in documents(path):
        validate(document)


@pytest.mark.parametrize(
    ("file", "field"),
    [("podmonitor/podmonitor.yaml", "jobLabel"), ("base/init.yaml", "backoffLimit")],
)
def test_a_misspelt_manifest_is_found(file: str, field: str) -> None:
    """Neither kind of check takes a field that it does not know."""
    (document,) = documents(DEPLOY / file)
    document["spec"][field + "s"] = document["spec"].pop(field)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(document)


def test_rule_for_the_operator() -> None:
    """What deploy/README.md pipes into kubectl is a PrometheusRule with the alerts."""
    readme = (DEPLOY / "README.md").read_text()
    (command,) = [line for line in readme.splitlines() if "kind: PrometheusRule" in line]
    rule = yaml.safe_load(run("sh", "-c", command.partition("| kubectl")[0]))
    validate(rule)
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text())


def test_dashboard() -> None:
    """Grafana's own model of a dashboard keeps all that is in it, so nothing is misspelt."""
    register_default_plugins()
    board = orjson.loads(DASHBOARD.read_bytes())
    understood = orjson.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert not list(lost(board, understood))


def test_a_misspelt_panel_is_found() -> None:
    """A field that Grafana does not know gets lost on the way through its model."""
    register_default_plugins()
    board = orjson.loads(DASHBOARD.read_bytes())
    board["panels"][1]["fieldConfigs"] = board["panels"][1].pop("fieldConfig")
    understood = orjson.loads(JSONEncoder().encode(Dashboard.from_json(board)))
    assert list(lost(board, understood)) == ["panels.1.fieldConfigs"]


def test_prometheus_configuration() -> None:
    """Promtool takes it, and the rules that it names."""
    run(promtool(), "check", "config", str(CONFIG / "prometheus.yml"))


def test_alerts_fire_when_they_should() -> None:
    """Promtool runs each alert on a story in which it must fire, and one in which it must not."""
    run(promtool(), "test", "rules", str(Path(__file__).parent / "alerts.yml"))


# --- Running tools -----------------------------------------------------------


def validate(document: Document) -> None:
    """Hold a manifest to its schema; raise for a kind that has none."""
    if document["kind"] in CUSTOM:
        jsonschema.validate(document, CUSTOM[document["kind"]])
    else:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def lost(given: Any, understood: Any, path: str = "") -> Iterator[str]:
    """Yield where something of one document is not in the other."""
    if type(given) in {dict, list} and type(given) is type(understood):
        known = dict(items(understood))
        for key, value in items(given):
            yield from lost(value, known.get(key), f"{path}.{key}".lstrip("."))
    elif given != understood:
        yield path


def items(collection: Any) -> list[tuple[Any, Any]]:
    return [*(collection.items() if hasattr(collection, "items") else enumerate(collection))]


def beside_python(program: str) -> str:
    path = shutil.which(program, path=str(Path(sys.executable).parent))
    return path or unavailable(f"{program} is not installed; make .venv/.installed does that")


def promtool() -> str:
    return installed("promtool")


def run(*command: str) -> str:
    done = subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
