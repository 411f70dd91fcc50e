"""`worker`, `relay`, `projector`, `send`: the service as processes of their own."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es.types import new_command_id
from tests.command_line import cqrs_es, running
from tests.servers import free_port, start_redis
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.command_line import Here, Running

NOBODY = "redis://127.0.0.1:1/0"
OPEN = ("account", "ada", "OpenAccount", '{"account_id": "ada"}')
DEPOSIT = ("account", "ada", "DepositMoney", '{"amount": "200.00"}')


@pytest.fixture
def service(here: Here, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Call the command line with a SQLite store and a Redis broker."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    here.done("init")
    return here


@pytest.fixture
def roles(service: Here, sqlite_url: str, redis_url: str) -> Iterator[list[Running]]:
    """Run each role as a process of its own."""
    del service  # it has initialised the store
    urls = {"CQRS_ES_STORE_URL": sqlite_url, "CQRS_ES_BROKER_URL": redis_url}
    with ExitStack() as stack:
        yield [
            stack.enter_context(running(*verb, **urls))
            for verb in (
                ["worker"],
                ["relay"],
                ["projector", "--only", "account_query"],
                ["projector", "--only", "bank_totals"],
            )
        ]


def balance(service: Here) -> str | None:
    result = service("view", "account_query", "ada", "--json")
    return result.json["balance"] if result.code == 0 else None


def held_cents(service: Here) -> int:
    """Return the money that the bank holds; none while there is no day yet."""
    days = service.done("view", "bank_totals", "--json").lines
    return sum(day["held_cents"] for day in days)


def test_the_roles_together_are_the_service(roles: list[Running], service: Here) -> None:
    """A command sent is decided, published and projected; SIGTERM ends each with code 0."""
    accepted = service.done("send", *OPEN, "--wait", "--json").json
    assert accepted["status"] == "accepted"
    assert accepted["events"] == [{"type": "AccountOpened", "sequence": 1}]
    service.done("send", *DEPOSIT, "--wait")
    until(lambda: balance(service) == "200.00")
    until(lambda: held_cents(service) == 20_000)
    (partition,) = service.done("status", "--json").json["partitions"]
    until(lambda: service.done("status", "--json").json["partitions"][0]["relay"] == "2")
    assert partition["head"] == "2"
    for role in roles:
        role.signal(signal.SIGTERM)
    assert [role.end().code for role in roles] == [0, 0, 0, 0]


def test_waiting_for_outcomes(roles: list[Running], service: Here) -> None:
    """Exit code 1 unless accepted; a duplicate and a reused id are told."""
    command_id = new_command_id()
    assert len(roles) == 4
    service.done("send", *OPEN, "--id", command_id, "--wait", "--json")
    again = service.done("send", *OPEN, "--id", command_id, "--wait", "--json").json
    assert (again["status"], again["duplicate"]) == ("accepted", True)
    reused = service("send", *DEPOSIT, "--id", command_id, "--wait", "--json")
    assert (reused.code, reused.json["error"]["code"]) == (1, "id_reused")
    conflict = service("send", *DEPOSIT, "--expected", "7", "--wait", "--json")
    assert (conflict.code, conflict.json["error"]["code"]) == (1, "conflict")
    failed = service("send", "account", "ada", "Nonsense", "{}", "--wait", "--json")
    assert (failed.code, failed.json["status"]) == (1, "failed")


def test_sending_without_waiting_prints_the_id(service: Here) -> None:
    """The id is there to ask for the outcome; nobody has decided it yet."""
    command_id = service.done("send", *OPEN).out.strip()
    assert service("outcome", command_id).code == 1
    given = service.done("send", *OPEN, "--id", command_id.upper(), "--json").json
    assert given == {"command_id": command_id}


def test_nobody_answers(service: Here) -> None:
    """Without a worker --wait gives up: exit code 1, and how to ask later."""
    result = service("send", *OPEN, "--wait", "--timeout", "0.2")
    assert result.code == 1
    assert "cqrs-es outcome" in result.complaint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("account", "ada", "OpenAccount", "{"), "not JSON"),
        (("account", "ada", "OpenAccount", "[]"), "must be a JSON object"),
        (("account", "a\nb", "OpenAccount", "{}"), "control characters"),
        (("acc ount", "ada", "OpenAccount", "{}"), "aggregate_type must match"),
        ((*OPEN, "--id", "mine"), "UUID"),
    ],
)
def test_a_message_that_nobody_would_take_is_not_sent(
    service: Here, arguments: tuple[str, ...], words: str
) -> None:
    """It is checked as its receiver would: exit code 2."""
    result = service("send", *arguments)
    assert (result.code, result.out) == (2, "")
    assert words in result.complaint


def test_an_unknown_projector(service: Here) -> None:
    """Wrong usage, with the names there are."""
    result = service("projector", "--only", "nothing")
    assert result.code == 2
    assert "account_query, bank_totals" in result.complaint


@pytest.mark.parametrize("module", ["worker", "projectors"])
def test_the_banks_own_modules(module: str, service: Here, sqlite_url: str, redis_url: str) -> None:
    """`python -m worker` and `python -m projectors` run its roles."""
    del service  # it has initialised the store
    with running(
        module=module, CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_BROKER_URL=redis_url
    ) as process:
        process.wait_for("partition taken")
        process.signal(signal.SIGTERM)
        assert process.end().code == 0


# --- Servers that are away ---------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "setting", "nobody"),
    [
        ("worker", "BROKER", NOBODY),
        ("run", "BROKER", NOBODY),
        ("tail", "STORE", "mysql://root@127.0.0.1:1/bank"),
    ],
)
def test_a_long_running_verb_waits_for_a_server(
    verb: str, setting: str, nobody: str, sqlite_url: str
) -> None:
    """It says so again and again, and ends cleanly when it is told to."""
    urls = {"CQRS_ES_STORE_URL": sqlite_url, f"CQRS_ES_{setting}_URL": nobody}
    with running(verb, CQRS_ES_LOG_FORMAT="json", **urls) as process:
        until(lambda: process.err.count("waiting for a server") >= 2)
        process.signal(signal.SIGTERM)
        result = process.end()
    assert result.code == 0
    waiting = [orjson.loads(line) for line in result.err.splitlines()]
    assert f"CQRS_ES_{setting}_URL" in waiting[0]["error"]


def test_until_idle_is_interrupted_while_it_waits(sqlite_url: str) -> None:
    """Nothing was done yet: exit code 4."""
    urls = {"CQRS_ES_STORE_URL": sqlite_url, "CQRS_ES_BROKER_URL": NOBODY}
    with running("run", "--until-idle", **urls) as process:
        process.wait_for("waiting for a server")
        process.signal(signal.SIGTERM)
        assert process.end().code == 4


@pytest.mark.parametrize("verb", [("send", *OPEN), ("init",), ("republish", "0", "--from", "1")])
def test_a_short_verb_does_not_wait(
    here: Here, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    """Exit code 3, and which setting to look at."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", NOBODY)
    result = here(*verb)
    assert (result.code, result.out) == (3, "")
    assert "CQRS_ES_BROKER_URL" in result.complaint


def test_no_store_server(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the store; the password is not shown."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", "mysql://root:secret@127.0.0.1:1/bank")
    result = here("status")
    assert result.code == 3
    assert "secret" not in result.err


def test_it_goes_on_when_the_server_is_there(sqlite_url: str, tmp_path: Path) -> None:
    """A worker that has waited for its broker takes its partitions once it can."""
    port = free_port()
    url = f"redis://127.0.0.1:{port}/0"
    with running("worker", CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_BROKER_URL=url) as worker:
        worker.wait_for("waiting for a server")
        server = start_redis(tmp_path, port=port)
        try:
            worker.wait_for("partition taken")
            worker.signal(signal.SIGTERM)
            assert worker.end().code == 0
        finally:
            server.stop()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("run", 0),
        ("--log-level error run --until-idle", 4),
        ("worker", 0),
        ("status", -signal.SIGTERM),
    ],
)
def test_told_to_stop_before_it_has_begun(arguments: str, code: int, sqlite_url: str) -> None:
    """A process that would run for long has stopped cleanly: it had nothing in hand."""
    app = "tests.apps.told_to_stop:app"
    ended = cqrs_es(*arguments.split(), CQRS_ES_APP=app, CQRS_ES_STORE_URL=sqlite_url)
    assert ended.code == code
