"""`init`, `check`, `settings`, `--help`, `--version`: before anything runs."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import botocore.session
import pytest

from cqrs_es.brokers import broker_for
from cqrs_es.cli.preparing import MEANINGS
from tests.bank_data import PROJECT
from tests.command_line import cqrs_es, environment
from tests.conftest import run_on
from tests.servers import free_port, psql

if TYPE_CHECKING:
    from tests.command_line import Here

VERBS = [
    "run", "worker", "relay", "projector", "reactor", "serve", "init", "check", "settings",
    "send", "status", "view", "stream", "tail", "outcome", "rebuild", "republish", "dead",
    "parked", "keys", "views", "scheduled", "schema",
]  # fmt: skip


# --- init --------------------------------------------------------------------


def test_init_is_idempotent(here: Here) -> None:
    """The second time it finds what the first one made."""
    first = here.done("init", "--json").json
    assert set(first) == {"partitions", "logepoch", "schema_version"}
    assert here.done("init", "--json").json == first


def test_init_begins_a_new_epoch(bank: Here) -> None:
    """--new-epoch renews the log's id and resets the relay's mark; events and views stay."""
    before = bank.done("init", "--json").json
    after = bank.done("init", "--new-epoch", "--json").json
    assert after["logepoch"] != before["logepoch"]
    (partition,) = bank.done("status", "--json").json["partitions"]
    assert (partition["head"], partition["relay"]) == ("26", "0")
    bank.done("run", "--until-idle")
    (partition,) = bank.done("status", "--json").json["partitions"]
    assert (partition["relay"], partition["projectors"]["account_query"]) == ("26", "26")


def test_a_server_store_has_to_be_initialised(mysql_url: str) -> None:
    """Without `init` a verb says so, exit code 2; afterwards all is there, P = 16."""
    refused = cqrs_es("status", CQRS_ES_STORE_URL=mysql_url)
    assert refused.code == 2
    assert "cqrs-es init" in refused.complaint
    assert cqrs_es("check", CQRS_ES_STORE_URL=mysql_url).code == 2
    made = cqrs_es("init", "--json", CQRS_ES_STORE_URL=mysql_url)
    assert made.json["partitions"] == 16
    assert cqrs_es("check", CQRS_ES_STORE_URL=mysql_url).code == 0
    found = cqrs_es("status", "--json", CQRS_ES_STORE_URL=mysql_url)
    assert len(found.json["partitions"]) == 16


# --- Whose database it is ----------------------------------------------------

OTHERS = {
    "events": "id INTEGER, title VARCHAR(40), starts VARCHAR(40)",
    "members": "id INTEGER, name VARCHAR(40)",
    "store_info": "id INTEGER, note VARCHAR(40)",
}
SERVERS = ["sqlite", "mysql", "postgres"]
REFUSED = [
    ("init",), ("init", "--new-epoch"), ("check",), ("status",), ("view", "account_query"),
    ("tail",), ("stream", "account", "a"), ("dead", "list"), ("parked", "list"),
    ("rebuild", "account_query"), ("republish", "0", "--from", "1"), ("run", "--until-idle"),
    ("worker",), ("relay",), ("projector",), ("send", "account", "a", "OpenAccount", "{}"),
]  # fmt: skip


def execute(url: str, statement: str) -> list[str]:
    """Run a statement on an SQL store as another program would; return its rows as text."""
    parts = urlsplit(url)
    if parts.scheme == "postgresql":
        return psql(url, statement).splitlines()
    if parts.scheme == "mysql":
        run_on(url, statement.replace("TABLE ", f"TABLE {parts.path.strip('/')}."))
        return []
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        rows = connection.execute(statement).fetchall()
        connection.commit()
    return [str(row) for row in rows]


@pytest.fixture(params=SERVERS)
def sql_url(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.mark.parametrize("store", [*SERVERS, "dynamodb"])
def test_another_service_is_refused(
    here: Here,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    redis_url: str,
    store: str,
) -> None:
    """By every verb, with exit code 2 and both names; the first service goes on."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", request.getfixturevalue(f"{store}_url"))
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    before = here.done("init", "--json").json
    monkeypatch.setenv("CQRS_ES_SERVICE", "shop")
    for verb in REFUSED:
        result = here(*verb)
        assert result.code == 2, (verb, result.out, result.err)
        said = " ".join((result.out + result.err).split())
        assert "belongs to the service 'bank', this is 'shop'" in said
    monkeypatch.delenv("CQRS_ES_SERVICE")
    assert here.done("init", "--json").json == before
    assert here("check").code == 0


@pytest.mark.parametrize("table", OTHERS)
def test_a_table_of_another_program_is_refused(
    here: Here, monkeypatch: pytest.MonkeyPatch, sql_url: str, table: str
) -> None:
    """By its name, with exit code 2, and nothing in its database is touched."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", sql_url)
    execute(sql_url, f"CREATE TABLE {table} ({OTHERS[table]})")
    for _ in range(2):
        result = here("init")
        assert result.code == 2, result.err
        assert f"the table {table} " in result.err
        assert "belongs to another program" in result.err
    execute(sql_url, f"DROP TABLE {table}")
    here.done("init")  # nothing was left half made
    assert here("check").code == 0


def test_a_table_that_was_replaced_is_found_by_check(
    here: Here, monkeypatch: pytest.MonkeyPatch, sql_url: str
) -> None:
    """The columns of every table of the framework are compared."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", sql_url)
    here.done("init")
    execute(sql_url, "DROP TABLE members")
    assert findings(here, code=1)["store"]["detail"].startswith("the store has no table members")
    execute(sql_url, f"CREATE TABLE members ({OTHERS['members']})")
    assert "the table members has no column role" in findings(here, code=2)["store"]["detail"]


def test_a_sqlite_file_of_another_program_stays_as_it_is(here: Here, sqlite_url: str) -> None:
    """To the byte: not even its journal's mode is changed."""
    execute(sqlite_url, f"CREATE TABLE events ({OTHERS['events']})")
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    before = path.read_bytes()
    for verb in (("init",), ("run", "--until-idle"), ("status",), ("check",)):
        here(*verb)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_table_of_another_program_on_dynamodb(
    here: Here, monkeypatch: pytest.MonkeyPatch, dynamodb_url: str
) -> None:
    """Other keys, or our keys and another index: refused by name."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", dynamodb_url)
    for keys in (["id"], ["pk", "sk"]):
        name = make_table(dynamodb_url, keys)
        result = here("init")
        assert result.code == 2, result.err
        assert f"the table {name} belongs to another program" in result.err
        delete_table(dynamodb_url, name)


def make_table(url: str, keys: list[str]) -> str:
    name = f"{urlsplit(url).path.strip('/')}-store"
    client(url).create_table(
        TableName=name,
        BillingMode="PAY_PER_REQUEST",
        KeySchema=[
            {"AttributeName": key, "KeyType": kind}
            for key, kind in zip(keys, ("HASH", "RANGE"), strict=False)
        ],
        AttributeDefinitions=[{"AttributeName": key, "AttributeType": "S"} for key in keys],
    )
    return name


def delete_table(url: str, name: str) -> None:
    client(url).delete_table(TableName=name)


def client(url: str) -> Any:
    parts = urlsplit(url)
    endpoint = parts.query.removeprefix("endpoint=")
    session: Any = botocore.session.Session()
    return session.create_client("dynamodb", region_name=parts.netloc, endpoint_url=endpoint)


READING = [
    ("status",), ("view", "account_query"), ("stream", "account", "a"), ("tail",),
    ("outcome", "0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f"), ("dead", "list"), ("dead", "show", "x"),
    ("dead", "retry", "--all"), ("dead", "drop", "--all"), ("parked", "list"),
    ("parked", "retry", "account_query"), ("rebuild", "account_query"),
]  # fmt: skip


@pytest.mark.parametrize("verb", READING, ids=" ".join)
def test_only_init_and_roles_make_a_store(here: Here, sqlite_url: str, verb: tuple[str]) -> None:
    """A slip in the URL of any other verb makes no file: exit code 1, and the file is named."""
    result = here(*verb)
    assert result.code == 1, result.err
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    assert f"there is no file {path}" in result.complaint
    assert list(path.parent.iterdir()) == []


# --- check -------------------------------------------------------------------


def findings(here: Here, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = here(*arguments, "check", "--json")
    assert result.code == code, result.out
    return {finding["check"]: finding for finding in result.lines}


def test_check_before_the_first_run(here: Here, tmp_path: Path) -> None:
    """A SQLite file that is not made yet is no fault, nor is it made."""
    found = findings(here)
    aggregates = [f"aggregate {name}" for name in ("account", "transfer", "statement")]
    assert list(found) == ["definitions", *aggregates, "store", "views", "unique keys", "broker"]
    assert all(finding["ok"] for finding in found.values())
    assert "not made yet" in found["store"]["detail"]
    assert "no store yet" in here.done("check", "--stored").out
    assert list(tmp_path.iterdir()) == []
    assert "DepositMoney" in found["aggregate account"]["detail"]


def test_check_after_it(bank: Here) -> None:
    """Schema, partitions and views are read."""
    found = findings(bank)
    assert found["store"]["detail"] == "schema 1, 1 partitions"
    assert found["views"]["detail"] == "2 with their tables"


def test_check_of_what_is_stored(bank: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bank's own code can read it all; what another could not is named, exit code 1."""
    lines = bank.done("check", "--stored", "--json").lines
    assert lines[-1]["check"] == "stored"
    assert "looked at 26 events" in lines[-1]["detail"]
    monkeypatch.setenv("CQRS_ES_SERVICE", "bank")
    result = bank("--app", "tests.apps.people:new", "check", "--stored", "--sample", "1", "--json")
    assert result.code == 1
    bad = {finding["check"]: finding["detail"] for finding in result.lines if not finding["ok"]}
    assert "event AccountOpened 1.0 of account" in bad
    assert "no aggregate type 'account'" in bad["event AccountOpened 1.0 of account"]


def test_check_names_a_broker_that_is_away(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other findings are there all the same; exit code 3; no password is shown."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", "redis://user:secret@127.0.0.1:1/0")
    result = here("check", "--json")
    assert result.code == 3
    assert [finding["check"] for finding in result.lines if not finding["ok"]] == ["broker"]
    assert "secret" not in result.out + result.err


def test_check_names_services_that_cant_be_made(here: Here, tmp_path: Path) -> None:
    """Handlers could not run: exit code 2."""
    (tmp_path / "mine.py").write_text(
        "from tests.integration.troublesome import Trouble\n"
        "from cqrs_es.application import Application\n"
        "app = Application('mine')\n"
        "app.aggregate(Trouble, services=lambda context: 1 / 0)\n"
    )
    result = cqrs_es("--app", "mine:app", "check", "--json", cwd=tmp_path)
    assert result.code == 2
    (bad,) = [finding for finding in result.lines if not finding["ok"]]
    assert bad["check"] == "aggregate trouble"
    assert "ZeroDivisionError" in bad["detail"]
    assert here.done("check").out.startswith("check")


# --- settings, help, version -------------------------------------------------


def test_every_setting_is_explained(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """With value, default and meaning; passwords are masked."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", "amqp://me:se?cr/et@host:5672/v")
    monkeypatch.setenv("CQRS_ES_BATCH_SIZE", "7")
    explained = {one["name"]: one for one in here.done("settings", "--json").lines}
    assert len(explained) == len(MEANINGS) == 18
    assert explained["CQRS_ES_BATCH_SIZE"]["value"] == 7
    assert explained["CQRS_ES_BATCH_SIZE"]["default"] == 500
    assert explained["CQRS_ES_BROKER_URL"]["value"] == "amqp://me:***@host:5672/v"
    assert "CQRS_ES_SHUTDOWN_TIMEOUT" in here.done("settings").out


def test_help_names_every_verb(here: Here) -> None:
    """Each on a line of its own, not cut short."""
    text = here.done("--help").out
    listed = text[text.index("Commands:") :].splitlines()[1:]
    assert [line.split()[0] for line in listed[: len(VERBS)]] == VERBS
    assert "..." not in "".join(listed[: len(VERBS)])
    assert "cqrs-es settings" in text
    assert here("nothing").code == here().code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_explains_itself(here: Here, verb: str) -> None:
    """What it does, and an example."""
    text = here.done(verb, "--help").out
    assert f"Example: cqrs-es {verb}" in text or "Commands:" in text


def test_help_works_without_settings_and_application(tmp_path: Path) -> None:
    """Whoever is lost can ask."""
    assert cqrs_es("run", "--help", cwd=tmp_path, CQRS_ES_NONSENSE="1").code == 0


def test_help_is_quick() -> None:
    """It loads no store, broker, log or table library."""
    script = (
        "import sys\n"
        "from cqrs_es.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'structlog', 'rich', 'redis', 'aiomysql', 'sqlite3', 'cqrs_es.application'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment({}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_application_is_imported_quickly() -> None:
    """What writes log lines is imported with the first of them, and for whoever opens it."""
    script = (
        "import sys, cqrs_es.application\n"
        "sys.exit(str({'structlog', 'rich', 'pygments', 'attr', 'typer'} & set(sys.modules) or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, env=environment({}),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr.strip() == "", done.stderr


def test_the_version(here: Here) -> None:
    """That of the installed distribution."""
    try:
        expected = metadata.version("cqrs-es")
    except metadata.PackageNotFoundError:
        expected = "unknown"
    assert here.done("--version").out == f"cqrs-es {expected}\n"


def test_another_service_is_looked_for(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` says where it is not; `settings` shows where it should be, without the password."""
    app = ("--app", "tests.remotes:app")
    found = findings(here, *app, code=2)
    assert "CQRS_ES_BILLING_URL is not set" in found["remote billing"]["detail"]
    port = free_port()
    monkeypatch.setenv("CQRS_ES_BILLING_URL", f"redis://shop:secret@127.0.0.1:{port}/0")
    found = findings(here, *app, code=3)
    assert f"127.0.0.1:{port}" in found["remote billing"]["detail"]
    printed = here.done(*app, "settings").out
    assert "CQRS_ES_BILLING_URL" in printed
    assert "secret" not in printed


def test_the_queue_of_another_service_is_found(
    here: Here, monkeypatch: pytest.MonkeyPatch, redis_url: str
) -> None:
    """Once it has made its queues."""
    app = ("--app", "tests.remotes:app")
    monkeypatch.setenv("CQRS_ES_BILLING_URL", redis_url)
    found = findings(here, *app, code=3)
    assert "billing has no queues yet" in found["remote billing"]["detail"]
    broker = broker_for(redis_url, service="billing")

    async def declare() -> None:
        await broker.open()
        await broker.declare(4, "epoch")
        await broker.close()

    asyncio.run(declare())
    assert "4 partitions" in findings(here, *app)["remote billing"]["detail"]
