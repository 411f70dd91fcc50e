"""Private servers for tests: on 127.0.0.1 and a free port, in a temporary folder.

Each is stopped by its process id when the test session ends. Where a server is
not installed, its tests are skipped with the reason; in CI that is an error.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONFIG = Path(__file__).parent.parent / "config"
# Where the programs that tests start come from: Debian's packages.
PACKAGES = {
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "initdb": "postgresql",
    "postgres": "postgresql",
    "psql": "postgresql",
    "pg_dump": "postgresql-client",
    "pg_restore": "postgresql-client",
    "createdb": "postgresql-client",
    "dropdb": "postgresql-client",
    "mariadb": "mariadb-client",
    "mariadb-dump": "mariadb-client",
    "pgbouncer": "pgbouncer",
    "redis-server": "redis-server",
    "epmd": "rabbitmq-server",
    "rabbitmq-server": "rabbitmq-server",
    "rabbitmqctl": "rabbitmq-server",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "curl": "curl",
}
START_SECONDS = 120.0  # 30 were too few for RabbitMQ where two cores had thirty processes to run
STOP_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server process of our own, and the port that it listens on."""

    process: subprocess.Popen[bytes]
    port: int
    command: Sequence[str] = ()
    user: str | None = None

    def kill(self) -> None:
        """End the process as a power cut would."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

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
    return path or not_installed(program)


def not_installed(program: str) -> NoReturn:
    """Skip the test, and say what to install: Debian's package, elsewhere one of that name."""
    package = PACKAGES.get(Path(program).name)
    advice = f": apt-get install {package}" if package else ""
    unavailable(f"{program} is not installed{advice}")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def launch(
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    user: str | None = None,
) -> Server:
    """Start a server and wait until it accepts connections."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=log.parent,  # where Mnesia leaves what it has to say when it dies
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            user=user,
        )
    server = Server(process, port, command, user)
    try:
        _await_port(server, log)
    except BaseException:
        server.stop()
        raise
    return server


def start_again(server: Server, log: Path) -> Server:
    """Start a server that has ended again, on its port, with what it has on disk."""
    return launch(server.command, server.port, log, user=server.user)


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


def start_mariadb(folder: Path, *options: str, port: int | None = None) -> Server:
    """Start a MariaDB of our own, again with what it has on disk; its user is root, no password."""
    daemon = installed("mariadbd")
    data, port = folder / "data", port or free_port()
    if not data.exists():
        shutil.copytree(_new_mariadb(), data)
    # Of its own: a server that starts deletes the temporary tables of all that share one.
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    command = [
        daemon,
        f"--defaults-file={CONFIG / 'mysql.cnf'}",
        "--user=root",
        f"--datadir={data}",
        f"--tmpdir={temporary}",
        f"--socket={folder / 'mysqld.sock'}",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        *options,
    ]
    return launch(command, port, folder / "mariadbd.log")


@functools.cache
def _new_mariadb() -> Path:
    """Make the data of a new MariaDB, once: a copy starts in a tenth of the time."""
    folder = Path(tempfile.mkdtemp(prefix="cqrs-es-mariadb-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    done = subprocess.run(
        [
            installed("mariadb-install-db"),
            "--no-defaults",
            "--user=root",
            f"--datadir={folder / 'data'}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / "data"


# --- MySQL itself ------------------------------------------------------------


def start_mysql(folder: Path, program: str) -> Server:
    """Start a MySQL of our own by its `mysqld`; its user is root, without a password."""
    daemon = installed(program)
    version = subprocess.run([daemon, "--version"], check=True, capture_output=True, text=True)
    if "mariadb" in version.stdout.lower():  # Debian's mysqld is a link to it
        unavailable(f"{daemon} is a MariaDB: {version.stdout.strip()}")
    data, port = f"--datadir={folder / 'data'}", free_port()
    subprocess.run(
        [daemon, "--no-defaults", "--initialize-insecure", "--user=root", data],
        check=True,
        capture_output=True,
    )
    command = [
        daemon,
        f"--defaults-file={CONFIG / 'mysql.cnf'}",
        "--user=root",
        data,
        f"--socket={folder / 'mysqld.sock'}",
        f"--pid-file={folder / 'mysqld.pid'}",
        f"--port={port}",
        "--bind-address=127.0.0.1",
        "--secure-file-priv=NULL",
        "--mysqlx=OFF",
    ]
    return launch(command, port, folder / "mysqld.log")


# --- PostgreSQL --------------------------------------------------------------

POSTGRES_PROGRAMS = "/usr/lib/postgresql"  # Debian's, in a folder for each major version
POSTGRES_USER = "postgres"  # Debian's; the server refuses to run as root


def start_postgres(folder: Path, *more_options: str) -> Server:
    """Start a PostgreSQL of our own; its user is postgres, without a password.

    What is in the folder, such as certificates, is given to the user that it runs as.
    """
    port, data = free_port(), folder / "data"
    user = POSTGRES_USER if os.geteuid() == 0 else None
    if user is not None:
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, user)
    subprocess.run(
        [_postgres_program("initdb"), "--auth=trust", f"--username={POSTGRES_USER}", str(data)],
        check=True,
        capture_output=True,
        user=user,
        cwd=folder,
    )
    options = {
        "port": port,
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": folder,
        "max_connections": 500,
    }
    settings = [f"--{name}={value}" for name, value in options.items()]
    command = [_postgres_program("postgres"), "-D", str(data), *settings, *more_options]
    server = launch(command, port, folder / "postgres.log", user=user)
    _await_answer(f"postgresql://{POSTGRES_USER}@127.0.0.1:{port}/")
    return server


def _await_answer(url: str) -> None:
    """Wait until PostgreSQL answers: it accepts connections while it is still starting."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            psql(url, "SELECT 1")
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _postgres_program(name: str) -> str:
    """Find a program of the newest version that is installed."""
    versions = Path(POSTGRES_PROGRAMS).glob("*/bin")
    for folder in sorted(versions, key=lambda path: int(path.parent.name), reverse=True):
        if found := shutil.which(name, path=str(folder)):
            return found
    return shutil.which(name) or not_installed(name)


def psql(url: str, statement: str) -> str:
    """Run a statement as PostgreSQL's own client does; return what it prints, one row a line."""
    database = url if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/postgres"
    done = subprocess.run(
        [installed("psql"), database, "-X", "-q", "-A", "-t", "-c", statement],
        check=True,
        capture_output=True,
        timeout=START_SECONDS,
    )
    return done.stdout.decode()


# --- PgBouncer ---------------------------------------------------------------


def start_pgbouncer(folder: Path, server_port: int, pool_mode: str) -> Server:
    """Start a pooler of our own before a PostgreSQL on 127.0.0.1, as its documentation has it."""
    program, port = installed("pgbouncer"), free_port()
    configuration = folder / "pgbouncer.ini"
    settings = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "trust",
        "auth_file": folder / "users",
        "pool_mode": pool_mode,
        "default_pool_size": 60,  # sessions are held by processes that keep them
        "server_tls_sslmode": "disable",
    }
    lines = [f"{name} = {value}" for name, value in settings.items()]
    databases = f"[databases]\n* = host=127.0.0.1 port={server_port}\n"
    configuration.write_text("\n".join([databases, "[pgbouncer]", *lines, ""]))
    (folder / "users").write_text(f'"{POSTGRES_USER}" ""\n')
    user = POSTGRES_USER if os.geteuid() == 0 else None
    if user is not None:
        for path in (folder, *folder.iterdir()):
            shutil.chown(path, user)
    return launch([program, str(configuration)], port, folder / "pgbouncer.log", user=user)


# --- DynamoDB ----------------------------------------------------------------


def start_dynamodb(folder: Path) -> Server:
    """Start a server that behaves like DynamoDB; it takes any credentials."""
    port = free_port()
    program = Path(__file__).parent / "dynamodb_server.py"
    return launch([sys.executable, str(program), str(port)], port, folder / "dynamodb.log")


# --- Redis -------------------------------------------------------------------


def start_redis(folder: Path, *options: str, port: int | None = None) -> Server:
    """Start a Redis of our own, configured as it is meant to be; `options` override that."""
    port = port or free_port()
    command = [
        installed("redis-server"),
        str(CONFIG / "redis.conf"),
        *("--port", str(port)),
        *("--bind", "127.0.0.1"),
        *("--dir", str(folder)),
        *options,
    ]
    return launch(command, port, folder / "redis.log")


# --- RabbitMQ ----------------------------------------------------------------

RABBITMQ_PROGRAMS = "/usr/lib/rabbitmq/bin"  # Debian's; on PATH there are wrappers that change user


@dataclass(frozen=True, slots=True)
class RabbitServer:
    """A RabbitMQ node of our own with an epmd of its own; its user is guest, password guest."""

    node: Server
    name_server: subprocess.Popen[bytes]
    folder: Path
    environment: dict[str, str]

    @property
    def port(self) -> int:
        """The port that speaks AMQP."""
        return self.node.port

    @property
    def url(self) -> str:
        """The default virtual host."""
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    def control(self, *arguments: str) -> str:
        """Run `rabbitmqctl` and return what it prints."""
        done = subprocess.run(
            [_rabbitmq_program("rabbitmqctl"), *arguments],
            env=self.environment,
            check=True,
            capture_output=True,
            timeout=START_SECONDS,
        )
        return done.stdout.decode()

    def signal(self, number: int) -> None:
        """Send a signal to the Erlang machine itself, not to the script around it."""
        os.kill(self._machine(), number)

    def kill(self) -> None:
        """End the node as a power cut would."""
        self.signal(signal.SIGKILL)
        self.node.process.wait(STOP_SECONDS)

    def start_again(self) -> RabbitServer:
        """Start the node that has ended again, with what it has on disk."""
        return replace(self, node=_launch_node(self.folder, self.port, self.environment))

    def stop(self) -> None:
        """End the node and its epmd."""
        if self.node.process.poll() is None:
            self.signal(signal.SIGTERM)
        self.node.stop()
        self.name_server.terminate()
        self.name_server.wait(STOP_SECONDS)

    def _machine(self) -> int:
        return int((self.folder / "pid").read_text())


def start_rabbitmq(folder: Path, *settings: str, management: bool = False) -> RabbitServer:
    """Start a RabbitMQ of our own, configured as it is meant to be; `settings` override lines.

    Its management API, where wanted, has the port that it has by default: 10,000 above.
    """
    name_server_port = free_port()
    name_server = subprocess.Popen(
        [installed("epmd"), "-port", str(name_server_port), "-address", "127.0.0.1"]
    )
    port = free_port()
    while management and port >= 55_000:
        port = free_port()
    if management:
        settings += (f"management.tcp.port = {port + 10_000}", "management.tcp.ip = 127.0.0.1")
    (folder / "plugins").write_text("[rabbitmq_management]." if management else "[].")
    configuration = (CONFIG / "rabbitmq.conf").read_text()
    (folder / "rabbitmq.conf").write_text("\n".join([configuration, *settings, ""]))
    environment = _rabbitmq_environment(folder, port, name_server_port)
    try:
        node = _launch_node(folder, port, environment)
    except BaseException:
        name_server.terminate()
        raise
    return RabbitServer(node, name_server, folder, environment)


def _launch_node(folder: Path, port: int, environment: dict[str, str]) -> Server:
    program = _rabbitmq_program("rabbitmq-server")
    return launch([program], port, folder / "rabbitmq.log", environment)


def _rabbitmq_environment(folder: Path, port: int, name_server_port: int) -> dict[str, str]:
    return os.environ | {
        "HOME": str(folder),  # where the Erlang cookie is
        "ERL_CRASH_DUMP": str(folder / "erl_crash.dump"),  # also of rabbitmqctl
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(folder / "data"),
        "RABBITMQ_LOG_BASE": str(folder / "logs"),
        "RABBITMQ_LOGS": "-",
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        "RABBITMQ_PID_FILE": str(folder / "pid"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "ERL_EPMD_PORT": str(name_server_port),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
    }


def _rabbitmq_program(name: str) -> str:
    path = shutil.which(name, path=RABBITMQ_PROGRAMS)
    return path or not_installed(name)
