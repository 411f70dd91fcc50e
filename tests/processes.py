"""A whole service as processes of its own: started, stopped, killed, asked."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from tests.bank_data import PROJECT

if TYPE_CHECKING:
    from collections.abc import Generator

CLI = [sys.executable, "-m", "cqrs_es.cli"]
STOP_SECONDS = 40.0
VERB_SECONDS = 180.0  # on a machine that others use too


@dataclass(slots=True)
class Service:
    """The processes of one application on one store and broker."""

    app: str
    store_url: str
    broker_url: str
    logs: Path
    settings: dict[str, str] = field(default_factory=dict[str, str])
    running: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])
    _logs_of: dict[int, Path] = field(default_factory=dict[int, Path])

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every process."""
        urls = {"CQRS_ES_STORE_URL": self.store_url, "CQRS_ES_BROKER_URL": self.broker_url}
        return (
            os.environ
            | {"CQRS_ES_APP": self.app, "CQRS_ES_LEASE_SECONDS": "3"}
            | urls
            | (self.settings)
        )

    def call(self, *arguments: str) -> str:
        """Run a verb to its end; return what it prints."""
        done = subprocess.run(
            [*CLI, *arguments],
            cwd=PROJECT,
            env=self.environment,
            capture_output=True,
            timeout=VERB_SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    def status(self) -> dict[str, Any]:
        """Return what `status --json` says."""
        found: dict[str, Any] = orjson.loads(self.call("status", "--json"))
        return found

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process that runs until it is stopped."""
        name = "-".join(argument.strip("-") for argument in arguments)
        path = self.logs / f"{len(self.running)}-{name}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [*CLI, *arguments],
                cwd=PROJECT,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.running.append(process)
        self._logs_of[process.pid] = path
        return process

    def log_of(self, process: subprocess.Popen[bytes]) -> str:
        """Return what a process has logged so far."""
        return self._logs_of[process.pid].read_text()

    def stop(self, process: subprocess.Popen[bytes]) -> int:
        """Ask a process to stop; return its exit code."""
        process.terminate()
        return process.wait(STOP_SECONDS)


@contextmanager
def service(
    app: str, store_url: str, broker_url: str, logs: Path, **settings: str
) -> Generator[Service]:
    """Initialise a service; whatever of it still runs at the end is killed."""
    made = Service(app, store_url, broker_url, logs, settings)
    made.call("init")
    try:
        yield made
    finally:
        for process in made.running:
            process.kill()
            process.wait()


def memory_of(process: subprocess.Popen[bytes], figure: str) -> int:
    """Return what the system says of a process's memory, in KiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (found,) = (line.split()[1] for line in status.splitlines() if line.startswith(figure))
    return int(found)
