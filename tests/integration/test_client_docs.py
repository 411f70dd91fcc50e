"""The page for other services runs as it stands and prints what it says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cqrs_es.brokers.amqp import driver
from cqrs_es.brokers.amqp.address import Address
from cqrs_es.brokers.amqp.topology import Names, topology
from tests.bank_data import PROJECT
from tests.command_line import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = PROJECT / "docs" / "clients.md"
RABBITMQ = "## With nothing but RabbitMQ"
EXAMPLE = PROJECT / "examples" / "send_and_follow.py"
TIMEOUT_SECONDS = 100.0
ANYTHING = "…"
END = "\N{SYMBOL FOR RECORD SEPARATOR}"


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of code on the page, and what the page says that it prints."""

    language: str
    code: str
    prints: str | None

    @property
    def script(self) -> str:
        """The block as part of a shell script, followed by a mark in the output."""
        code = f"python - <<'END_OF_BLOCK'\n{self.code}END_OF_BLOCK\n"
        return f"{self.code if self.language == 'sh' else code}echo '{END}'\n"

    def check(self, printed: str) -> None:
        if self.prints is None:
            return
        expected = ".*".join(map(re.escape, self.prints.split(ANYTHING)))
        assert re.fullmatch(expected, printed), f"after\n{self.code}\nthere was\n{printed}"


def blocks(page: str) -> list[Block]:
    """Find the pieces of code on a page, each with the text block that follows it."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    followers = [*found[1:], ("", "")]
    return [
        Block(language, code, follower[1] if follower[0] == "text" else None)
        for (language, code), follower in zip(found, followers, strict=True)
        if language in {"sh", "python"}
    ]


def run(script: str, folder: Path) -> str:
    """Run a shell script in a folder, with what it starts in the background ended after it."""
    path, log = folder / "stdout", folder / "stderr"
    with path.open("wb") as out, log.open("wb") as err:
        shell = subprocess.Popen(
            ["/bin/bash", "-euc", script],
            cwd=folder,
            env=on_the_path(environment({"CQRS_ES_APP": "worker.app:app"})),
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = shell.wait(TIMEOUT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    assert code == 0, f"{path.read_text()}\n{log.read_text()}"
    return path.read_text()


def on_the_path(variables: dict[str, str]) -> dict[str, str]:
    """Have `python` and `cqrs-es` be those of this test run."""
    return {**variables, "PATH": f"{Path(sys.executable).parent}:{variables['PATH']}"}


def test_redis_prints_what_the_page_says(redis_url: str, tmp_path: Path) -> None:
    """Every block up to RabbitMQ, one after another, on a Redis server and a SQLite file."""
    page, _, _ = PAGE.read_text().partition(RABBITMQ)
    check(page.replace("redis://localhost:6379/0", redis_url), tmp_path)


def test_rabbitmq_prints_what_the_page_says(bank_amqp_url: str, tmp_path: Path) -> None:
    """Every block from there on, on a RabbitMQ server and another SQLite file."""
    _, _, page = PAGE.read_text().partition(RABBITMQ)
    address = urlsplit(bank_amqp_url).netloc.rpartition("@")[2]
    page = page.replace("amqp://guest:guest@localhost:5672/", bank_amqp_url)
    check(page.replace("localhost:5672", address), tmp_path)


@pytest.fixture
def bank_amqp_url(amqp_url: str) -> Iterator[str]:
    """Name a RabbitMQ server that has nothing of the bank, nor will have."""
    forget_the_bank(amqp_url)
    yield amqp_url
    forget_the_bank(amqp_url)


def forget_the_bank(url: str) -> None:
    connection = driver.connect(Address.of(url), "test")
    channel = connection.channel()
    declared = topology(Names("bank"), 16)
    for queue in declared.queues:
        channel.queue_delete(queue.name)
    for exchange in declared.exchanges:
        channel.exchange_delete(exchange.name)
    connection.close()


def check(page: str, folder: Path) -> None:
    every = blocks(page)
    printed = run("".join(block.script for block in every), folder).split(f"{END}\n")
    assert len(printed) == len(every) + 1
    for block, output in zip(every, printed, strict=False):
        block.check(output)


def test_the_example_sends_and_follows(redis_url: str, tmp_path: Path) -> None:
    """`examples/send_and_follow.py` prints the refusal, and the events that it caused."""
    start = f"export CQRS_ES_BROKER_URL={redis_url}\ncqrs-es init\ncqrs-es run &\n"
    printed = run(f"{start}python {EXAMPLE}", tmp_path).splitlines()
    assert printed[-3:] == [
        "rejected amount: must be more than 0",
        "1 AccountOpened {'account_id': 'ACCT-001'}",
        "2 CustomerDepositedMoney {'amount': '200.00', 'balance': '200.00'}",
    ]
