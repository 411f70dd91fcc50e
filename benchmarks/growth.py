"""What becomes of speed and memory as logs, streams and caches grow?

    python -m benchmarks.growth [--subjects log streams hot waiting memory] [--rows 1000000]

On MariaDB, with commands executed in this process, some hundreds at a time; what is compared
takes turns. CPU is that of this process and of the server together.

- log: commands for new aggregates where the log is empty; where it has so many rows; and there with
  ids of commands that are random, as uuid4 makes them, instead of in the order of time.
- streams: one command, where nothing is cached, for aggregates of ten events and of many.
- hot: commands for one aggregate, and for as many aggregates.
- waiting: each tenth of so many commands that wait on Redis when a worker is started.
- memory: what this process has grown by, once it has decided for so many aggregates.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import resource
import tempfile
import time
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from benchmarks import measuring, queue
from benchmarks.measuring import Figures, cpu_seconds
from benchmarks.summing import Add, Sum
from cqrs_es.aggregate import SnapshotEvery
from cqrs_es.application import Application
from cqrs_es.execution.policy import ExecutionPolicy
from cqrs_es.settings import Settings
from tests.conftest import run_on
from tests.servers import start_mariadb

if TYPE_CHECKING:
    import argparse
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from cqrs_es.opened import OpenApplication
    from tests.servers import Server

PARTITIONS: Final = 16
AT_ONCE: Final = 500
STREAM: Final = 10  # events of each aggregate that is there before
MOST_EVENTS: Final = 10_000  # of one command
MEGABYTE: Final = 1_000_000


@dataclass(slots=True)
class Growth:
    """A server, and what is asked of it."""

    server: Server
    chosen: argparse.Namespace
    report: measuring.Report
    names: Iterator[int] = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        """The server's URL, with an empty path."""
        return f"mysql://root@127.0.0.1:{self.server.port}/"

    @asynccontextmanager
    async def opened(self, name: str, cache_bytes: int | None = None) -> AsyncGenerator[Any]:
        """Open the application on a database, which is made if need be."""
        app = Application("growth")
        app.aggregate(Sum, source=SnapshotEvery(100))
        run_on(self.url, f"CREATE DATABASE IF NOT EXISTS {name}")
        settings = Settings(store_url=f"{self.url}{name}", partitions=PARTITIONS)
        policy = None if cache_bytes is None else ExecutionPolicy(cache_bytes=cache_bytes)
        async with app.open(settings, initialise=True, policy=policy) as opened:
            yield opened

    async def race(self, setting: str, contenders: dict[str, Any], rounds: int) -> None:
        """Have each do its rounds in turns; a round returns how many commands it was."""
        figures = {name: Figures() for name in contenders}
        turns = list(contenders.items())
        for number in range(1 + rounds):  # the first of which warms up
            turns.append(turns.pop(0))
            for name, run in turns:
                began, cpu = time.perf_counter(), self._cpu()
                count = await run()
                if number > 0:
                    figures[name].wall.append((time.perf_counter() - began) / count * 1e6)
                    figures[name].cpu.append((self._cpu() - cpu) / count * 1e6)
        self.report.add(setting, figures)

    def _cpu(self) -> float:
        return time.process_time() + cpu_seconds(self.server.process.pid)


async def give(opened: OpenApplication, ids: Sequence[str], at_random: bool = False) -> int:  # noqa: FBT001, FBT002
    """Execute a command for each id; return how many they were."""
    for first in range(0, len(ids), AT_ONCE):
        found = await asyncio.gather(
            *(
                opened.execute(
                    Sum, each, Add(1), command_id=str(uuid.uuid4()) if at_random else None
                )
                for each in ids[first : first + AT_ONCE]
            )
        )
        assert all(outcome.accepted for outcome in found)
    return len(ids)


def new_ids(count: int) -> list[str]:
    return [uuid.uuid4().hex for _ in range(count)]


def fill(url: str, name: str, rows: int) -> None:
    """Write events and outcomes, with ids at random, as if they had been decided.

    Without checks, MariaDB sorts what one statement writes to an empty table before it builds its
    indexes: page by page would take ever longer once they are larger than memory.
    """
    events = (
        f"INSERT INTO {name}.events SELECT 'sum', MD5(seq DIV {STREAM}), seq MOD {STREAM} + 1,"
        f" 'Added', '1', '{{\"number\":1}}', '{{}}', seq MOD {PARTITIONS},"
        f" seq DIV {PARTITIONS} + 1, UUID(), NOW(6) FROM {name}.seq_0_to_{rows - 1}"
    )
    outcomes = (
        f"INSERT INTO {name}.command_outcomes SELECT MD5(CONCAT('c', seq)), SHA2(seq, 256),"
        f" CONCAT('{{\"status\":\"', REPEAT('x', 120), '\"}}'), NOW(6)"
        f" FROM {name}.seq_0_to_{rows - 1}"
    )
    began = time.monotonic()
    for insert in (outcomes, events):
        run_on(url, f"SET STATEMENT unique_checks = 0, foreign_key_checks = 0 FOR {insert}")
    heads = f"({rows} + {PARTITIONS - 1} - log_partition) DIV {PARTITIONS}"
    run_on(url, f"UPDATE {name}.log_partitions SET head = {heads}")
    [(written,)] = run_on(url, f"SELECT SUM(head) FROM {name}.log_partitions")
    [(found,)] = run_on(url, f"SELECT COUNT(*) FROM {name}.events")
    assert found == written == rows, f"{found} events, heads of {written}, wanted {rows}"
    print(f"{rows:,} rows in {time.monotonic() - began:.0f} s", flush=True)


async def log(growth: Growth) -> None:
    """Compare an empty log with one of many rows."""
    chosen = growth.chosen
    async with AsyncExitStack() as stack:
        empty = await stack.enter_async_context(growth.opened("empty"))
        full = await stack.enter_async_context(growth.opened("full"))
        fill(growth.url, "full", chosen.rows)
        count, rows = chosen.commands, f"{chosen.rows:,} rows"
        contenders = {
            "empty": lambda: give(empty, new_ids(count)),
            rows: lambda: give(full, new_ids(count)),
            f"{rows}, random": lambda: give(full, new_ids(count), at_random=True),
        }
        await growth.race(f"log of {rows}", contenders, chosen.rounds)


async def streams(growth: Growth) -> None:
    """Compare aggregates of few and many events."""
    async with growth.opened("streams", cache_bytes=0) as opened:
        sizes = [10, 1_000, growth.chosen.stream]
        for size in sizes:
            for first in range(0, size, MOST_EVENTS):
                times = min(MOST_EVENTS, size - first)
                await opened.execute(Sum, f"of-{size}", Add(1, times))

        def one(size: int) -> Any:
            return lambda: give(opened, [f"of-{size}"])

        contenders = {f"{size:,} events": one(size) for size in sizes}
        await growth.race("streams", contenders, growth.chosen.rounds * 10)


async def hot(growth: Growth) -> None:
    """Compare one aggregate with as many as there are commands."""
    async with growth.opened("hot") as opened:
        count = growth.chosen.commands
        contenders = {
            "spread out": lambda: give(opened, [f"s-{number}" for number in range(count)]),
            "one aggregate": lambda: give(opened, ["hot"] * count),
        }
        await growth.race("hot", contenders, growth.chosen.rounds)


async def waiting(growth: Growth) -> None:
    """Compare the tenths of a queue that is long when its worker starts."""
    count = growth.chosen.waiting
    with queue.servers("redis") as running:
        bank = queue.Bank(running, "waiting", measuring.PROJECT, ["worker"])
        bank.fill(count)
        with bank.running() as started:
            processes = {"worker": started["worker"].pid} | running.processes
            left = (running.outside.queued(bank.name) for _ in iter(_pause, None))
            moments: list[queue.Moment] = []
            for tenth in range(11):
                next(each for each in left if each < count * (1 - tenth / 10) or each == 0)
                moments.append(queue.Moment.now(processes))
    found = [one.until(other, count // 10) for one, other in itertools.pairwise(moments)]
    for name in found[0]:
        tenths = {
            f"tenth {n}": Figures(*([each] for each in it[name])) for n, it in enumerate(found, 1)
        }
        growth.report.add(f"{count:,} waiting, {name}", tenths)


def _pause() -> bool:
    time.sleep(queue.LOOK_SECONDS)
    return True


async def memory(growth: Growth) -> None:
    """Say what this process takes when it knows many aggregates."""
    async with growth.opened("memory", growth.chosen.cache_bytes) as opened:
        await give(opened, new_ids(growth.chosen.commands))
        found, some = {"before": resident()}, growth.chosen.aggregates // 5
        for number in range(1, 6):
            await give(opened, new_ids(some))
            found[f"{number * some:,} aggregates"] = resident()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE
        growth.report.add_memory("memory", found | {"at most": most})


def resident() -> float:
    """Return how much memory this process has, in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE


SUBJECTS: Final = {"log": log, "streams": streams, "hot": hot, "waiting": waiting, "memory": memory}


def main() -> None:
    """Measure one after the other, each on a server of its own."""
    parser = measuring.options(__doc__, rounds=5, commands=5_000)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="of events that are there")
    parser.add_argument("--stream", type=int, default=100_000, help="events of the longest one")
    parser.add_argument("--waiting", type=int, default=300_000, help="commands in the queue")
    parser.add_argument("--aggregates", type=int, default=300_000, help="whose memory is measured")
    parser.add_argument("--cache-bytes", type=int, help="of the aggregates' memory")
    parser.add_argument("--server", nargs="*", default=[], metavar="SETTING", help="of MariaDB")
    chosen = parser.parse_args()
    if chosen.quick:
        chosen.rounds, chosen.commands, chosen.rows = 1, 50, 1_000
        chosen.stream, chosen.aggregates, chosen.waiting = 1_200, 1_000, 100
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    report = measuring.Report("growth", chosen)
    for subject in chosen.subjects:
        with tempfile.TemporaryDirectory(prefix="cqrs-es-") as folder:
            server = start_mariadb(Path(folder), *(f"--{each}" for each in chosen.server))
            try:
                asyncio.run(SUBJECTS[subject](Growth(server, chosen, report)))
            finally:
                server.stop()
    report.finish()


if __name__ == "__main__":
    main()
