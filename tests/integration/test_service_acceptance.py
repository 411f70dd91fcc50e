"""Acceptance cases that take several real processes, on MariaDB and each broker."""

from __future__ import annotations

import http.client
from contextlib import closing
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.bank_service import message, query
from tests.outside import PARTITIONS, partition_of
from tests.processes import service
from tests.servers import free_port
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.outside import Outside
    from tests.processes import Service

NEWER = ("--app", "tests.integration.newer_bank:app")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def bank(mysql_url: str, broker_url: str, outside: Outside, tmp_path: Path) -> Iterator[Service]:
    with service("worker.app:app", mysql_url, broker_url, tmp_path) as made:
        outside.follow("bank", "me")
        yield made


def replies(outside: Outside, command: dict[str, Any]) -> list[dict[str, Any]]:
    found = outside.replies("bank", "me")
    return [reply for reply in found if reply["command_id"] == command["id"]]


def answer(outside: Outside, command: dict[str, Any]) -> dict[str, Any]:
    """Wait for the reply to a command."""
    until(lambda: bool(replies(outside, command)), f"no reply to {command}")
    return replies(outside, command)[0]


def asked(outside: Outside, command: dict[str, Any]) -> dict[str, Any]:
    """Send a command where it belongs, and wait for its outcome."""
    outside.send("bank", [command])
    return answer(outside, command)


def opening(account: str) -> dict[str, Any]:
    return message("OpenAccount", account, {"account_id": account}, reply_to="me")


def deposit(account: str, amount: str) -> dict[str, Any]:
    return message("DepositMoney", account, {"amount": amount}, reply_to="me")


def owners(bank: Service) -> dict[int, str]:
    """Return which worker holds each partition."""
    leases = bank.status()["leases"]
    return {lease["partition"]: lease["owner"] for lease in leases if lease["role"] == "worker"}


def shared(bank: Service, workers: int) -> bool:
    """Tell whether every partition is held, by so many workers."""
    held = owners(bank)
    return len(held) == PARTITIONS and len(set(held.values())) == workers


def members(bank: Service) -> list[dict[str, Any]]:
    return [member for member in bank.status()["members"] if member["role"] == "worker"]


# --- B -------------------------------------------------------------------------


def test_b18_one_id_a_hundred_times(bank: Service, outside: Outside) -> None:
    """Through two workers, in every partition, right or wrong: one outcome, 99 duplicates of it."""
    for _ in range(2):
        bank.start("worker")
    until(lambda: shared(bank, 2), "the partitions are not shared")
    asked(outside, opening("A-1"))
    command = deposit("A-1", "7")
    body = orjson.dumps(command)
    outside.send_bytes("bank", [(number % PARTITIONS, body) for number in range(100)])
    until(lambda: len(replies(outside, command)) == 100, "not all are answered")
    outcomes = replies(outside, command)
    assert sum(outcome.pop("duplicate") for outcome in outcomes) == 99
    assert all(outcome == outcomes[0] for outcome in outcomes)
    assert outcomes[0]["status"] == "accepted"
    assert query(bank.store_url, "SELECT COUNT(*) FROM events") == [(2,)]
    assert query(bank.store_url, "SELECT COUNT(*) FROM command_outcomes") == [(2,)]


def test_b20_a_stale_cache_never_decides(bank: Service, outside: Outside) -> None:
    """A worker that cached a balance of 0 accepts what a deposit through another one covers."""
    for _ in range(2):
        bank.start("worker")
    until(lambda: shared(bank, 2), "the partitions are not shared")
    withdrawals = [
        message("WithdrawMoney", "A-1", {"amount": "60", "atm_id": "x"}, reply_to="me")
        for _ in range(2)
    ]
    right, held = partition_of(withdrawals[0]), owners(bank)
    elsewhere = next(partition for partition, owner in held.items() if owner != held[right])
    asked(outside, opening("A-1"))
    assert asked(outside, withdrawals[0])["error"]["code"] == "funds_not_available"
    paid_in = deposit("A-1", "100")
    outside.send_bytes("bank", [(elsewhere, orjson.dumps(paid_in))])
    assert answer(outside, paid_in)["status"] == "accepted"
    assert asked(outside, withdrawals[1])["status"] == "accepted"
    assert owners(bank) == held


# --- D -------------------------------------------------------------------------


def is_ready(port: int) -> tuple[int, str]:
    """Ask a process whether it is ready, and if not, why."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with closing(connection):
        connection.request("GET", "/ready")
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_d10_a_rolling_deploy(bank: Service, outside: Outside) -> None:
    """What newer code wrote the older leaves to it; alone, it waits and says why; nothing fails."""
    asked_by_newer = message("CloseAccount", "A-1", {}, reply_to="me")
    newer = bank.start(*NEWER, "worker")
    asked(outside, opening("A-1"))
    assert asked(outside, asked_by_newer)["status"] == "accepted"
    assert bank.stop(newer) == 0
    port = free_port()
    older = bank.start("worker", "--health-port", str(port))
    closed = deposit("A-1", "5")
    outside.send("bank", [closed])
    until(lambda: [m["fit"] for m in members(bank)] == [False], "the older is not unfit")
    names = (f"B-{number}" for number in range(99))
    other = next(name for name in names if partition_of(opening(name)) != partition_of(closed))
    assert asked(outside, opening(other))["status"] == "accepted"  # it goes on elsewhere
    status, reasons = is_ready(port)
    assert status == 503
    assert "AccountClosed" in reasons
    assert replies(outside, closed) == []

    newer = bank.start(*NEWER, "worker")
    outcome = answer(outside, closed)
    assert (outcome["status"], outcome["error"]["code"]) == ("rejected", "account_is_closed")
    until(lambda: shared(bank, 1), "the newer does not hold everything")
    assert asked(outside, deposit(other, "5"))["status"] == "accepted"
    assert bank.status()["dead_letters"] == 0
    assert [bank.stop(process) for process in (older, newer)] == [0, 0]
