"""docker-compose.yml: what it starts, in which order, and with which rights."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from config.settings import BankSettings
from cqrs_es.runtime.roles import RELAY, WORKER
from cqrs_es.settings import Settings
from tests.bank_data import PROJECT
from tests.deployment.composition import (
    ASKS,
    HTTP,
    LISTENS,
    SECRETS,
    bank_services,
    long_running,
    make_secrets,
)
from tests.deployment.files import CONFIG, compose
from tests.deployment.image import in_context
from tests.deployment.parsing import FOLLOWERS, VERBS, followers, parse

if TYPE_CHECKING:
    from tests.deployment.files import Document

COMPOSED = compose()
SERVICES: dict[str, Document] = COMPOSED["services"]
BANK = bank_services(COMPOSED)
PROCESSES = long_running(COMPOSED)
SERVERS = {name: one for name, one in SERVICES.items() if name not in BANK}


# --- What runs ---------------------------------------------------------------


@pytest.mark.parametrize("name", BANK)
def test_the_command_line_takes_the_command(name: str) -> None:
    """Every service of the bank calls a verb that there is, with options that it has."""
    if SERVICES[name]["command"] == ["--help"]:
        return
    verb, parameters = parse(SERVICES[name]["command"])
    assert VERBS.get(verb, verb) in name
    assert set(parameters.get("only") or ()) <= FOLLOWERS.get(verb, set())


def test_every_role_runs_in_a_container_of_its_own() -> None:
    """The worker, twice; the relay; each projector and each reactor; the gateway."""
    calls = [parse(one["command"]) for one in PROCESSES.values()]
    assert sorted(verb for verb, _ in calls if verb not in FOLLOWERS) == [RELAY, "serve", WORKER]
    assert all(len(found["only"]) == 1 for verb, found in calls if verb in FOLLOWERS)
    assert followers(calls) == {verb: sorted(names) for verb, names in FOLLOWERS.items()}
    assert SERVICES["worker"]["deploy"]["replicas"] == 2


def test_the_store_is_made_first() -> None:
    """Processes start after `init`, which starts after its servers answer."""
    for one in PROCESSES.values():
        assert one["depends_on"] == {"init": {"condition": "service_completed_successfully"}}
    waits_for = SERVICES["init"]["depends_on"]
    assert waits_for.keys() == {"mysql", "rabbitmq", "redis"}
    assert all(one == {"condition": "service_healthy"} for one in waits_for.values())


@pytest.mark.parametrize("name", PROCESSES)
def test_probes_are_served_where_they_are_asked(name: str) -> None:
    """On every address of the container; the image's own health check asks there."""
    _, parameters = parse(SERVICES[name]["command"])
    assert parameters["health_port"] == LISTENS
    assert "healthcheck" not in SERVICES[name]
    assert f"http://{ASKS}/ready" in (PROJECT / "Dockerfile").read_text()


@pytest.mark.parametrize("broker", ["rabbitmq", "redis"])
@pytest.mark.parametrize("name", BANK)
def test_the_environment_is_understood(name: str, broker: str, tmp_path: Path) -> None:
    """Settings that there are, with URLs from files; a stop is never cut short."""
    secrets = tmp_path / "secrets"
    make_secrets(secrets)
    service = compose(BROKER=broker)["services"][name]
    targets = {
        f"{SECRETS}/{target}": secrets / source
        for source, target in map(_names, service["secrets"])
    }
    environment = {
        key: str(targets.get(value, value)) for key, value in service["environment"].items()
    }
    settings = Settings.from_environment(environment)
    assert settings.store_url is not None
    assert settings.store_url.startswith("mysql://")
    assert settings.broker_url.startswith({"rabbitmq": "amqp://", "redis": "redis://"}[broker])
    if name in PROCESSES:
        grace = float(service["stop_grace_period"].removesuffix("s"))
        assert grace >= settings.shutdown_timeout + 5


def _names(secret: Any) -> tuple[str, str]:
    return (secret, secret) if isinstance(secret, str) else (secret["source"], secret["target"])


def test_the_gateway_listens_where_compose_publishes_it() -> None:
    """On every address of its container, for this machine; those let in are those of the secret."""
    service = SERVICES["gateway"]
    _, parameters = parse(service["command"])
    assert set(HTTP) <= set(service["command"])
    assert parameters["gateway"] == "worker.http:gateway"
    assert service["ports"] == [f"127.0.0.1:{parameters['port']}:{parameters['port']}"]
    assert f"EXPOSE {parameters['port']} " in (PROJECT / "Dockerfile").read_text()
    assert service["environment"]["BANK_HTTP_TOKENS_FILE"] == f"{SECRETS}/http_tokens"
    assert "http_tokens" in service["secrets"]


# --- How it is kept ----------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_services_gain_no_rights(name: str) -> None:
    """None may gain any; those of the bank have none and write nothing."""
    service = SERVICES[name]
    assert service["security_opt"] == ["no-new-privileges:true"]
    if name in BANK:
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "user" not in service  # the image's
        assert not service.get("volumes")


@pytest.mark.parametrize("name", [*PROCESSES, *SERVERS])
def test_services_are_kept_running(name: str) -> None:
    """Started again, limited in what they take, with logs that end somewhere."""
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["logging"]["driver"] == "json-file"
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("name", SERVERS)
def test_servers_are_checked_and_pinned(name: str) -> None:
    """A health check each; a version, not whatever is latest; reached from this machine only."""
    service = SERVICES[name]
    assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
    assert re.search(r":v?\d+\.\d+", service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_prometheus_asks_every_process() -> None:
    """Its configuration names the services, and the port that they listen on."""
    loaded = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    (job,) = loaded["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) == set(PROCESSES)
    assert f":{discovery['port']}" in LISTENS


def test_what_is_mounted_is_there() -> None:
    """Docker would make an empty folder of a file that is missing."""
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSED["volumes"] or (PROJECT / source).exists()


# --- Secrets -----------------------------------------------------------------


def test_every_secret_is_made(tmp_path: Path) -> None:
    """`make secrets` writes each file that the compose file names; nobody else may enter."""
    secrets = tmp_path / "secrets"
    make_secrets(secrets)
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    for name, one in COMPOSED["secrets"].items():
        assert one["file"] == f"secrets/{name}"
        assert (secrets / name).read_text().strip()
    used = {_names(one)[0] for service in SERVICES.values() for one in service.get("secrets", [])}
    assert used | {"redis_url"} == set(COMPOSED["secrets"])


def test_secrets_are_random_and_stay(tmp_path: Path) -> None:
    """No two are the same; made again, they are what they were: servers remember them."""
    for folder in ("one", "two"):
        make_secrets(tmp_path / folder)
    one, two = _passwords(tmp_path / "one"), _passwords(tmp_path / "two")
    assert len({*one.values(), *two.values()}) == len(one) + len(two)
    assert all(re.fullmatch(r"[0-9a-f]{48}\n", password) for password in one.values())
    make_secrets(tmp_path / "one")
    assert _passwords(tmp_path / "one") == one


def _passwords(folder: Path) -> dict[str, str]:
    made = [*folder.glob("*_password"), *folder.glob("*_token")]
    return {path.name: path.read_text() for path in made}


def test_the_operators_tokens_stay(tmp_path: Path) -> None:
    """Whoever was added to the file by hand is still let in after `make secrets`."""
    make_secrets(tmp_path)
    tokens = tmp_path / "http_tokens"
    made = BankSettings.from_environment({"BANK_HTTP_TOKENS_FILE": str(tokens)}).http_tokens
    assert {name: token for token, name in made.items()} == {
        name: (tmp_path / f"{name}_token").read_text().strip() for name in ("teller", "reader")
    }
    tokens.write_text(tokens.read_text() + "auditor secret\n")
    make_secrets(tmp_path)
    assert "auditor secret\n" in tokens.read_text()


def test_secrets_get_into_no_image_and_no_commit() -> None:
    """Their folder is ignored by git and left out of the build's context."""
    assert "/secrets/" in (PROJECT / ".gitignore").read_text().splitlines()
    assert not in_context(Path("secrets/store_url"))
    assert not in_context(Path("bank.db"))
    assert in_context(Path("cqrs_es/cli/main.py"))


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_in_the_environment(name: str) -> None:
    """Where a variable speaks of a password it names a file."""
    for key, value in SERVICES[name].get("environment", {}).items():
        if "PASS" in key or "URL" in key:
            assert key.endswith("_FILE")
            assert value.startswith(SECRETS + os.sep)
