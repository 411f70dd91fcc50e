"""`dead …`, `parked …`, `republish`."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import redis

from cqrs_es import errors, wire
from cqrs_es.cloudevents import timestamp
from cqrs_es.commands import new_command
from tests.command_line import EXAMPLE, cqrs_es, message
from tests.terminal import on_a_terminal, without_escapes
from tests.transfers import Account, Ask, Asked, Broken, Fund

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command_line import Here, Result

UNKNOWN = "0192f0c4-5b7a-7000-8000-00000000aaaa"
NEXT_MONTH = datetime.now(UTC).replace(microsecond=0) + timedelta(days=30)
BAD = b"{bad \x1b[31m"


@pytest.fixture
def troubled(here: Here, tmp_path: Path) -> Here:
    """Bring about two dead letters: an unknown command, and a line that is no message."""
    unknown = message("CloseAccount", "account", "ada", command_id=UNKNOWN)
    file = tmp_path / "commands.jsonl"
    file.write_bytes(b"\n".join([unknown, BAD, *EXAMPLE.read_bytes().splitlines()]))
    summary = here.done("run", "--commands", str(file), "--until-idle", "--json").json
    assert (summary["commands"]["failed"], summary["commands"]["dead"]) == (1, 1)
    return here


def letters(here: Here) -> dict[str, Any]:
    return {letter["reason"][:15]: letter for letter in here.done("dead", "list", "--json").lines}


def test_dead_list(troubled: Here) -> None:
    """One object a line, with everything that is known."""
    found = letters(troubled)
    assert set(found) == {"unknown_command", "message is not "}
    unknown = found["unknown_command"]
    assert unknown["id"] == UNKNOWN
    assert orjson.loads(unknown["body"])["type"] == "CloseAccount"
    assert unknown["source"] == "commands"
    assert unknown["attempts"] == 1
    assert found["message is not "]["body"] == BAD.decode()
    assert troubled.done("status", "--json").json["dead_letters"] == 2


def test_dead_letters_for_people_hold_no_escapes(troubled: Here) -> None:
    """What a terminal would obey is shown as a code."""
    letter_id = letters(troubled)["message is not "]["id"]
    shown = troubled.done("dead", "show", letter_id).out
    assert "{bad \\x1b[31m" in shown
    assert "\x1b" not in shown + troubled.done("dead", "list").out


def test_ids_can_be_copied_from_a_terminal(troubled: Here, sqlite_url: str) -> None:
    """On 80 columns the reason is folded, and the id that the other verbs take is not."""
    listed = on_a_terminal("dead", "list", columns=80, CQRS_ES_STORE_URL=sqlite_url)
    lines = without_escapes(listed).splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines if line[:1].strip()] == ["id", *ids(troubled)]


def ids(here: Here) -> list[str]:
    return [letter["id"] for letter in here.done("dead", "list", "--json").lines]


def test_repair_where_nothing_is_broken(here: Here) -> None:
    """It says so, to people; there is nothing for programs to read."""
    here.done("init")
    assert here.done("dead", "retry", "--all").out == "there are no dead letters\n"
    assert here.done("dead", "drop", "--all").out == "there are no dead letters\n"
    parked = ("parked", "retry", "account_query")
    assert here.done(*parked).out == "nothing is parked for account_query\n"
    assert here.done("dead", "drop", "--all", "--json").out == ""
    assert here.done(*parked, "--json").out == ""


def test_dead_show(troubled: Here) -> None:
    """The same object by its id; another id is not found."""
    assert (
        troubled.done("dead", "show", UNKNOWN, "--json").json
        == letters(troubled)["unknown_command"]
    )
    missing = troubled("dead", "show", str(uuid.uuid4()))
    assert missing.code == 1
    assert "there is no dead letter" in missing.complaint


def test_dead_retry_of_what_is_still_wrong(troubled: Here) -> None:
    """The outcome of each is printed; those that stay make the exit code 1."""
    result = troubled("dead", "retry", "--all", "--json")
    assert result.code == 1
    assert [outcome["status"] for outcome in result.lines] == ["failed"]
    assert "not JSON" in result.complaint
    logged = [orjson.loads(line) for line in result.err.splitlines() if line.startswith("{")]
    assert {line["service"] for line in logged} == {"bank"}
    assert len(letters(troubled)) == 2


def test_dead_retry_with_newer_code(troubled: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that knows the command accepts it, and the letter is gone (D11)."""
    monkeypatch.setenv("CQRS_ES_SERVICE", "bank")
    newer = ("--app", "tests.integration.newer_bank:app")
    result = troubled.done(*newer, "dead", "retry", UNKNOWN, "--json")
    assert result.json["status"] == "accepted"
    assert result.json["events"] == [{"type": "AccountClosed", "sequence": 8}]
    assert set(letters(troubled)) == {"message is not "}
    assert troubled.done("outcome", UNKNOWN, "--json").json["status"] == "accepted"


def test_dead_drop(troubled: Here) -> None:
    """By id, or all; the failed outcome stays."""
    dropped = troubled.done("dead", "drop", UNKNOWN, "--json").json
    assert dropped == {"id": UNKNOWN, "dropped": True}
    assert troubled("dead", "drop", UNKNOWN).code == 1
    troubled.done("dead", "drop", "--all")
    assert letters(troubled) == {}
    assert troubled.done("outcome", UNKNOWN, "--json").json["status"] == "failed"


@pytest.mark.parametrize("verb", ["retry", "drop"])
@pytest.mark.parametrize("which", [(), (UNKNOWN, "--all")])
def test_which_letters_must_be_said(here: Here, verb: str, which: tuple[str, ...]) -> None:
    """Neither none nor both: wrong usage."""
    assert here("dead", verb, *which).code == 2


def test_parked_list(here: Here, tmp_path: Path) -> None:
    """One object a line for each aggregate that a view fails on."""
    file = tmp_path / "commands.jsonl"
    file.write_bytes(b"\n".join(message("Do", "trouble", name) for name in ("a", "b")))
    app = ("--app", "tests.integration.troublesome:with_broken_view")
    summary = here.done(*app, "run", "--commands", str(file), "--until-idle")
    assert "parked       2" in summary.out
    parked = here.done(*app, "parked", "list", "--json").lines
    assert [(p["aggregate_type"], p["aggregate_id"], p["from_sequence"]) for p in parked] == [
        ("trouble", "a", 1), ("trouble", "b", 1)
    ]  # fmt: skip
    assert {p["reason"] for p in parked} == {"ValueError: this view is wrong"}
    assert here.done(*app, "status", "--json").json["parked"] == 2


def test_republish_needs_a_broker_that_lasts(bank: Here) -> None:
    """What is published to a broker in memory reaches nobody: exit code 2."""
    assert "broker in memory" in bank("republish", "0", "--from", "1").complaint


def test_republish_fills_a_topic_that_lost_everything(
    bank: Here, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Redis what comes before is published too: entry ids have no holes."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    done = bank.done("republish", "0", "--from", "20", "--json").json
    assert done == {"partition": 0, "from": "20", "to": "26"}
    with redis.Redis.from_url(redis_url) as client:  # pyright: ignore[reportUnknownMemberType]
        entries = client.xrange("bank:events:0")
    assert entries is not None
    assert [entry_id for entry_id, _ in entries] == [f"{n}-0".encode() for n in range(1, 27)]


def test_republish_puts_back_what_was_trimmed(
    bank: Here, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Redis from the given offset on, in front of what is there."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    bank.done("republish", "0", "--from", "1")
    with redis.Redis.from_url(redis_url) as client:  # pyright: ignore[reportUnknownMemberType]
        client.xtrim("bank:events:0", maxlen=3, approximate=False)
        done = bank.done("republish", "0", "--from", "20", "--json").json
        assert done == {"partition": 0, "from": "20", "to": "26"}
        entries = client.xrange("bank:events:0")
    assert entries is not None
    assert [entry_id for entry_id, _ in entries] == [f"{n}-0".encode() for n in range(20, 27)]


@pytest.mark.parametrize(("partition", "offset", "code"), [("0", "27", 1), ("7", "1", 2)])
def test_republish_what_is_not_there(
    bank: Here, redis_url: str, monkeypatch: pytest.MonkeyPatch, partition: str, offset: str,
    code: int,
) -> None:  # fmt: skip
    """Beyond the head is not found, a partition that there is not is wrong usage."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    assert bank("republish", partition, "--from", offset).code == code


# --- scheduled ---------------------------------------------------------------


def test_a_command_is_sent_for_later(redis_url: str, tmp_path: Path) -> None:
    """`send --at` has the workers keep it; listed, made due and cancelled by its id."""
    store_url = f"sqlite:///{tmp_path / 'later.db'}"

    def call(*arguments: str) -> Result:
        return cqrs_es(*arguments, CQRS_ES_STORE_URL=store_url, CQRS_ES_BROKER_URL=redis_url)

    done = call("init")
    assert done.code == 0, done.err
    ids: list[str] = []
    for account in ("ada", "bob", "eve"):
        payload = orjson.dumps({"account_id": account}).decode()
        arguments = (
            "send",
            "account",
            account,
            "OpenAccount",
            payload,
            "--at",
            f"{NEXT_MONTH:%Y-%m-%dT%H:%M:%S}+01:00",
        )
        sent = call(*arguments, "--json")
        assert sent.code == 0, sent.err
        ids.append(sent.json["command_id"])
    assert call("run", "--until-idle").code == 0
    every = call("scheduled", "list", "--json").lines
    (statement,) = [line for line in every if line["target"] == "statement/bank"]
    listed = [line for line in every if line != statement]
    assert sorted(line["id"] for line in listed) == sorted(ids)
    assert {line["due"] for line in listed} == {timestamp(NEXT_MONTH - timedelta(hours=1))}
    assert {line["target"] for line in listed} == {"account/ada", "account/bob", "account/eve"}
    assert call("scheduled", "list", "--due", "--json").lines == []
    assert call("scheduled", "list", "--failed", "--json").lines == []
    (line,) = call("scheduled", "list", "--for", "account/bob", "--json").lines
    assert line["id"] == ids[1]
    assert line["command"]["payload"] == {"account_id": "bob"}

    assert call("scheduled", "run", ids[0], "--json").json == {
        "id": ids[0],
        "due": True,
    }
    (line,) = call("scheduled", "list", "--due", "--json").lines
    assert line["id"] == ids[0]
    status = call("status", "--json").json
    assert status["scheduled"]["due"] == 1
    assert status["scheduled"]["overdue_seconds"] >= 0
    assert "scheduled, due" in call("status").out
    assert call("scheduled", "cancel", ids[1]).out == f"{ids[1]} cancelled\n"
    assert call("run", "--until-idle").code == 0
    assert call("outcome", ids[0], "--json").json["status"] == "accepted"
    for verb in ("cancel", "run"):
        late = call("scheduled", verb, ids[0], "--json")
        assert late.code == 1
        assert late.json["status"] == "accepted"
        gone = call("scheduled", verb, ids[1], "--json")
        assert (gone.code, gone.out) == (1, "")
        assert "there is no scheduled command" in gone.complaint
    left = {line["id"] for line in call("scheduled", "list", "--json").lines}
    assert left == {ids[2], statement["id"]}
    assert ids[2] in call("scheduled", "list").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["send", "a", "1", "C", "{}", "--at", "tomorrow"], "--at must be a moment such as"),
        (["send", "a", "1", "C", "{}", "--at", "2020-01-01T00:00:00Z"], "more than a day ago"),
        (["send", "a", "1", "C", "{}", "--at", f"{NEXT_MONTH:%FT%TZ}", "--wait"], "--wait"),
        (["scheduled", "list", "--for", "account"], "give TYPE/ID"),
        (["scheduled", "cancel", "x"], "must be a UUID"),
    ],
)
def test_wrong_times_and_targets_are_refused(bank: Here, arguments: list[str], said: str) -> None:
    """Exit code 2, and what is to be given."""
    result = bank(*arguments)
    assert result.code == 2
    assert said in result.complaint


def test_dead_list_names_the_process_that_waits(
    here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input that fails holds up its instance, which the letter names; dropped, it goes on."""

    def break_bad(given: object) -> None:
        if isinstance(given, Asked) and given.transfer == "bad":
            raise errors.DefinitionError  # which is not tried again

    monkeypatch.setattr(Broken, "on", break_bad)
    asked = [new_command(Account, "ada", Ask(name, "ada", "ben", 5)) for name in ("bad", "good")]
    commands = [new_command(Account, "ada", Fund(10)), *asked]
    file = tmp_path / "commands.jsonl"
    file.write_bytes(b"\n".join(map(wire.encode_command, commands)))
    app = ("--app", "tests.transfers:app")
    here.done(*app, "run", "--commands", str(file), "--until-idle")
    (letter,) = here.done(*app, "dead", "list", "--json").lines
    assert letter["waits"] == "transfer/bad"
    assert "transfer/bad" in here.done(*app, "dead", "list").out
    assert here.done(*app, "dead", "show", letter["id"], "--json").json == letter
    assert here.done(*app, "stream", "transfer", "good", "--json").lines[-1]["type"] == "Ended"
    here.done(*app, "dead", "drop", letter["id"])
    assert here.done(*app, "dead", "list", "--json").lines == []
