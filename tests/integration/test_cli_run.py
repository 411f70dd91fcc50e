"""`run`: what it does, what it prints, how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es.cli import entry
from cqrs_es.cli import running as running_verbs
from cqrs_es.cli.main import cli
from tests.command_line import EXAMPLE, cqrs_es, message, running
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.command_line import Here, Running

ALL = {"accepted": 26, "rejected": 6, "failed": 0, "duplicate": 1, "dead": 0}
TROUBLE = ("--app", "tests.integration.troublesome:app")


def lines_of(*commands: str, aggregates: int = 1) -> bytes:
    """Write command messages for the troublesome application."""
    return b"\n".join(
        message(command, "trouble", f"t{number}")
        for number in range(aggregates)
        for command in commands
    )


def fed(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "commands.jsonl"
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("url", ["memory://", "sqlite"])
def test_it_handles_a_file_and_ends(url: str, sqlite_url: str) -> None:
    """With --until-idle it exits 0 when all is done, and prints exactly the summary."""
    store = sqlite_url if url == "sqlite" else url
    result = cqrs_es(
        "run", "--commands", str(EXAMPLE), "--until-idle", "--json", CQRS_ES_STORE_URL=store
    )
    assert result.code == 0, result.err
    summary = result.json
    assert summary.pop("seconds") > 0
    assert summary == {"commands": ALL, "events": 26}


def test_handlers_find_their_application_open(here: Here, tmp_path: Path) -> None:
    """The bank's statement reads a view, by the application that its module has."""
    command = message("DrawStatement", "statement", "bank")
    arguments = ("run", "--commands", fed(tmp_path, command), "--until-idle", "--json")
    assert here.done(*arguments).json["commands"] == dict.fromkeys(ALL, 0) | {"accepted": 1}


def test_a_file_fed_again_is_all_duplicates(bank: Here) -> None:
    """Nothing is done twice."""
    before = bank.done("view", "account_query", "--json").lines
    summary = bank.done("run", "--commands", str(EXAMPLE), "--until-idle", "--json").json
    assert summary["commands"] == dict.fromkeys(ALL, 0) | {"duplicate": 33}
    assert summary["events"] == 0
    assert bank.done("view", "account_query", "--json").lines == before


def test_bad_lines_become_dead_letters_and_good_ones_go_on(here: Here, tmp_path: Path) -> None:
    """Blank lines are skipped; what is no message is counted as dead; the last needs no newline."""
    first, second = EXAMPLE.read_bytes().splitlines()[:2]
    content = b"\n".join([b"{bad", b"", b"  ", first, b"[1]", b"\xff\xfe", second])
    summary = here.done("run", "--commands", fed(tmp_path, content), "--until-idle", "--json").json
    assert summary["commands"] == dict.fromkeys(ALL, 0) | {"accepted": 2, "dead": 3}
    letters = here.done("dead", "list", "--json").lines
    assert sorted(letter["body"] for letter in letters) == ["[1]", "{bad", "\ufffd\ufffd"]


def test_failures_are_an_error_where_that_is_asked_for(here: Here, tmp_path: Path) -> None:
    """With --strict the exit code is 1 for failed commands, dead letters and parked aggregates."""
    until_idle = ("run", "--until-idle", "--json", "--strict", "--commands")
    rejections = here.done(*until_idle, str(EXAMPLE)).json["commands"]["rejected"]
    assert rejections  # which are answers, no failures
    unknown = here(*until_idle, fed(tmp_path, message("Nonsense", "account", "a1")))
    assert (unknown.code, unknown.json["commands"]["failed"]) == (1, 1)
    assert "failed: 1" in unknown.complaint
    assert "`cqrs-es dead list`" in unknown.complaint
    dead = here(*until_idle, fed(tmp_path, b"{no"))
    assert (dead.code, dead.json["commands"]["dead"]) == (1, 1)
    assert here.done("run", "--until-idle", "--json").json["commands"]["failed"] == 0


def test_it_reads_stdin(sqlite_url: str) -> None:
    """A file named - is stdin."""
    result = cqrs_es(
        "run", "--commands", "-", "--until-idle", "--json",
        stdin=EXAMPLE.read_bytes(), CQRS_ES_STORE_URL=sqlite_url,
    )  # fmt: skip
    assert result.json["commands"] == ALL


def test_what_arrives_on_stdin_is_handled_before_it_ends(sqlite_url: str) -> None:
    """Lines are sent as they come, not when a buffer is full."""
    first = EXAMPLE.read_bytes().splitlines()[0]
    with running("run", "--commands", "-", CQRS_ES_STORE_URL=sqlite_url) as run:
        run.feed(first + b"\n")
        command_id = orjson.loads(first)["id"]
        until(lambda: cqrs_es("outcome", command_id, CQRS_ES_STORE_URL=sqlite_url).code == 0)
        run.signal(signal.SIGTERM)
        assert run.end().code == 0


def test_a_summary_for_people(here: Here) -> None:
    """Without --json the outcomes, events and rows are listed."""
    result = here.done("run", "--commands", str(EXAMPLE), "--until-idle")
    assert "33: 26 accepted, 6 rejected, 1 duplicate" in result.out
    assert "view account_query  4 rows" in result.out


def test_nothing_to_do_is_done_at_once(here: Here) -> None:
    """--until-idle without commands ends when what is there is projected."""
    summary = here.done("run", "--until-idle", "--json").json
    assert summary["commands"] == dict.fromkeys(ALL, 0)


@pytest.mark.parametrize(("file", "reason"), [("/no/such", "No such file"), (".", "directory")])
def test_a_file_that_cant_be_read_is_wrong_usage(here: Here, file: str, reason: str) -> None:
    """It is said before anything is started."""
    result = here("run", "--commands", file, "--until-idle")
    assert result.code == 2
    assert reason in result.complaint


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(number: signal.Signals, sqlite_url: str) -> None:
    """The first signal stops it with exit code 0."""
    with running("run", CQRS_ES_STORE_URL=sqlite_url) as run:
        run.wait_for("partition taken")
        run.signal(number)
        assert run.end().code == 0


def test_it_listens_for_signals_before_it_imports_anything() -> None:
    """What takes time to import would leave a signal to Python, whose exit code is -15."""
    slow = "{'asyncio', 'msgspec', 'orjson', 'structlog', 'typer'}"
    code = f"import sys, cqrs_es.cli.entry; sys.exit(bool({slow} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_verb_that_runs_roles_listens_early() -> None:
    """A new one is easily forgotten where the command line begins."""
    callbacks = [command.callback for command in cli.registered_commands if command.callback]
    verbs = {each.__name__ for each in callbacks if each.__module__ == running_verbs.__name__}
    assert verbs == entry.LONG_RUNNING


def test_an_interrupted_until_idle_is_told_apart(sqlite_url: str) -> None:
    """A signal before the end gives exit code 4; running it again finishes the work."""
    with running(
        "run", "--commands", "-", "--until-idle", "--json", CQRS_ES_STORE_URL=sqlite_url
    ) as run:
        run.feed(EXAMPLE.read_bytes())  # and no end of file
        run.wait_for("partition taken")
        run.signal(signal.SIGINT)
        result = run.end()
    assert result.code == 4
    assert "run it again" in result.complaint
    assert set(result.json) == {"commands", "events", "seconds"}
    again = cqrs_es("run", "--commands", str(EXAMPLE), "--until-idle", CQRS_ES_STORE_URL=sqlite_url)
    assert again.code == 0


@contextmanager
def trouble(command: str, sqlite_url: str, says: str, **settings: str) -> Generator[Running]:
    """Run a command that takes for ever, and has begun."""
    with running(
        *TROUBLE, "run", "--commands", "-", CQRS_ES_STORE_URL=sqlite_url, **settings
    ) as run:
        run.feed(lines_of(command) + b"\n")
        until(lambda: says in run.out)
        yield run


def test_the_second_signal_cancels(sqlite_url: str) -> None:
    """What takes too long is cut short by the second signal: exit code 1."""
    with trouble("Wait", sqlite_url, "waiting") as run:
        run.signal(signal.SIGTERM)
        run.wait_for('"stopping"')
        run.signal(signal.SIGTERM)
        result = run.end()
    assert result.code == 1
    assert "stopped before all in hand was finished" in result.err


@pytest.mark.parametrize(("command", "says"), [("Wait", "waiting"), ("Cling", "clinging")])
def test_the_first_signal_gives_only_so_much_time(sqlite_url: str, command: str, says: str) -> None:
    """After the shutdown timeout what is left is cut short, even what won't be: exit code 1."""
    with trouble(command, sqlite_url, says, CQRS_ES_SHUTDOWN_TIMEOUT="0.3") as run:
        run.signal(signal.SIGTERM)
        result = run.end()
    assert result.code == 1
    assert "stopped before all in hand was finished" in result.err


def test_the_third_signal_exits_at_once(sqlite_url: str) -> None:
    """Even where the event loop is blocked: 128 and the signal's number."""
    with trouble("Block", sqlite_url, "blocking") as run:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            run.signal(number)
            until(lambda: _handled(run.process.pid))
        assert run.end().code == 128 + signal.SIGTERM


def _handled(process_id: int) -> bool:
    """Tell whether a process has no signal pending, or is gone."""
    try:
        text = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return all(
        int(line.split()[1], 16) == 0
        for line in text.splitlines()
        if line.startswith(("SigPnd", "ShdPnd"))
    )


def test_a_blocked_event_loop_ends_the_process(sqlite_url: str) -> None:
    """After a lease's time, with the stack of what blocks it; exit code 1."""
    with trouble("Block", sqlite_url, "blocking", CQRS_ES_LEASE_SECONDS="1") as run:
        result = run.end()
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if "event loop blocked" in line]
    assert "time.sleep(LONG)" in orjson.loads(line)["stack"]


def test_a_slow_start_is_no_blocked_event_loop(sqlite_url: str, redis_url: str) -> None:
    """Before it has a lease, a process may take long: to import drivers, on a busy machine, say."""
    slow = ("--app", "tests.apps.slow_driver:app")
    for verb in (["init"], ["run", "--until-idle"]):
        done = cqrs_es(
            *slow,
            *verb,
            CQRS_ES_STORE_URL=sqlite_url,
            CQRS_ES_BROKER_URL=redis_url,
            CQRS_ES_LEASE_SECONDS="1",
        )
        assert done.code == 0, done.err


def test_a_frozen_process_goes_on(here: Here, sqlite_url: str) -> None:
    """One that was stopped as a whole for longer than a lease takes its partitions again."""

    def leases() -> int:
        return len(here.done("status", "--json").json["leases"])

    with running("run", CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_LEASE_SECONDS="1") as run:
        run.wait_for("partition taken")
        until(lambda: leases() == 5)
        run.signal(signal.SIGSTOP)
        until(lambda: leases() == 0)
        run.signal(signal.SIGCONT)
        until(lambda: leases() == 5)
        run.signal(signal.SIGTERM)
        assert run.end().code == 0


def test_a_view_that_is_wrong_does_not_keep_until_idle_waiting(
    sqlite_url: str, tmp_path: Path
) -> None:
    """Too many parked aggregates end the run with exit code 1, and the view's name."""
    commands = fed(tmp_path, lines_of("Do", aggregates=30))
    result = cqrs_es(
        "--app", "tests.integration.troublesome:with_broken_view",
        "run", "--commands", commands, "--until-idle",
        CQRS_ES_STORE_URL=sqlite_url,
    )  # fmt: skip
    assert result.code == 1
    assert "broken failed on events" in result.complaint
    assert "fix the view" in result.complaint


def test_the_example_of_transfers(bank: Here) -> None:
    """One arrives, one comes back; what examples/README.md says of them."""
    path = EXAMPLE.with_name("transfers.jsonl")
    bank.done("run", "--commands", str(path), "--until-idle")
    outcomes = [
        bank("outcome", orjson.loads(line)["id"], "--json").json["status"]
        for line in path.read_text().splitlines()
    ]
    assert outcomes == ["accepted", "rejected", "accepted", "accepted", "rejected"]
    balances = [
        bank.done("view", "account_query", account, "--json").json["balance"]
        for account in ("ada", "chloe")
    ]
    assert balances == ["1023.72", "545.51"]
    events = bank.done("stream", "transfer", "0192f0c4-5b7a-7000-8001-000000000004", "--json").lines
    assert [event["type"] for event in events] == [
        "TransferBegan", "TransferRefused", "TransferEnded"
    ]  # fmt: skip


def test_progress_is_shown_every_second(sqlite_url: str) -> None:
    """Where stderr is no terminal: as log lines, each a JSON object."""
    with running(
        "run", "--commands", "-", CQRS_ES_STORE_URL=sqlite_url, CQRS_ES_LOG_FORMAT="json"
    ) as run:
        run.feed(EXAMPLE.read_bytes())
        run.wait_for('"progress"')
        run.signal(signal.SIGTERM)
        result = run.end()
    lines = [orjson.loads(line) for line in result.err.splitlines()]
    (progress, *_) = [line for line in lines if line["event"] == "progress"]
    assert progress["commands"] == 33
    assert progress["events"] == 26
    (started,) = [line for line in lines if line["event"] == "started"]
    assert started["roles"] == [
        "projector:account_query", "projector:bank_totals", "reactor:transfer", "relay", "worker"
    ]  # fmt: skip
    assert started["app"] == "worker.app:app"
    assert started["store"] == sqlite_url
