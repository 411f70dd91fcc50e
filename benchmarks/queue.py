"""What does a command cost that comes by the queue, and how many does a process get through?

    python -m benchmarks.queue [--broker rabbitmq] [--roles worker relay projector]
        [--workers 1 2 4] [--against REV]

In each round the queue is filled, on a database of its own; then one process of each role is
started, and timed from the first commit until the last event is handled by all of them. CPU
seconds are the operating system's own, of each process from then to then.

With `--workers` so many of them are measured too: they share out the partitions first, and are
stopped by a signal while the queue is filled; time begins when they are let go on.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias
from urllib.parse import urlsplit

import orjson
import pymysql

from benchmarks import measuring
from benchmarks.contenders import building
from benchmarks.contenders.by_queue.rules import TABLES
from benchmarks.measuring import OURS, PROJECT, Figures, cpu_seconds, environment_of
from tests.conftest import run_on
from tests.outside import PARTITIONS, Outside, RabbitOutside, RedisOutside
from tests.servers import start_mariadb, start_rabbitmq, start_redis

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

PATIENCE_SECONDS: Final = 240.0
LOOK_SECONDS: Final = 0.02
# A look counts rows: where it takes long, it is repeated less often.
LOOKS_APART: Final = 20
BATCH: Final = 1000
QUICK_COMMANDS: Final = 200
SHARE: Final = 8  # of the commands, for those that need some ten times as long
CRATES_AT_ONCE: Final = 16
ALL: Final = "all processes"
CELERY: Final = "benchmarks.contenders.by_queue.celery_bank"
ASYNCIO: Final = "benchmarks.contenders.by_queue.asyncio_bank"


@dataclass(frozen=True, slots=True)
class Moment:
    """What the clocks say: the wall's, and the CPU seconds of each process."""

    at: float
    cpu: dict[str, float]

    @classmethod
    def now(cls, processes: Mapping[str, int]) -> Moment:
        """Look at the clocks; of a role's processes, `worker` and `worker 2`, take the sum."""
        cpu: dict[str, float] = {}
        for name, pid in processes.items():
            role = name.split()[0]
            cpu[role] = cpu.get(role, 0.0) + cpu_seconds(pid)
        return cls(time.monotonic(), cpu)

    def until(self, end: Moment, count: int) -> dict[str, tuple[float, float]]:
        """Return wall and CPU of each process and of all, in microseconds for each of `count`."""
        wall = (end.at - self.at) / count * 1e6
        cpu = {name: (end.cpu[name] - it) / count * 1e6 for name, it in self.cpu.items()}
        return {name: (wall, it) for name, it in (cpu | {ALL: sum(cpu.values())}).items()}


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
def servers(broker: str, *settings: str) -> Generator[Servers]:
    """Run private servers for the length of a block; `settings` are MariaDB's options."""
    with tempfile.TemporaryDirectory(prefix="cqrs-es-") as name, ExitStack() as stack:
        folder = Path(name)
        for part in ("mariadb", "broker"):
            (folder / part).mkdir()
        mariadb = start_mariadb(folder / "mariadb", *settings)
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
class Service(ABC):
    """What is measured, on a database and queues of its own."""

    servers: Servers
    name: str

    @abstractmethod
    def fill(self, count: int) -> None:
        """Make the tables, and fill the queue."""

    @abstractmethod
    def measure(self, count: int) -> dict[str, tuple[float, float]]:
        """Time it; return wall and CPU of each process, in microseconds a command."""


class Consumer(Service):
    """What takes its commands from a queue."""

    @abstractmethod
    def start(self) -> dict[str, subprocess.Popen[bytes]]:
        """Start its processes."""

    @abstractmethod
    def decided(self) -> int:
        """Return how many commands have an outcome."""

    def caught_up(self) -> bool:
        """Say whether what follows from outcomes is done."""
        return True

    def measure(self, count: int) -> dict[str, tuple[float, float]]:
        """Time it; return wall and CPU of each process, in microseconds a command."""
        with self.running() as started:
            processes = {role: it.pid for role, it in started.items()} | self.servers.processes
            looks = self.looks(started)
            first = next(decided for decided in looks if decided > 0)
            begin = Moment.now(processes)
            next(decided for decided in looks if decided >= count and self.caught_up())
            end = Moment.now(processes)
        return begin.until(end, max(1, count - first))

    @contextmanager
    def running(self) -> Generator[dict[str, subprocess.Popen[bytes]]]:
        """Run its processes for the length of a block."""
        started = self.start()
        with contextlib.ExitStack() as stack:
            for process in started.values():
                stack.callback(process.wait, 60)
                stack.callback(process.terminate)
            yield started

    def looks(self, processes: dict[str, subprocess.Popen[bytes]]) -> Iterator[int]:
        """Yield again and again how many commands have an outcome."""
        deadline, pause = time.monotonic() + PATIENCE_SECONDS, LOOK_SECONDS
        while time.monotonic() < deadline:
            for name, process in processes.items():
                if process.poll() is not None:
                    message = f"the {name} ended with exit code {process.returncode}"
                    raise RuntimeError(message)
            time.sleep(pause)
            began = time.monotonic()
            decided = self.decided()
            pause = max(LOOK_SECONDS, LOOKS_APART * (time.monotonic() - began))
            yield decided
        raise TimeoutError


@dataclass(slots=True)
class Bank(Consumer):
    """The bank as one commit has it."""

    tree: Path
    roles: Sequence[str]
    lease_seconds: ClassVar[str] = "3"

    def run(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a verb."""
        settings = {
            "CQRS_ES_APP": "worker.app:app",
            "CQRS_ES_STORE_URL": f"{self.servers.database}{self.name}",
            "CQRS_ES_BROKER_URL": self.servers.broker,
            "CQRS_ES_SERVICE": self.name,
            "CQRS_ES_LEASE_SECONDS": self.lease_seconds,
            "CQRS_ES_LOG_LEVEL": "WARNING",
        }
        return quiet([sys.executable, "-m", "cqrs_es.cli", *arguments], settings, self.tree)

    def fill(self, count: int) -> None:
        """Make the tables, and fill the queue."""
        run_on(self.servers.database, f"CREATE DATABASE {self.name}")
        finished(self.run("init"))
        self.send(itertools.islice(measuring.commands(), count))

    def send(self, messages: Iterator[dict[str, Any]]) -> None:
        """Fill the queue."""
        while some := list(itertools.islice(messages, BATCH)):
            self.servers.outside.send(self.name, some)

    def start(self) -> dict[str, subprocess.Popen[bytes]]:
        """Start a process of each role."""
        return {role: self.run(role) for role in self.roles}

    def decided(self) -> int:
        """Return how many commands have an outcome."""
        return self.servers.query(self.name, "SELECT COUNT(*) FROM command_outcomes")

    def caught_up(self) -> bool:
        """Say whether the role that is the furthest behind has handled every event."""

        def query(sql: str) -> int:
            return self.servers.query(self.name, sql)

        written = query("SELECT SUM(head) FROM log_partitions")
        done = [written]
        checkpoints = "SELECT SUM(log_offset) FROM checkpoints WHERE projector LIKE "
        if "relay" in self.roles:
            done.append(query(f"{checkpoints} '$relay'"))
        if "projector" in self.roles:
            done += [query(f"{checkpoints} '{v}%'") for v in ("account_query", "bank_totals")]
        return min(done) >= written


@dataclass(slots=True)
class Workers(Bank):
    """The bank with some workers, among which the partitions are shared out before it begins."""

    workers: int = 1
    lease_seconds: ClassVar[str] = "6"  # well beyond what it takes to fill the queue

    def fill(self, count: int) -> None:
        """Make the tables; the queue is filled when the workers are there."""
        Bank.fill(self, 0)

    def start(self) -> dict[str, subprocess.Popen[bytes]]:
        """Start all of them."""
        return {f"worker {number}": self.run("worker") for number in range(1, self.workers + 1)}

    def measure(self, count: int) -> dict[str, tuple[float, float]]:
        """Time it; return wall and CPU of all workers, in microseconds a command."""
        messages = list(itertools.islice(measuring.commands(), count))
        with self.running() as started:
            processes = {name: it.pid for name, it in started.items()} | self.servers.processes
            looks = self.looks(started)
            next(None for _ in looks if self._shared_out())
            for process in started.values():
                process.send_signal(signal.SIGSTOP)
            try:
                self.send(iter(messages))
                begin = Moment.now(processes)
            finally:
                for process in started.values():
                    process.send_signal(signal.SIGCONT)
            next(None for decided in looks if decided >= count)
            end = Moment.now(processes)
        return begin.until(end, count)

    def _shared_out(self) -> bool:
        """Say whether each has as many partitions as any other."""
        share = PARTITIONS // self.workers
        owners = "SELECT owner FROM leases WHERE role = 'worker' AND owner IS NOT NULL"
        with_share = f"{owners} GROUP BY owner HAVING COUNT(*) >= {share}"
        found = self.servers.query(self.name, f"SELECT COUNT(*) FROM ({with_share}) AS w")
        return found == self.workers


@dataclass(slots=True)
class ByHand(Consumer):
    """A module of `contenders/by_queue/`: how its worker is started, by which Python."""

    module: str
    python: str | Path
    worker: Sequence[str]

    def _run(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        driver = "mysql+pymysql" if self.module == CELERY else "mysql"
        settings = {
            "DATABASE_URL": f"{self.servers.database}{self.name}".replace("mysql", driver, 1),
            "BROKER_URL": self.servers.broker.replace("amqp://", "pyamqp://"),
            "QUEUE": self.name,
            "PYTHONWARNINGS": "ignore",  # Celery's of being root
        }
        return quiet([self.python, "-m", *arguments], settings, PROJECT)

    def fill(self, count: int) -> None:
        """Make the tables, and have it send what others are sent."""
        run_on(self.servers.database, f"CREATE DATABASE {self.name}")
        for table in TABLES:
            run_on(self.servers.database, table.replace("TABLE ", f"TABLE {self.name}."))
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            commands = list(itertools.islice(measuring.commands(), count))
            Path(file.name).write_bytes(orjson.dumps(commands))
            finished(self._run(self.module, file.name))

    def start(self) -> dict[str, subprocess.Popen[bytes]]:
        """Start its worker."""
        return {"worker": self._run(*self.worker)}

    def decided(self) -> int:
        """Return how many commands have an outcome."""
        return self.servers.query(self.name, "SELECT COUNT(*) FROM processed")


@dataclass(slots=True)
class Crates(Service):
    """The Rust crates, which have no queue: in-process, and the commands from a file."""

    program: Path
    at_once: int = CRATES_AT_ONCE
    commands: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def fill(self, count: int) -> None:
        """Make the database, and the commands."""
        run_on(self.servers.database, f"CREATE DATABASE {self.name}")
        self.commands = list(itertools.islice(measuring.commands(), count))

    def measure(self, count: int) -> dict[str, tuple[float, float]]:
        """Time them from when all are connected; return what others do."""
        arguments = (f"{self.servers.database}{self.name}", str(self.at_once))
        contender = measuring.Contender("mysql-es", arguments, program=(str(self.program),))
        first = count // 10
        with tempfile.TemporaryDirectory() as folder, measuring.running(contender) as process:
            file = Path(folder) / "commands.json"
            file.write_bytes(orjson.dumps(self.commands[:first]))
            measuring.ask(process, file)
            file.write_bytes(orjson.dumps(self.commands[first:]))
            processes = {"worker": process.pid} | self.servers.processes
            begin = Moment.now(processes)
            measuring.ask(process, file)
            end = Moment.now(processes)
        return begin.until(end, count - first)


def quiet(
    command: Sequence[str | Path], settings: dict[str, str], tree: Path
) -> subprocess.Popen[bytes]:
    """Start a process of a tree."""
    environment = environment_of(tree) | settings
    return subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL)


def finished(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that prepares a round."""
    if process.wait(PATIENCE_SECONDS) != 0:
        message = f"{process.args!r} ended with exit code {process.returncode}"
        raise RuntimeError(message)


# --- Contenders --------------------------------------------------------------

Make: TypeAlias = "Callable[[Servers, str], Service]"


def contenders(
    chosen: argparse.Namespace, against: measuring.Revision | None
) -> dict[str, tuple[Make, int]]:
    """Return who is measured, each with how many commands it gets in a round."""

    def bank(tree: Path) -> Make:
        return lambda running, name: Bank(running, name, tree, chosen.roles)

    def by_hand(module: str, python: str | Path, *worker: str) -> Make:
        return lambda running, name: ByHand(running, name, module, python, worker)

    def some(tree: Path, number: int) -> Make:
        return lambda running, name: Workers(running, name, tree, ["worker"], number)

    count = QUICK_COMMANDS if chosen.quick else chosen.commands
    trees = {OURS: PROJECT} | ({} if against is None else {against.name: against.tree})
    found = {name: (bank(tree), count) for name, tree in trees.items()}
    for name, tree in trees.items():
        prefix = "" if name == OURS else f"{name}, "
        for number in chosen.workers:
            title = f"{prefix}{number} worker{'s' * (number > 1)}"
            found[title] = (some(tree, number), count)
    if chosen.alone or against is not None:
        return found
    if (python := building.celery_python()) is not None:
        celery = ("celery", "--app", CELERY, "worker", "--loglevel", "ERROR", "--concurrency")
        found["celery"] = (by_hand(CELERY, python, *celery, str(chosen.processes)), count // SHARE)
    if chosen.broker == "redis":
        found["asyncio"] = (by_hand(ASYNCIO, sys.executable, ASYNCIO), count // SHARE)
        if (program := building.crates(quick=chosen.quick)) is not None:
            found["mysql-es"] = (lambda running, name: Crates(running, name, program), count)
    return found


def race(
    chosen: argparse.Namespace, against: measuring.Revision | None
) -> dict[str, dict[str, Figures]]:
    """Measure all of them, round by round in turns; return figures by process."""
    turns = list(contenders(chosen, against).items())
    order = [name for name, _ in turns]
    figures: dict[str, dict[str, Figures]] = {}
    with servers(chosen.broker) as running:
        for number in range(1 if chosen.quick else chosen.rounds):
            turns.append(turns.pop(0))
            for place, (name, (make, count)) in enumerate(turns):
                service = make(running, f"bank{number}x{place}")
                service.fill(count)
                for process, (wall, cpu) in service.measure(count).items():
                    found = figures.setdefault(process, {}).setdefault(name, Figures())
                    found.wall.append(wall)
                    found.cpu.append(cpu)
    return {
        process: {name: found[name] for name in order if name in found}
        for process, found in figures.items()
    }


def main() -> None:
    """Measure."""
    parser = measuring.options(__doc__, rounds=7, commands=20_000)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--alone", action="store_true", help="without the contenders")
    parser.add_argument("--processes", type=int, default=8, help="of Celery's pool")
    parser.add_argument("--roles", nargs="+", default=["worker"], metavar="VERB")
    parser.add_argument("--workers", nargs="+", type=int, default=[], help="measure so many too")
    chosen = parser.parse_args()
    report = measuring.Report("queue", chosen)
    with measuring.revision(chosen.against) as against:
        for process, figures in race(chosen, against).items():
            report.add(process, figures)
    report.finish()


if __name__ == "__main__":
    main()
