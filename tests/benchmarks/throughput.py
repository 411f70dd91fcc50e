"""How many commands a second one process of each role gets through, and what that costs.

    python -m tests.benchmarks.throughput [--copies 5] [--broker redis]
        [--roles worker relay projector]

The queue is filled first: with the real transactions of a bank (`BANK_DATA`), as
many copies of them as asked for, each copy with accounts and ids of its own. Then
one process of each role is started on private servers, and timed from the first
commit until the last event is handled by all of them. CPU seconds are the
operating system's own, of each process from then to then.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pymysql

from tests.bank_data import bank_folder
from tests.outside import Outside, RabbitOutside, RedisOutside
from tests.processes import CLI, Service, service
from tests.servers import Server, start_mariadb, start_rabbitmq, start_redis

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PATIENCE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Moment:
    """What the clocks say: the wall's, and the CPU seconds of each process."""

    at: float
    cpu: dict[str, float]

    @classmethod
    def now(cls, processes: dict[str, int]) -> Moment:
        return cls(time.monotonic(), {name: cpu_seconds(pid) for name, pid in processes.items()})


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process [proc(5), fields 14 and 15 of stat]."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


# --- The brokers -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Queue:
    """A broker that runs: its URL, the process whose CPU counts, and a client that fills it."""

    url: str
    pid: int
    outside: Outside


@contextmanager
def redis_queue(folder: Path) -> Generator[Queue]:
    server = start_redis(folder)
    url = f"redis://127.0.0.1:{server.port}/0"
    outside = RedisOutside(url)
    yield Queue(url, server.process.pid, outside)
    outside.close()
    server.stop()


@contextmanager
def rabbitmq_queue(folder: Path) -> Generator[Queue]:
    server = start_rabbitmq(folder)
    outside = RabbitOutside(server.url)
    yield Queue(server.url, int((folder / "pid").read_text()), outside)
    outside.hang_up()
    server.stop()


QUEUES = {"redis": redis_queue, "rabbitmq": rabbitmq_queue}


# --- The commands ------------------------------------------------------------


def commands(copies: int) -> Iterator[dict[str, Any]]:
    """Make the bank's commands, copy after copy."""
    lines = (bank_folder() / "commands.jsonl").read_bytes().splitlines()
    for copy in range(copies):
        for line in lines:
            yield renamed(orjson.loads(line), copy)


def renamed(message: dict[str, Any], copy: int) -> dict[str, Any]:
    account = f"{message['aggregate_id']}-{copy}"
    message["id"] = str(uuid.uuid5(uuid.UUID(message["id"]), str(copy)))
    message["aggregate_id"] = account
    if "account_id" in message["payload"]:
        message["payload"]["account_id"] = account
    return message


def enqueue(outside: Outside, name: str, copies: int) -> int:
    """Fill the queue; return how many commands it holds."""
    count = 0
    for batch in batched(commands(copies), 1000):
        outside.send(name, batch)
        count += len(batch)
    return count


def batched(messages: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    while batch := list(itertools.islice(messages, size)):
        yield batch


# --- The measurement ---------------------------------------------------------


def asked(port: int, sql: str) -> int:
    connection = pymysql.connect(host="127.0.0.1", port=port, user="root", database="bank")
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return int(cursor.fetchall()[0][0] or 0)


def events(port: int) -> int:
    return asked(port, "SELECT SUM(head) FROM log_partitions")


def slowest(port: int, roles: Sequence[str]) -> int:
    """Return how many events the role has handled that is the furthest behind."""
    done = [events(port)]
    if "relay" in roles:
        done.append(asked(port, "SELECT SUM(log_offset) FROM checkpoints WHERE projector='$relay'"))
    if "projector" in roles:
        for view in ("account_query", "bank_totals"):
            where = f"projector LIKE '{view}%'"
            sql = f"SELECT SUM(log_offset) FROM checkpoints WHERE {where}"  # noqa: S608 - our own
            done.append(asked(port, sql))
    return min(done)


def measure(
    bank: Service, mariadb: Server, queue: Queue, count: int, chosen: argparse.Namespace
) -> None:
    started = {role: start(bank, role, chosen.profile) for role in chosen.roles}
    processes = {role: process.pid for role, process in started.items()}
    processes |= {"mariadb": mariadb.process.pid, chosen.broker: queue.pid}
    while (first := events(mariadb.port)) == 0:
        time.sleep(0.005)
    begin = Moment.now(processes)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while slowest(mariadb.port, chosen.roles) < count:
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)
    report(count - first, begin, Moment.now(processes))
    for process in started.values():
        bank.stop(process)
    assert asked(mariadb.port, "SELECT COUNT(*) FROM command_outcomes") == count


def start(bank: Service, role: str, profile: str | None) -> subprocess.Popen[bytes]:
    if profile is None:
        return bank.start(role)
    file = f"{profile}.{role}"
    profiling = [sys.executable, "-m", "cProfile", "-o", file, "-m", *CLI[2:], role]
    process = subprocess.Popen(profiling, env=bank.environment, stderr=subprocess.DEVNULL)
    bank.running.append(process)
    return process


def report(count: int, begin: Moment, end: Moment) -> None:
    seconds = end.at - begin.at
    print(f"{count} commands in {seconds:.2f} s: {count / seconds:,.0f}/s")
    for name, spent in end.cpu.items():
        cpu = spent - begin.cpu[name]
        print(f"  {name:10} {cpu:5.2f} s of CPU, {cpu / count * 1e6:5.0f} µs a command")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--copies", type=int, default=5)
    options.add_argument("--broker", choices=QUEUES, default="redis")
    options.add_argument("--roles", nargs="+", default=["worker"], metavar="VERB")
    options.add_argument("--profile", metavar="FILE", help="cProfile writes to FILE.<role>")
    chosen = options.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for part in ("mariadb", "broker", "logs"):
            (folder / part).mkdir()
        mariadb = start_mariadb(folder / "mariadb")
        stack.callback(mariadb.stop)
        queue = stack.enter_context(QUEUES[chosen.broker](folder / "broker"))
        with pymysql.connect(host="127.0.0.1", port=mariadb.port, user="root") as connection:
            connection.cursor().execute("CREATE DATABASE bank")
        store = f"mysql://root@127.0.0.1:{mariadb.port}/bank"
        with service("worker.app:app", store, queue.url, folder / "logs") as bank:
            count = enqueue(queue.outside, "bank", chosen.copies)
            measure(bank, mariadb, queue, count, chosen)


if __name__ == "__main__":
    main()
