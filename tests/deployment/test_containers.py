"""The compose file with an engine: images built, networks, kills, stops; `make containers`.

Where the engine has not got a server's image, its stand-in of Debian's packages takes its place:
see deploy/containers. There is none for Grafana, which is left out then.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.bank_data import PROJECT, bank_balances, bank_folder
from tests.deployment.composition import make_secrets
from tests.deployment.files import COMPOSE
from tests.servers import unavailable
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(1800),  # the image is built first, from the package index
    pytest.mark.skipif(
        "CQRS_ES_TEST_CONTAINERS" not in os.environ, reason="has a target: make containers"
    ),
]
PROJECT_NAME = "bank-containers"
PROCESSES = {
    "worker": 2,
    "relay": 1,
    "projector-account-query": 1,
    "projector-bank-totals": 1,
    "reactor-transfer": 1,
    "gateway": 1,
}
# Ends a container as a crash does; `docker kill` is an order, after which it is not started again.
CRASH = "import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), 9)"
CLIENTS = 16
SECONDS = 180.0


def docker(*words: str, check: bool = True) -> str:
    """Call the engine; return what it prints."""
    done = subprocess.run(
        [shutil.which("docker") or "docker", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def compose_program() -> list[str]:
    """Return how this machine calls Compose."""
    for words in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(words[0]):
            asked = subprocess.run([*words, "version"], capture_output=True, check=False)
            if asked.returncode == 0:
                return words
    return unavailable("neither docker compose nor docker-compose is installed")


def is_image(name: str) -> bool:
    """Tell whether the engine has an image."""
    return bool(docker("image", "inspect", "--format", "{{.Id}}", name, check=False))


def stand_in(name: str, of: str) -> str:
    """Return an image that the engine has: the real one, else what stands in for it."""
    if is_image(name):
        return name
    standing = f"stand-in/{of}"
    if is_image(standing):
        return standing
    return unavailable(f"no image {name}: pull it, or run deploy/containers/build-stand-ins")


@dataclass(slots=True)
class Stack:
    """The compose file, running as a project of its own."""

    folder: Path
    broker: str
    secrets: Path = field(init=False)

    def __post_init__(self) -> None:
        self.secrets = self.folder / "secrets"
        make_secrets(self.secrets)
        composed = yaml.safe_load(COMPOSE.read_text())
        del composed["name"]  # Compose 1 does not know it
        services = composed["services"]
        if not is_image(services["grafana"]["image"]):
            del services["grafana"]
        for name, service in services.items():
            if "build" in service:
                python = stand_in("python:3.13-slim-bookworm", "python")
                service["build"] = {"context": str(PROJECT), "args": {"PYTHON": python}}
                service["image"] = "bank:containers"
            else:
                service["image"] = stand_in(service["image"], name)
            # Any free ports of this machine: the bank itself may be running on it.
            ports = [port.rpartition(":")[2] for port in service.get("ports", ())]
            service["ports"] = [f"127.0.0.1::{port}" for port in ports]
        for name, secret in composed["secrets"].items():
            secret["file"] = str(self.secrets / name)
        (self.folder / "compose.yml").write_text(json.dumps(composed))  # which is YAML too

    def compose(self, *words: str, seconds: float = 900) -> str:
        """Call Compose; return what it prints."""
        where = ["--project-name", PROJECT_NAME, "--project-directory", str(PROJECT)]
        done = subprocess.run(
            [*compose_program(), *where, "--file", str(self.folder / "compose.yml"), *words],
            env=os.environ | {"BROKER": self.broker},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def inspect(self, service: str) -> list[dict[str, Any]]:
        """Return what the engine knows of each of them."""
        found: list[dict[str, Any]] = json.loads(docker("inspect", *self.containers(service)))
        return found

    def healthy(self) -> bool:
        """Tell whether the engine says so of every container that is to go on."""
        found = Counter(
            service
            for service in PROCESSES
            for one in self.inspect(service)
            if "Health" in one["State"] and one["State"]["Health"]["Status"] == "healthy"
        )
        return found == PROCESSES

    def port(self, service: str, port: int) -> int:
        """Return where a container's port is on this machine."""
        return int(self.compose("port", service, str(port)).strip().rpartition(":")[2])

    def cli(self, *words: str) -> Any:
        """Do what an operator does who runs a verb."""
        return json.loads(self.compose("run", "--rm", "-T", "cli", *words, "--json"))


@dataclass(slots=True)
class Customers:
    """Send the bank's commands over HTTP, in order for each account, until each has its outcome."""

    port: int
    token: str
    commands: Sequence[Mapping[str, Any]]
    answered: Counter[str] = field(default_factory=Counter[str])
    repeated: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Send all of it."""
        accounts: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for command in self.commands:
            accounts[command["aggregate_id"]].append(command)
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(self._serve, accounts.values()))

    def _serve(self, commands: Sequence[Mapping[str, Any]]) -> None:
        for command in commands:
            done = partial(self._is_done, command)
            until(done, "an outcome", within_seconds=SECONDS)

    def _is_done(self, command: Mapping[str, Any]) -> bool:
        answer: dict[str, Any]
        try:
            status, answer = self._ask(command)
        except (OSError, http.client.HTTPException):
            status, answer = 503, {}
        if status in {202, 503}:  # later, or nobody is there: once more, by the same key
            with self.lock:
                self.repeated += 1
            time.sleep(0.2)
            return False
        with self.lock:
            self.answered[str(answer.get("status", answer))] += 1
        return True

    def _ask(self, command: Mapping[str, Any]) -> tuple[int, Any]:
        headers = {
            "Authorization": f"Bearer {self.token}",
            "Content-Type": "application/json",
            "Idempotency-Key": command["id"],
            "Prefer": "wait=20",
        }
        path = f"/aggregates/account/{command['aggregate_id']}/{command['type']}"
        return ask(self.port, "POST", path, json.dumps(command["payload"]), headers)

    @property
    def done(self) -> int:
        return sum(self.answered.values())


def ask(
    port: int, method: str, path: str, body: str | None = None, headers: Mapping[str, str] = {}
) -> tuple[int, Any]:
    """Send one request to a published port."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.fixture(scope="module", params=["rabbitmq", "redis"])
def stack(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """Build the image, start everything; leave nothing behind but images."""
    if not shutil.which("docker"):
        unavailable("docker is not installed")
    made = Stack(tmp_path_factory.mktemp(request.param), request.param)
    try:
        made.compose("build", "worker")
        made.compose("up", "--detach")
        until(made.healthy, "all healthy", within_seconds=SECONDS)
        yield made
    finally:
        print(made.compose("logs", "--no-color", "--tail", "15"))  # noqa: T201 - of a failure
        made.compose("down", "--volumes", "--timeout", "5")


@pytest.fixture
def token(stack: Stack) -> str:
    return (stack.secrets / "teller_token").read_text().strip()


def test_only_what_is_published_is_reached(stack: Stack) -> None:
    """At this machine's own address alone; each container is in the project's network only."""
    published = {"gateway", "rabbitmq", "redis", "prometheus", "grafana"}
    for name in (*PROCESSES, "mysql", "rabbitmq", "redis", "prometheus"):
        for one in stack.inspect(name):
            assert list(one["NetworkSettings"]["Networks"]) == [f"{PROJECT_NAME}_default"]
            ports = [each for each in one["NetworkSettings"]["Ports"].values() if each]
            assert bool(ports) == (name in published)
            assert {each["HostIp"] for port in ports for each in port} <= {"127.0.0.1"}


def test_processes_have_no_rights(stack: Stack) -> None:
    """The engine runs them as nobody in particular, on a file system that they can't write."""
    for one in stack.inspect("worker"):
        host = one["HostConfig"]
        assert (host["CapDrop"], host["ReadonlyRootfs"], host["Init"]) == (["ALL"], True, True)
        assert (host["Memory"], host["PidsLimit"]) == (512 * 1024 * 1024, 64)
        written = docker(
            "exec", one["Id"], "sh", "-c", "id -u; touch /app/x || echo no", check=False
        )
        assert written.split() == ["10001", "no"]


def test_an_operator_is_answered(stack: Stack) -> None:
    """By the verbs of the compose file's own heading."""
    opened = ("send", "account", "ACCT-001", "OpenAccount", '{"account_id": "ACCT-001"}', "--wait")
    assert stack.cli(*opened)["status"] == "accepted"
    assert {one["role"] for one in stack.cli("status")["leases"]} >= {"worker", "relay"}


def test_prometheus_finds_every_process(stack: Stack) -> None:
    """By the names that the network resolves, an address for each copy."""
    port = stack.port("prometheus", 9090)

    def found() -> dict[str, int]:
        _, answer = ask(port, "GET", "/api/v1/query?query=count%20by%20(process)%20(up%3D%3D1)")
        series = answer["data"]["result"]
        return {one["metric"]["process"]: int(one["value"][1]) for one in series}

    until(lambda: found() == PROCESSES, "every process", within_seconds=SECONDS)


def test_the_bank_comes_out_right_whoever_dies(stack: Stack, token: str) -> None:
    """Workers and the gateway are killed, one is stopped, while its real commands come by HTTP.

    Each is accepted once, and every balance is the one that the bank itself recorded.
    """
    folder = bank_folder()
    commands = [json.loads(line) for line in (folder / "commands.jsonl").read_text().splitlines()]
    port = stack.port("gateway", 8000)
    customers = Customers(port, token, commands)
    sending = threading.Thread(target=customers.run)
    started = time.monotonic()
    sending.start()

    def reached(part: float) -> None:
        until(lambda: customers.done >= part * len(commands), "progress", within_seconds=900)

    first, second = stack.containers("worker")
    reached(0.1)
    docker("kill", first)
    reached(0.3)
    docker("start", first)
    docker("exec", second, "python", "-c", CRASH, check=False)
    until(lambda: is_running(second, restarts=1), "a restart", within_seconds=SECONDS)
    reached(0.5)
    docker("stop", "--time", "40", first)
    assert exit_code(first) == 0
    docker("start", first)
    reached(0.7)
    (gateway,) = stack.containers("gateway")
    docker("exec", gateway, "python", "-c", CRASH, check=False)
    until(lambda: is_running(gateway, restarts=1), "a restart", within_seconds=SECONDS)
    # The engine may have published another port for the one that came back.
    customers.port = stack.port("gateway", 8000)
    sending.join(900)
    assert not sending.is_alive()
    print(  # noqa: T201 - the figures are what a person runs this for
        f"\n{len(commands)} commands by {stack.broker} in {time.monotonic() - started:.0f} s, "
        f"{customers.repeated} requests repeated"
    )
    assert customers.answered == {"accepted": len(commands)}
    expected = bank_balances(folder)

    def rows() -> dict[str, Decimal]:
        found: dict[str, Decimal] = {}
        after = ""
        while True:
            path = f"/views/account_query?limit=1000&after={after}"
            headers = {"Authorization": f"Bearer {token}"}
            _, page = ask(customers.port, "GET", path, headers=headers)
            if not page:
                return found
            found |= {one["view_id"]: Decimal(one["payload"]["balance"]) for one in page}
            after = page[-1]["view_id"]

    until(
        lambda: {name: rows().get(name) for name in expected} == expected,
        "the balances",
        within_seconds=SECONDS,
    )


def is_running(container: str, *, restarts: int) -> bool:
    """Tell whether a container is back, and has been away so many times."""
    shown = docker("inspect", "--format", "{{.State.Running}} {{.RestartCount}}", container)
    return shown == f"true {restarts}"


def exit_code(container: str) -> int:
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", container))


def test_a_stop_drains_and_what_was_taken_is_kept(stack: Stack, token: str) -> None:
    """Sent without waiting, then everything is stopped: each ends by itself, nothing is lost."""
    port = stack.port("gateway", 8000)
    headers = {
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
        "Prefer": "respond-async",
    }
    path = "/aggregates/account/ACCT-001/DepositMoney"
    sent: list[str] = []
    for _ in range(200):
        status, answer = ask(port, "POST", path, '{"amount": "1.00"}', headers)
        assert status == 202
        sent.append(answer["command_id"])
    began = time.monotonic()
    stack.compose("stop")
    print(f"\nstopped in {time.monotonic() - began:.0f} s")  # noqa: T201
    codes = {
        one["Name"]: one["State"]["ExitCode"] for name in PROCESSES for one in stack.inspect(name)
    }
    assert set(codes.values()) == {0}, codes
    stack.compose("up", "--detach")
    until(stack.healthy, "all healthy", within_seconds=SECONDS)
    port = stack.port("gateway", 8000)
    credentials = {"Authorization": headers["Authorization"]}

    def all_decided() -> bool:
        answers = [ask(port, "GET", f"/outcomes/{each}", headers=credentials) for each in sent]
        return all(status == 200 and found["status"] == "accepted" for status, found in answers)

    until(all_decided, "all decided", within_seconds=SECONDS)
