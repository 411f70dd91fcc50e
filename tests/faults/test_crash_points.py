"""A process killed at each instant that matters, under load; what it did is judged at the end.

The bank, a process for each role, on servers; transfers, which reactors and due rows make, all
roles in one process, on SQLite, servers and DynamoDB, where that may be a function that SQS brings
commands; `init` on each. `make crashes` hits every instant many times (`CQRS_ES_TEST_CRASHES`),
`make test` some of them, by a seed. DynamoDB, SQS and SNS are moto's, a process that lives on.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cqrs_es.settings import Settings
from tests import outside
from tests.apps import dying_init
from tests.apps.dying import DYNAMODB, FUNCTIONS, INSTANTS, LEASED, SQL, main
from tests.cloud import Cloud, Subscriber
from tests.conftest import run_on
from tests.faults import test_transfers
from tests.faults.test_chaos import LOOKS_APART_SECONDS, chaos
from tests.faults.test_transfers import Bank, check
from tests.forking import fork
from tests.history.checker import assert_promises_held
from tests.lambda_runtime import SCHEDULED, Killed, QueueSource, Sandbox, client
from tests.servers import psql
from tests.transfers import bank
from tests.waiting import until
from worker.app import app

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Sequence

    from cqrs_es.messages import CommandMessage
    from cqrs_es.opened import OpenApplication
    from tests.faults.test_chaos import Chaos

log = logging.getLogger(__name__)

CRASHES = int(os.environ.get("CQRS_ES_TEST_CRASHES", "0"))
SHARES = 4  # of the hits, so that several can be made at once: most of the time is waiting
ROLES = ("worker", "relay", "projector", "rebuild")
ROLES_OF_TRANSFERS = ("due", "reactor")
EVERY_ROLE = (*ROLES, *ROLES_OF_TRANSFERS, "drop")
LEASE_SECONDS = os.environ.get("CQRS_ES_TEST_LEASE_SECONDS", "6")
ON_DYNAMODB = {
    "CQRS_ES_PARTITIONS": "2",
    "CQRS_ES_LEASE_SECONDS": LEASE_SECONDS,
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
}  # moto takes as long for one request as a server for a hundred
AT_ONCE = 1  # instant of each role in `make test`
# Of senders: what dies and starts is to have the machine, not what goes well.
PAUSE_SECONDS, PAUSE_SECONDS_ON_DYNAMODB = 0.4, 3.0
TRANSFERS_EACH, EACH_ON_DYNAMODB = 6, 3  # between two deaths
MOST_TRIES = 3  # to die once, at the mean
# Of two partitions a process may have one lease; at so small a load few appends are several.
ONCE = {"some leases taken", "between the append's transactions"}
NOBODY_WAITS = {"replied"}  # for an outcome of a command that is in a file
STATEMENTS_AT_ONCE = 6  # of `init` on each store, in `make test`
PATIENCE_SECONDS = 300.0 if CRASHES else 100.0  # within which a process has come to its instant

pytestmark = pytest.mark.timeout(CRASHES * 240 + 600)


class Dying:
    """Processes of one role, one after another, each of which dies at an instant.

    The next one is started once others have answered what the last one may have had in hand: a
    command that two processes die of alone fails, since nobody can tell that it is innocent (G9).
    """

    def __init__(self, made: Chaos, role: str, instants: list[str], rng: random.Random) -> None:
        self._bank, self._role, self._rng = made.bank, role, rng
        self._senders, self._views = made.senders, made.history.views
        self._in_hand: list[set[str]] = [set() for _ in made.senders]
        self._left = instants
        self._process: subprocess.Popen[bytes] | None = None
        self._since = 0.0
        self._instant = ""
        self.hits: Counter[str] = Counter()

    def ended(self) -> bool:
        """Look after the one that lives; tell whether all have died."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                waited = time.monotonic() - self._since
                said = self._bank.log_of(self._process)[-3000:]
                assert waited < PATIENCE_SECONDS, f"nobody comes to {self._instant!r}: {said}"
                return False
            assert code == -signal.SIGKILL, self._bank.log_of(self._process)[-3000:]
            self.hits[self._instant] += 1
            self._process = None
            self._in_hand = [sender.unanswered() for sender in self._senders]
        for sender, ids in zip(self._senders, self._in_hand, strict=True):
            if ids & sender.unanswered():
                return False
        if self._left:
            self._instant, self._since = self._left.pop(), time.monotonic()
            self._process = self._start(self._instant)
        return self._process is None

    def _start(self, instant: str) -> subprocess.Popen[bytes]:
        number = 1 if instant in ONCE or self._role == "rebuild" else self._rng.randint(1, 4)
        dies_at = {"DIES_AT": f"{instant} {number}"}
        dying = replace(
            self._bank, app="tests.apps.dying_bank:app", settings=self._bank.settings | dies_at
        )
        return dying.start(*self._arguments())

    def _arguments(self) -> tuple[str, ...]:
        if self._role == "rebuild":
            return ("rebuild", self._rng.choice(self._views))
        return (self._role,)


def seeded(*on: str) -> random.Random:
    """Begin what a seed repeats."""
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s on %s", seed, " and ".join(on))
    return random.Random(seed)


def instants_of(
    roles: Sequence[str], rng: random.Random, times: int, on: Sequence[str] = (SQL, LEASED)
) -> list[str]:
    """Take each of the roles' instants that there are so many times, in an order of chance."""
    there = {name: each for name, each in INSTANTS.items() if {*each.on} <= {*on}}
    names = [name for name, each in there.items() if each.role in roles] * times
    return rng.sample(names, len(names))


def there_is(store_url: str, broker_url: str) -> tuple[str, str]:
    """Tell what a pair has instants of."""
    return (
        DYNAMODB if store_url.startswith("dynamodb") else SQL,
        FUNCTIONS if broker_url.startswith("sqs") else LEASED,
    )


def crash(store: str, broker: str, folder: Path, times: int) -> None:
    """Hit every instant so many times, or some of them once; judge the history."""
    rng = seeded(store, broker)
    seed, on_dynamodb = rng.randrange(2**32), store == "dynamodb"
    with ExitStack() as stack:
        if on_dynamodb:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            patch.setattr(outside, "PARTITIONS", int(ON_DYNAMODB["CQRS_ES_PARTITIONS"]))
        made = stack.enter_context(
            chaos(
                store,
                broker,
                folder,
                seed,
                copies=1,
                pause_seconds=PAUSE_SECONDS_ON_DYNAMODB if on_dynamodb else PAUSE_SECONDS,
                by_wire=False,
                **(ON_DYNAMODB if on_dynamodb else {}),
            )
        )
        on = there_is(store, broker)
        planned = {role: instants_of([role], rng, times or 1, on) for role in ROLES}
        if not times:
            planned = {role: names[:AT_ONCE] for role, names in planned.items()}
        wanted = Counter(name for names in planned.values() for name in names)
        dying = [Dying(made, role, names, rng) for role, names in planned.items()]
        longest = max(map(len, planned.values()))
        until(
            lambda: sum(not each.ended() for each in dying) == 0,  # looks after each of them
            "not all have died",
            within_seconds=PATIENCE_SECONDS * longest,
            every=LOOKS_APART_SECONDS,
        )
        hits = sum((each.hits for each in dying), Counter[str]())
        log.warning("hit %s", dict(hits))
        assert hits == wanted
        for view in made.history.views:
            made.bank.call("rebuild", view)
        drained = made.drain(PATIENCE_SECONDS)
        history = made.recorded()
        log.warning(
            "%s commands, %s events; drained in %.1f s",
            len(history.outcomes),
            len(history.events),
            drained,
        )
        assert_promises_held(history)
        codes = made.all_stop()
        assert codes == [0] * len(codes)


def test_some_instants(tmp_path: Path) -> None:
    """Killed where it hurts most, a process breaks no promise."""
    crash("mysql", "redis", tmp_path, 0)


def share_of_hits(share: int) -> int:
    """Return how often a test hits each instant, so that all shares together do `CRASHES` times."""
    return CRASHES // SHARES + (share < CRASHES % SHARES)


@pytest.mark.skipif(not CRASHES, reason="make crashes runs it: it takes minutes")
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize(
    ("store", "broker"),
    [
        ("mysql", "redis"),
        ("mysql", "amqp"),
        ("postgres", "redis"),
        ("postgres", "amqp"),
        ("dynamodb", "redis"),
    ],
)
def test_each_instant_often(store: str, broker: str, share: int, tmp_path: Path) -> None:
    """Each of them, on every pair of servers."""
    crash(store, broker, tmp_path, share_of_hits(share))


# --- Reactors and due rows, and SQLite -------------------------------------------------


def transfers_each(store_url: str) -> int:
    """Return how many transfers are asked for between two deaths."""
    return EACH_ON_DYNAMODB if store_url.startswith("dynamodb") else TRANSFERS_EACH


class Deaths(Bank):
    """Transfers that processes make which have every role, and die one after another.

    After each death one that lives does what was left: see `Dying`.
    """

    def follow(self) -> None:
        """Have the topic's events kept from now on."""
        if self._outside is not None:
            self._outside.follow(self._name)

    def published(self) -> dict[int, int] | None:
        """Count the events that the topic had, in order; None where nobody could follow it."""
        if self._outside is None:
            return None
        return {number: len(found) for number, found in self._outside.topic(self._name).items()}

    async def suffer(self, opened: OpenApplication, instants: list[str]) -> Counter[str]:
        """Let one die at each of the instants; return what was hit."""
        hits: Counter[str] = Counter()
        left, tries, old = instants[:], 0, 0
        each = transfers_each(self.environment["CQRS_ES_STORE_URL"])
        of_accounts = len(self.accounts) * 6 // 5  # to put money into them, and to close some
        self.write((await self.unsettled(opened))[:of_accounts])
        await self._live("run", "--commands", str(self.file), "--until-idle")
        while left:
            instant, tries = left[-1], tries + 1
            assert tries <= MOST_TRIES * len(instants), f"nobody comes to {instant!r}"
            self.write((await self.unsettled(opened))[:each])
            runs = ["run", "--commands", str(self.file), "--until-idle"]
            if (role := INSTANTS[instant].role) in {"rebuild", "drop"}:
                await self._live(*runs)
                runs = ["rebuild", "balance"]
            if role == "drop":
                await self._live(*runs)
                old = (await opened.storage.views.generations())["balance"] - 1
                runs += ["--drop", str(old)]
            # The second time something happens, unless there was only one in this share.
            if await asyncio.to_thread(self._die, f"{instant} {1 + tries % 2}", *runs):
                hits[left.pop()] += 1
            await self._live(*runs)
            if role == "drop":
                assert f"balance__{old}" not in await opened.storage.views.list_tables()
                assert await opened.storage.views.page(f"balance__{old}") == []
        return hits

    async def _live(self, *arguments: str) -> None:
        await asyncio.to_thread(partial(self.call, *arguments, seconds=PATIENCE_SECONDS))

    def _die(self, dies_at: str, *arguments: str) -> bool:
        """Run a verb; tell whether it has died."""
        dying, written = self.environment | {"DIES_AT": dies_at}, self.file.with_suffix(".log")
        process = fork(main, *arguments, environment=dying, output=written)
        process.join(PATIENCE_SECONDS)
        code = process.exitcode
        process.kill()
        assert code in {0, -signal.SIGKILL}, (dies_at, written.read_text()[-3000:])
        return code == -signal.SIGKILL


class FunctionDeaths(Deaths):
    """Transfers that functions make: SQS brings commands, and one that is rung does the rest.

    The one that lives is frozen while others die.
    """

    _living: Sandbox | None = None

    @property
    def _cloud(self) -> Cloud:
        store_url, broker_url = (
            self.environment[f"CQRS_ES_{it}_URL"] for it in ("STORE", "BROKER")
        )
        return Cloud(store_url, broker_url, broker_url.partition("?endpoint=")[2], self._folder)

    def follow(self) -> None:
        """Subscribe to the topic."""
        self._subscriber = Subscriber(self._cloud)
        self._reached: Counter[int] = Counter()

    def published(self) -> dict[int, int]:
        """Drop what came before, as subscribers do."""
        for event in self._subscriber.events():
            partition, offset = event["partition"], int(event["offset"])
            assert offset <= self._reached[partition] + 1, f"a hole before {event}"
            self._reached[partition] = max(self._reached[partition], offset)
        return dict(self._reached)

    def write(self, messages: list[CommandMessage]) -> None:
        """Have the commands sent by whatever runs next."""
        self._to_send = messages

    def call(self, verb: str, *arguments: str, seconds: float = 60) -> None:
        """Let the function that lives do all there is; other verbs are programs here too."""
        if verb != "run":
            super().call(verb, *arguments, seconds=seconds)
            return
        if self._living is None:
            self._living = self._function()
        assert not self._work(self._living), self._log.read_text()[-3000:]

    def _die(self, dies_at: str, *arguments: str) -> bool:
        if arguments[0] != "run":
            return super()._die(dies_at, *arguments)
        with self._function(DIES_AT=dies_at) as sandbox:
            return self._work(sandbox)

    def _function(self, **more: str) -> Sandbox:
        handler, environment = "tests.apps.dying_function.handler", self.environment | more
        return Sandbox(handler, environment, self._log, seconds=PATIENCE_SECONDS)

    @property
    def _log(self) -> Path:
        return self.file.with_suffix(".log")

    def _work(self, sandbox: Sandbox) -> bool:
        """Bring a function what there is until nothing is left; tell whether it died of it."""
        cloud, end = self._cloud, time.monotonic() + PATIENCE_SECONDS
        cloud.send(self._to_send, service=self._name)
        source = QueueSource(cloud.endpoint, cloud.table.replace("-store", "-commands.fifo"))
        while not sandbox.kills and source.depth():
            source.bring(sandbox)
            assert time.monotonic() < end, self._log.read_text()[-3000:]
        with suppress(Killed):
            while not sandbox.kills and not sandbox.invoke(SCHEDULED)["idle"]:
                pass
        self.published()  # moto is the slower the more a queue has
        return sandbox.kills > 0

    def close(self) -> None:
        """Leave no process."""
        super().close()
        if self._living is not None:
            self._living.__exit__()


async def crash_runs(store_url: str, broker_url: str, folder: Path, instants: list[str]) -> None:
    """Hit these instants, and judge what became of the transfers."""
    name = f"transfers-{random.randrange(2**32)}"
    with pytest.MonkeyPatch.context() as patch:
        wanted = transfers_each(store_url) * (
            2 * len(instants) + 4
        )  # some instants take a second try
        patch.setattr(test_transfers, "TRANSFERS", max(wanted, test_transfers.TRANSFERS))
        patch.setattr(test_transfers, "MOST_TRANSFERS", wanted)
        made = FunctionDeaths if broker_url.startswith("sqs:") else Deaths
        deaths = made(store_url, broker_url, folder, seeded(store_url, broker_url), name)
        try:
            deaths.call("init")
            deaths.follow()
            async with bank(name).open(deaths.settings) as opened:
                hits = await deaths.suffer(opened, instants)
                log.warning("hit %s", dict(hits))
                await deaths.finish(opened)
                await check(opened, deaths)
                heads = dict(await opened.storage.events.heads())
                log.warning("%s events in %s partitions", sum(heads.values()), len(heads))
                assert (published := deaths.published()) is None or heads == {
                    number: published.get(number, 0) for number in heads
                }
        finally:
            deaths.close()
    assert hits == Counter(instants)


@pytest.fixture
def sqs_url(dynamodb_url: str) -> str:
    """Name a queue and a topic beside the table."""
    return dynamodb_url.replace("dynamodb:", "sqs:")


@pytest.mark.parametrize("broker", ["redis", "sqs"])
async def test_some_instants_on_dynamodb(
    dynamodb_url: str, broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Money is neither lost nor made where an append is no transaction of SQL."""
    url = request.getfixturevalue(f"{broker}_url")
    rng = seeded("dynamodb", broker)
    some = instants_of(EVERY_ROLE, rng, 1, there_is(dynamodb_url, url))
    instants = [name for name in some if name not in NOBODY_WAITS][:AT_ONCE]
    await crash_runs(dynamodb_url, url, tmp_path, instants)


async def test_some_instants_of_reactors_and_due_rows(sqlite_url: str, tmp_path: Path) -> None:
    """Money is neither lost nor made."""
    rng = seeded("sqlite")
    instants = [rng.choice(instants_of([role], rng, 1)) for role in ROLES_OF_TRANSFERS]
    await crash_runs(sqlite_url, "memory://", tmp_path, instants)


@pytest.mark.skipif(not CRASHES, reason="make crashes runs it: it takes minutes")
@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize(
    ("store_url", "broker", "roles"),
    [
        ("sqlite", "memory", EVERY_ROLE),
        ("dynamodb", "redis", EVERY_ROLE),
        ("dynamodb", "sqs", EVERY_ROLE),
        ("mysql", "redis", ROLES_OF_TRANSFERS),
        ("mysql", "amqp", ROLES_OF_TRANSFERS),
        ("postgres", "redis", ROLES_OF_TRANSFERS),
        ("postgres", "amqp", ROLES_OF_TRANSFERS),
    ],
    ids=[
        "sqlite-memory",
        "dynamodb-redis",
        "dynamodb-sqs",
        "mysql-redis",
        "mysql-amqp",
        "postgres-redis",
        "postgres-amqp",
    ],
    indirect=["store_url"],
)
async def test_each_instant_of_one_process(
    store_url: str,
    broker: str,
    roles: Sequence[str],
    share: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """The process that dies has every role; so that of SQLite, where there is no other."""
    url = "memory://" if broker == "memory" else request.getfixturevalue(f"{broker}_url")
    planned = instants_of(roles, seeded(store_url), share_of_hits(share), there_is(store_url, url))
    instants = [name for name in planned if name not in NOBODY_WAITS]
    await crash_runs(store_url, url, tmp_path, instants)


# --- Migrations ------------------------------------------------------------------------


@pytest.mark.parametrize("store", ["sqlite", "mysql", "postgres", "dynamodb"])
def test_init_that_dies_between_two_statements_is_done_by_the_next(
    request: pytest.FixtureRequest, store: str, tmp_path: Path
) -> None:
    """Whichever they are: the next makes the same of it as one that nothing befell."""
    template = _databases_on(store, request, tmp_path)
    made: list[str] = []
    own = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}

    def database(name: str) -> str:
        _tell(template, f"CREATE DATABASE {name}")
        made.append(name)
        return template.format(name)

    def end_of(number: int) -> tuple[str, str]:
        """Have `init` die before a statement, there is none of number 0; tell how it ended."""
        url, written = database(f"dying_{number}"), tmp_path / f"{number}.log"
        process = fork(dying_init.main, url, number, environment=own, output=written)
        process.join(PATIENCE_SECONDS)
        code = process.exitcode
        process.kill()
        assert code == (-signal.SIGKILL if number else 0), written.read_text()
        return url, written.read_text()

    try:
        whole, printed = end_of(0)
        statements = int(printed)
        numbers = [*range(1, statements + 1)]
        if not CRASHES:
            numbers = seeded(store).sample(numbers, STATEMENTS_AT_ONCE)
        for number in numbers:
            url, _ = end_of(number)
            asyncio.run(_initialise(url))
            assert _schema(url) == _schema(whole), url
        log.warning("%s of %s statements of init on %s", len(numbers), statements, store)
    finally:
        for name in made:
            _tell(template, f"DROP DATABASE {name}")


def _databases_on(store: str, request: pytest.FixtureRequest, folder: Path) -> str:
    """Return the URL of a database, or table, of which `{}` is the name."""
    match store:
        case "sqlite":
            return f"sqlite:///{folder}/{{}}"
        case "dynamodb":
            return str(request.getfixturevalue("dynamodb_url")).replace("?", "_{}?")
        case _:
            return str(request.getfixturevalue(f"{store}_server")).rstrip("/") + "/{}"


def _tell(template: str, statement: str) -> None:
    """Tell a server, where there is one that has databases."""
    server = template.removesuffix("/{}")
    if server.startswith("mysql"):
        run_on(server, statement)
    elif server.startswith("postgres"):
        psql(server, statement)


async def _initialise(url: str) -> None:
    settings = Settings(store_url=url)
    async with app.open(settings, initialise=True, reach_broker=False) as opened:
        assert await opened.storage.events.heads() is not None


def _schema(url: str) -> list[object]:
    """List a database's tables, columns and indexes as its own catalogue has them."""
    if url.startswith("dynamodb"):
        return _table(url)
    server, _, name = url.rpartition("/")
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            return connection.execute("SELECT name, sql FROM sqlite_master ORDER BY 1").fetchall()
    if url.startswith("mysql"):
        of = f"FROM information_schema.{{}} WHERE table_schema = '{name}' ORDER BY 1, 2, 3, 4"
        columns = "table_name, column_name, column_type, is_nullable, column_default, extra"
        indexes = "table_name, index_name, seq_in_index, column_name, non_unique"
        return [
            *run_on(server, f"SELECT {columns} {of.format('columns')}"),
            *run_on(server, f"SELECT {indexes} {of.format('statistics')}"),
        ]
    columns = "table_name, column_name, data_type, is_nullable, column_default"
    of = "information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2"
    indexes = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"
    asked = f"SELECT {columns} FROM {of}"  # noqa: S608
    return [*psql(url, asked).split("\n"), *psql(url, indexes).split("\n")]


def _table(url: str) -> list[object]:
    """Describe a table, and name the attributes of all that is in it."""
    cloud = Cloud(url, "", url.partition("?endpoint=")[2], Path())
    dynamodb = client("dynamodb", cloud.endpoint)
    table = dynamodb.describe_table(TableName=cloud.table)["Table"]
    names = ("TableStatus", "KeySchema", "AttributeDefinitions", "BillingModeSummary")
    indexes = [(each["IndexName"], each["KeySchema"]) for each in table["GlobalSecondaryIndexes"]]
    items = dynamodb.scan(TableName=cloud.table)["Items"]
    return [*(table[name] for name in names), indexes, [sorted(item) for item in items]]
