"""Unique values from the command to the look-up: claimed, taken, changed, made anew (G12)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import Aggregate, command, errors, event
from cqrs_es.application import Application
from cqrs_es.cli.preparing import check_everything
from cqrs_es.definitions import AnyStateful
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from tests.apps import users
from tests.apps.users import ADDRESSES, USERS, Leave, Register, User
from tests.bank_data import PROJECT
from tests.command_line import Result, cqrs_es
from tests.forking import fork
from tests.stores import STORES, sql_of

if TYPE_CHECKING:
    from pathlib import Path

    from cqrs_es.messages import Outcome
    from cqrs_es.opened import OpenApplication

on_databases = pytest.mark.parametrize("store_url", STORES[1:], indirect=True)
REGISTRATIONS = int(os.environ.get("CQRS_ES_TEST_REGISTRATIONS", "64"))
PROCESSES = int(os.environ.get("CQRS_ES_TEST_REGISTERING", "4"))
KILLS = int(os.environ.get("CQRS_ES_TEST_KEY_KILLS", "4"))
DEADLOCKS = {
    "mysql": "SELECT variable_value FROM information_schema.global_status"
    " WHERE variable_name = 'INNODB_DEADLOCKS'",
    "postgresql": "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()",
}


def code(outcome: Outcome) -> str | None:
    return outcome.error.code if outcome.error else None


async def test_a_value_is_one_users_until_it_is_given_up() -> None:
    """Claimed, found, refused to others, released by a change and by leaving."""
    async with TestApp(users.app) as t:
        assert (await t.send(User, "u-1", Register("Ada@x.org"))).accepted
        assert await t.find(User, email="ada@x.org") == "u-1"
        taken = await t.send(User, "u-2", Register("ADA@X.ORG"))
        assert (taken.status, code(taken)) == ("rejected", "email_taken")
        assert taken.error is not None
        assert "u-1" not in taken.error.message
        assert await t.events(User, "u-2") == []
        assert (await t.send(User, "u-1", Register("bob@x.org"))).accepted
        assert (await t.send(User, "u-2", Register("ada@x.org"))).accepted
        assert (await t.send(User, "u-1", Leave())).accepted
        assert await t.find(User, email="bob@x.org") is None
        assert await t.find(User, email="ada@x.org") == "u-2"


async def test_the_outcome_of_a_taken_value_is_kept() -> None:
    """The same command again is a duplicate of the rejection, though the value is free by then."""
    async with TestApp(users.app) as t:
        await t.send(User, "u-1", Register("ada@x.org"))
        refused = await t.send(User, "u-2", Register("ada@x.org"))
        await t.send(User, "u-1", Leave())
        again = await t.send(User, "u-2", Register("ada@x.org"), command_id=refused.command_id)
        assert (code(again), again.duplicate) == ("email_taken", True)
        assert (await t.send(User, "u-2", Register("ada@x.org"))).accepted


async def test_commands_behind_a_refused_one_are_decided_without_it() -> None:
    """Of many commands in one append, those whose claims are free are accepted."""
    async with users.app.open(Settings(store_url="memory://")) as opened:
        await opened.execute(User, "u-1", Register("ada@x.org"))
        wanted = ["ada@x.org", "bob@x.org", "ada@x.org", "cid@x.org"]
        outcomes = await asyncio.gather(
            *(opened.execute(User, "u-2", Register(email)) for email in wanted)
        )
        assert [code(outcome) for outcome in outcomes] == [
            None if "ada" not in e else "email_taken" for e in wanted
        ]
        assert await opened.find(User, email="cid@x.org") == "u-2"
        assert await opened.find(User, email="bob@x.org") is None


async def test_a_refusal_that_lets_the_next_command_claim_stands() -> None:
    """Both values are taken, each seen to be only where the other command is decided otherwise."""
    async with users.app.open(Settings(store_url="memory://")) as opened:
        await opened.execute(User, "u-1", Register("ada@x.org"))
        await opened.execute(User, "u-2", Register("bob@x.org"))
        outcomes = await asyncio.wait_for(
            asyncio.gather(
                opened.execute(User, "u-3", Register("ada@x.org")),
                # At sequence 0 only once the first is refused.
                opened.execute(User, "u-3", Register("bob@x.org"), expected_sequence=0),
            ),
            timeout=10,
        )
        assert [code(outcome) for outcome in outcomes] == ["email_taken", "email_taken"]


@command
class Become:
    number: int
    values: dict[str, Any]


@event
class Became:
    values: dict[str, Any]


@dataclass
class Thing(Aggregate[Become, Became, None], type="thing"):
    values: dict[str, Any] | None = None

    def handle(self, command: Become, services: None) -> Iterator[Became]:  # noqa: ARG002
        yield Became(command.values)

    def apply(self, event: Became) -> None:
        self.values = event.values

    def keys(self) -> Mapping[str, str]:
        if self.values and "raise" in self.values:
            raise RuntimeError("no keys today")
        return self.values or {}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"raise": 1}, "Thing.keys() raised RuntimeError"),
        ({f"k{n}": "v" for n in range(17)}, "returned 17 keys; at most 16"),
        ({"email": ""}, "the value of email is empty"),
        ({"email": 7}, "the value of email is a int"),
        ({"email": None}, "the value of email is a NoneType"),
        ({"e mail": "x"}, "a key's name must match"),
    ],
)
async def test_keys_that_are_none_fail_the_command(values: dict[str, Any], reason: str) -> None:
    """With a reason, at once, and nothing is written; the aggregate goes on with others."""
    app = Application("things")
    app.aggregate(Thing)
    async with app.open(Settings(store_url="memory://")) as opened:
        outcome = await opened.execute(Thing, "t", Become(1, values))
        assert outcome.status == "failed"
        assert outcome.error is not None
        assert reason in outcome.error.message
        assert await opened.events(Thing, "t") == []
        most = {f"k{n}": "é" * 300 for n in range(16)}
        assert (await opened.execute(Thing, "t", Become(2, most))).accepted
        assert await opened.find(Thing, k15="é" * 300) == "t"


async def test_looking_up_what_is_no_key() -> None:
    """A class without keys, no name, two names, an empty value: each is said."""
    async with users.app.open(Settings(store_url="memory://")) as opened:
        for wrong in ({}, {"email": "a", "phone": "b"}, {"email": ""}):
            with pytest.raises(errors.DefinitionError):
                await opened.find(User, **wrong)


# --- keys() has changed ----------------------------------------------------------


@dataclass
class Before(User, type="user"):
    """Users as they were before they had unique addresses."""

    keys = AnyStateful.keys


@dataclass
class Exactly(User, type="user"):
    """Users whose addresses were compared letter by letter."""

    def keys(self) -> Mapping[str, str]:
        return {"email": self.email} if self.email else {}


def application(cls: type[User]) -> Application:
    app = Application("users")
    app.aggregate(cls)
    return app


async def registered(settings: Settings, cls: type[User], *emails: str, first: int = 0) -> None:
    async with application(cls).open(settings, initialise=True) as opened:
        for number, email in enumerate(emails, first):
            assert (await opened.execute(cls, f"u-{number}", Register(email))).accepted


async def is_due(settings: Settings, cls: type[User]) -> bool:
    found = await check_everything(application(cls), settings)
    return not next(each for each in found if each.check == "unique keys").ok


@on_databases
async def test_keys_that_are_new_are_made_from_the_log(store_url: str) -> None:
    """`check` says so; the rebuild adds what states claim; then values are guarded."""
    settings = Settings(store_url=store_url)
    await registered(settings, Before, "ada@x.org", "bob@x.org", "")
    assert await is_due(settings, User)
    async with users.app.open(settings) as opened:
        assert await opened.find(User, email="ada@x.org") is None
        done = await opened.rebuild_keys(User)
        assert (done.aggregates, done.added, done.removed, done.collisions) == (3, 2, 0, ())
        assert code(await opened.execute(User, "u-9", Register("ADA@x.org"))) == "email_taken"
    assert not await is_due(settings, User)


@on_databases
async def test_keys_of_another_spelling_are_made_anew(store_url: str) -> None:
    """What no state claims any more goes, also what an aggregate gave up; the rest stays."""
    settings = Settings(store_url=store_url)
    await registered(settings, Exactly, "Ada@x.org", "bob@x.org")
    assert not await is_due(settings, Exactly)
    assert await is_due(settings, User)
    async with users.app.open(settings) as opened:
        done = await opened.rebuild_keys(User)
        assert (done.added, done.removed, done.collisions) == (1, 1, ())
        assert await opened.find(User, email="Ada@x.org") is None
        assert await opened.find(User, email="ada@x.org") == "u-0"
    assert not await is_due(settings, User)


@on_databases
async def test_values_that_collide_are_reported_with_both_holders(store_url: str) -> None:
    """The keys stay due until one of the two has changed; the first one holds the value."""
    settings = Settings(store_url=store_url)
    await registered(settings, Exactly, "ada@x.org", "ADA@x.org", "bob@x.org")
    async with users.app.open(settings) as opened:
        done = await opened.rebuild_keys(User)
        assert [(c.name, {c.holder, c.other}) for c in done.collisions] == [
            ("email", {"u-0", "u-1"})
        ]
        assert await is_due(settings, User)
        assert (await opened.execute(User, "u-1", Register("cid@x.org"))).accepted
        assert (await opened.rebuild_keys(User)).collisions == ()
        assert await opened.find(User, email="ada@x.org") == "u-0"
    assert not await is_due(settings, User)


def test_the_verb_reports_what_it_did_and_what_collides(tmp_path: Path) -> None:
    """Exit 0 when it is done, 1 with a table of holders where values collide, 2 without keys."""
    url = f"sqlite:///{tmp_path}/users.db"
    asyncio.run(registered(Settings(store_url=url), Exactly, "ada@x.org", "ADA@x.org"))

    def call(*arguments: str) -> Result:
        return cqrs_es(*arguments, CQRS_ES_APP="tests.apps.users:app", CQRS_ES_STORE_URL=url)

    done = call("keys", "rebuild", "user")
    assert done.code == 1
    assert "u-0" in done.out
    assert "u-1" in done.out
    checked = call("check")
    assert checked.code == 2
    assert "cqrs-es keys rebuild user" in checked.out
    asyncio.run(registered(Settings(store_url=url), User, "bob@x.org", first=1))
    done = call("keys", "rebuild", "user", "--json")
    assert done.code == 0
    assert done.json == {
        "type": "user",
        "aggregates": 2,
        "added": 0,
        "removed": 0,
        "collisions": [],
    }
    assert call("check").code == 0
    assert call("keys", "rebuild", "nobody").code == 1


# --- Many processes ------------------------------------------------------------


def environment(store_url: str) -> dict[str, str]:
    return os.environ | {"CQRS_ES_STORE_URL": store_url, "CQRS_ES_BROKER_URL": "memory://"}


def start(store_url: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.apps.users", *map(str, arguments)],
        cwd=PROJECT,
        env=environment(store_url),
        stdout=subprocess.PIPE,
    )


async def deadlocks(opened: OpenApplication, store_url: str) -> int:
    sql = DEADLOCKS.get(store_url.split(":", 1)[0].split("+", 1)[0])
    return int(str((await sql_of(opened.storage.views).query(sql))[0][0])) if sql else 0


@on_databases
@pytest.mark.timeout(3600)
async def test_g12_many_processes_register_one_address(store_url: str, tmp_path: Path) -> None:
    """One user of all is accepted, the others are rejected, and no server sees a deadlock."""
    settings = Settings(store_url=store_url)
    async with users.app.open(settings, initialise=True) as opened:
        before = await deadlocks(opened, store_url)
        share = -(-REGISTRATIONS // PROCESSES)
        outputs = [tmp_path / f"{number}.json" for number in range(PROCESSES)]
        processes = [
            fork(
                *(users.main, "register", number, share, "ada@x.org"),
                environment=environment(store_url),
                output=output,
            )
            for number, output in enumerate(outputs)
        ]
        counts: Counter[str] = Counter()
        for process, output in zip(processes, outputs, strict=True):
            await asyncio.to_thread(process.join, 900)
            assert process.exitcode == 0, output.read_text()
            counts.update(orjson.loads(output.read_bytes().splitlines()[-1]))  # warnings come first
        assert counts == {"accepted": 1, "email_taken": share * PROCESSES - 1}
        winner = await opened.find(User, email="ada@x.org")
        assert winner is not None
        assert (await opened.load(User, winner)).state.email == "ada@x.org"
        assert await deadlocks(opened, store_url) == before


@on_databases
async def test_g12_changes_under_kill_9_leave_each_value_with_its_holder(store_url: str) -> None:
    """Users take each other's addresses, in processes that are killed: keys and states agree."""
    settings = Settings(store_url=store_url)
    async with users.app.open(settings, initialise=True) as opened:
        before = await deadlocks(opened, store_url)
        for kill in range(KILLS):
            processes = [start(store_url, "change", n, f"{kill} {n}") for n in range(2)]
            try:
                for process in processes:
                    assert process.stdout is not None
                    assert await asyncio.to_thread(process.stdout.readline) == b"changing\n"
                rebuilt = await opened.rebuild_keys(User)  # beside them; then somewhere among them
                assert (rebuilt.added, rebuilt.removed, rebuilt.collisions) == (0, 0, ())
            finally:
                for process in processes:
                    process.kill()
                    process.communicate()
        states = {
            id_: (await opened.load(User, id_)).state.email
            for id_ in (f"{process}-{user}" for process in range(2) for user in range(USERS))
        }
        held = {email: id_ for id_, email in states.items() if email is not None}
        assert len(held) == sum(email is not None for email in states.values())
        assert {a: await opened.find(User, email=a) for a in ADDRESSES} == {
            a: held.get(a) for a in ADDRESSES
        }
        rebuilt = await opened.rebuild_keys(User)
        assert (rebuilt.added, rebuilt.removed, rebuilt.collisions) == (0, 0, ())
        assert await deadlocks(opened, store_url) == before
