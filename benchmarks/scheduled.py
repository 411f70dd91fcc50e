"""What scheduled commands cost: the look for due ones, their decision, how late timers are.

    python -m benchmarks.scheduled [--store mysql postgres sqlite] [--rows 1000000] [--json PATH]

One row in ten is due, the others are for the next day. A worker asks for a batch, and for as
many more as it has in hand. A worker in this process then decides as many commands from its
queue in memory as from rows, in turns; both on the same store. `--rows 0` leaves the first out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from benchmarks.measuring import Figures, Report, add_json
from benchmarks.summing import Add, Sum
from cqrs_es import wire
from cqrs_es.application import Application
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.commands import new_command
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.ports.store import ScheduledCommand
from cqrs_es.settings import Settings
from cqrs_es.stores.sql.scheduled import DUE
from cqrs_es.telemetry.metrics import Meter
from cqrs_es.types import utc_now
from tests.conftest import run_on
from tests.servers import psql, start_mariadb, start_postgres
from tests.stores import sql_of
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Generator

    from cqrs_es.messages import CommandMessage
    from cqrs_es.opened import OpenApplication

PARTITIONS = 16
AGGREGATES = 2_000
BATCH = Settings().batch_size


class Lateness(Meter):
    """Keeps how late each scheduled command was taken."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def fired(self, late: float) -> None:
        self.seconds.append(late)


def message(number: int) -> CommandMessage:
    made = new_command(Sum, f"s-{number % AGGREGATES}", Add(number))
    return wire.parse_command(wire.encode_command(made))


def messages(count: int) -> list[CommandMessage]:
    """Make the commands of a round, each time the same but for their ids."""
    return [message(number) for number in range(count)]


def row(number: int, due: datetime) -> ScheduledCommand:
    return ScheduledCommand.of(message(number), due, PARTITIONS)


async def fill(opened: OpenApplication, count: int) -> None:
    """Add rows, one in ten of which is due."""
    now = datetime.now(UTC)
    day = 86_400
    for first in range(0, count, 5_000):
        spans = [
            random.uniform(600, day) if n % 10 else -random.uniform(0, day) for n in range(5_000)
        ]
        rows = [row(first + n, now + timedelta(seconds=span)) for n, span in enumerate(spans)]
        await opened.storage.events.schedule(rows)


async def look(opened: OpenApplication, what: str) -> None:
    """Time the two queries of a worker."""
    events = opened.storage.events

    async def timed(ask: Callable[[int], Awaitable[object]]) -> float:
        samples: list[float] = []
        for number in range(48):
            began = time.perf_counter()
            await ask(number % PARTITIONS)
            samples.append((time.perf_counter() - began) * 1000)
        return statistics.median(samples)

    found = {
        "due, 100 rows": await timed(lambda p: events.due(p, 100)),
        "due, a batch": await timed(lambda p: events.due(p, BATCH)),
        "due, beside a batch": await timed(lambda p: events.due(p, 2 * BATCH)),
        "next due, 1 partition": await timed(lambda p: events.next_due([p])),
        "next due, all": await timed(lambda _: events.next_due(range(PARTITIONS))),
        "count due, all": await timed(lambda _: events.count_due(range(PARTITIONS))),
    }
    for name, ms in found.items():
        print(f"{what:9} {name:22} {ms:8.2f} ms", flush=True)


async def explain(opened: OpenApplication, what: str) -> None:
    """Print how long the server itself takes to find what a worker asks for, and how."""
    asked = (0, utc_now(), BATCH)
    query = sql_of(opened.storage.views).query
    if what == "mysql":
        found = json.loads(str((await query(f"ANALYZE FORMAT=JSON {DUE}", asked))[0][0]))
        block = found["query_block"]
        table = block["nested_loop"][0]["table"]
        pages = table["r_engine_stats"]["pages_accessed"]
        took = f"{block['r_total_time_ms']:.2f} ms by {table['key']}, {pages} pages"
        print(f"{what:9} {'due, a batch: server':22} {took}", flush=True)
    elif what == "postgres":
        for (line,) in await query(f"EXPLAIN (ANALYZE, BUFFERS) {DUE}", asked):
            print(f"{what:9} {line}", flush=True)


@dataclass(slots=True)
class Rates:
    """How many commands a second in each round, and the CPU seconds of each."""

    rate: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])

    def figures(self) -> Figures:
        """Return microseconds of each command, of all rounds but the first."""
        return Figures([1e6 / it for it in self.rate[1:]], [it * 1e6 for it in self.cpu[1:]])


@contextmanager
def clocked(what: str, count: int, rates: Rates) -> Generator[None]:
    began, cpu = time.monotonic(), time.process_time()
    yield
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    rates.rate.append(count / seconds)
    rates.cpu.append(cpu / count)
    print(f"{what:32} {count / seconds:8.0f}/s {cpu / count * 1e6:8.0f} µs CPU", flush=True)


async def decided(opened: OpenApplication, total: int) -> None:
    """Wait until so many commands are decided in all."""

    async def reached() -> bool:
        return opened.process.executor.counts.accepted >= total

    await eventually(reached, within_seconds=600)


async def from_queue(opened: OpenApplication, what: str, count: int, rates: Rates) -> None:
    """Decide commands that one worker takes from its queue."""
    before = opened.process.executor.counts.accepted
    sent = [OutgoingCommand(m.key.partition(PARTITIONS), m.id, m.body) for m in messages(count)]
    with clocked(f"{what} from the queue", count, rates):
        await opened.process.broker.send(sent)
        await decided(opened, before + count)


async def from_rows(opened: OpenApplication, what: str, count: int, rates: Rates) -> None:
    """Decide commands of rows that are all due at one moment, and were added before it."""
    before = opened.process.executor.counts.accepted
    due = datetime.now(UTC) + timedelta(seconds=count / 500)
    rows = [ScheduledCommand.of(each, due, PARTITIONS) for each in messages(count)]
    for first in range(0, count, 2_000):
        await opened.storage.events.schedule(rows[first : first + 2_000])
    left = (due - datetime.now(UTC)).total_seconds()
    if left < 0:
        busy = "adding the rows took until they were due: the machine is too busy"
        raise RuntimeError(busy)
    await asyncio.sleep(left)
    with clocked(f"{what} from rows", count, rates):
        await decided(opened, before + count)


async def race(opened: OpenApplication, what: str, count: int, rounds: int) -> dict[str, Figures]:
    """Decide commands from the queue and from rows, in turns, by one worker; compare the two."""
    queue, rows = Rates(), Rates()
    async with opened.running({"worker"}):
        for number in range(rounds + 1):  # the first of which warms up
            turns = [(from_queue, queue), (from_rows, rows)]
            for decide, rates in turns if number % 2 else reversed(turns):
                await decide(opened, f"{what} {number}", count, rates)
    pairs = [
        (mine / other, other_cpu / mine_cpu)
        for mine, other, mine_cpu, other_cpu in zip(
            rows.rate[1:], queue.rate[1:], rows.cpu[1:], queue.cpu[1:], strict=True
        )
    ]
    rate, other = statistics.median(rows.rate[1:]), statistics.median(queue.rate[1:])
    print(
        f"{what} one worker, {rounds} rounds of {count}:"
        f" rows {rate:.0f}/s ÷ queue {other:.0f}/s = {rate / other:.2f};"
        f" within a round {statistics.median(pair[0] for pair in pairs):.2f}"
        f" ({min(pairs)[0]:.2f} to {max(pairs)[0]:.2f}),"
        f" in CPU of the worker {statistics.median(pair[1] for pair in pairs):.2f}",
        flush=True,
    )
    return {"from the queue": queue.figures(), "from rows": rows.figures()}


async def timers(opened: OpenApplication, what: str, meter: Lateness) -> None:
    """Measure how late commands are that become due one by one."""
    meter.seconds.clear()
    async with opened.running({"worker"}):
        await asyncio.sleep(3)
        now = datetime.now(UTC)
        rows = [row(n, now + timedelta(seconds=2 + random.uniform(0, 10))) for n in range(300)]
        before = opened.process.executor.counts.accepted
        await opened.storage.events.schedule(rows)  # as another process: nobody is told
        await decided(opened, before + 300)
    late = sorted(meter.seconds[-300:])
    print(
        f"{what} lateness p50 {late[150] * 1000:.0f} ms, p99 {late[297] * 1000:.0f} ms", flush=True
    )


async def measure(what: str, url: str, chosen: argparse.Namespace, report: Report) -> None:
    app = Application("bench")
    app.aggregate(Sum)
    meter = Lateness()
    settings = Settings(store_url=url, partitions=PARTITIONS)
    opening = app.open(
        settings, broker=MemoryBroker(event_retention=100), initialise=True, meter=meter
    )
    async with opening as opened:
        report.add(what, await race(opened, what, chosen.count, chosen.rounds))
        await timers(opened, what, meter)
        if not chosen.rows:
            return
        began = time.monotonic()
        await fill(opened, chosen.rows)
        print(f"{what} {chosen.rows} rows added in {time.monotonic() - began:.0f} s", flush=True)
        if what == "mysql":
            run_on(url, "ANALYZE TABLE bench.outgoing_commands")
        elif what == "postgres":
            psql(url, "VACUUM ANALYZE outgoing_commands")
        await look(opened, what)
        await explain(opened, what)


@contextmanager
def database(store: str) -> Generator[str]:
    """Run a private server with an empty database, where it has one; yield its URL."""
    with tempfile.TemporaryDirectory(prefix=f"cqrs-es-{store}-") as folder:
        if store == "sqlite":
            yield f"sqlite:///{folder}/bench.db"
            return
        if store == "mysql":
            server = start_mariadb(Path(folder))
            root = f"mysql://root@127.0.0.1:{server.port}/"
            run_on(root, "CREATE DATABASE bench")
        else:
            server = start_postgres(Path(folder))
            root = f"postgresql://postgres@127.0.0.1:{server.port}/"
            psql(root, "CREATE DATABASE bench")
        try:
            yield f"{root}bench"
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="What scheduled commands cost")
    stores = ["mysql", "postgres", "sqlite"]
    parser.add_argument("--store", nargs="+", default=stores, choices=stores)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--count", type=int, default=20_000, help="commands in a round")
    parser.add_argument("--rounds", type=int, default=3)
    add_json(parser)
    chosen = parser.parse_args()
    report = Report("scheduled", chosen)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    for store in chosen.store:
        with database(store) as url:
            asyncio.run(measure(store, url, chosen, report))
    report.finish()


if __name__ == "__main__":
    main()
