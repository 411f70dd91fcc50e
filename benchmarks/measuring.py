"""Measuring contenders in alternation: their processes, rounds, medians, a table and JSON."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import orjson
from rich.console import Console
from rich.table import Table

from tests.conftest import run_on
from tests.servers import psql, start_mariadb, start_postgres

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

PROJECT: Final = Path(__file__).parent.parent
OURS: Final = "cqrs-es"
WARM_UP_ROUNDS: Final = 2
QUICK_COMMANDS: Final = 20
LIBRARIES: Final = (
    *("eventsourcing", "psycopg", "asyncpg", "aiomysql", "redis", "msgspec", "orjson"),
    *("uvicorn", "fastapi", "sqlalchemy"),
)
NAMES: Final = ("one", "two", "three")
TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")


def options(description: str | None, rounds: int, commands: int) -> argparse.ArgumentParser:
    """Return the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--commands", type=int, default=commands, help="in each round")
    parser.add_argument("--against", metavar="REV", help="measure another commit beside this tree")
    add_json(parser)
    parser.add_argument("--quick", action="store_true", help="only see whether it works")
    return parser


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option that says where `write` writes."""
    told = "write every round's figures to a file, or to one of the question's name in a folder"
    parser.add_argument("--json", metavar="PATH", type=Path, help=told)


def write(path: Path | None, question: str, found: Mapping[str, object]) -> None:
    """Write what was found as JSON, if that is wanted, with what it was found on."""
    if path is None:
        return
    whole = {"question": question, "on": surroundings()} | dict(found)
    file = path / f"{question}.json" if path.is_dir() else path
    file.write_text(json.dumps(whole, indent=1))


# --- Commands ----------------------------------------------------------------


def commands() -> Iterator[dict[str, Any]]:
    """Make command messages without end: a bank's own, copy after copy, or a likeness of them.

    `BANK_DATA` names the folder with `commands.jsonl`.
    """
    file = Path(os.environ.get("BANK_DATA", PROJECT / "../shared/data/bank")) / "commands.jsonl"
    copy = 0
    while True:
        lines = file.read_bytes().splitlines() if file.exists() else likeness(copy)
        for line in lines:
            yield renamed(orjson.loads(line), copy)
        copy += 1


def renamed(message: dict[str, Any], copy: int) -> dict[str, Any]:
    """Give a message the account and the id of its copy."""
    account = f"{message['aggregate_id']}-{copy}"
    message["id"] = str(uuid.uuid5(uuid.UUID(message["id"]), str(copy)))
    message["aggregate_id"] = account
    if "account_id" in message["payload"]:
        message["payload"]["account_id"] = account
    return message


def likeness(seed: int) -> Iterator[bytes]:
    """Make some two thousand commands for a hundred accounts."""
    dice = random.Random(seed)
    accounts = [f"account-{number}" for number in range(100)]
    for account in accounts:
        yield _line(dice, account, "OpenAccount", {"account_id": account})
    for number in range(2000):
        amount = str(Decimal(dice.randrange(1, 100_000)) / 100)
        more: dict[str, dict[str, str]] = {
            "DepositMoney": {},
            "WithdrawMoney": {"atm_id": "atm-1"},
            "WriteCheck": {"check_number": f"check-{number}"},
        }
        kind = dice.choices(list(more), (5, 3, 2))[0]
        yield _line(dice, dice.choice(accounts), kind, {"amount": amount} | more[kind])


def _line(dice: random.Random, account: str, kind: str, payload: Mapping[str, str]) -> bytes:
    id_ = str(uuid.UUID(int=dice.getrandbits(128), version=4))
    envelope = {"id": id_, "type": kind, "aggregate_type": "account", "aggregate_id": account}
    return orjson.dumps(envelope | {"payload": payload})


# --- Contenders --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Revision:
    """A commit that is checked out in a folder of its own."""

    name: str
    tree: Path


@contextmanager
def revision(name: str | None) -> Generator[Revision | None]:
    """Check a commit out for the length of a block, with the benchmarks of this tree in it."""
    if name is None:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="cqrs-es-benchmark-") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(PROJECT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, name], check=True)
        try:
            if (tree / "benchmarks").exists():
                (tree / "benchmarks").rename(tree / "benchmarks-of-its-own")
            (tree / "benchmarks").symlink_to(PROJECT / "benchmarks")
            yield Revision(name, tree)
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def environment_of(tree: Path) -> dict[str, str]:
    """Return the environment in which a process imports a tree's own modules."""
    return os.environ | {"PYTHONPATH": str(tree)}


@dataclass(frozen=True, slots=True)
class Contender:
    """A program in a process of its own: a module of this tree or another, or something else."""

    name: str
    arguments: Sequence[str]
    tree: Path = PROJECT
    program: Sequence[str] = (sys.executable, "-m")


@dataclass(slots=True)
class Figures:
    """What each round took, in microseconds a command: by the wall's clock, and of CPU."""

    wall: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])


@contextmanager
def running(contender: Contender) -> Generator[subprocess.Popen[str]]:
    """Run a contender's process for the length of a block."""
    process = subprocess.Popen(
        [*contender.program, *contender.arguments],
        cwd=contender.tree,
        env=environment_of(contender.tree),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        assert process.stdin is not None
        process.stdin.close()
        if process.wait(60) != 0:
            message = f"{contender.name} ended with exit code {process.returncode}"
            raise RuntimeError(message)


def race(contenders: Sequence[Contender], chosen: argparse.Namespace) -> dict[str, Figures]:
    """Give the same commands to all, round by round, each time in another order."""
    rounds, size = (1, QUICK_COMMANDS) if chosen.quick else (chosen.rounds, chosen.commands)
    warm_up = 0 if chosen.quick else WARM_UP_ROUNDS
    figures = {contender.name: Figures() for contender in contenders}
    stream = commands()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = [(it.name, stack.enter_context(running(it))) for it in contenders]
        for number in range(warm_up + rounds):
            path = folder / "commands.json"
            path.write_bytes(orjson.dumps([next(stream) for _ in range(size)]))
            processes.append(processes.pop(0))
            found = {name: ask(process, path) for name, process in processes}
            if len({it["accepted"] for it in found.values()}) > 1:
                message = f"they do not do the same: {found}"
                raise RuntimeError(message)
            for name, it in found.items() if number >= warm_up else ():
                figures[name].wall.append(it["seconds"] / size * 1e6)
                figures[name].cpu.append(it["cpu"] / size * 1e6)
    return figures


def ask(process: subprocess.Popen[str], path: Path) -> dict[str, float]:
    """Have a round done; return what it took."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{path}\n")
    process.stdin.flush()
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process and its children [proc(5): stat, 14 and 15]."""
    process = Path(f"/proc/{pid}")
    fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
    own = (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND
    children = " ".join(it.read_text() for it in process.glob("task/*/children")).split()
    return own + sum(cpu_seconds(int(child)) for child in children)


# --- Databases ---------------------------------------------------------------


@contextmanager
def databases(store: str) -> Generator[Sequence[str]]:
    """Make databases on one private server, with its own durability; yield their URLs."""
    with tempfile.TemporaryDirectory(prefix="cqrs-es-") as folder, contextlib.ExitStack() as stack:
        match store:
            case "memory":
                yield ["memory://"] * len(NAMES)
                return
            case "sqlite":
                root = f"sqlite:///{folder}/"
            case "postgres":
                server = start_postgres(Path(folder))
                stack.callback(server.stop)
                root = f"postgresql://postgres@127.0.0.1:{server.port}/"
                for name in NAMES:
                    psql(root, f"CREATE DATABASE {name}")
            case _:
                server = start_mariadb(Path(folder))
                stack.callback(server.stop)
                root = f"mysql://root@127.0.0.1:{server.port}/"
                for name in NAMES:
                    run_on(root, f"CREATE DATABASE {name}")
        yield [f"{root}{name}" for name in NAMES]


# --- Reports -----------------------------------------------------------------


class Report:
    """What was measured, as tables on the terminal and as JSON."""

    def __init__(self, question: str, chosen: argparse.Namespace, each: str = "a command") -> None:
        """Report an answer to a question; figures are microseconds of `each`."""
        self._question = question
        self._each = each
        self._chosen = chosen
        self._found: dict[str, Mapping[str, Figures]] = {}
        self._megabytes: dict[str, Mapping[str, float]] = {}

    def add(self, setting: str, figures: Mapping[str, Figures]) -> None:
        """Add what was found in one setting, and show it."""
        self._found[setting] = figures
        table = Table("contender", title=f"{self._question}: {setting}, µs {self._each}")
        for heading in ("wall", "from-to", "CPU", "from-to", "wall : ours", "CPU : ours"):
            table.add_column(heading, justify="right")
        first = figures[OURS] if OURS in figures else next(iter(figures.values()))
        for name, it in figures.items():
            wall, cpu = ratio(it.wall, first.wall), ratio(it.cpu, first.cpu)
            table.add_row(name, *_spread(it.wall), *_spread(it.cpu), f"{wall:.2f}", f"{cpu:.2f}")
        Console(width=100).print(table)

    def add_memory(self, setting: str, megabytes: Mapping[str, float]) -> None:
        """Add how much memory was found in use, and show it."""
        self._megabytes[setting] = megabytes
        for name, it in megabytes.items():
            print(f"{setting}, {name}: {it:.0f} MB", flush=True)

    def finish(self) -> None:
        """Write everything to a file, if one is wanted."""
        found = {
            setting: {name: {"wall": it.wall, "cpu": it.cpu} for name, it in figures.items()}
            for setting, figures in self._found.items()
        }
        whole = {"each": self._each, "microseconds": found, "megabytes": self._megabytes}
        write(self._chosen.json, self._question, whole)


def _spread(figures: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.median(figures):,.0f}", f"{min(figures):,.0f}-{max(figures):,.0f}"


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the median of the ratios of rounds that were run side by side."""
    return statistics.median(a / b if b else 1.0 for a, b in zip(one, other, strict=True))


def surroundings() -> dict[str, str]:
    """Say when and on what this was measured."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    return {
        "commit": subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    } | {name: metadata.version(name) for name in LIBRARIES}
