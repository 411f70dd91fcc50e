"""What does a deposit over HTTP cost that is answered after its commit?

    python -m benchmarks.http [--connections 1 32] [--broker rabbitmq] [--against REV]

The bank's gateway on MariaDB, by the store and by the queue with one worker, beside the same
handler written by hand (`contenders/by_hand.py`). Each has a database of its own on one server,
and lives through all rounds; in a round one after the other gets as many requests, each with an
`Idempotency-Key`, for some of 200 accounts. CPU is that of gateway and worker, without database and
broker; who asks runs on the same machine, and costs the wall's clock as much for all.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any, Final

import orjson

from benchmarks import measuring
from benchmarks.measuring import (
    OURS,
    PROJECT,
    WARM_UP_ROUNDS,
    Figures,
    Revision,
    cpu_seconds,
    environment_of,
)
from benchmarks.queue import servers
from tests.conftest import run_on
from tests.servers import free_port

if TYPE_CHECKING:
    import argparse
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from benchmarks.queue import Servers

BY_HAND: Final = "by hand"
VIAS: Final = ("store", "queue")
ACCOUNTS: Final = 200
PATIENCE_SECONDS: Final = 60.0
QUICK_REQUESTS: Final = 200


# --- Who is asked ------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Processes that serve the bank over HTTP, and how they are asked."""

    port: int
    database: str
    open_path: str
    deposit_path: str
    counting: str
    """SQL that counts its deposits."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list[subprocess.Popen[bytes]])

    @property
    def cpu(self) -> float:
        return sum(cpu_seconds(each.pid) for each in self.processes)

    def post(self, path: str, payload: object, key: str) -> dict[str, Any]:
        """Send one request by a connection of its own."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        with contextlib.closing(connection):
            connection.request("POST", path, orjson.dumps(payload), headers)
            response = connection.getresponse()
            found: dict[str, Any] = orjson.loads(response.read())
        if response.status != HTTPStatus.OK:
            raise ConnectionError(found)
        return found

    def open_accounts(self) -> None:
        """Wait until it serves, and open all accounts."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for number in range(ACCOUNTS):
            payload = {"account_id": f"a-{number}"}
            while True:
                try:
                    self.post(self.open_path.format(number), payload, f"open-{number}")
                    break
                except ConnectionError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)

    def check(self, running: Servers, deposits: int) -> None:
        """Raise an error unless each deposit was made once, and is not made again."""
        path, key = self.deposit_path.format(0), str(uuid.uuid4())
        answers = [self.post(path, {"amount": "1.00"}, key)["duplicate"] for _ in range(2)]
        made = running.query(self.database, self.counting)
        if (answers, made) != ([False, True], deposits + 1):
            message = f"{self.database}: {made} deposits of {deposits + 1}, duplicate: {answers}"
            raise RuntimeError(message)


def requests(site: Site, count: int) -> Iterator[bytes]:
    """Write deposits as they go over the wire."""
    body = b'{"amount": "1.00"}'
    for _ in range(count):
        path = site.deposit_path.format(random.randrange(ACCOUNTS))
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {uuid.uuid4().hex}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        yield head.encode() + body


async def ask(site: Site, connections: int, count: int) -> None:
    """Have requests answered, one after the other on each connection."""
    left = iter(list(requests(site, count)))
    async with asyncio.timeout(PATIENCE_SECONDS), asyncio.TaskGroup() as group:
        for _ in range(connections):
            group.create_task(_ask_by_one(site.port, left))


async def _ask_by_one(port: int, left: Iterator[bytes]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        for request in left:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = head.partition(b"content-length:")[2].partition(b"\r\n")[0]
            body = await reader.readexactly(int(length))
            if not head.startswith(b"http/1.1 200"):
                raise RuntimeError((head + body).decode())


# --- Contenders --------------------------------------------------------------


@contextmanager
def started(
    tree: Path, arguments: Sequence[str], **settings: str
) -> Generator[subprocess.Popen[bytes]]:
    """Run a process for the length of a block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=tree,
        env=environment_of(tree) | settings,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)


def gateway(stack: ExitStack, running: Servers, name: str, via: str, tree: Path) -> Site:
    """Start the bank's gateway, by the queue with a worker."""
    run_on(running.database, f"CREATE DATABASE {name}")
    settings = {
        "CQRS_ES_APP": "worker.app:app",
        "CQRS_ES_STORE_URL": f"{running.database}{name}",
        "CQRS_ES_BROKER_URL": running.broker if via == "queue" else "memory://",
        "CQRS_ES_SERVICE": name,
        "CQRS_ES_LOG_LEVEL": "WARNING",
        "BANK_HTTP_VIA": via,
    }
    command = [sys.executable, "-m", "cqrs_es.cli", "init"]
    environment = environment_of(tree) | settings
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    site = Site(
        free_port(),
        name,
        "/aggregates/account/a-{}/OpenAccount",
        "/aggregates/account/a-{}/DepositMoney",
        "SELECT COUNT(*) FROM events WHERE event_type = 'CustomerDepositedMoney'",
    )
    verbs = [["serve", "--port", str(site.port)], *([["worker"]] if via == "queue" else [])]
    for verb in verbs:
        process = started(tree, ["cqrs_es.cli", *verb], **settings)
        site.processes.append(stack.enter_context(process))
    return site


def by_hand(stack: ExitStack, running: Servers) -> Site:
    """Start the handler that is written by hand."""
    run_on(running.database, "CREATE DATABASE by_hand")
    site = Site(
        free_port(),
        "by_hand",
        "/accounts/a-{}",
        "/accounts/a-{}/deposits",
        "SELECT COUNT(*) FROM ledger",
    )
    module = ["uvicorn", "benchmarks.contenders.by_hand:api", "--port", str(site.port)]
    arguments = [*module, "--no-access-log", "--log-level", "warning"]
    url = running.database.replace("mysql:", "mysql+aiomysql:")
    process = started(PROJECT, arguments, BY_HAND_DATABASE=f"{url}by_hand")
    site.processes.append(stack.enter_context(process))
    return site


def contenders(
    stack: ExitStack, running: Servers, against: Revision | None
) -> dict[str, dict[str, Site]]:
    """Start everybody; return who is compared, by way."""
    ways = {via: {OURS: gateway(stack, running, f"our_{via}", via, PROJECT)} for via in VIAS}
    if against is None:
        other = by_hand(stack, running)
        for sites in ways.values():
            sites[BY_HAND] = other
    else:
        for via, sites in ways.items():
            sites[against.name] = gateway(stack, running, f"other_{via}", via, against.tree)
    return ways


# --- Rounds ------------------------------------------------------------------


def race(chosen: argparse.Namespace, against: Revision | None) -> dict[str, Mapping[str, Figures]]:
    """Ask each in turn, round by round; return figures by way and number of connections."""
    rounds, count = (1, QUICK_REQUESTS) if chosen.quick else (chosen.rounds, chosen.commands)
    warm_up = 0 if chosen.quick else WARM_UP_ROUNDS
    with ExitStack() as stack:
        running = stack.enter_context(servers(chosen.broker))
        ways = contenders(stack, running, against)
        sites = list(dict.fromkeys(site for way in ways.values() for site in way.values()))
        for site in sites:
            site.open_accounts()
        found = {(site, many): Figures() for site in sites for many in chosen.connections}
        for number, many in itertools.product(range(warm_up + rounds), chosen.connections):
            sites.append(sites.pop(0))
            for site in sites:
                wall, cpu = measure(site, many, count)
                if number >= warm_up:
                    found[site, many].wall.append(wall)
                    found[site, many].cpu.append(cpu)
        for site in sites:
            site.check(running, (warm_up + rounds) * len(chosen.connections) * count)
    return {
        f"via {via}, {many} connections": {name: found[site, many] for name, site in way.items()}
        for via, way in ways.items()
        for many in chosen.connections
    }


def measure(site: Site, connections: int, count: int) -> tuple[float, float]:
    """Ask for so many deposits; return wall and CPU of each, in microseconds."""
    began, cpu = time.monotonic(), site.cpu
    asyncio.run(ask(site, connections, count))
    return (time.monotonic() - began) / count * 1e6, (site.cpu - cpu) / count * 1e6


def main() -> None:
    """Measure."""
    parser = measuring.options(__doc__, rounds=7, commands=2_000)
    parser.add_argument("--broker", choices=("redis", "rabbitmq"), default="redis")
    parser.add_argument("--connections", nargs="+", type=int, default=[32])
    chosen = parser.parse_args()
    report = measuring.Report("http", chosen)
    with measuring.revision(chosen.against) as against:
        for setting, figures in race(chosen, against).items():
            report.add(setting, figures)
    report.finish()


if __name__ == "__main__":
    main()
