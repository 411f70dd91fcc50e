"""What does a command cost that comes by the queue, and how many does a process get through?

    python -m benchmarks.queue [--broker rabbitmq] [--roles worker relay projector]
        [--against REV]

In each round the queue is filled, on a database of its own; then one process of each role is
started, and timed from the first commit until the last event is handled by all of them. CPU
seconds are the operating system's own, of each process from then to then.
"""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import pymysql

from benchmarks import measuring
from benchmarks.measuring import OURS, PROJECT, Figures, cpu_seconds, environment_of
from tests.conftest import run_on
from tests.outside import Outside, RabbitOutside, RedisOutside
from tests.servers import start_mariadb, start_rabbitmq, start_redis

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Sequence

PATIENCE_SECONDS: Final = 300.0
BATCH: Final = 1000


@dataclass(frozen=True, slots=True)
class Moment:
    """What the clocks say: the wall's, and the CPU seconds of each process."""

    at: float
    cpu: dict[str, float]

    @classmethod
    def now(cls, processes: dict[str, int]) -> Moment:
        """Look at the clocks."""
        return cls(time.monotonic(), {name: cpu_seconds(pid) for name, pid in processes.items()})


# --- The servers -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Servers:
    """A database server and a broker: their URLs, and the processes whose CPU counts."""

    database: str
    broker: str
    processes: dict[str, int]
    outside: Outside

    def query(self, database: str, sql: str) -> int:
        """Return the one number that a query finds."""
        parts = urlsplit(self.database)
        connection = pymysql.connect(
            host=parts.hostname, port=parts.port or 3306, user="root", database=database
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return int(cursor.fetchall()[0][0] or 0)


@contextmanager
def servers(broker: str) -> Generator[Servers]:
    """Run private servers for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="cqrs-es-") as name, ExitStack() as stack:
        folder = Path(name)
        for part in ("mariadb", "broker"):
            (folder / part).mkdir()
        mariadb = start_mariadb(folder / "mariadb")
        stack.callback(mariadb.stop)
        url = f"mysql://root@127.0.0.1:{mariadb.port}/"
        outside: Outside
        if broker == "redis":
            redis = start_redis(folder / "broker")
            stack.callback(redis.stop)
            broker_url, pid = f"redis://127.0.0.1:{redis.port}/0", redis.process.pid
            outside = RedisOutside(broker_url)
        else:
            rabbit = start_rabbitmq(folder / "broker")
            stack.callback(rabbit.stop)
            broker_url, pid = rabbit.url, int((folder / "broker/pid").read_text())
            outside = RabbitOutside(rabbit.url)
        stack.callback(outside.hang_up)
        yield Servers(url, broker_url, {"mariadb": mariadb.process.pid, broker: pid}, outside)


# --- A round -----------------------------------------------------------------


@dataclass(slots=True)
class Bank:
    """The bank as one commit has it: its processes, on a database and queues of its own."""

    servers: Servers
    tree: Path
    name: str
    roles: Sequence[str]

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process of the command line."""
        settings = {
            "CQRS_ES_APP": "worker.app:app",
            "CQRS_ES_STORE_URL": f"{self.servers.database}{self.name}",
            "CQRS_ES_BROKER_URL": self.servers.broker,
            "CQRS_ES_SERVICE": self.name,
            "CQRS_ES_LEASE_SECONDS": "3",
            "CQRS_ES_LOG_LEVEL": "WARNING",
        }
        return subprocess.Popen(
            [sys.executable, "-m", "cqrs_es.cli", *arguments],
            cwd=self.tree,
            env=environment_of(self.tree) | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def fill(self, count: int) -> None:
        """Make the tables, and fill the queue."""
        run_on(self.servers.database, f"CREATE DATABASE {self.name}")
        if (code := self.start("init").wait(60)) != 0:
            message = f"init of {self.tree} ended with exit code {code}"
            raise RuntimeError(message)
        messages = itertools.islice(measuring.commands(), count)
        while some := list(itertools.islice(messages, BATCH)):
            self.servers.outside.send(self.name, some)

    def handled(self) -> int:
        """Return how many events the role has handled that is the furthest behind."""

        def query(sql: str) -> int:
            return self.servers.query(self.name, sql)

        done = [query("SELECT SUM(head) FROM log_partitions")]
        checkpoints = "SELECT SUM(log_offset) FROM checkpoints WHERE projector LIKE "
        if "relay" in self.roles:
            done.append(query(f"{checkpoints} '$relay'"))
        if "projector" in self.roles:
            done += [query(f"{checkpoints} '{v}%'") for v in ("account_query", "bank_totals")]
        return min(done)

    def decided(self) -> int:
        """Return how many commands have an outcome."""
        return self.servers.query(self.name, "SELECT COUNT(*) FROM command_outcomes")

    def measure(self, count: int) -> dict[str, tuple[float, float]]:
        """Time the roles; return wall and CPU of each process, in microseconds a command."""
        started = {role: self.start(role) for role in self.roles}
        with contextlib.ExitStack() as stack:
            for process in started.values():
                stack.callback(process.wait, 60)
                stack.callback(process.terminate)
            processes = {role: it.pid for role, it in started.items()} | self.servers.processes
            deadline = time.monotonic() + PATIENCE_SECONDS
            while (first := self.decided()) == 0:
                _check(deadline)
            begin = Moment.now(processes)
            while self.decided() < count or self.handled() < self._events():
                _check(deadline)
            end = Moment.now(processes)
        left = max(1, count - first)
        wall = (end.at - begin.at) / left * 1e6
        return {n: (wall, (end.cpu[n] - begin.cpu[n]) / left * 1e6) for n in processes}

    def _events(self) -> int:
        return self.servers.query(self.name, "SELECT SUM(head) FROM log_partitions")


def _check(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError
    time.sleep(0.01)


def race(
    chosen: argparse.Namespace, against: measuring.Revision | None
) -> dict[str, dict[str, Figures]]:
    """Measure this tree, and another beside it, round by round; return figures by process."""
    trees = (
        [(OURS, PROJECT)] if against is None else [(OURS, PROJECT), (against.name, against.tree)]
    )
    rounds, count = (1, 200) if chosen.quick else (chosen.rounds, chosen.commands)
    figures: dict[str, dict[str, Figures]] = {}
    with servers(chosen.broker) as running:
        for number in range(rounds):
            trees.append(trees.pop(0))
            for place, (name, tree) in enumerate(trees):
                bank = Bank(running, tree, f"bank{number}x{place}", chosen.roles)
                bank.fill(count)
                for process, (wall, cpu) in bank.measure(count).items():
                    found = figures.setdefault(process, {}).setdefault(name, Figures())
                    found.wall.append(wall)
                    found.cpu.append(cpu)
    return figures


def main() -> None:
    """Measure."""
    parser = measuring.options(__doc__, rounds=7, commands=20_000)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--roles", nargs="+", default=["worker"], metavar="VERB")
    chosen = parser.parse_args()
    report = measuring.Report("queue", chosen)
    with measuring.revision(chosen.against) as against:
        for process, figures in race(chosen, against).items():
            report.add(process, figures)
    report.finish()


if __name__ == "__main__":
    main()
