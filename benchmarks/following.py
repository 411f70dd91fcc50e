"""What does it cost to follow the log: relay, projector and rebuild, beside the drivers alone?

    python -m benchmarks.following [--subjects projector rebuild relay] [--broker rabbitmq]
        [--commands 100000] [--against REV]

The bank decides so many commands once; each contender gets a copy of that log, and follows it from
its beginning to its end. Ours are processes of the command line: the projector fills both views of
the bank, a rebuild one of them, the relay publishes to a topic that somebody has subscribed to.
Theirs (`contenders/by_driver.py`) read as many rows at a time: the reader decodes them into the
same events and writes no views, the relay writes them as CloudEvents and publishes, the publisher
has these before its time begins.

Time begins when a process reads the log for the first time, for which a lock keeps it waiting.
It ends when its checkpoints are at the log's end, for a rebuild with its process, after the switch.
Of the projector an event counts twice, as two views read it. CPU is that of the process; then that
of database and broker too.
"""

from __future__ import annotations

import os
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import pymysql

from benchmarks import measuring
from benchmarks.measuring import OURS, PROJECT, Contender, Figures
from benchmarks.queue import (
    ALL,
    PATIENCE_SECONDS,
    QUICK_COMMANDS,
    Bank,
    Moment,
    Servers,
    servers,
)

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

ORIGINAL: Final = "original"
VIEWS: Final = ("account_query", "bank_totals")
MARK: Final = "$relay"
LOOK_SECONDS: Final = 0.01
FEW_EVENTS: Final = 1_000
OF_A_SERVICE: Final = {"source", "logepoch"}
# All of them are in memory, whoever comes first.
SERVER: Final = ("--innodb-buffer-pool-size=2G", "--innodb-log-file-size=1G")
COLUMNS: Final = (
    "aggregate_type, aggregate_id, sequence, event_type, event_version, payload, metadata,"
    " log_partition, log_offset, command_id, recorded_at"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a verb of ours, what moves as it goes on, and who else does it."""

    verb: Sequence[str]
    followers: Sequence[str]
    others: dict[str, str]
    """Modes of `by_driver`, by name."""

    @property
    def ends(self) -> bool:
        """Whether the process ends with its task."""
        return self.verb[0] == "rebuild"


READER: Final = {"aiomysql": "read"}
SUBJECTS: Final = {
    "projector": [Subject(["projector"], VIEWS, READER)],
    "rebuild": [Subject(["rebuild", view], [view], READER) for view in VIEWS],
    "relay": [Subject(["relay"], [MARK], {"by driver": "relay", "publishing only": "publish"})],
}


# --- The log -----------------------------------------------------------------


@dataclass(slots=True)
class Log:
    """The servers, with a log that the bank has written."""

    running: Servers
    events: int
    connection: Any
    topic: dict[int, list[dict[str, Any]]] = field(
        default_factory=dict[int, "list[dict[str, Any]]"]
    )

    @classmethod
    @contextmanager
    def written(cls, broker: str, commands: int) -> Generator[Log]:
        """Have the bank decide commands that come by the queue, as they do."""
        with servers(broker, *SERVER) as running:
            bank = Bank(running, ORIGINAL, PROJECT, ["worker"])
            bank.fill(commands)
            bank.measure(commands)
            running.outside.lose_everything(ORIGINAL)
            events = running.query(ORIGINAL, "SELECT COUNT(*) FROM events")
            url = urlsplit(running.database)
            connection = pymysql.connect(
                host=url.hostname, port=url.port or 3306, user="root", autocommit=True
            )
            print(f"{events:,} events of {commands:,} commands", flush=True)
            with connection:
                yield cls(running, events, connection)

    def number(self, sql: str) -> int:
        """Return the one number that a query finds."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
            return int(cursor.fetchall()[0][0] or 0)

    def tell(self, sql: str) -> None:
        """Run a statement."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql)

    def copy_events(self, name: str) -> None:
        """Put the events into a database of their own."""
        self.tell(f"CREATE DATABASE {name}")
        self.tell(f"CREATE TABLE {name}.events LIKE {ORIGINAL}.events")
        self.tell(f"INSERT INTO {name}.events SELECT * FROM {ORIGINAL}.events")

    def copy(self, name: str) -> None:
        """Put the log into a database where there are tables for it."""
        self.tell(f"INSERT INTO {name}.events ({COLUMNS}) SELECT {COLUMNS} FROM {ORIGINAL}.events")
        heads = f"SELECT log_partition, head FROM {ORIGINAL}.log_partitions"
        self.tell(f"REPLACE INTO {name}.log_partitions (log_partition, head) {heads}")

    def compare_topic(self, name: str) -> None:
        """Raise an error unless a topic is empty or as the first one; one of many is not read."""
        if self.events > FEW_EVENTS:
            return
        found = {
            partition: [{k: v for k, v in it.items() if k not in OF_A_SERVICE} for it in events]
            for partition, events in self.running.outside.topic(name).items()
            if events
        }
        self.topic = self.topic or found
        if found and found != self.topic:
            raise RuntimeError(f"{name} does not publish what others do")


# --- A round -----------------------------------------------------------------


@dataclass(slots=True)
class Follower:
    """A contender, in a database of its own, under a service's name of its own."""

    log: Log
    name: str

    @contextmanager
    def prepared(self, tree: Path) -> Generator[Bank]:
        """Have a tree make the tables for the length of a block, and copy the log."""
        bank = Bank(self.log.running, self.name, tree, [])
        bank.fill(0)
        self.log.copy(self.name)
        with self.cleaned_up():
            self.log.running.outside.follow(self.name)
            yield bank

    @contextmanager
    def cleaned_up(self) -> Generator[None]:
        """Leave nothing behind a block; see that the topic has what others' had."""
        try:
            yield
            self.log.compare_topic(self.name)
        finally:
            self.log.running.outside.lose_everything(self.name)
            self.log.tell(f"DROP DATABASE {self.name}")

    def processes(self, process: subprocess.Popen[Any]) -> dict[str, int]:
        return {"process": process.pid} | self.log.running.processes

    def ours(self, subject: Subject, tree: Path) -> tuple[Moment, Moment, int]:
        """Run a verb of a tree; return when it began and ended, and how many events it was."""
        with self.prepared(tree) as bank:
            self.log.tell(f"LOCK TABLES {self.name}.events WRITE")
            process = bank.run(*subject.verb)
            with ExitStack() as stack:
                stack.callback(process.wait, 60)
                stack.callback(process.terminate)
                self._until(process, self._is_kept_waiting)
                begin = Moment.now(self.processes(process))
                self.log.tell("UNLOCK TABLES")
                if subject.ends:
                    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                else:
                    self._until(process, lambda: self._done(subject) >= self._all(subject))
                end = Moment.now(self.processes(process))
            if process.returncode != 0 or self._done(subject) < self._all(subject):
                message = f"{subject.verb} ended with exit code {process.returncode}"
                raise RuntimeError(message)
        return begin, end, self._all(subject)

    def theirs(self, mode: str) -> tuple[Moment, Moment, int]:
        """Run what is written by hand."""
        running = self.log.running
        database = f"{running.database}{self.name}"
        module = ("benchmarks.contenders.by_driver", mode, database, running.broker, self.name)
        contender = Contender(mode, module)
        self.log.copy_events(self.name)
        with self.cleaned_up(), measuring.running(contender) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdout.readline()
            running.outside.follow(self.name)
            begin = Moment.now(self.processes(process))
            process.stdin.write("\n")
            process.stdin.flush()
            count = int(process.stdout.readline())
            end = Moment.now(self.processes(process))
        if count != self.log.events:
            message = f"{mode}: {count} events of {self.log.events}"
            raise RuntimeError(message)
        return begin, end, count

    def _is_kept_waiting(self) -> bool:
        waiting = f"db = '{self.name}' AND state LIKE 'Waiting for table%'"
        sql = f"SELECT COUNT(*) FROM information_schema.processlist WHERE {waiting}"
        return self.log.number(sql) > 0

    def _all(self, subject: Subject) -> int:
        return self.log.events * len(subject.followers)

    def _done(self, subject: Subject) -> int:
        wanted = " OR ".join(f"projector LIKE '{each}%'" for each in subject.followers)
        return self.log.number(
            f"SELECT SUM(log_offset) FROM {self.name}.checkpoints WHERE {wanted}"
        )

    def _until(self, process: subprocess.Popen[Any], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if process.poll() is not None:
                message = f"{process.args!r} ended with exit code {process.returncode}"
                raise RuntimeError(message)
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(LOOK_SECONDS)


def race(
    log: Log, subject: Subject, rounds: int, against: measuring.Revision | None
) -> dict[str, dict[str, Figures]]:
    """Measure all that do one thing, round by round in turns; return figures by process."""

    def verb(tree: Path) -> Callable[[Follower], tuple[Moment, Moment, int]]:
        return lambda follower: follower.ours(subject, tree)

    def by_hand(mode: str) -> Callable[[Follower], tuple[Moment, Moment, int]]:
        return lambda follower: follower.theirs(mode)

    contenders = {OURS: verb(PROJECT)}
    if against is None:
        contenders |= {name: by_hand(mode) for name, mode in subject.others.items()}
    else:
        contenders[against.name] = verb(against.tree)
    turns = list(contenders.items())
    found = {it: {name: Figures() for name in contenders} for it in ("process", ALL)}
    for number in range(rounds):
        turns.append(turns.pop(0))
        for place, (name, run) in enumerate(turns):
            begin, end, count = run(Follower(log, f"{subject.verb[0]}{number}x{place}"))
            for process, (wall, cpu) in begin.until(end, count).items():
                if process in found:
                    found[process][name].wall.append(wall)
                    found[process][name].cpu.append(cpu)
    return found


def main() -> None:
    """Measure."""
    parser = measuring.options(__doc__, rounds=5, commands=100_000)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    chosen = parser.parse_args()
    rounds, commands = (1, QUICK_COMMANDS) if chosen.quick else (chosen.rounds, chosen.commands)
    report = measuring.Report("following", chosen, each="an event")
    with (
        measuring.revision(chosen.against) as against,
        Log.written(chosen.broker, commands) as log,
    ):
        for subject in [each for name in chosen.subjects for each in SUBJECTS[name]]:
            for process, figures in race(log, subject, rounds, against).items():
                report.add(f"{' '.join(subject.verb)}, {process}", figures)
    report.finish()


if __name__ == "__main__":
    main()
