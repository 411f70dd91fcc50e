"""What goes wrong is one sentence on stderr that says what to do, and an exit code."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors, program
from tests.bank_data import PROJECT
from tests.command_line import EXAMPLE, Result, cqrs_es, environment, message, running

if TYPE_CHECKING:
    from tests.command_line import Here

RUN = ("run", "--commands", str(EXAMPLE), "--until-idle", "--json")


def assert_refused(result: Result, code: int, *words: str) -> None:
    """One sentence with these words, no traceback, nothing on stdout."""
    assert result.code == code, result.err
    assert result.out == ""
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.complaint


def database(store_url: str) -> Path:
    return Path(store_url.removeprefix("sqlite:///"))


# --- The application ---------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("worker.app", ("MODULE:ATTRIBUTE", "worker.app:app")),
        ("no_such_module:app", ("'no_such_module'", "there is no module")),
        ("worker.nothing:app", ("there is no module 'worker.nothing'",)),
        ("worker.app:nothing", ("no such attribute", "Application")),
        ("worker.app:settings", ("BankSettings", "Application")),
        ("json:dumps", ("function",)),
    ],
)
def test_an_application_that_is_not_there(here: Here, path: str, words: tuple[str, ...]) -> None:
    """A wrong --app says which part of it is wrong."""
    assert_refused(here("--app", path, "status"), 2, *words)


def test_an_application_that_does_not_import(tmp_path: Path) -> None:
    """The inner error is named, with its place."""
    (tmp_path / "mine.py").write_text("first = 1\nsecond = undefined\n")
    result = cqrs_es("--app", "mine:app", "status", cwd=tmp_path)
    assert_refused(result, 2, "'mine' does not import", "NameError", "undefined", "line 2")


def test_an_application_whose_dependency_is_missing(tmp_path: Path) -> None:
    """A module that the application's module imports is told apart from that itself."""
    (tmp_path / "mine.py").write_text("import not_installed_at_all\n")
    result = cqrs_es("--app", "mine:app", "status", cwd=tmp_path)
    assert_refused(result, 2, "'mine' does not import", "No module named 'not_installed_at_all'")


def test_an_application_with_a_wrong_setting_of_its_own(sqlite_url: str) -> None:
    """The setting's own sentence is passed on."""
    result = cqrs_es("status", CQRS_ES_STORE_URL=sqlite_url, BANK_ATM_SECONDS="soon")
    assert_refused(result, 2, "BANK_ATM_SECONDS must be a number of seconds")


def test_no_application(tmp_path: Path) -> None:
    """All the ways to name one are listed."""
    result = cqrs_es("status", cwd=tmp_path)
    assert_refused(result, 2, "--app", "CQRS_ES_APP", "pyproject.toml")


def test_the_application_is_found_in_pyproject(tmp_path: Path) -> None:
    """`[tool.cqrs-es] app`, with the current directory first on the import path."""
    (tmp_path / "pyproject.toml").write_text('[tool.cqrs-es]\napp = "mine:app"\n')
    (tmp_path / "worker").mkdir()
    (tmp_path / "mine.py").write_text(
        "from cqrs_es.application import Application\napp = Application('mine')\n"
    )
    result = cqrs_es("init", "--json", cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / "mine.db").exists()


def test_the_flag_goes_before_the_environment(tmp_path: Path) -> None:
    """--app, then CQRS_ES_APP, then pyproject.toml."""
    (tmp_path / "pyproject.toml").write_text('[tool.cqrs-es]\napp = "third:app"\n')
    first = cqrs_es("--app", "first:app", "status", cwd=tmp_path, CQRS_ES_APP="second:app")
    assert "'first'" in first.complaint
    second = cqrs_es("status", cwd=tmp_path, CQRS_ES_APP="second:app")
    assert "'second'" in second.complaint
    third = cqrs_es("status", cwd=tmp_path)
    assert "'third'" in third.complaint


# --- Settings and usage ------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("CQRS_ES_STORE", "x", ("CQRS_ES_STORE is no setting", "CQRS_ES_STORE_URL")),
        ("CQRS_ES_BATCH_SIZE", "many", ("CQRS_ES_BATCH_SIZE", "whole number", "'many'")),
        ("CQRS_ES_STORE_URL", "oracle://x", ("CQRS_ES_STORE_URL", "sqlite")),
        ("CQRS_ES_BROKER_URL", "kafka://x", ("CQRS_ES_BROKER_URL", "redis://")),
        ("CQRS_ES_LOG_LEVEL", "loud", ("CQRS_ES_LOG_LEVEL", "debug")),
        ("CQRS_ES_STORE_URL_FILE", "/no/such", ("CQRS_ES_STORE_URL_FILE", "can't be read")),
    ],
)
def test_wrong_settings(
    here: Here, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: tuple[str, ...]
) -> None:
    """The variable is named, and what it may be."""
    monkeypatch.setenv(name, value)
    result = here("status")
    assert_refused(result, 2, *words)


@pytest.mark.parametrize("verb", ["worker", "relay", "projector"])
def test_one_role_alone_refuses_a_memory_broker(verb: str, here: Here) -> None:
    """Nobody else could see what it does."""
    assert_refused(here(verb), 2, "broker in memory", "CQRS_ES_BROKER_URL", "cqrs-es run")


@pytest.mark.parametrize("verb", ["worker", "relay", "projector"])
def test_one_role_alone_refuses_a_memory_store(
    verb: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for the store."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", "memory://")
    monkeypatch.setenv("CQRS_ES_BROKER_URL", "redis://127.0.0.1:1/0")
    assert_refused(here(verb), 2, "store in memory", "CQRS_ES_STORE_URL")


def test_sending_refuses_a_memory_broker(here: Here) -> None:
    """The command would be gone with the process."""
    assert_refused(here("send", "account", "a", "DepositMoney", "{}"), 2, "broker in memory")


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("view",), ("run", "--nonsense"), ("--log-level", "loud", "run")]
)
def test_wrong_usage(here: Here, arguments: tuple[str, ...]) -> None:
    """Unknown verbs and options, and missing arguments, are exit code 2."""
    result = here(*arguments)
    assert result.code == 2
    assert "Error: " in result.err
    assert result.out == ""


# --- SQLite ------------------------------------------------------------------


def test_another_number_of_partitions(bank: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """P is fixed when a store is created: exit code 2."""
    monkeypatch.setenv("CQRS_ES_PARTITIONS", "4")
    assert_refused(bank(*RUN), 2, "1 partitions", "CQRS_ES_PARTITIONS says 4", "unset")


def test_the_number_of_partitions_is_remembered(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not be set again."""
    monkeypatch.setenv("CQRS_ES_PARTITIONS", "4")
    here.done(*RUN)
    monkeypatch.delenv("CQRS_ES_PARTITIONS")
    assert len(here.done("status", "--json").json["partitions"]) == 4


def test_a_newer_schema(bank: Here, sqlite_url: str) -> None:
    """The program is to be upgraded: exit code 2."""
    with closing(sqlite3.connect(database(sqlite_url))) as connection:
        connection.execute("UPDATE store_info SET value = '99' WHERE name = 'schema_version'")
        connection.commit()
    assert_refused(bank(*RUN), 2, "schema 99", "upgrade")


def test_a_locked_file(bank: Here, sqlite_url: str) -> None:
    """Another process holds the lock: exit code 3 for who writes; others read beside it."""
    del bank  # it has made the file
    with closing(sqlite3.connect(database(sqlite_url))) as connection:
        connection.execute("BEGIN IMMEDIATE")
        result = cqrs_es(*RUN, CQRS_ES_STORE_URL=f"{sqlite_url}?timeout=0.1")
        assert cqrs_es("status", CQRS_ES_STORE_URL=f"{sqlite_url}?timeout=0.1").code == 0
    assert_refused(result, 3, "lock", "try again")


def test_a_file_that_is_locked_while_it_runs(sqlite_url: str) -> None:
    """A lock held for longer than a lease ends the run: exit code 3."""
    url = f"{sqlite_url}?timeout=0.1"
    with running("run", CQRS_ES_STORE_URL=url, CQRS_ES_LEASE_SECONDS="1") as run:
        run.wait_for("partition taken")
        with closing(sqlite3.connect(database(sqlite_url))) as connection:
            connection.execute("BEGIN IMMEDIATE")
            assert_refused_run(run.end())


def assert_refused_run(result: Result) -> None:
    assert result.code == 3, result.err
    assert "lock" in result.complaint


def test_a_read_only_file(bank: Here, sqlite_url: str) -> None:
    """Exit code 1, and where to look."""
    del bank  # it has made the file
    result = cqrs_es(*RUN, CQRS_ES_STORE_URL=f"{sqlite_url}?mode=ro")
    assert_refused(result, 1, "can't be written", "permissions")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A file can't be made there: exit code 1."""
    result = cqrs_es(*RUN, CQRS_ES_STORE_URL=f"sqlite:///{tmp_path / 'no' / 'bank.db'}")
    assert_refused(result, 1, "can't be written")


def test_a_file_that_is_no_database(sqlite_url: str) -> None:
    """Exit code 1."""
    database(sqlite_url).write_bytes(b"this is no database, not at all. " * 100)
    assert_refused(cqrs_es(*RUN, CQRS_ES_STORE_URL=sqlite_url), 1, "damaged or is no database")


def test_a_full_disk_ends_the_run(bank: Here, sqlite_url: str, tmp_path: Path) -> None:
    """A write that finds no room ends the whole process, not only a partition: exit code 1."""
    del bank  # it has made the file
    with closing(sqlite3.connect(database(sqlite_url))) as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
    names = [f"a{number}" for number in range(500)]
    openings = [message("OpenAccount", "account", name, {"account_id": name}) for name in names]
    more = tmp_path / "more.jsonl"
    more.write_bytes(b"\n".join(openings))
    result = cqrs_es(
        "run", "--commands", str(more), "--until-idle", "--json",
        CQRS_ES_STORE_URL=f"{sqlite_url}?max_pages={pages + 2}",
    )  # fmt: skip
    assert_refused(result, 1, "disk is full", "nothing was written")


# --- The rest ----------------------------------------------------------------


def test_a_traceback_only_when_debugging(here: Here) -> None:
    """--log-level debug shows where an error comes from."""
    assert "Traceback" not in here("view", "nothing").err
    assert "Traceback" in here("--log-level", "debug", "view", "nothing").err


def test_a_traceback_only_when_debugging_by_setting(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CQRS_ES_LOG_LEVEL=debug does so too."""
    monkeypatch.setenv("CQRS_ES_LOG_LEVEL", "debug")
    assert "Traceback" in here("view", "nothing").err


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (errors.SettingsError(), 2),
        (errors.StoreNotInitialised(), 2),
        (errors.SchemaTooNew(), 2),
        (errors.PartitionsMismatch(), 2),
        (errors.InvalidMessage(), 2),
        (errors.StoreUnavailable(), 3),
        (errors.StoreLocked(), 3),
        (errors.BrokerUnavailable(), 3),
        (errors.StoreFull(), 1),
        (errors.StoreReadOnly(), 1),
        (errors.StoreCorrupt(), 1),
        (errors.NotFound(), 1),
        (errors.WaitTimeout(), 1),
        (RuntimeError("a bug"), 1),
    ],
)
def test_each_error_has_its_exit_code(exc: Exception, code: int) -> None:
    """Also deep within groups."""
    group = ExceptionGroup("outer", [ExceptionGroup("inner", [exc])])
    assert program.exit_code(errors.innermost(group)) == code
    assert program.sentence(exc).count("\n") == 0


def test_a_full_stdout_is_an_error(bank: Here, sqlite_url: str) -> None:
    """Data that could not be written is no success."""
    del bank  # it has made the file
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "cqrs_es.cli", "view", "account_query", "--json"],
            cwd=PROJECT,
            env=environment({"CQRS_ES_STORE_URL": sqlite_url}),
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.returncode == 1
    assert b"No space left" in done.stderr
