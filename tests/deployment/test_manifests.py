"""The manifests for Kubernetes: they start what there is, and hold it to few rights."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from cqrs_es.runtime.roles import RELAY, WORKER
from cqrs_es.settings import DEFAULT_PARTITIONS, Settings
from tests.bank_data import PROJECT
from tests.deployment.files import (
    DEPLOY,
    KUSTOMIZATION,
    Document,
    documents,
    manifest_files,
    manifests,
)
from tests.deployment.parsing import FOLLOWERS, VERBS, followers, parse

if TYPE_CHECKING:
    from pathlib import Path

DEPLOYMENTS = manifests("Deployment")
PODS = {**DEPLOYMENTS, **manifests("Job")}
SETTINGS = DEPLOY / "base" / "settings.env"
# In a page, in `kubectl exec`, in `docker compose run`.
CALL = re.compile(r"(?:`cqrs-es|-- cqrs-es|--rm cli) ([a-z][^`\n]*?)(?:`|$)", re.MULTILINE)
PAGES = ("README.md", "docs/operations.md", "deploy/README.md", "docker-compose.yml")
GATEWAY_LABELS = {
    "app.kubernetes.io/name": "bank",
    "app.kubernetes.io/component": "gateway",
}
KUSTOMIZATIONS = sorted(DEPLOY.rglob(KUSTOMIZATION))


def pod_of(manifest: Document) -> dict[str, Any]:
    pod: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return pod


def container_of(manifest: Document) -> dict[str, Any]:
    (container,) = pod_of(manifest)["containers"]
    found: dict[str, Any] = container
    return found


def environment_of(manifest: Document) -> dict[str, str]:
    """Return what a container has in its environment, the shared settings included."""
    lines = [line for line in SETTINGS.read_text().splitlines() if not line.startswith("#")]
    own = {one["name"]: one["value"] for one in container_of(manifest)["env"]}
    return dict(line.split("=", 1) for line in lines) | own


def routed_seconds(manifest: Document) -> int:
    """Return how long a pod goes on serving while others learn that it is about to stop."""
    lifecycle = container_of(manifest).get("lifecycle")
    return int(lifecycle["preStop"]["exec"]["command"][1]) if lifecycle else 0


# --- What runs ---------------------------------------------------------------


@pytest.mark.parametrize("name", PODS)
def test_the_command_line_takes_the_arguments(name: str) -> None:
    """Every container calls a verb that there is, with options that it has."""
    verb, parameters = parse(container_of(PODS[name])["args"])
    assert VERBS.get(verb, verb) in name
    assert set(parameters.get("only") or ()) <= FOLLOWERS.get(verb, set())


def test_every_role_runs() -> None:
    """A Deployment each for worker, relay, every projector and reactor, and the gateway."""
    calls = [parse(container_of(one)["args"]) for one in DEPLOYMENTS.values()]
    assert followers(calls) == {verb: sorted(names) for verb, names in FOLLOWERS.items()}
    assert {WORKER, RELAY, "serve"} <= {verb for verb, _ in calls}


@pytest.mark.parametrize("name", PODS)
def test_the_environment_is_understood(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings are settings, with values that they can have; secrets come as files."""
    environment = environment_of(PODS[name])
    (secrets,) = [
        volume for volume in container_of(PODS[name])["volumeMounts"] if volume["name"] == "secrets"
    ]
    (example,) = documents(DEPLOY / "secret.example.yaml")
    for key, content in example["stringData"].items():
        (tmp_path / key).write_text(content)
    monkeypatch.chdir(tmp_path)
    replaced = {
        key: value.replace(secrets["mountPath"], str(tmp_path))
        for key, value in environment.items()
    }
    settings = Settings.from_environment(replaced)
    assert settings.store_url == example["stringData"]["store_url"]
    assert settings.broker_url == example["stringData"]["broker_url"]
    if name in DEPLOYMENTS:
        grace = pod_of(PODS[name])["terminationGracePeriodSeconds"]
        assert grace >= settings.shutdown_timeout + 5 + routed_seconds(PODS[name])


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_probes_ask_where_it_listens(name: str) -> None:
    """Alive and started by /live, ready by /ready, on the port of `--health-port`."""
    container = container_of(DEPLOYMENTS[name])
    _, parameters = parse(container["args"])
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    asked = {
        kind: (container[kind]["httpGet"]["path"], ports[container[kind]["httpGet"]["port"]])
        for kind in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    host, _, number = parameters["health_port"].rpartition(":")
    port = int(number)
    assert host == "0.0.0.0"  # noqa: S104 - a probe comes from outside of the container
    assert asked == {
        "startupProbe": ("/live", port),
        "livenessProbe": ("/live", port),
        "readinessProbe": ("/ready", port),
    }


# --- With which rights -------------------------------------------------------


@pytest.mark.parametrize("name", PODS)
def test_pods_are_restricted(name: str) -> None:
    """Each fits the Pod Security Standard that the namespace enforces, and writes nothing."""
    pod, container = pod_of(PODS[name]), container_of(PODS[name])
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert container["resources"]["requests"]
    assert container["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", PODS)
def test_pods_run_as_the_user_of_the_image(name: str) -> None:
    """The number is that of the Dockerfile, and may read the secrets."""
    context = pod_of(PODS[name])["securityContext"]
    dockerfile = (PROJECT / "Dockerfile").read_text()
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
    assert context["fsGroup"] == context["runAsGroup"]


@pytest.mark.parametrize("name", PODS)
def test_services_do_not_look_like_settings(name: str) -> None:
    """Kubernetes adds no variables: CQRS_ES_… of a Service's name would be refused."""
    assert pod_of(PODS[name])["enableServiceLinks"] is False


# --- What belongs together ---------------------------------------------------


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_selectors_find_the_pods(name: str) -> None:
    """Deployment, disruption budget and spread choose the pods of this Deployment, no others."""
    deployment = DEPLOYMENTS[name]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    budget = manifests("PodDisruptionBudget")[name]
    (spread,) = pod_of(deployment)["topologySpreadConstraints"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert spread["labelSelector"]["matchLabels"] == labels
    everybody = [one["spec"]["template"]["metadata"]["labels"] for one in PODS.values()]
    assert everybody.count(labels) == 1


def test_the_monitor_finds_every_process() -> None:
    """It selects the pods of every Deployment, and names a port that they have."""
    (monitor,) = manifests("PodMonitor").values()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    for deployment in DEPLOYMENTS.values():
        assert wanted <= deployment["spec"]["template"]["metadata"]["labels"].items()
        assert endpoint["port"] in {port["name"] for port in container_of(deployment)["ports"]}


def test_nobody_calls_the_pods_from_outside() -> None:
    """The policy is for every pod, and lets the cluster in where probes are served."""
    policy, gateways = manifests("NetworkPolicy").values()
    chosen = policy["spec"]["podSelector"]["matchLabels"].items()
    for pod in PODS.values():
        assert chosen <= pod["spec"]["template"]["metadata"]["labels"].items()
    assert policy["spec"]["ingress"] == lets_in("health")
    assert gateways["spec"]["podSelector"]["matchLabels"] == GATEWAY_LABELS
    assert gateways["spec"]["ingress"] == lets_in("http")
    for deployment in DEPLOYMENTS.values():
        names = {port["name"] for port in container_of(deployment)["ports"]}
        serves_http = deployment["metadata"]["name"] == "gateway"
        assert names == ({"http", "health"} if serves_http else {"health"})


def lets_in(port: str) -> list[Document]:
    """Return the rule by which a policy lets everybody within the cluster in at a port."""
    return [{"from": [{"namespaceSelector": {}}], "ports": [{"port": port}]}]


def test_the_service_finds_the_gateway() -> None:
    """It selects the gateway's pods alone, and routes to what they listen on."""
    (service,) = manifests("Service").values()
    assert service["spec"]["selector"] == GATEWAY_LABELS
    (port,) = service["spec"]["ports"]
    container = container_of(DEPLOYMENTS["base/gateway.yaml:gateway"])
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    _, parameters = parse(container["args"])
    assert ports[port["targetPort"]] == parameters["port"]
    assert parameters["host"] == "0.0.0.0"  # noqa: S104 - the Service comes from outside


def test_tokens_come_from_the_secret() -> None:
    """Who is let in is in the Secret, by the key that the gateway is told."""
    environment = environment_of(DEPLOYMENTS["base/gateway.yaml:gateway"])
    (example,) = documents(DEPLOY / "secret.example.yaml")
    key = environment["BANK_HTTP_TOKENS_FILE"].rpartition("/")[2]
    assert len(example["stringData"][key].split()) == 2
    assert f"--from-file={key}" in (DEPLOY / "README.md").read_text()


def test_every_deployment_is_scaled() -> None:
    """KEDA scales each up to the number of partitions, and none to nothing."""
    scaled = {
        one["spec"]["scaleTargetRef"]["name"]: one for one in manifests("ScaledObject").values()
    }
    assert scaled.keys() == {one["metadata"]["name"] for one in DEPLOYMENTS.values()}
    for one in scaled.values():
        assert one["spec"]["maxReplicaCount"] == DEFAULT_PARTITIONS
        assert one["spec"]["minReplicaCount"] >= 1
    assert not any("replicas" in one["spec"] for one in DEPLOYMENTS.values())


def test_every_manifest_is_applied() -> None:
    """Each is named by the kustomization beside it, which names no other; the secret is by hand."""
    named = {
        (path.parent / resource).resolve()
        for path in KUSTOMIZATIONS
        for resource in yaml.safe_load(path.read_text())["resources"]
    }
    folders = {path for path in named if path.is_dir()}
    assert folders == {DEPLOY / "base"}
    assert named - folders == set(manifest_files()) - {DEPLOY / "secret.example.yaml"}


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=str)
def test_kustomizations_say_nothing_unknown(path: Path) -> None:
    """Their fields are those that kustomize has, and what they change is there."""
    (document,) = documents(path)
    known = {"apiVersion", "kind", "namespace", "resources", "replicas", "images"}
    assert set(document) <= known | {"configMapGenerator"}
    assert document["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
    names = {one["metadata"]["name"] for one in DEPLOYMENTS.values()}
    assert {one["name"] for one in document.get("replicas", [])} in (set(), names)
    images = {container_of(one)["image"] for one in PODS.values()}
    assert {one["name"] for one in document.get("images", [])} <= images


# --- What operators read -----------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_calls_in_the_documentation(page: str) -> None:
    """Every `cqrs-es VERB` that a page tells people to run is one that there is."""
    text = (PROJECT / page).read_text()
    calls = re.findall(
        r"(?:`|-- |run --rm )(?:cqrs-es|cli) ([a-z][^`\n]*?)(?:`|$)", text, re.MULTILINE
    )
    assert calls
    for call in calls:
        words = re.sub(r"'[^']*'", "{}", call)
        words = re.sub(r"\b(PARTITION|OFFSET|N)\b", "3", words)
        parse(words.split())
