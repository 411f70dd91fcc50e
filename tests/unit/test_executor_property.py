"""However commands are batched, the events are those of deciding them one by one."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, TypeAlias

import orjson
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import DomainError
from cqrs_es.aggregate import AggregateSourced, EventSourced, SnapshotEvery, SourceOfTruth
from cqrs_es.application import Application
from cqrs_es.codec import to_json
from cqrs_es.execution.executor import Executor
from cqrs_es.execution.handling import run_handler
from cqrs_es.execution.policy import ExecutionPolicy
from cqrs_es.messages import CommandMessage, Outcome, spec_of
from cqrs_es.ports.store import LoadRequest
from cqrs_es.stores import storage_for
from cqrs_es.testing import FakeClock
from cqrs_es.types import AggregateKey
from domain.account import (
    AtmRuleViolation,
    BankAccount,
    Command,
    DepositMoney,
    OpenAccount,
    WithdrawMoney,
    WriteCheck,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.ports.storage import Storage

BROKEN_ATM = "broken"
Stored: TypeAlias = "tuple[str, bytes]"


class Services:
    """Cash machines of which one refuses; every call gives way to other work."""

    async def atm_withdrawal(self, atm_id: str, amount: Decimal) -> None:
        del amount
        await asyncio.sleep(0)
        if atm_id == BROKEN_ATM:
            raise AtmRuleViolation

    async def validate_check(self, account_id: str, check_number: str) -> None:
        del account_id, check_number
        await asyncio.sleep(0)


@dataclass(frozen=True)
class Sent:
    """A command as it is sent: which of a few ids it has, and whether others are let in first."""

    account: str
    command: Command
    command_id: str
    pause: bool


amounts = st.integers(1, 300).map(lambda cents: Decimal(cents) / 100)
commands = st.one_of(
    st.builds(OpenAccount, st.just("A")),
    st.builds(DepositMoney, amounts),
    st.builds(WithdrawMoney, amounts, st.sampled_from(["atm", BROKEN_ATM])),
    st.builds(WriteCheck, st.just("1170"), amounts),
)
# Few ids: that some commands are sent twice, or that two have one id, is part of it.
ids = st.integers(0, 60).map(lambda number: f"00000000-0000-7000-8000-{number:012}")
sequences = st.lists(
    st.builds(Sent, st.sampled_from("ABC"), commands, ids, st.booleans()), max_size=60
)
sources = st.sampled_from([EventSourced(), AggregateSourced(), SnapshotEvery(3)])


def _message(sent: Sent) -> CommandMessage:
    name = spec_of(type(sent.command)).name
    payload = orjson.loads(to_json(sent.command))
    return CommandMessage(sent.command_id, name, "account", sent.account, payload, body=b"{}")


# --- One by one ----------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    accepted: bool
    code: str | None
    duplicate: bool


class OneByOne:
    """The rules in their simplest form: no batches, no store, no copies."""

    def __init__(self) -> None:
        self.events: defaultdict[str, list[Stored]] = defaultdict(list)
        self._accounts: defaultdict[str, BankAccount] = defaultdict(BankAccount)
        self._answers: dict[str, tuple[str, Answer]] = {}

    async def send(self, sent: Sent) -> Answer:
        content = _message(sent).content_hash()
        if sent.command_id in self._answers:
            known, answer = self._answers[sent.command_id]
            if known != content:
                return Answer(accepted=False, code="id_reused", duplicate=False)
            return Answer(answer.accepted, answer.code, duplicate=True)
        answer = await self._decide(sent)
        self._answers[sent.command_id] = content, answer
        return answer

    async def _decide(self, sent: Sent) -> Answer:
        yielded: list[object] = []
        try:
            account = self._accounts[sent.account]
            await run_handler(account, sent.command, Services(), on_yield=yielded.append)
        except DomainError as exc:
            # None of the bank's commands is refused after its first event.
            return Answer(accepted=False, code=exc.code, duplicate=False)
        self.events[sent.account] += [(type(e).__name__, to_json(e)) for e in yielded]
        return Answer(accepted=True, code=None, duplicate=False)


# --- In batches ----------------------------------------------------------------


async def _in_batches(
    sequence: Sequence[Sent], source: SourceOfTruth, batch_size: int, cached: int
) -> tuple[list[Outcome], dict[str, list[Stored]]]:
    app = Application("bank")
    app.aggregate(BankAccount, services=_services, source=source)
    storage = storage_for("memory://")
    await storage.initialise(1)
    policy = ExecutionPolicy(batch_size=batch_size, cache_bytes=cached * 700)
    executor = Executor(
        app.registry, storage.events, partitions=1, clock=FakeClock(), policy=policy
    )
    async with executor:
        answers: list[asyncio.Future[Outcome]] = []
        for sent in sequence:
            answers.append(executor.submit(_message(sent)))
            if sent.pause:
                await asyncio.sleep(0)
        outcomes = [await answer for answer in answers]
    return outcomes, {id_: await _stored(storage, id_) for id_ in "ABC"}


def _services(_: object) -> Services:
    return Services()


async def _stored(storage: Storage, id_: str) -> list[Stored]:
    (loaded,) = await storage.events.load([LoadRequest(AggregateKey("account", id_))])
    assert [event.sequence for event in loaded.events] == [*range(1, len(loaded.events) + 1)]
    return [(event.event_type, event.payload) for event in loaded.events]


@given(sequences, sources, st.integers(1, 20), st.integers(0, 3))
def test_batches_change_nothing(
    sequence: list[Sent], source: SourceOfTruth, batch_size: int, cached: int
) -> None:
    """Outcomes and events are those of deciding one by one, for batches of any size."""

    async def compare() -> None:
        expected = OneByOne()
        answers = [await expected.send(sent) for sent in sequence]
        outcomes, events = await _in_batches(sequence, source, batch_size, cached)
        assert [_answer(outcome) for outcome in outcomes] == answers
        assert events == {id_: expected.events[id_] for id_ in "ABC"}

    asyncio.run(compare())


def _answer(outcome: Outcome) -> Answer:
    code = None if outcome.error is None else outcome.error.code
    return Answer(outcome.accepted, code, outcome.duplicate)
