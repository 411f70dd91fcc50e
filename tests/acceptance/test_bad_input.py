"""Bad input as raw bytes through the broker: each is answered as the contract says, alone.

All cases go through one application for each place: what is shown is not the
parser, but that none of them disturbs its neighbours.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import DomainError
from cqrs_es.testing import TestApp
from cqrs_es.types import new_command_id
from domain.account import BankAccount
from tests.raw import deposit, opened, raw, sent
from tests.samples import Counter, Services, counting_app
from worker.app import app as bank

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.settings import Settings


LIMIT = 256 * 1024  # bytes of a message


@pytest.fixture
async def t(where: Settings) -> AsyncIterator[TestApp]:
    async with TestApp(bank, settings=where) as app:
        await sent(app, opened())
        yield app


def without(field: str) -> dict[str, Any]:
    message = deposit("1")
    del message[field]
    return message


BROKEN = {
    "not JSON": b"{",
    "empty": b"",
    "array": b"[1,2]",
    "string": b'"hello"',
    "null": b"null",
    "invalid UTF-8": b'{"id":"\xff\xfe"}',
    "lone surrogate": b'{"id":"\\ud800"}',
    "NaN": b'{"id":NaN}',
    "10,000 levels": b"[" * 10_000 + b"]" * 10_000,
    "10,000 levels inside": b'{"payload":' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001,
    "17 levels": orjson.dumps(deposit("1", payload=orjson.loads(b'{"a":' * 16 + b"1" + b"}" * 16))),
    "over the limit": orjson.dumps(deposit("1", note="x" * LIMIT)),
    "no id": orjson.dumps(without("id")),
    "no type": orjson.dumps(without("type")),
    "no aggregate_type": orjson.dumps(without("aggregate_type")),
    "no aggregate_id": orjson.dumps(without("aggregate_id")),
    "no payload": orjson.dumps(without("payload")),
    "id that is no UUID": orjson.dumps(deposit("1", id="17")),
    "id with braces": orjson.dumps(deposit("1", id="{" + new_command_id() + "}")),
    "id that is a number": orjson.dumps(deposit("1", id=17)),
    "type with a space": orjson.dumps(deposit("1", type="Deposit Money")),
    "type that is too long": orjson.dumps(deposit("1", type="D" * 65)),
    "aggregate type with a slash": orjson.dumps(deposit("1", aggregate_type="a/b")),
    "empty aggregate id": orjson.dumps(deposit("1", aggregate_id="")),
    "aggregate id that is too long": orjson.dumps(deposit("1", aggregate_id="x" * 256)),
    "aggregate id with a control character": orjson.dumps(deposit("1", aggregate_id="a\nb")),
    "aggregate id with DEL": orjson.dumps(deposit("1", aggregate_id="a\x7f")),
    "payload that is an array": orjson.dumps(deposit("1", payload=[])),
    "payload that is null": orjson.dumps(deposit("1") | {"payload": None}),
    "metadata that is an array": orjson.dumps(deposit("1", metadata=["a"])),
    "metadata with a number": orjson.dumps(deposit("1", metadata={"a": 1})),
    "metadata with an upper-case key": orjson.dumps(deposit("1", metadata={"A": "1"})),
    "33 entries of metadata": orjson.dumps(deposit("1", metadata={f"k{n}": "" for n in range(33)})),
    "9 KiB of metadata": orjson.dumps(deposit("1", metadata={"k": "x" * 9 * 1024})),
    "expected_sequence as text": orjson.dumps(deposit("1", expected_sequence="1")),
    "expected_sequence below 0": orjson.dumps(deposit("1", expected_sequence=-1)),
    "expected_sequence true": orjson.dumps(deposit("1", expected_sequence=True)),
    "sent_at as a number": orjson.dumps(deposit("1", sent_at=5)),
}


async def test_broken_envelopes_are_buried(t: TestApp) -> None:
    """Each becomes one dead letter, whole up to the limit; commands among them are accepted."""
    among = [deposit("1") for _ in BROKEN]
    for body, good in zip(BROKEN.values(), among, strict=True):
        await t.enqueue(body, orjson.dumps(good))
    outcomes = [await t.reply(good["id"]) for good in among]
    await t.drain()
    assert all(outcome.accepted for outcome in outcomes)
    letters = await t.dead_letters()
    names = {body[:LIMIT]: name for name, body in BROKEN.items()}
    assert sorted(names.get(letter.body, "?") for letter in letters) == sorted(BROKEN)
    for letter in letters:
        assert letter.body_length == len(BROKEN[names[letter.body]])
        assert letter.reason
    assert len(await t.events(BankAccount, "A-1")) == 1 + len(among)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "missing field": ({}, "amount"),
    "extra field": ({"amount": "1", "extra": 1}, "extra"),
    "number": ({"amount": 5}, "amount"),
    "fraction": ({"amount": 5.5}, "amount"),
    "list": ({"amount": ["1"]}, "amount"),
    "null": ({"amount": None}, "amount"),
    **{
        f"amount {value!r}": ({"amount": value}, "amount")
        for value in ("0", "-1", "NaN", "sNaN", "Infinity", "1E+3", "1.001", "٣", True, "", "1_0")
    },
    "amount over the limit": ({"amount": "1000000000000.00"}, "amount"),
}


async def test_c11_payloads_that_do_not_fit(t: TestApp) -> None:
    """Each is rejected as invalid, naming the field; there is no dead letter, no event."""
    for name, (payload, field) in REFUSED.items():
        outcome = await sent(t, raw("DepositMoney", payload))
        assert outcome.error, name
        assert (outcome.status, outcome.error.code) == ("rejected", "invalid_command"), name
        assert field in outcome.error.message, name
    assert await t.dead_letters() == []
    assert len(await t.events(BankAccount, "A-1")) == 1
    assert (await sent(t, deposit("1"))).accepted


STRANGE_IDS = [
    "it's",
    'a"b',
    "🏦 emoji",
    "../../etc",
    "'; DROP TABLE events; --",
    "x" * 255,
    "%s?{}",
]


async def test_strange_ids_are_ids(t: TestApp) -> None:
    """Quotes, emoji, paths and SQL are ordinary ids, up to the view."""
    for account in STRANGE_IDS:
        await sent(t, opened(account))
        outcome = await sent(t, deposit("7", aggregate_id=account))
        assert outcome.accepted, account
    await t.drain()
    for account in STRANGE_IDS:
        row = await t.opened.storage.views.get(await t.opened.table("account_query"), account)
        assert row, account
        assert orjson.loads(row.payload)["balance"] == "7", account


async def test_of_duplicate_keys_the_last_wins(t: TestApp) -> None:
    """As JSON parsers have it."""
    message = deposit("3")
    body = orjson.dumps(message)[:-1] + b',"payload":{"amount":"8"}}'
    await t.enqueue(body)
    await t.reply(message["id"])
    await t.drain()
    row = await t.opened.storage.views.get(await t.opened.table("account_query"), "A-1")
    assert row
    assert orjson.loads(row.payload)["balance"] == "8"


# --- Handlers that misbehave ----------------------------------------------------


class NotToday(DomainError):
    """not today"""  # noqa: D400 - what the sender is told


def counter(name: str, payload: dict[str, Any]) -> dict[str, Any]:
    return raw(name, payload, aggregate_type="counter", aggregate_id="c")


async def test_a_handler_that_never_returns(where: Settings) -> None:
    """It is ended at its deadline and fails; the next command of its aggregate goes on."""

    async def for_ever() -> None:
        await asyncio.Event().wait()

    services = Services({"slow": for_ever})
    settings = replace(where, handler_timeout=0.02)
    async with TestApp(counting_app(services), settings=settings) as t:
        slow, good = counter("AddAfterCall", {"name": "slow", "n": 1}), counter("Add", {"n": 2})
        with t.expect_failures():
            await t.enqueue(orjson.dumps(slow), orjson.dumps(good))
            failed = await t.reply(slow["id"])
            assert (await t.reply(good["id"])).accepted
        assert failed.error
        assert (failed.status, failed.error.code) == ("failed", "internal_error")
        assert "CQRS_ES_HANDLER_TIMEOUT" in failed.error.message


AWKWARD = ["a\0b", "\ud800", "x" * 10_000_000]


@pytest.mark.parametrize("text", AWKWARD, ids=["NUL", "surrogate", "10 MB"])
async def test_a_reason_that_no_store_can_hold(where: Settings, text: str) -> None:
    """It is made one that they can, for the sender and for the operator; others go on."""

    async def refuse() -> None:
        raise NotToday(text)

    async def crash() -> None:
        raise RuntimeError(text)

    services = Services({"refuse": refuse, "crash": crash})
    async with TestApp(counting_app(services), settings=where) as t:
        refused, crashing, good = (
            counter("AddAfterCall", {"name": name, "n": 1}) for name in ("refuse", "crash", "")
        )
        with t.expect_failures():
            await t.enqueue(*map(orjson.dumps, (refused, crashing, good)))
            rejected = await t.reply(refused["id"])
            failed = await t.reply(crashing["id"])
            assert (await t.reply(good["id"])).accepted
        assert rejected.error
        assert (rejected.status, rejected.error.code) == ("rejected", "not_today")
        assert (await t.opened.outcome(refused["id"])) == rejected
        assert failed.status == "failed"
        (letter,) = await t.opened.storage.dead_letters.page()
        assert "RuntimeError" in letter.reason
        assert max(len(rejected.error.message), len(letter.reason)) <= 2000


async def test_state_changed_without_an_event(where: Settings) -> None:
    """It is accepted with no events, and the change leaves no trace."""
    async with TestApp(counting_app(), settings=where) as t:
        assert (await sent(t, counter("Tamper", {"n": 99}))).events == ()
        assert (await sent(t, counter("AddUpTo", {"n": 1, "limit": 1}))).accepted
        assert (await t.opened.load(Counter, "c")).state.total == 1


async def test_a_service_that_fails_once(where: Settings) -> None:
    """The command is tried again and accepted; nothing is left to repair."""
    failures = [ConnectionRefusedError()]

    async def flaky() -> None:
        if failures:
            raise failures.pop()

    async with TestApp(counting_app(Services({"flaky": flaky})), settings=where) as t:
        with t.expect_failures():
            outcome = await sent(t, counter("AddAfterCall", {"name": "flaky", "n": 1}))
        assert outcome.accepted
        assert await t.opened.storage.dead_letters.count() == 0
