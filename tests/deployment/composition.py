"""The bank's services of docker-compose.yml as processes: their own commands, settings, secrets."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

from tests.bank_data import PROJECT
from tests.deployment.files import Document, compose
from tests.servers import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.deployment.image import Image

MAKE_SECRETS = PROJECT / "deploy" / "make-secrets"
# What a service listens on for probes, and where the image's health check asks.
LISTENS = "0.0.0.0:8080"
ASKS = "127.0.0.1:8080"
# What the gateway listens on for everybody else.
HTTP = ("--host=0.0.0.0", "--port=8000")
SECRETS = "/run/secrets"


def bank_services(composed: Document) -> dict[str, Document]:
    """Return the services that run the bank's image."""
    services: dict[str, Document] = composed["services"]
    return {name: one for name, one in services.items() if one["image"].startswith("bank:")}


def long_running(composed: Document) -> dict[str, Document]:
    """Return those of them that run until they are stopped."""
    return {name: one for name, one in bank_services(composed).items() if one["restart"] != "no"}


def make_secrets(folder: Path) -> None:
    """Make secrets as an operator does."""
    subprocess.run([MAKE_SECRETS, folder], check=True, capture_output=True)


@dataclass(frozen=True, slots=True)
class Container:
    """One copy of a service, the port that it serves probes on, and what it says.

    `http_port` is where a gateway serves everybody else.
    """

    service: str
    process: subprocess.Popen[bytes]
    port: int
    http_port: int
    log: Path


@dataclass(slots=True)
class Composition:
    """Everything that `docker compose up` starts of the bank.

    `addresses` says where the servers are that the URLs name.
    """

    image: Image
    secrets: Path
    folder: Path
    broker: str
    addresses: Mapping[str, str]
    containers: list[Container] = field(default_factory=list[Container])

    @property
    def composed(self) -> Document:
        """The compose file with this broker."""
        return compose(BROKER=self.broker)

    def up(self) -> None:
        """Run what the others wait for, then start the others, as many copies as they are."""
        services = long_running(self.composed)
        first = {name for one in services.values() for name in one["depends_on"]}
        for name in sorted(first):
            code, printed = self.call(name, self.service(name)["command"])
            assert code == 0, printed
        for name, one in services.items():
            for _ in range(one["deploy"].get("replicas", 1)):
                self.containers.append(self._start(name))

    def stop(self) -> dict[str, int]:
        """Ask all to stop; return exit codes by service. Fails where one takes too long."""
        for container in self.containers:
            container.process.terminate()
        return {one.service: one.process.wait(self._grace(one)) for one in self.containers}

    def kill(self) -> None:
        """End whatever still runs."""
        for container in self.containers:
            container.process.kill()
            container.process.communicate()

    def call(self, name: str, command: list[str]) -> tuple[int, str]:
        """Do what `docker compose run --rm NAME COMMAND` does."""
        return self.image.run([*self.image.entrypoint, *command], self.environment(name))

    def ask(self, *arguments: str) -> Any:
        """Return what a verb answers an operator; None where it fails."""
        code, printed = self.call("cli", [*arguments, "--json"])
        return orjson.loads(printed) if code == 0 else None

    def healthy(self, container: Container) -> bool:
        """Do what Docker does to find out."""
        command = [
            word.replace(ASKS, f"127.0.0.1:{container.port}") for word in self.image.health_check
        ]
        return self.image.run(command, self.environment(container.service))[0] == 0

    def environment(self, name: str) -> dict[str, str]:
        """Return a service's environment, with its secrets where this machine has them."""
        mounted = str(self._mount(name))
        given: dict[str, str] = self.service(name)["environment"]
        return {key: value.replace(SECRETS, mounted) for key, value in given.items()}

    def service(self, name: str) -> Document:
        """Return one service."""
        found: Document = self.composed["services"][name]
        return found

    def _start(self, name: str) -> Container:
        port, http_port = free_port(), free_port()
        here = {LISTENS: f"127.0.0.1:{port}"}
        here |= dict(zip(HTTP, ("--host=127.0.0.1", f"--port={http_port}"), strict=True))
        command: list[str] = list(self.service(name)["command"])
        for there, replaced in here.items():
            command = [word.replace(there, replaced) for word in command]
        log = self.folder / f"{len(self.containers)}-{name}.log"
        words = [*self.image.entrypoint, *command]
        process = self.image.start(words, self.environment(name), output=log)
        return Container(name, process, port, http_port, log)

    def _grace(self, container: Container) -> float:
        return float(self.service(container.service)["stop_grace_period"].removesuffix("s"))

    def _mount(self, name: str) -> Path:
        """Lay out what the service sees in /run/secrets."""
        folder = self.folder / f"secrets-{name}"
        folder.mkdir(exist_ok=True)
        for secret in self.service(name)["secrets"]:
            short = isinstance(secret, str)
            source, target = (secret, secret) if short else (secret["source"], secret["target"])
            shutil.copyfile(self._file(source), folder / target)
        return folder

    def _file(self, source: str) -> Path:
        """Return a secret's file, the servers' names in it replaced."""
        named: str = self.composed["secrets"][source]["file"]
        file = self.secrets / named.removeprefix("secrets/")
        content = file.read_text()
        for name, address in self.addresses.items():
            content = content.replace(f"@{name}", f"@{address}")
        moved = self.folder / file.name
        moved.write_text(content)
        return moved
