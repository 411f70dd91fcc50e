"""The files of the deployment, as data."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson
import yaml

from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

DEPLOY = PROJECT / "deploy"
CONFIG = PROJECT / "config"
COMPOSE = PROJECT / "docker-compose.yml"
DASHBOARD = CONFIG / "grafana" / "dashboards" / "cqrs-es.json"
ALERTS = CONFIG / "alerts.yml"
# What names nothing that Kubernetes knows: kubectl reads it itself.
KUSTOMIZATION = "kustomization.yaml"

Document = dict[str, Any]
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")


def compose(**variables: str) -> Document:
    """Return docker-compose.yml, its variables replaced as `docker compose` does it."""
    loaded: Document = yaml.safe_load(interpolated(COMPOSE.read_text(), variables))
    return loaded


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Replace `${NAME:-default}` and `$$`."""

    def value(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        return variables.get(match["name"]) or match["default"] or ""

    return _VARIABLE.sub(value, text)


def manifest_files() -> list[Path]:
    """Return every file in deploy/ that Kubernetes is to take."""
    others = {KUSTOMIZATION, "template.yaml"}  # that of AWS
    return [path for path in sorted(DEPLOY.rglob("*.yaml")) if path.name not in others]


def documents(path: Path) -> list[Document]:
    """Return the documents in a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def manifests(kind: str) -> dict[str, Document]:
    """Return every manifest of a kind in deploy/, by file and name."""
    return {
        f"{path.relative_to(DEPLOY)}:{one['metadata']['name']}": one
        for path in manifest_files()
        for one in documents(path)
        if one["kind"] == kind
    }


def dashboard_queries() -> dict[str, str]:
    """Return the dashboard's queries by panel and letter."""
    board = orjson.loads(DASHBOARD.read_bytes())
    return {
        f"{panel['id']} {panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel.get("targets", [])
    }


def alert_rules() -> dict[str, Document]:
    """Return the alerts by name."""
    loaded = yaml.safe_load(ALERTS.read_text())
    return {rule["alert"]: rule for group in loaded["groups"] for rule in group["rules"]}


def scaling_queries() -> dict[str, str]:
    """Return what KEDA asks Prometheus, by the name of what it scales."""
    return {
        where: trigger["metadata"]["query"]
        for where, scaled in manifests("ScaledObject").items()
        for trigger in scaled["spec"]["triggers"]
    }
