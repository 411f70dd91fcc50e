"""How long after it was sent is a command answered, its event on the topic, and in the view?

    python -m benchmarks.latency [--store postgres] [--broker rabbitmq] [--rate 200]
        [--against REV]

A service of one process a role gets commands at an even pace and tells of each: its outcome
by a reply, its event by the topic; of some events the projector's checkpoint is looked at, each
millisecond until it is there. In the end nothing is sent for a while, and the statements are
counted that the whole service asks of the database.
"""

from __future__ import annotations

import dataclasses
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import amqp
import orjson
import psycopg
import pymysql
import redis
from rich.console import Console
from rich.table import Table

from benchmarks import measuring
from benchmarks.measuring import OURS, PROJECT, QUICK_COMMANDS, environment_of
from tests.outside import PARTITIONS, Outside, RabbitOutside, RedisOutside
from tests.servers import psql, start_mariadb, start_postgres, start_rabbitmq, start_redis

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Generator, Sequence

    from benchmarks.measuring import Revision

REPLY_TO: Final = "latency"
VIEW: Final = "account_query"
MOMENTS: Final = ("outcome", "topic", "view")
WARM_UP_COMMANDS: Final = 200
PATIENCE_SECONDS: Final = 60.0
SETTLING_SECONDS: Final = 10.0
IDLE_SECONDS: Final = 20.0


# --- The servers -------------------------------------------------------------


class Database(ABC):
    """A server of our own, and one connection to a database on it."""

    connection: Any

    @abstractmethod
    def create(self, name: str) -> str:
        """Make a database, connect to it, and return its URL."""

    @abstractmethod
    def statements(self) -> int:
        """Count the statements that the server has been asked, by whomever."""

    def query(self, sql: str) -> int:
        """Return the one number that a query finds, 0 for none."""
        with self.connection.cursor() as cursor:
            cursor.execute(sql)
            return int(cursor.fetchall()[0][-1] or 0)


class MariaDb(Database):
    """MariaDB."""

    def __init__(self, folder: Path) -> None:
        self._server = start_mariadb(folder)
        self.stop = self._server.stop

    def create(self, name: str) -> str:
        self.connection = pymysql.connect(
            host="127.0.0.1", port=self._server.port, user="root", autocommit=True
        )
        with self.connection.cursor() as cursor:
            cursor.execute(f"CREATE DATABASE {name}")
        self.connection.select_db(name)
        return f"mysql://root@127.0.0.1:{self._server.port}/{name}"

    def statements(self) -> int:
        return self.query("SHOW GLOBAL STATUS LIKE 'Questions'")


class Postgres(Database):
    """PostgreSQL, which counts statements by its extension `pg_stat_statements`."""

    def __init__(self, folder: Path) -> None:
        self._server = start_postgres(folder, "--shared_preload_libraries=pg_stat_statements")
        self.stop = self._server.stop
        psql(self._url("postgres"), "CREATE EXTENSION pg_stat_statements")

    def _url(self, name: str) -> str:
        return f"postgresql://postgres@127.0.0.1:{self._server.port}/{name}"

    def create(self, name: str) -> str:
        psql(self._url("postgres"), f"CREATE DATABASE {name}")
        self.connection = psycopg.connect(self._url(name), autocommit=True)
        return self._url(name)

    def statements(self) -> int:
        found = psql(self._url("postgres"), "SELECT SUM(calls)::bigint FROM pg_stat_statements")
        return int(found)


class Ear(ABC):
    """What hears replies and events, and notes when each came."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped = threading.Event()
        self.outcomes: dict[str, tuple[float, dict[str, Any]]] = {}
        self.events: dict[tuple[int, int], float] = {}
        self.newest: tuple[int, int] | None = None

    def note(self, body: bytes) -> None:
        """Note what came just now."""
        now, found = time.monotonic(), orjson.loads(body)
        if "command_id" in found:
            self.outcomes[found["command_id"]] = now, found
        else:
            self.newest = place = found["partition"], int(found["offset"])
            self.events.setdefault(place, now)

    @abstractmethod
    def listen(self) -> None:
        """Hear until stopped."""


class RedisEar(Ear):
    """Reads streams."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(name)
        self._client: Any = redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]

    def listen(self) -> None:
        streams = [f"{self.name}:events:{number}" for number in range(PARTITIONS)]
        after: dict[Any, Any] = dict.fromkeys([f"{self.name}:replies:{REPLY_TO}", *streams], "0-0")
        while not self.stopped.is_set():
            for stream, entries in self._client.xread(after, block=200):
                for entry, fields in entries:
                    self.note(fields.get(b"outcome") or fields[b"event"])
                    after[stream.decode()] = entry
        self._client.close()


class RabbitEar(Ear):
    """Consumes queues of its own."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(name)
        self._connection: Any = amqp.Connection(f"127.0.0.1:{urlsplit(url).port}")
        self._connection.connect()
        channel, replies = self._connection.channel(), f"{name}.replies.{REPLY_TO}"
        channel.queue_declare(replies, durable=True, auto_delete=False)
        channel.queue_declare(f"{name}.heard", exclusive=True)
        channel.queue_bind(f"{name}.heard", f"{name}.events", "#")
        for queue in (replies, f"{name}.heard"):
            channel.basic_consume(queue, no_ack=True, callback=self._take)

    def _take(self, message: Any) -> None:
        body = message.body
        self.note(body if isinstance(body, bytes) else body.encode())

    def listen(self) -> None:
        while not self.stopped.is_set():
            try:
                self._connection.drain_events(timeout=0.2)
            except TimeoutError:
                continue
        self._connection.close()


@dataclass(frozen=True, slots=True)
class Servers:
    """A database, a broker, and how to speak to it."""

    database: Database
    broker: str
    outside: Outside
    ear: Callable[[str, str], Ear]


@contextmanager
def servers(store: str, broker: str) -> Generator[Servers]:
    """Run private servers for the length of a block."""
    with tempfile.TemporaryDirectory(prefix="cqrs-es-") as name, ExitStack() as stack:
        folder = Path(name)
        for part in ("database", "broker"):
            (folder / part).mkdir()
        folder.chmod(0o755)
        kind = MariaDb if store == "mysql" else Postgres
        database = kind(folder / "database")
        stack.callback(database.stop)
        if broker == "redis":
            redis_server = start_redis(folder / "broker")
            stack.callback(redis_server.stop)
            url = f"redis://127.0.0.1:{redis_server.port}/0"
            found = Servers(database, url, RedisOutside(url), RedisEar)
        else:
            rabbit = start_rabbitmq(folder / "broker")
            stack.callback(rabbit.stop)
            found = Servers(database, rabbit.url, RabbitOutside(rabbit.url), RabbitEar)
        stack.callback(found.outside.hang_up)
        yield found


# --- A round -----------------------------------------------------------------


@dataclass(slots=True)
class Found:
    """What the rounds of one contender have shown: milliseconds, and statements a second."""

    p50: dict[str, list[float]] = field(default_factory=dict[str, "list[float]"])
    p99: dict[str, list[float]] = field(default_factory=dict[str, "list[float]"])
    idle: list[float] = field(default_factory=list[float])

    def add(self, what: str, seconds: Sequence[float]) -> None:
        """Note what one round has shown of one moment."""
        cuts = statistics.quantiles([*seconds, seconds[0]], n=100)
        self.p50.setdefault(what, []).append(cuts[49] * 1000)
        self.p99.setdefault(what, []).append(cuts[98] * 1000)


class Bank:
    """The bank as one commit has it, as a process of each role."""

    def __init__(self, running: Servers, tree: Path, name: str, roles: Sequence[str]) -> None:
        self._database = running.database
        self._outside = running.outside
        self._tree, self._name = tree, name
        url = self._database.create(name)
        self._environment = environment_of(tree) | {
            "CQRS_ES_APP": "worker.app:app",
            "CQRS_ES_STORE_URL": url,
            "CQRS_ES_BROKER_URL": running.broker,
            "CQRS_ES_SERVICE": name,
            "CQRS_ES_LOG_LEVEL": "WARNING",
        }
        assert self._start("init").wait(60) == 0
        self._ear = running.ear(running.broker, name)
        self._views: dict[tuple[int, int], float] = {}
        self._processes = [self._start(*role.split()) for role in roles]

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "cqrs_es.cli", *arguments],
            cwd=self._tree,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @contextmanager
    def listening(self) -> Generator[None]:
        """Hear what the service says during a block, and end the service with it."""
        threads = [threading.Thread(target=it) for it in (self._ear.listen, self._look)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for process in self._processes:
                process.terminate()
            self._ear.stopped.set()
            for thread in threads:
                thread.join()
            for process in self._processes:
                process.wait(60)

    def _look(self) -> None:
        """Look when the view has an event that was just heard, of one after the other."""
        while not self._ear.stopped.is_set():
            newest = self._ear.newest
            if newest is None or newest in self._views:
                time.sleep(0.001)
                continue
            partition, offset = newest
            wanted = f"projector LIKE '{VIEW}%' AND log_partition = {partition}"
            sql = f"SELECT MAX(log_offset) FROM checkpoints WHERE {wanted}"
            while self._database.query(sql) < offset:
                if self._ear.stopped.is_set():
                    return
                time.sleep(0.001)
            self._views[newest] = time.monotonic()

    def measure(self, messages: Sequence[dict[str, Any]], rate: float, found: Found) -> None:
        """Send commands at an even pace; note how long each took."""
        sent: dict[str, float] = {}
        begin = time.monotonic()
        for number, message in enumerate(messages):
            time.sleep(max(0.0, begin + number / rate - time.monotonic()))
            sent[message["id"]] = time.monotonic()
            self._outside.send(self._name, [message | {"reply_to": REPLY_TO}])
        self._await(lambda: sent.keys() <= self._ear.outcomes.keys())
        answered = [(id_, *self._ear.outcomes[id_]) for id_ in sent]
        begun = {
            (outcome["partition"], int(outcome["offset"])): sent[id_]
            for id_, _, outcome in answered
            if outcome["offset"] is not None
        }
        self._await(lambda: begun.keys() <= self._ear.events.keys())
        self._await(lambda: self._ear.newest in self._views)
        found.add("outcome", [at - sent[id_] for id_, at, _ in answered])
        found.add("topic", [self._ear.events[place] - at for place, at in begun.items()])
        seen = {place: at for place, at in self._views.items() if place in begun}
        found.add("view", [at - begun[place] for place, at in seen.items()])

    def idle(self, seconds: float) -> float:
        """Return how many statements a second the database is asked while nothing happens."""
        before = self._database.statements()
        time.sleep(seconds)
        return (self._database.statements() - before - 1) / seconds

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.005)


def race(chosen: argparse.Namespace, against: Revision | None) -> dict[str, Found]:
    """Measure this tree, and another beside it, round by round."""
    trees = [(OURS, PROJECT)]
    if against is not None:
        trees.append((against.name, against.tree))
    rounds, count, seconds = (
        (1, QUICK_COMMANDS, 2.0) if chosen.quick else (chosen.rounds, chosen.commands, IDLE_SECONDS)
    )
    found = {name: Found() for name, _ in trees}
    messages = measuring.commands()
    with servers(chosen.store, chosen.broker) as running:
        for number in range(rounds):
            trees.append(trees.pop(0))
            for place, (name, tree) in enumerate(trees):
                bank = Bank(running, tree, f"bank{number}x{place}", chosen.roles)
                with bank.listening():
                    bank.measure(list(islice(messages, WARM_UP_COMMANDS)), chosen.rate, Found())
                    bank.measure(list(islice(messages, count)), chosen.rate, found[name])
                    if number == 0:
                        time.sleep(0 if chosen.quick else SETTLING_SECONDS)
                        found[name].idle.append(bank.idle(seconds))
    return found


def show(found: dict[str, Found], setting: str) -> None:
    """Show the medians of all rounds, and what they lie between."""
    table = Table("contender", title=f"latency: {setting}, milliseconds after it was sent")
    for what in MOMENTS:
        table.add_column(f"{what} p50", justify="right")
        table.add_column("p99", justify="right")
    table.add_column("idle, statements/s", justify="right")
    for name, it in found.items():
        figures = [each for what in MOMENTS for each in (it.p50[what], it.p99[what])]
        cells = [f"{statistics.median(each):.1f}" for each in [*figures, it.idle]]
        table.add_row(name, *cells)
    Console(width=110).print(table)


def main() -> None:
    """Measure."""
    parser = measuring.options(__doc__, rounds=5, commands=2_000)
    parser.add_argument("--store", choices=("mysql", "postgres"), default="mysql")
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--rate", type=float, default=200.0, help="commands a second")
    roles = ["worker", "relay", "projector", "serve --public --port 0"]
    parser.add_argument("--roles", nargs="+", default=roles, metavar="VERB")
    chosen = parser.parse_args()
    with measuring.revision(chosen.against) as against:
        found = race(chosen, against)
    show(found, f"{chosen.broker}, {chosen.store}, {chosen.rate:g}/s")
    figures = {name: dataclasses.asdict(it) for name, it in found.items()}
    measuring.write(chosen.json, "latency", {"milliseconds": figures})


if __name__ == "__main__":
    main()
