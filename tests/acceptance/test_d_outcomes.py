"""D: what becomes of a command, through the broker, as raw messages."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import Aggregate, command, errors, event, upcaster, wire
from cqrs_es.application import Application
from cqrs_es.stores import storage_for
from cqrs_es.testing import TestApp
from cqrs_es.types import new_command_id
from domain.account import BankAccount
from tests.raw import deposit, opened, raw, sent
from tests.samples import Add, Added, Counter, Services, counting_app
from worker.app import app as bank

if TYPE_CHECKING:
    from cqrs_es import Outcome
    from cqrs_es.settings import Settings
    from cqrs_es.types import JsonObject


def counter(name: str, payload: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return raw(name, payload, aggregate_type="counter", aggregate_id="c", **fields)


def code(outcome: Outcome) -> tuple[str, str | None]:
    return outcome.status, None if outcome.error is None else outcome.error.code


async def letters(t: TestApp) -> list[str]:
    return [letter.id for letter in await t.opened.storage.dead_letters.page()]


# --- D1: each cause of an outcome ---------------------------------------------


async def test_d1_accepted_with_and_without_events(where: Settings) -> None:
    """A command that is done is accepted, also one that yields nothing."""
    async with TestApp(counting_app(), settings=where) as t:
        done = await sent(t, counter("AddEach", {"numbers": [1, 2]}))
        assert code(done) == ("accepted", None)
        assert (done.sequence, done.partition, done.offset) == (2, 0, 2)
        assert [(e.type, e.sequence) for e in done.events] == [("Added", 1), ("Added", 2)]
        nothing = await sent(t, counter("AddEach", {"numbers": []}))
        assert code(nothing) == ("accepted", None)
        assert (nothing.sequence, nothing.partition, nothing.offset) == (2, None, None)
        assert await letters(t) == []


async def test_d1_rejections(where: Settings) -> None:
    """Rules, expectations and payloads reject; nothing becomes a dead letter."""
    async with TestApp(bank, settings=where) as t:
        await sent(t, opened())
        rule = await sent(t, raw("WithdrawMoney", {"amount": "1", "atm_id": "x"}))
        assert code(rule) == ("rejected", "funds_not_available")
        assert rule.sequence == 1
        stale = await sent(t, deposit("1", expected_sequence=7))
        assert code(stale) == ("rejected", "conflict")
        invalid = await sent(t, deposit("-1"))
        assert code(invalid) == ("rejected", "invalid_command")
        assert invalid.sequence is None
        assert await letters(t) == []


async def test_d1_failures(where: Settings) -> None:
    """What can't be decided fails, with a dead letter."""
    async with TestApp(counting_app(), settings=where) as t:
        unknown = raw("Nonsense", aggregate_type="counter", aggregate_id="c")
        foreign = raw("Add", {"n": 1}, aggregate_type="ghost", aggregate_id="c")
        crashing = counter("AddThenCrash", {"n": 1})
        with t.expect_failures():
            outcomes = [await sent(t, message) for message in (unknown, foreign, crashing)]
        assert [code(outcome) for outcome in outcomes] == [
            ("failed", "unknown_command"),
            ("failed", "unknown_aggregate_type"),
            ("failed", "internal_error"),
        ]
        assert await letters(t) == sorted(m["id"] for m in (unknown, foreign, crashing))
        assert await t.opened.events(Counter, "c") == []


async def test_d1_an_unknown_name_with_a_version(where: Settings) -> None:
    """Newer code's command is not decided here; unless an upcaster says that there is none."""

    @upcaster("Paint", to="9.0")
    def refuse(_: JsonObject) -> JsonObject:
        raise errors.InvalidCommand("nobody paints here")

    message = wire.parse_command(orjson.dumps(counter("Paint", {"n": 1}) | {"version": "1.1"}))
    async with TestApp(counting_app(), settings=where) as t:
        with pytest.raises(errors.UnknownVersion, match=r"'Paint', and this is version 1\.1"):
            await t.opened.submit(message)
        assert await letters(t) == []
        assert await t.opened.outcome(message.id) is None
    refusing = Application("tests")
    refusing.aggregate(Counter, services=lambda _: Services(), command_upcasters=[refuse])
    async with TestApp(refusing, settings=where) as t:
        outcome = await t.opened.submit(message)
        assert code(outcome) == ("rejected", "invalid_command")


async def test_d1_too_large_a_result(where: Settings) -> None:
    """An event over the limit fails its command alone."""

    @command
    class Say:
        text: str

    @event
    class Said:
        text: str

    class Speaker(Aggregate[Say, Said, None], type="speaker"):
        def handle(self, command: Say, services: None) -> list[Said]:
            del services
            return [Said(command.text * 1000)]

        def apply(self, event: Said) -> None:
            pass

    app = Application("tests")
    app.aggregate(dataclass(Speaker))
    settings = replace(where, max_event_bytes=10_000)
    async with TestApp(app, settings=settings) as t:
        large = raw("Say", {"text": "x" * 50}, aggregate_type="speaker")
        small = raw("Say", {"text": "x"}, aggregate_type="speaker")
        assert code(await sent(t, large)) == ("failed", "internal_error")
        assert code(await sent(t, small)) == ("accepted", None)
        assert await letters(t) == [large["id"]]


async def test_d1_no_envelope_no_outcome(where: Settings) -> None:
    """A message that breaks the envelope's rules has no outcome, only a dead letter."""
    async with TestApp(bank, settings=where) as t:
        message = opened()
        del message["payload"]
        await t.enqueue(orjson.dumps(message))
        await t.drain()
        assert await t.opened.outcome(message["id"]) is None
        assert await letters(t) == [message["id"]]


# --- D2 to D7, D11 -------------------------------------------------------------


async def test_d2_an_id_is_for_one_content(where: Settings) -> None:
    """The same id with another amount is refused, and the stored outcome stays."""
    async with TestApp(bank, settings=where) as t:
        await sent(t, opened())
        first = deposit("10")
        accepted = await sent(t, first)
        other = await sent(t, first | {"payload": {"amount": "11"}})
        assert code(other) == ("rejected", "id_reused")
        assert await t.opened.outcome(first["id"]) == accepted
        again = await sent(t, first)
        assert again == replace(accepted, duplicate=True)


async def test_d2_in_the_process_it_is_an_error(where: Settings) -> None:
    """Who executes a command by an id that another one had has made a mistake."""
    async with TestApp(counting_app(), settings=where) as t:
        id_ = new_command_id()
        assert (await t.opened.execute(Counter, "c", Add(1), command_id=id_)).accepted
        with pytest.raises(errors.IdReused, match=id_):
            await t.opened.execute(Counter, "c", Add(2), command_id=id_)
        assert (await t.opened.execute(Counter, "c", Add(1), command_id=id_)).duplicate


async def test_d3_ids_ignore_case(where: Settings) -> None:
    """An id in upper case is the same id."""
    async with TestApp(bank, settings=where) as t:
        first = opened()
        await sent(t, first)
        again = await sent(t, first | {"id": first["id"].upper()})
        assert (again.command_id, again.duplicate) == (first["id"], True)


async def test_d4_expected_sequence(where: Settings) -> None:
    """It is compared once; what was accepted stays accepted."""
    async with TestApp(bank, settings=where) as t:
        for message in (opened(), deposit("1"), deposit("1")):
            await sent(t, message)
        fits = deposit("5", expected_sequence=3)
        accepted = await sent(t, fits)
        assert code(accepted) == ("accepted", None)
        late = await sent(t, fits | {"id": new_command_id()})
        assert code(late) == ("rejected", "conflict")
        assert await sent(t, fits) == replace(accepted, duplicate=True)


async def test_d5_dead_retry_after_mending(where: Settings) -> None:
    """A failed command whose cause is gone is accepted, and its dead letter is gone."""

    async def down() -> None:
        raise ConnectionRefusedError

    services = Services({"bank": down})
    async with TestApp(counting_app(services), settings=where) as t:
        message = counter("AddAfterCall", {"name": "bank", "n": 3})
        with t.expect_failures():
            assert code(await sent(t, message)) == ("failed", "internal_error")
        services.hooks.clear()
        retried = await t.opened.retry_dead_letter(message["id"])
        assert code(retried) == ("accepted", None)
        assert await letters(t) == []
        assert await t.opened.outcome(message["id"]) == retried
        assert len(await t.opened.events(Counter, "c")) == 1
        again = await sent(t, message)
        assert again == replace(retried, duplicate=True)


@pytest.mark.parametrize("reply_to", ["bank:events:0", "../x", "x" * 65, ""])
async def test_d6_reply_to_names_nothing_else(where: Settings, reply_to: str) -> None:
    """A `reply_to` outside its alphabet refuses the command and touches nothing."""
    async with TestApp(bank, settings=where) as t:
        message = opened() | {"reply_to": reply_to}
        await t.enqueue(orjson.dumps(message))
        await t.drain()
        assert await letters(t) == [message["id"]]
        assert await t.opened.outcome(message["id"]) is None
        assert await t.events(BankAccount, "A-1") == []


async def test_d7_the_next_command_sees_nothing_of_a_crash(where: Settings) -> None:
    """Two commands in one batch: the second is decided on what the first left behind, nothing."""
    async with TestApp(counting_app(), settings=where) as t:
        bad = counter("AddThenCrash", {"n": 100})
        good = counter("AddUpTo", {"n": 1, "limit": 1})
        with t.expect_failures():
            await t.enqueue(orjson.dumps(bad), orjson.dumps(good))
            assert code(await t.reply(bad["id"])) == ("failed", "internal_error")
            assert code(await t.reply(good["id"])) == ("accepted", None)
        (only,) = await t.opened.events(Counter, "c")
        assert only.data == Added(1)


async def test_d11_a_deploy_that_knows_the_command(where: Settings) -> None:
    """An unknown command is decided by `dead retry` once the code knows it."""

    @command
    class Old:
        pass

    class Before(Aggregate[Old, Added, None], type="counter"):
        def handle(self, command: Old, services: None) -> None:
            del command, services

        def apply(self, event: Added) -> None:
            pass

    older = Application("tests")
    older.aggregate(dataclass(Before))
    storage = storage_for(where.store_url or "")
    await storage.open()
    message = counter("Add", {"n": 4})
    async with TestApp(older, settings=where, storage=storage) as t:
        assert code(await sent(t, message)) == ("failed", "unknown_command")
    async with TestApp(counting_app(), settings=where, storage=storage) as t:
        assert code(await t.opened.retry_dead_letter(message["id"])) == ("accepted", None)
        assert await letters(t) == []
        assert (await t.opened.load(Counter, "c")).state.total == 4
    await storage.close()


async def test_b18_one_id_a_hundred_times(where: Settings) -> None:
    """A hundred messages with one id through two executors: one set of events, 99 duplicates."""
    storage = storage_for(where.store_url or "")
    await storage.open()
    message = wire.parse_command(orjson.dumps(counter("Add", {"n": 1})))
    async with (
        counting_app().open(where, storage=storage, initialise=True) as a,
        counting_app().open(where, storage=storage) as b,
    ):
        outcomes = await asyncio.gather(
            *(worker.submit(message) for _ in range(50) for worker in (a, b))
        )
        assert sum(outcome.duplicate for outcome in outcomes) == 99
        assert {replace(outcome, duplicate=False) for outcome in outcomes} == {
            await a.outcome(message.id)
        }
        assert len(await a.events(Counter, "c")) == 1
    await storage.close()
