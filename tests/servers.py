"""Private servers for tests: on 127.0.0.1 and a free port, in a temporary folder.

Each is stopped by its process id when the test session ends. Where a server is
not installed, its tests are skipped with the reason; in CI that is an error.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

START_SECONDS = 30.0
STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server process of our own, and the port that it listens on."""

    process: subprocess.Popen[bytes]
    port: int

    def stop(self) -> None:
        """End the process; kill it when it takes too long."""
        self.process.terminate()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def unavailable(reason: str) -> NoReturn:
    """Skip the test for want of a server; fail it in CI, where every server must be there."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must have it", pytrace=False)
    pytest.skip(reason)


def installed(program: str) -> str:
    """Return the path of a server's program, or skip the test."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/usr/local/sbin")
    return path or unavailable(f"{program} is not installed")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(command: Sequence[str], port: int, log: Path) -> Server:
    """Start a server and wait until it accepts connections."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    server = Server(process, port)
    try:
        _await_port(server, log)
    except BaseException:
        server.stop()
        raise
    return server


def _await_port(server: Server, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _accepts(server.port):
        if server.process.poll() is not None or time.monotonic() > deadline:
            message = f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}"
            raise RuntimeError(message)
        time.sleep(0.02)


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# --- MariaDB -----------------------------------------------------------------


def start_mariadb(folder: Path) -> Server:
    """Start a MariaDB of our own; its user is root, without a password."""
    daemon, installer = installed("mariadbd"), installed("mariadb-install-db")
    data, port = folder / "data", free_port()
    subprocess.run(
        [
            installer,
            "--no-defaults",
            "--user=root",
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ],
        check=True,
        capture_output=True,
    )
    command = [
        daemon,
        "--no-defaults",
        "--user=root",
        f"--datadir={data}",
        f"--socket={folder / 'mysqld.sock'}",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        "--character-set-server=utf8mb4",
    ]
    return launch(command, port, folder / "mariadbd.log")


# --- Redis -------------------------------------------------------------------


def start_redis(folder: Path, *options: str, port: int | None = None) -> Server:
    """Start a Redis of our own that keeps nothing on disk."""
    port = port or free_port()
    command = [
        installed("redis-server"),
        *("--port", str(port)),
        *("--bind", "127.0.0.1"),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--dir", str(folder)),
        *options,
    ]
    return launch(command, port, folder / "redis.log")
