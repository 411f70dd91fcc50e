"""`status`, `view`, `stream`, `tail`, `outcome`: what they print, for programs and for people."""

from __future__ import annotations

import signal
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson
import pytest

from cqrs_es.cli.output import print_json
from cqrs_es.types import new_command_id
from tests.command_line import EXAMPLE, message, running
from tests.terminal import on_a_terminal, without_escapes
from tests.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command_line import Here

FIRST = "0192f0c4-5b7a-7000-8000-000000000001"
REJECTED = "0192f0c4-5b7a-7000-8000-000000000019"
ADA = [
    "AccountOpened",
    "CustomerDepositedMoney",
    "CustomerWithdrewCash",
    "CustomerWroteCheck",
    "CustomerDepositedMoney",
    "CustomerWroteCheck",
    "CustomerWithdrewCash",
]


FOLLOWERS = ("account_query", "bank_totals", "reactor:transfer")
ROLES = [
    "projector:account_query",
    "projector:bank_totals",
    "reactor:transfer",
    "relay",
    "worker",
]

# --- status ------------------------------------------------------------------


def test_status(bank: Here) -> None:
    """Heads, marks and checkpoints are strings; nobody works on an embedded store at rest."""
    views = [
        {"view": name, "generation": 1, "building": None, "filling": None, "behind": 0, "parked": 0}
        for name in FOLLOWERS
    ]
    assert bank.done("status", "--json").json == {
        "views": views,
        "partitions": [
            {
                "partition": 0,
                "head": "26",
                "relay": "26",
                "projectors": dict.fromkeys(FOLLOWERS, "26"),
            }
        ],
        "members": [],
        "vacant_roles": ROLES,
        "leases": [],
        "scheduled": {"due": 0, "overdue_seconds": 0.0},
        "remotes": {},
        "dead_letters": 0,
        "parked": 0,
    }


def test_status_names_who_works_on_what(here: Here, sqlite_url: str) -> None:
    """Beside a process that runs, its members and leases are listed."""
    with running("run", CQRS_ES_STORE_URL=sqlite_url) as run:
        until(lambda: run.err.count("partition taken") == len(ROLES))
        found = here.done("status", "--json").json
        text = here.done("status").out
    assert [member["role"] for member in found["members"]] == ROLES
    assert [(lease["role"], lease["partition"]) for lease in found["leases"]] == [
        (role, 0) for role in ROLES
    ]
    assert all(role in text for role in ROLES)
    assert found["vacant_roles"] == []
    assert "nobody" not in text


def test_status_for_people(bank: Here) -> None:
    """A table of views, one of partitions, one of members, and the counts."""
    lines = bank.done("status").out.splitlines()
    assert lines[0].split() == ["view", "generation", "rebuilding", "behind", "parked"]
    assert lines[1].split() == ["account_query", "1", "0", "0"]
    assert lines[5].split() == ["partition", "head", "relay", *FOLLOWERS]
    assert lines[6].split() == ["0", "26", "26", "26", "26", "26"]
    assert lines[-5].split() == ["worker", "nobody"]
    counts = [line.rsplit(maxsplit=1) for line in lines[-3:]]
    assert counts == [["dead letters", "0"], ["parked", "0"], ["scheduled, due", "0"]]


# --- view --------------------------------------------------------------------


def test_one_row_is_its_payload(bank: Here) -> None:
    """With an id: the payload itself (C12)."""
    row = bank.done("view", "account_query", "ada", "--json").json
    assert row["account_id"] == "ada"
    assert row["balance"] == "1123.72"
    assert row["ledger"][2] == {"description": "1170", "amount": "256.28"}


def test_all_rows_one_a_line(bank: Here) -> None:
    """Without an id: id, version and payload of each, by id."""
    rows = bank.done("view", "account_query", "--json").lines
    assert [set(row) for row in rows] == [{"view_id", "version", "payload"}] * 4
    balances = {row["view_id"]: row["payload"]["balance"] for row in rows}
    assert list(balances.items()) == [
        ("ada", "1123.72"), ("ben", "0.00"), ("chloe", "445.51"), ("dmitri", "0.00")
    ]  # fmt: skip


def test_a_projector_of_its_own_columns(bank: Here) -> None:
    """Its rows by its columns: the money held is the sum of all balances."""
    rows = bank.done("view", "bank_totals", "--json").lines
    assert set(rows[0]) == {
        "day", "accounts", "deposits_cents", "withdrawals_cents", "checks_cents", "held_cents"
    }  # fmt: skip
    assert [row["day"] for row in rows] == sorted(row["day"] for row in rows)
    assert sum(row["held_cents"] for row in rows) == 112372 + 44551


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("account_query", "eve"), 1, "no row 'eve'"),
        (("nothing",), 1, "there is no view 'nothing'; the application's are account_query"),
        (("bank_totals", "2026-11-02"), 2, "leave the id out"),
    ],
)
def test_a_view_or_row_that_is_not_there(
    bank: Here, arguments: tuple[str, ...], code: int, words: str
) -> None:
    """What is missing is named."""
    result = bank("view", *arguments)
    assert (result.code, result.out) == (code, "")
    assert words in result.complaint


def test_a_view_for_people(bank: Here) -> None:
    """One row as indented JSON, all rows as a table, without colours in a file."""
    assert '"balance": "1123.72",' in bank.done("view", "account_query", "ada").out
    table = bank.done("view", "account_query").out.splitlines()
    assert table[0].split() == ["view_id", "version", "payload"]
    assert len(table) == 5
    assert "\x1b" not in "".join(table)


def test_a_view_in_pages(bank: Here) -> None:
    """At most so many rows, after the last one of the page before."""
    first = bank.done("view", "account_query", "--limit", "3", "--json").lines
    rest = bank.done("view", "account_query", "--after", first[-1]["view_id"], "--json").lines
    assert [row["view_id"] for row in first] == ["ada", "ben", "chloe"]
    assert [row["view_id"] for row in rest] == ["dmitri"]
    every = bank.done("view", "bank_totals", "--json").lines
    assert bank.done("view", "bank_totals", "--limit", "2", "--json").lines == every[:2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("account_query", "ada", "--limit", "1"),
        ("account_query", "--limit", "0"),
        ("bank_totals", "--after", "x"),
    ],
)
def test_pages_of_what_has_none(bank: Here, arguments: tuple[str, ...]) -> None:
    """One row is no page, and rows without ids have none to go on after: wrong usage."""
    result = bank("view", *arguments)
    assert (result.code, result.out) == (2, "")


def test_a_view_that_has_seen_a_command(here: Here, sqlite_url: str) -> None:
    """It is waited for, however late the command is decided; then the row is read."""
    command_id = new_command_id()
    opening = message("OpenAccount", "account", "zoe", {"account_id": "zoe"}, command_id)
    here.done("init")
    reading = ("view", "account_query", "zoe", "--wait-for", command_id, "--json")
    with (
        running(*reading, CQRS_ES_STORE_URL=sqlite_url) as view,
        running("run", "--commands", "-", CQRS_ES_STORE_URL=sqlite_url) as run,
    ):
        run.wait_for("started")
        run.feed(opening + b"\n")
        result = view.end()
    assert result.code == 0, result.err
    assert result.json["account_id"] == "zoe"


def test_status_has_colours_on_a_terminal_only(bank: Here, sqlite_url: str, tmp_path: Path) -> None:
    """There what somebody has to see to is in red; in a file there are no escapes."""
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b"not a message\n")
    bank.done("run", "--commands", str(file), "--until-idle")
    plain = bank.done("status").out
    coloured = on_a_terminal("status", CQRS_ES_STORE_URL=sqlite_url)
    assert "\x1b" not in plain
    assert "\x1b[1;31m1\x1b[0m" in coloured
    assert without_escapes(coloured).split() == plain.split()
    json = on_a_terminal("status", "--json", CQRS_ES_STORE_URL=sqlite_url)
    assert "\x1b" not in json


# --- stream and tail ---------------------------------------------------------


def test_a_stream_is_an_aggregates_events(bank: Here) -> None:
    """One CloudEvent a line, as on the topic."""
    events = bank.done("stream", "account", "ada", "--json").lines
    assert [event["type"] for event in events] == ADA
    epoch = bank.done("init", "--json").json["logepoch"]
    first = events[1]
    assert first.pop("time").endswith("Z")
    assert first == {
        "specversion": "1.0",
        "id": "account/ada/2",
        "source": "/bank",
        "type": "CustomerDepositedMoney",
        "subject": "ada",
        "datacontenttype": "application/json",
        "data": {"amount": "1000", "balance": "1000"},
        "aggregatetype": "account",
        "aggregatesequence": "2",
        "eventversion": "1.0",
        "partition": 0,
        "offset": "2",
        "logepoch": epoch,
        "partitionkey": "account/ada",
        "commandid": first["commandid"],
        "metadata": first["metadata"],
    }


@pytest.mark.parametrize("name", [("account", "Ada"), ("Account", "ada"), ("account", "nobody")])
def test_no_such_stream(bank: Here, name: tuple[str, str]) -> None:
    """An aggregate without events is not found: exit code 1."""
    result = bank("stream", *name)
    assert (result.code, result.out) == (1, "")
    assert "there is no aggregate" in result.complaint


def followed(url: str, *arguments: str, count: int) -> list[Any]:
    """Tail until so many events are there, then stop it by a signal."""
    with running("tail", "--json", *arguments, CQRS_ES_STORE_URL=url) as tail:
        until(lambda: tail.out.count("\n") >= count)
        tail.signal(signal.SIGTERM)
        result = tail.end()
    assert result.code == 0, result.err
    return result.lines


def test_tail_from_the_start(bank: Here, sqlite_url: str) -> None:
    """Every event of the log, in order; a signal ends it with exit code 0."""
    del bank  # it has filled the log
    events = followed(sqlite_url, "--from", "start", count=26)
    assert [event["offset"] for event in events] == [str(n) for n in range(1, 27)]


def test_tail_from_an_offset_of_one_type(bank: Here, sqlite_url: str) -> None:
    """From that offset on, it included; other types are left out."""
    del bank  # it has filled the log
    checks = followed(sqlite_url, "--from", "0:6", "--type", "CustomerWroteCheck", count=5)
    assert [event["data"]["check_number"] for event in checks] == [
        "1171", "2001", "2002", "3001", "4001"
    ]  # fmt: skip


def test_tail_warns_of_a_type_that_the_code_does_not_have(bank: Here, sqlite_url: str) -> None:
    """It may be in the log all the same, from older code; a slip would show nothing for ever."""
    del bank  # it has filled the log
    arguments = ("--from", "start", "--type", "AccountOpend", "--type", "AccountOpened")
    with running("tail", "--json", *arguments, CQRS_ES_STORE_URL=sqlite_url) as tail:
        tail.wait_for("event type unknown")
        tail.signal(signal.SIGTERM)
        result = tail.end()
    assert result.code == 0, result.err
    assert result.err.count("event type unknown") == 1
    assert '"type":"AccountOpend"' in result.err


def test_tail_shows_what_comes(bank: Here, sqlite_url: str) -> None:
    """From the end on, unless said otherwise: only what is committed later."""
    with running("tail", "--json", CQRS_ES_STORE_URL=sqlite_url) as tail:
        tail.wait_for("following")
        bank.done("run", "--commands", str(EXAMPLE), "--until-idle")  # duplicates: nothing new
        opening = message("OpenAccount", "account", "zoe", {"account_id": "zoe"})
        with running("run", "--commands", "-", CQRS_ES_STORE_URL=sqlite_url) as run:
            run.feed(opening + b"\n")
            until(lambda: "\n" in tail.out)
        tail.signal(signal.SIGINT)
        result = tail.end()
    assert result.code == 0
    assert [event["id"] for event in result.lines] == ["account/zoe/1"]


@pytest.mark.parametrize(
    ("where", "words"), [("middle", "not 'middle'"), ("9:1", "there is no partition 9")]
)
def test_tail_from_nowhere(bank: Here, where: str, words: str) -> None:
    """A place that is none is wrong usage."""
    result = bank("tail", "--from", where)
    assert result.code == 2
    assert words in result.complaint


# --- outcome -----------------------------------------------------------------


def test_an_outcome(bank: Here) -> None:
    """What a sender would receive; the id in any case (D3)."""
    for command_id in (FIRST, FIRST.upper()):
        assert bank.done("outcome", command_id, "--json").json == {
            "command_id": FIRST,
            "status": "accepted",
            "aggregate_type": "account",
            "aggregate_id": "ada",
            "sequence": 1,
            "partition": 0,
            "offset": "1",
            "events": [{"type": "AccountOpened", "sequence": 1}],
            "error": None,
            "duplicate": False,
        }


def test_a_rejection_for_people(bank: Here) -> None:
    """Looking up succeeds, whatever the outcome was."""
    text = bank.done("outcome", REJECTED).out
    assert "rejected" in text
    assert "invalid_command" in text


@pytest.mark.parametrize(("command_id", "code"), [(FIRST.replace("1", "2"), 1), ("mine", 2)])
def test_no_such_outcome(bank: Here, command_id: str, code: int) -> None:
    """An unknown id is not found, what is no id is wrong usage."""
    result = bank("outcome", command_id)
    assert (result.code, result.out) == (code, "")


def test_columns_of_every_type_are_printed_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    """A decimal keeps its digits, bytes are hexadecimal; days, moments and UUIDs are text."""
    row = {
        "price": Decimal("1.50"),
        "body": b"\x00\xff",
        "day": date(2026, 3, 29),
        "key": UUID(int=1),
    }
    print_json(row)
    printed = orjson.loads(capfd.readouterr().out)
    assert printed == {
        "price": "1.50", "body": "00ff", "day": "2026-03-29", "key": str(UUID(int=1))
    }  # fmt: skip
