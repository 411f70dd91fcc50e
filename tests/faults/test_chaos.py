"""The whole bank under load, while whatever can fail does; then its life is judged.

A seed gives the plan of the faults and the senders' commands; what happens when is
up to the machine. `make faults` runs for minutes (`CQRS_ES_TEST_CHAOS_SECONDS`) on
every pair of servers, `make test` for seconds on one.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pymysql
import pytest
import redis

from tests.conftest import run_on
from tests.history import recorder
from tests.history.checker import REACTOR, RELAY, assert_promises_held
from tests.history.records import History
from tests.history.traffic import PAUSE_SECONDS, Sender
from tests.lambda_runtime import REGION
from tests.outside import Outside, RabbitOutside, RedisOutside
from tests.processes import Service, service
from tests.proxy import Wires
from tests.servers import (
    RabbitServer,
    Server,
    installed,
    psql,
    start_again,
    start_dynamodb,
    start_mariadb,
    start_postgres,
    start_rabbitmq,
    start_redis,
)
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

log = logging.getLogger(__name__)

SECONDS = float(os.environ.get("CQRS_ES_TEST_CHAOS_SECONDS", "0"))
SHORT_FAULTS, SHORT_SECONDS = 5, 12.0  # in `make test`: whichever is first
LEASE_SECONDS = 3.0  # what `tests.processes` sets
ROLES = ("worker", "relay", "projector", "reactor")
SENDERS = 3
SMALL_DISK_BYTES = 2_000_000_000
# Seconds from the end of a fault until all that was sent before is answered.
PATIENCE = 200.0 if SECONDS else 100.0
LOOKS_APART_SECONDS = 0.1  # each asks the database twice

pytestmark = pytest.mark.timeout(SECONDS + 400)


# --- The plan --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong for a time, and then is fixed."""

    kind: str
    role: str
    seconds: float

    def __str__(self) -> str:
        """Name it as in a plan."""
        return f"{self.kind} {self.role} {self.seconds:.1f} s"


# Weights: what takes long comes seldom.
PROCESS_FAULTS = {"kill": 6, "freeze": 2, "stop": 2, "add": 1}
SERVER_FAULTS = {"restart": 2, "cut": 4, "half_close": 2, "stall": 2, "refuse_writes": 2, "fill": 2}
LONGER = {"freeze", "stall", "refuse_writes", "fill"}


def planned(seed: int, servers: Servers) -> Iterator[Fault]:
    """Plan faults without end."""
    rng = random.Random(seed)
    weights = PROCESS_FAULTS | SERVER_FAULTS
    if servers.broker_name == "redis":
        weights["flush"] = 1
    if not servers.disks:
        del weights["fill"]
    while True:
        (kind,) = rng.choices(list(weights), list(weights.values()))
        role = rng.choice(ROLES)
        if kind in SERVER_FAULTS:
            role = rng.choice(("store", "broker"))
        if kind == "flush":
            role = "broker"
        longest = LEASE_SECONDS * 2 if kind in LONGER else 1.0
        yield Fault(kind, role, rng.uniform(0, longest))


# --- The servers ------------------------------------------------


@dataclass(slots=True)
class Servers:
    """A database and a broker of our own."""

    store_name: str
    broker_name: str
    folder: Path
    store: Server = field(init=False)
    broker: Server | RabbitServer = field(init=False)
    # Small file systems of their own, by server, where this user may mount them.
    disks: dict[str, Path] = field(default_factory=dict[str, Path])

    def start(self, *, on_small_disks: bool = False) -> None:
        store, broker = self.folder / "store", self.folder / "broker"
        if self.store_name == "postgres":
            # Not below pytest's own folder: the server runs as a user who may not look into it.
            store = Path(tempfile.mkdtemp(prefix="cqrs-es-postgres-"))
            atexit.register(shutil.rmtree, store, ignore_errors=True)
        for name, folder in (("store", store), ("broker", broker)):
            folder.mkdir(exist_ok=True)
            if on_small_disks and _mounted(folder):
                self.disks[name] = folder
        if self.store_name == "mysql":
            self.store = start_mariadb(store)
            # Root may write where a server is read-only: the bank is another user.
            for statement in (
                "CREATE DATABASE bank",
                "CREATE USER bank",
                "GRANT ALL ON bank.* TO bank",
            ):
                self._tell(statement)
        elif self.store_name == "dynamodb":
            self.store = start_dynamodb(store)
        else:
            self.store = start_postgres(store)
            self._tell("CREATE DATABASE bank")
        start_broker = start_redis if self.broker_name == "redis" else start_rabbitmq
        try:
            self.broker = start_broker(broker)
        except BaseException:
            self.store.stop()
            raise

    def stop(self) -> None:
        self.broker.stop()
        self.store.stop()
        for folder in self.disks.values():
            subprocess.run([installed("umount"), folder], check=True)

    def _tell(self, statement: str) -> None:
        """Ask the database as its administrator."""
        if self.store_name == "mysql":
            run_on(f"mysql://root@127.0.0.1:{self.store.port}", statement)
        else:
            psql(f"postgresql://postgres@127.0.0.1:{self.store.port}/", statement)

    def store_url(self, port: int) -> str:
        if self.store_name == "dynamodb":
            return f"dynamodb://{REGION}/bank?endpoint=http://127.0.0.1:{port}"
        user = "mysql://bank" if self.store_name == "mysql" else "postgresql://postgres"
        return f"{user}@127.0.0.1:{port}/bank"

    def broker_url(self, port: int) -> str:
        if self.broker_name == "redis":
            return f"redis://127.0.0.1:{port}/0"
        return f"amqp://guest:guest@127.0.0.1:{port}/"

    def restart(self, name: str, seconds: float) -> None:
        """End a server as a power cut would; start it again after a while."""
        if name == "store":
            # PostgreSQL's children outlive a killed parent; on SIGQUIT none is tidy either.
            sudden = signal.SIGKILL if self.store_name == "mysql" else signal.SIGQUIT
            self.store.process.send_signal(sudden)
            self.store.process.wait(20)
        else:
            self.broker.kill()
        time.sleep(seconds)
        self.start_again(name)

    def start_again(self, name: str) -> None:
        """Start a server that has ended."""
        if name == "store":
            self.store = start_again(self.store, self.folder / "store.log")
        elif isinstance(self.broker, RabbitServer):
            self.broker = self.broker.start_again()
        else:
            self.broker = start_again(self.broker, self.folder / "broker.log")

    def refuse_writes(self, name: str, *, refused: bool) -> None:
        """Have a server take no writes, as a replica after a failover, or RabbitMQ's alarms do."""
        if name == "store" and self.store_name == "mysql":
            self._tell(f"SET GLOBAL read_only = {int(refused)}")
        elif name == "store":
            state = "on" if refused else "off"
            self._tell(f"ALTER SYSTEM SET default_transaction_read_only = {state}")
            self._tell("SELECT pg_reload_conf()")
        elif isinstance(self.broker, RabbitServer):
            self.broker.control("set_vm_memory_high_watermark", "0.00001" if refused else "0.4")
        else:
            client: Any = redis.Redis(port=self.broker.port)
            with client:
                client.replicaof(*(("127.0.0.1", "1") if refused else ("NO", "ONE")))

    def fill(self, name: str) -> None:
        """Take all room on a server's disk; of RabbitMQ's so much that its alarm goes off."""
        balloon, size = self.disks[name] / "balloon", 0
        left = 50_000_000 if name == "broker" and self.broker_name == "amqp" else 0
        with balloon.open("wb") as file:
            while (free := shutil.disk_usage(balloon).free - left) > 0:
                with suppress(OSError):  # the server has taken some of it meanwhile
                    os.posix_fallocate(file.fileno(), size, free)
                    size += free

    def make_room(self, name: str) -> None:
        """Give the room back; start a server again that has ended for want of it."""
        (self.disks[name] / "balloon").unlink()
        server = self.store if name == "store" else self.broker
        process = server.node.process if isinstance(server, RabbitServer) else server.process
        with suppress(subprocess.TimeoutExpired):
            process.wait(1)  # one that is about to end
            self.start_again(name)


def _mounted(folder: Path) -> bool:
    """Mount a file system of its own, in memory; tell whether that may be done."""
    options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES}"]
    mount = [installed("mount"), *options, "tmpfs", str(folder)]
    done = subprocess.run(mount, check=False, capture_output=True)
    if done.returncode != 0:
        log.warning("no disk is filled: %s", done.stderr.decode().strip())
    return done.returncode == 0


# --- The bank and its senders ----------------------------------------------------------


@dataclass(slots=True)
class Chaos:
    """A bank on servers of its own, its senders, and what was done to it."""

    servers: Servers
    wires: Wires
    bank: Service
    history: History
    senders: list[Sender] = field(default_factory=list[Sender])
    processes: dict[str, list[subprocess.Popen[bytes]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    stopping: list[subprocess.Popen[bytes]] = field(default_factory=list["subprocess.Popen[bytes]"])
    done: Counter[str] = field(default_factory=Counter[str])
    recovery: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def store_url(self) -> str:
        """The database itself, not by the proxy."""
        return self.servers.store_url(self.servers.store.port)

    @property
    def broker_url(self) -> str:
        """The broker itself, not by the proxy."""
        return self.servers.broker_url(self.servers.broker.port)

    def connected(self, sender: str) -> Outside:
        """Connect a sender with the broker as it is now."""
        if self.history.broker == "redis":
            return RedisOutside(self.broker_url)
        outside = RabbitOutside(self.broker_url)
        outside.follow_replies("bank", sender)
        return outside

    def to_send_again(self, late: dict[str, float]) -> set[str]:
        """Choose what the broker has lost by our doing, and what is decided: its reply is lost.

        Anything else is only late, or the service has lost it.
        """
        loss = max(self.history.losses, default=0.0)
        lost = {command_id for command_id, since in late.items() if since <= loss}
        with suppress(pymysql.Error, subprocess.CalledProcessError):
            return lost | recorder.decided(self.store_url, late)
        return lost

    def start(self, role: str) -> None:
        self.processes[role].append(self.bank.start(role))

    def suffer(self, fault: Fault) -> None:
        """Let a fault happen and be fixed; wait until all that was sent before has its effect."""
        getattr(self, f"_{fault.kind}")(fault)
        healed = time.monotonic()
        waiting = [(sender, sender.unanswered()) for sender in self.senders]
        until(
            lambda: not any(ids & sender.unanswered() for sender, ids in waiting),
            f"what was sent before the end of {fault} is not answered",
            within_seconds=PATIENCE,
            every=LOOKS_APART_SECONDS,
        )
        heads = self._heads()
        until(
            lambda: self._has_got_to(heads),
            f"relay, projectors or reactors do not get on after {fault}",
            within_seconds=PATIENCE,
            every=LOOKS_APART_SECONDS,
        )
        self.done[fault.kind] += 1
        self.recovery[f"{fault.kind} {fault.role}"].append(time.monotonic() - healed)
        self._all_live()

    def drain(self, patience: float = PATIENCE) -> float:
        """Have the senders end, and everything decided, published and projected."""
        began = time.monotonic()
        for sender in self.senders:
            sender.end()
        for sender in self.senders:
            sender.join(patience)
            assert not sender.is_alive(), f"{len(sender.in_flight)} of {sender.name} unanswered"
        until(
            self._is_at_rest,
            "relay, projectors, reactors or due rows do not get to the end",
            within_seconds=patience,
            every=LOOKS_APART_SECONDS,
        )
        return time.monotonic() - began

    def recorded(self) -> History:
        """Complete the history."""
        history = self.history
        for sender in self.senders:
            history.sent += sender.sent
            history.replies += sender.replies
        recorder.record_tables(history, self.store_url)
        if history.broker == "redis":
            streams = recorder.read_streams(self.broker_url, "bank", history.partitions)
            history.topic["from the beginning"] = streams
        else:
            history.topic["queue"] = recorder.read_queue(self.broker_url, "subscriber")
        for row in history.outcomes[:: max(1, len(history.outcomes) // 3)]:
            shown = self.bank.call("outcome", row.command_id, "--json")
            history.shown[row.command_id] = orjson.loads(shown)
        return history

    def all_stop(self) -> list[int]:
        """Ask every process to stop; return their exit codes."""
        for process in (each for role in ROLES for each in self.processes[role]):
            self._has_begun(process)
            process.terminate()
            self.stopping.append(process)
        return [process.wait(40) for process in self.stopping]

    def _heads(self) -> dict[int, int]:
        rows = recorder.rows(self.store_url, "SELECT log_partition, head FROM log_partitions")
        return {row["log_partition"]: row["head"] for row in rows}

    def _is_at_rest(self) -> bool:
        """Tell whether all has been published and followed, and nothing is left that it causes."""
        if self.servers.store_name == "dynamodb":
            return self._says_that_it_rests()
        heads = self._heads()
        return (
            self._has_got_to(heads)
            and not recorder.waiting(self.store_url)
            and self._heads() == heads
        )

    def _says_that_it_rests(self) -> bool:
        """Ask the bank itself, of which there is nothing that could be asked so soon."""
        found = self.bank.status()
        followed = all(each["behind"] == 0 for each in found["views"])
        published = all(each["relay"] == each["head"] for each in found["partitions"])
        return followed and published and not found["scheduled"]["due"]

    def _has_got_to(self, heads: dict[int, int]) -> bool:
        """Tell whether relay, views and reactors have got to these offsets."""
        marks: dict[str, dict[int, int]] = defaultdict(dict)
        for row in recorder.rows(self.store_url, "SELECT * FROM checkpoints"):
            marks[row["projector"]][row["log_partition"]] = row["log_offset"]
        live = {
            row["projector"]: row["live"]
            for row in recorder.rows(self.store_url, "SELECT * FROM generations")
        }
        followers = (*self.history.views, REACTOR)
        return all(
            marks[reader].get(partition, 0) >= head
            for partition, head in heads.items()
            for reader in (RELAY, *(f"{name}__{live.get(name, 1)}" for name in followers))
        )

    def _all_live(self) -> None:
        """No process may have ended but those that a fault ended."""
        for role in ROLES:
            for process in self.processes[role]:
                assert process.poll() is None, self.bank.log_of(process)[-3000:]

    def _has_begun(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until Python itself is up and would hear a signal."""
        until(lambda: '"started"' in self.bank.log_of(process), "a process does not start")

    # What can happen, by its name in a plan.

    def _kill(self, fault: Fault) -> None:
        victim = self.processes[fault.role].pop(0)
        victim.kill()
        victim.wait()
        time.sleep(fault.seconds)
        self.start(fault.role)

    def _freeze(self, fault: Fault) -> None:
        victim = self.processes[fault.role][0]
        victim.send_signal(signal.SIGSTOP)
        time.sleep(LEASE_SECONDS / 2 + fault.seconds)
        victim.send_signal(signal.SIGCONT)

    def _stop(self, fault: Fault) -> None:
        victim = self.processes[fault.role].pop(0)
        self._has_begun(victim)
        victim.terminate()
        self.stopping.append(victim)
        self.start(fault.role)

    def _add(self, fault: Fault) -> None:
        """Start one more; end the oldest of too many."""
        self.start(fault.role)
        if len(self.processes[fault.role]) > 3:
            self._stop(fault)

    def _restart(self, fault: Fault) -> None:
        self.servers.restart(fault.role, fault.seconds)

    def _cut(self, fault: Fault) -> None:
        self.wires.do(fault.role, "reset")

    def _stall(self, fault: Fault) -> None:
        self.wires.do(fault.role, "stall")
        time.sleep(fault.seconds)
        self.wires.do(fault.role, "heal")

    def _half_close(self, fault: Fault) -> None:
        self.wires.do(fault.role, "half_close")

    def _refuse_writes(self, fault: Fault) -> None:
        self.servers.refuse_writes(fault.role, refused=True)
        time.sleep(fault.seconds)
        self.servers.refuse_writes(fault.role, refused=False)

    def _fill(self, fault: Fault) -> None:
        self.servers.fill(fault.role)
        time.sleep(fault.seconds)
        self.servers.make_room(fault.role)

    def _flush(self, fault: Fault) -> None:
        del fault
        began = time.monotonic()
        client: Any = redis.Redis.from_url(self.broker_url)  # pyright: ignore[reportUnknownMemberType]
        with client:
            client.flushall()
        # Nothing that was sent in between may be called kept, or lost.
        self.history.losses += [began, time.monotonic()]


@contextmanager
def chaos(
    store: str,
    broker: str,
    folder: Path,
    seed: int,
    *,
    copies: int = 2,
    pause_seconds: float = PAUSE_SECONDS,
    by_wire: bool = True,
    **settings: str,
) -> Generator[Chaos]:
    """Run a bank with some processes of each role, and its senders, which pause between batches.

    Its processes reach the servers by wires that can be cut, or at once.
    """
    servers = Servers(store, broker, folder)
    servers.start(on_small_disks=SECONDS > 0)
    with ExitStack() as stack:
        stack.callback(servers.stop)
        wires = Wires({"store": servers.store.port, "broker": servers.broker.port})
        stack.callback(wires.close)
        by = (
            wires.ports if by_wire else {"store": servers.store.port, "broker": servers.broker.port}
        )
        urls = servers.store_url(by["store"]), servers.broker_url(by["broker"])
        (folder / "logs").mkdir()
        bank = stack.enter_context(service("worker.app:app", *urls, folder / "logs", **settings))
        made = Chaos(servers, wires, bank, History(broker))
        if store == "dynamodb":
            made.history.views = ("account_query",)
        made.senders += [
            Sender(
                f"sender-{n}", seed + n, "bank", made.connected, made.to_send_again, pause_seconds
            )
            for n in range(SENDERS)
        ]
        if broker == "amqp":
            recorder.bind_queue(made.broker_url, "bank", "subscriber")
        for role in ROLES * copies:
            made.start(role)
        for sender in made.senders:
            sender.start()
        yield made


# --- The tests -------------------------------------------------------------------------


def live_through(store: str, broker: str, folder: Path, seconds: float, faults: float) -> None:
    """Run the plan of a seed for a time or for a number of faults, fix everything, judge."""
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s on %s and %s", seed, store, broker)
    with chaos(store, broker, folder, seed) as made:
        began = time.monotonic()
        for number, fault in enumerate(planned(seed, made.servers)):
            passed = time.monotonic() - began
            if passed > seconds or number >= faults:
                break
            log.warning("%s: %s", number, fault)
            made.suffer(fault)
        drained = made.drain()
        history = made.recorded()
        log.warning(
            "%s; %s messages sent, %s outcomes, %s events; drained in %.1f s; recovered in %s",
            dict(made.done),
            len(history.sent),
            len(history.outcomes),
            len(history.events),
            drained,
            {name: [round(each, 1) for each in times] for name, times in made.recovery.items()},
        )
        assert_promises_held(history)
        codes = made.all_stop()
        assert codes == [0] * len(codes)


def test_a_short_life(tmp_path: Path) -> None:
    """Whatever befalls processes, servers and wires, no promise to users is broken."""
    live_through("mysql", "redis", tmp_path, SHORT_SECONDS, SHORT_FAULTS)


@pytest.mark.skipif(not SECONDS, reason="make faults runs it: it takes minutes")
@pytest.mark.parametrize(
    ("store", "broker"), [("mysql", "redis"), ("mysql", "amqp"), ("postgres", "amqp")]
)
def test_a_long_life(store: str, broker: str, tmp_path: Path) -> None:
    """As the short one, with many faults of every kind."""
    live_through(store, broker, tmp_path, SECONDS, float("inf"))
