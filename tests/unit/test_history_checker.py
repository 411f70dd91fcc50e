"""The judge of a service's life finds nothing wrong with good ones, and everything with bad ones.

The lives are made up here, by the contract: fast, and as bad as they have to be.
"""
# ruff: noqa: D401 - what a mutation does to a life is told as what happened in it

from __future__ import annotations

import functools
import pickle
import random
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any
from uuid import UUID

import orjson
import pytest

from tests.bank_data import PROJECT
from tests.history import bank
from tests.history.checker import (
    assert_promises_held,
    code_of,
    content_hash,
    contradictions,
    partition_of,
)
from tests.history.records import History, Reply, Seen, Sent, StoredEvent, StoredOutcome
from tests.history.traffic import NEVER_OPENED, random_command

Json = dict[str, Any]

ACCOUNTS = [f"A-{number}" for number in range(6)]
SENDERS = ["one", "two", "three"]
COMMANDS = 240
FREE = {"account_id": "A-0"}


# --- A good life ---------------------------------------------------------------------


@dataclass(slots=True)
class Life:
    """A service that keeps every promise, in the plainest way: it does one thing at a time."""

    history: History
    rng: random.Random
    now: float = 100.0
    accounts: dict[tuple[str, str], bank.Account] = field(
        default_factory=lambda: defaultdict(bank.Account)
    )
    decided: dict[str, StoredOutcome] = field(default_factory=dict[str, StoredOutcome])
    queues: dict[tuple[str, str], deque[Sent]] = field(default_factory=lambda: defaultdict(deque))
    # Transfers whose money is on its way: the event that it left by.
    on_its_way: list[StoredEvent] = field(default_factory=list[StoredEvent])

    def tick(self) -> float:
        self.now += self.rng.uniform(0.001, 0.01)
        return self.now

    def send(self, message: Json, sender: str) -> None:
        sent = Sent(sender, message, self.tick(), self.tick())
        self.history.sent.append(sent)
        self.queues[sent.account].append(sent)

    def decide_one(self) -> bool:
        """Decide the first command of any account that has one, or go on with a transfer."""
        if self.on_its_way and self.rng.random() < 0.3:
            self._end_transfer(self.on_its_way.pop(0))
            return True
        waiting = [account for account, queue in self.queues.items() if queue]
        if not waiting:
            if self.on_its_way:
                self._end_transfer(self.on_its_way.pop(0))
                return True
            return False
        sent = self.queues[self.rng.choice(waiting)].popleft()
        self.history.replies.append(Reply(self._answer(sent), self.tick()))
        return True

    def lose_everything(self) -> None:
        """Have the broker lose what waits, and its senders send it again, the last ones first."""
        lost = [sent for queue in self.queues.values() for sent in queue]
        self.queues.clear()
        self.history.losses.append(self.tick())
        for sent in reversed(lost):
            self.send(sent.message, sent.sender)

    def _answer(self, sent: Sent) -> Json:
        if (row := self.decided.get(sent.id)) is not None:
            if row.request_hash == content_hash(sent):
                return row.outcome | {"duplicate": True}
            error = {"code": "id_reused", "message": "it was sent with other content"}
            return _outcome(sent.id, sent.account) | {"status": "rejected", "error": error}
        state = self.accounts[sent.account]
        verdict = bank.verdict(sent.message, state)
        if verdict.or_code is not None and self._is_taken(sent):
            verdict = bank.Verdict("rejected", verdict.or_code)
        outcome = _outcome(sent.id, sent.account) | {
            "status": verdict.status,
            "sequence": state.sequence + len(verdict.events) if verdict.loaded else None,
            "error": {"code": verdict.code, "message": verdict.code} if verdict.code else None,
        }
        for event_type, payload in verdict.events:
            metadata = sent.message.get("metadata", {})
            event = self._append(sent.account, sent.id, event_type, payload, metadata)
            _tell(outcome, event)
            if event_type == "CustomerSentMoney":
                self.on_its_way.append(event)
        if verdict.status == "failed":
            letter = {"source": "commands", "reason": verdict.code}
            body = orjson.dumps(sent.message).decode()
            self.history.dead_letters.append(letter | {"body": body})
        row = self.decided[sent.id] = StoredOutcome(sent.id, content_hash(sent), outcome)
        self.history.outcomes.append(row)
        return outcome

    def _is_taken(self, sent: Sent) -> bool:
        iban = sent.message["payload"]["iban"]
        return any(
            state.iban == iban and name != sent.account for name, state in self.accounts.items()
        )

    def _append(
        self,
        account: tuple[str, str],
        command_id: str,
        event_type: str,
        payload: Json,
        metadata: dict[str, str],
    ) -> StoredEvent:
        partition = partition_of(account, self.history.partitions)
        offset = self.history.heads.get(partition, 0) + 1
        written = _as_text(payload)
        state = self.accounts[account].after(event_type, written)
        self.accounts[account] = state
        self.history.heads[partition] = offset
        event = StoredEvent(
            *account,
            state.sequence,
            event_type,
            "1.0",
            written,
            metadata,
            partition,
            offset,
            command_id,
            f"2026-11-23T07:00:{self.now % 60:09.6f}Z",
        )
        self.history.events.append(event)
        return event

    def _end_transfer(self, left: StoredEvent) -> None:
        """Have money arrive, or come back: as the process does it, by commands that nobody sent."""
        process = ("transfer", left.command_id)
        source, target = left.payload["from_account"], left.payload["to_account"]
        amount = Decimal(left.payload["amount"])
        ends = {"from_account": source, "to_account": target, "amount": amount}
        self._cause(process, "TransferBegan", ends)
        arrives = self.accounts["account", target].opened_as is not None
        if not arrives:
            self._cause(("account", target), None, {})
            self._cause(process, "TransferRefused", {"reason": "account_not_open"})
        end = ("account", target if arrives else source)
        money = {"amount": amount, "balance": self.accounts[end].balance + amount}
        if arrives:
            self._cause(end, "CustomerReceivedMoney", {"from_account": source, **money}, process)
        else:
            self._cause(end, "TransferCameBack", {"to_account": target, **money}, process)
        self._cause(process, "TransferEnded", {"arrived": arrives})

    def _cause(
        self,
        account: tuple[str, str],
        event_type: str | None,
        payload: Json,
        process: tuple[str, str] | None = None,
    ) -> None:
        """Decide a command that nobody sent: with one event, or refused."""
        command_id = str(UUID(int=self.rng.getrandbits(128), version=4))
        outcome = _outcome(command_id, account)
        outcome["sequence"] = self.accounts[account].sequence
        if event_type is None:
            error = {"code": "account_not_open", "message": "account not open"}
            outcome |= {"status": "rejected", "error": error}
        else:
            metadata = {"process": "/".join(process)} if process else dict[str, str]()
            event = self._append(account, command_id, event_type, payload, metadata)
            outcome["sequence"] = event.sequence
            _tell(outcome, event)
        self.history.outcomes.append(StoredOutcome(command_id, "", outcome))

    def end(self) -> History:
        """Decide, publish and project the rest."""
        while self.decide_one():
            pass
        history = self.history
        history.topic["live"] = [_published(history, event) for event in history.events]
        # A relay that died before its mark was set publishes again.
        again = len(history.events) // 2
        for event in history.events[again:]:
            history.topic["live"].append(_published(history, event))
        readers = ("$relay", "account_query__1", "bank_totals__1", "reactor:transfer")
        history.checkpoints = {reader: dict(history.heads) for reader in readers}
        history.live = {"account_query": "account_query__1", "bank_totals": "bank_totals__1"}
        for (kind, name), state in self.accounts.items():
            if kind == "account" and state.iban:
                history.unique_keys.append({"aggregate_id": name, "name": "iban"})
        for name in ACCOUNTS:
            events = [(e.event_type, e.payload) for e in history.events if e.aggregate_id == name]
            if events:
                history.accounts.append((name, _as_text(bank.statement(events))))
        days: dict[str, dict[str, int]] = defaultdict(lambda: dict(bank.EMPTY_DAY))
        for event in history.events:
            if event.aggregate_type != "account":
                continue
            day = event.metadata.get("booked_on", "2026-11-23")
            bank.add_to_day(days[day], event.event_type, event.payload)
        history.totals = list(days.items())
        history.shown = {row.command_id: row.outcome for row in history.outcomes[::20]}
        return history


def good_life(seed: int, broker: str) -> History:
    """Return a life of its own, to be spoiled."""
    life: History = pickle.loads(_good_life(seed, broker))  # noqa: S301 - our own
    return life


@functools.cache
def _good_life(seed: int, broker: str) -> bytes:
    """Make a life with duplicates, rejections, failures and a broker that lost everything."""
    rng = random.Random(seed)
    life = Life(History(broker, logepoch="5f0c"), rng)
    for number in range(COMMANDS):
        earlier = life.history.sent
        if earlier and rng.random() < 0.05:
            again = rng.choice(earlier).message
            life.send(again | ({"payload": FREE} if rng.random() < 0.3 else {}), "again")
        else:
            known = life.accounts["account", name].sequence if (name := rng.choice(ACCOUNTS)) else 0
            other = NEVER_OPENED if rng.random() < 0.2 else rng.choice(ACCOUNTS)
            life.send(random_command(rng, name, known, other), rng.choice(SENDERS))
        while rng.random() < 0.5 and life.decide_one():
            pass
        if number == COMMANDS // 2:
            life.lose_everything()
    return pickle.dumps(life.end())


def _tell(outcome: Json, event: StoredEvent) -> None:
    """Say in an outcome where its event is."""
    outcome["events"] = [{"type": event.event_type, "sequence": event.sequence}]
    outcome["partition"], outcome["offset"] = event.log_partition, str(event.log_offset)


def _outcome(command_id: str, account: tuple[str, str]) -> Json:
    return {
        "command_id": command_id,
        "status": "accepted",
        "aggregate_type": account[0],
        "aggregate_id": account[1],
        "sequence": None,
        "partition": None,
        "offset": None,
        "events": [],
        "error": None,
        "duplicate": False,
    }


def _as_text(payload: Json) -> Json:
    """Write Decimals as the service does."""

    def text(value: object) -> str:
        assert isinstance(value, Decimal)
        return format(value, "f")

    written: Json = orjson.loads(orjson.dumps(payload, default=text))
    return written


def _published(history: History, event: StoredEvent) -> Seen:
    name = f"{event.aggregate_type}/{event.aggregate_id}"
    partition, offset = event.log_partition, event.log_offset
    body = {
        "specversion": "1.0",
        "id": f"{name}/{event.sequence}",
        "source": "/bank",
        "type": event.event_type,
        "subject": event.aggregate_id,
        "time": event.recorded_at,
        "datacontenttype": "application/json",
        "data": event.payload,
        "aggregatetype": event.aggregate_type,
        "aggregatesequence": str(event.sequence),
        "eventversion": event.event_version,
        "partition": partition,
        "offset": str(offset),
        "logepoch": history.logepoch,
        "partitionkey": name,
        "commandid": event.command_id,
        "metadata": orjson.dumps(event.metadata).decode(),
    }
    if "correlation_id" in event.metadata:
        body["correlationid"] = event.metadata["correlation_id"]
    if history.broker == "redis":
        return Seen(f"bank:events:{partition}", f"{offset}-0", body)
    return Seen(
        f"{event.aggregate_type}.{event.event_type}.{partition}", f"{partition}-{offset}", body
    )


BROKERS = pytest.mark.parametrize("broker", ["redis", "amqp"])


@BROKERS
@pytest.mark.parametrize("seed", range(5))
def test_a_good_life_has_no_contradiction(seed: int, broker: str) -> None:
    """Duplicates, rejections, failures and a loss of the broker break no promise."""
    life = good_life(seed, broker)
    assert_promises_held(life)
    codes = {code_of(row.outcome) for row in life.outcomes}
    assert codes >= {None, "conflict", "funds_not_available", "invalid_command", "unknown_command"}


# --- Bad lives -----------------------------------------------------------------------

Mutation = Callable[[History], None]
MUTATIONS: list[tuple[str, Mutation]] = []


def breaks(promise: str) -> Callable[[Mutation], Mutation]:
    """Register a mutation with the promise that it breaks."""

    def register(mutation: Mutation) -> Mutation:
        MUTATIONS.append((promise, mutation))
        return mutation

    return register


def accepted(life: History, number: int = 40) -> tuple[int, StoredOutcome]:
    """Return an accepted command of the middle of a life, and the index of its row."""
    sent = {each.id for each in life.sent}
    rows = [(n, row) for n, row in enumerate(life.outcomes) if row.command_id in sent]
    return [(n, row) for n, row in rows if row.outcome["events"]][number]


def changed(life: History, index: int, **fields: Any) -> None:
    """Change an outcome wherever it is told: table, replies, `outcome`."""
    row = life.outcomes[index]
    life.outcomes[index] = replace(row, outcome=row.outcome | fields)
    for n, reply in enumerate(life.replies):
        if reply.outcome["command_id"] == row.command_id and reply.outcome["error"] is None:
            life.replies[n] = replace(reply, outcome=reply.outcome | fields)
    if row.command_id in life.shown:
        life.shown[row.command_id] |= fields


def changed_event(life: History, index: int, **payload: Any) -> None:
    """Change an event's payload in the log and on the topic alike."""
    event = life.events[index]
    life.events[index] = replace(event, payload=event.payload | payload)
    for n, seen in enumerate(life.topic["live"]):
        if seen.event["id"] == f"account/{event.aggregate_id}/{event.sequence}":
            body = seen.event | {"data": life.events[index].payload}
            life.topic["live"][n] = replace(seen, event=body)


def with_balance(life: History) -> int:
    """Return the index of an event after which its account has money."""
    return next(n for n, e in enumerate(life.events) if n > 60 and "balance" in e.payload)


@breaks("G1")
def a_lost_command(life: History) -> None:
    """The broker had it; nobody decided it."""
    lost = Sent("one", random_command(random.Random(0), "A-0", 0, "A-1"), life.losses[-1] + 1, 1e6)
    life.sent.append(lost)


@breaks("G1")
def a_lost_outcome(life: History) -> None:
    """It was answered, and then forgotten."""
    index = next(n for n, row in enumerate(life.outcomes) if row.outcome["status"] == "rejected")
    life.losses.clear()
    del life.outcomes[index]


@breaks("G2")
def a_double_outcome(life: History) -> None:
    """A second row of one id."""
    life.outcomes.append(life.outcomes[7])


@breaks("G2")
def a_changed_outcome_in_a_reply(life: History) -> None:
    """One sender was told another thing than the table says."""
    reply = life.replies[50]
    life.replies[50] = replace(reply, outcome=reply.outcome | {"sequence": 77})


@breaks("G2")
def a_duplicate_with_another_outcome(life: History) -> None:
    """A message sent again was answered by a second decision."""
    index = next(n for n, r in enumerate(life.replies) if r.outcome["duplicate"])
    error = {"code": "funds_not_available", "message": "funds not available"}
    outcome = life.replies[index].outcome | {"status": "rejected", "error": error}
    life.replies[index] = replace(life.replies[index], outcome=outcome)


@breaks("G2")
def a_changed_outcome_in_the_verb(life: History) -> None:
    """`cqrs-es outcome` says another thing than the table."""
    command_id, outcome = next(iter(life.shown.items()))
    life.shown[command_id] = outcome | {"sequence": 77}


@breaks("G2")
def an_outcome_of_nothing(life: History) -> None:
    """Nobody had sent that command."""
    strange = "00000000-0000-4000-8000-000000000000"
    row = life.outcomes[3]
    outcome = row.outcome | {"command_id": strange}
    life.outcomes.append(replace(row, command_id=strange, outcome=outcome))


@breaks("G2")
def another_commands_hash(life: History) -> None:
    """The stored hash is not that of the content."""
    life.outcomes[9] = replace(life.outcomes[9], request_hash="0" * 64)


@breaks("G2")
def an_id_called_reused(life: History) -> None:
    """It was sent with one content only."""
    sent = next(s for s in life.sent if sum(o.id == s.id for o in life.sent) == 1)
    error = {"code": "id_reused", "message": ""}
    life.replies.append(
        Reply(_outcome(sent.id, sent.account) | {"status": "rejected", "error": error}, 1e6)
    )


@breaks("G4")
def an_event_without_its_outcome(life: History) -> None:
    """The events were committed, the outcome was not."""
    index, _ = accepted(life)
    del life.outcomes[index]


@breaks("G4")
def an_outcome_without_its_event(life: History) -> None:
    """The outcome was committed, its last event in the log was not."""
    last = max(life.events, key=lambda event: (event.log_partition, event.log_offset))
    life.events.remove(last)
    life.heads[last.log_partition] -= 1
    life.topic["live"] = [s for s in life.topic["live"] if s.event["commandid"] != last.command_id]


@breaks("G4")
def an_outcome_that_names_another_offset(life: History) -> None:
    """Everybody is told a wrong place."""
    index, row = accepted(life)
    changed(life, index, offset=str(int(row.outcome["offset"]) + 1))


@breaks("G3")
def a_stale_decision(life: History) -> None:
    """Money was paid out that was no longer there."""
    index = next(
        n for n, row in enumerate(life.outcomes) if code_of(row.outcome) == "funds_not_available"
    )
    changed(life, index, status="accepted", error=None)


@breaks("G3")
def a_refusal_of_what_was_right(life: History) -> None:
    """An account is open, and yet the next command is told that it is not."""
    index = next(
        n for n, row in enumerate(life.outcomes) if code_of(row.outcome) == "account_already_open"
    )
    error = {"code": "account_not_open", "message": "account not open"}
    changed(life, index, error=error)
    for n, reply in enumerate(life.replies):
        is_its = reply.outcome["command_id"] == life.outcomes[index].command_id
        if is_its and code_of(reply.outcome) != "id_reused":
            life.replies[n] = replace(reply, outcome=reply.outcome | {"error": error})


@breaks("G3")
def a_rejection_on_an_older_state(life: History) -> None:
    """Its sender had been told of a later one before it sent it."""
    for n, row in enumerate(life.outcomes[60:], 60):
        code = code_of(row.outcome)
        if code == "account_already_open" and row.outcome["sequence"] > 8:
            life.outcomes[n] = replace(row, outcome=row.outcome | {"sequence": 1})
            life.replies = [
                replace(r, outcome=r.outcome | {"sequence": 1})
                if r.outcome["command_id"] == row.command_id
                else r
                for r in life.replies
            ]
            return
    raise AssertionError("no such rejection")


@breaks("G3")
def a_balance_of_another_state(life: History) -> None:
    """A deposit was added to what the account held before."""
    changed_event(life, with_balance(life), balance="1000000.00")


@breaks("G3")
def an_event_without_its_metadata(life: History) -> None:
    """The day on which it is booked is lost."""
    index = next(n for n, event in enumerate(life.events) if event.metadata)
    life.events[index] = replace(life.events[index], metadata={})


@breaks("G3")
def an_internal_error(life: History) -> None:
    """A command that is in order was given up."""
    index = next(n for n, row in enumerate(life.outcomes) if row.outcome["status"] == "rejected")
    changed(life, index, status="failed", error={"code": "internal_error", "message": "killed"})


@breaks("G8")
def an_overtaken_command(life: History) -> None:
    """Of two commands of one sender the later one was decided first."""
    # What the records say of their sending is changed: the decisions stay right.
    place = {row.command_id: row.outcome["sequence"] for row in life.outcomes}
    one = [s for s in life.sent if s.sender == "one" and place.get(s.id) is not None]
    for first in one:
        for second in one:
            counts = [sum(o.id == s.id for o in life.sent) for s in (first, second)]
            apart = place[first.id] + 1 < place[second.id] and first.at < second.at
            if apart and first.account == second.account and counts == [1, 1]:
                _exchange(life, first, second)
                return
    raise AssertionError("no such pair")


def _exchange(life: History, first: Sent, second: Sent) -> None:
    a, b = life.sent.index(first), life.sent.index(second)
    life.sent[a] = replace(second, at=first.at, accepted_at=first.accepted_at)
    life.sent[b] = replace(first, at=second.at, accepted_at=second.accepted_at)


@breaks("G5")
def a_lost_event(life: History) -> None:
    """The log has a hole."""
    del life.events[50]


@breaks("G5")
def a_double_event(life: History) -> None:
    """The log has an event twice."""
    life.events.append(life.events[50])


@breaks("G5")
def a_double_event_at_the_end(life: History) -> None:
    """An event is appended once more, with numbers of its own."""
    event = max(life.events, key=lambda each: (each.log_partition, each.log_offset))
    again = replace(event, sequence=event.sequence + 1, log_offset=event.log_offset + 1)
    life.events.append(again)


@breaks("G5")
def a_swap_in_the_log(life: History) -> None:
    """Two events of an account have each other's offsets."""
    first = life.events[50]
    n, second = next(
        (n, e) for n, e in enumerate(life.events) if n > 50 and e.account == first.account
    )
    life.events[50] = replace(first, log_offset=second.log_offset)
    life.events[n] = replace(second, log_offset=first.log_offset)


@breaks("G5")
def a_head_that_lags(life: History) -> None:
    """A partition's head is not its last offset."""
    life.heads[next(iter(life.heads))] -= 1


@breaks("G5")
def an_event_in_a_foreign_partition(life: History) -> None:
    """It is not where its account's events are."""
    free = next(p for p in range(life.partitions) if p not in life.heads)
    last = max(life.events, key=lambda event: (event.log_partition, event.log_offset))
    life.events[life.events.index(last)] = replace(last, log_partition=free, log_offset=1)


@breaks("G6")
def an_event_not_published(life: History) -> None:
    """No subscriber ever saw it."""
    gone = life.events[30]
    life.topic["live"] = [s for s in life.topic["live"] if s.event["commandid"] != gone.command_id]


@breaks("G6")
def a_swap_on_the_topic(life: History) -> None:
    """Two events of a partition came in the wrong order, and did not come again."""
    seen = life.topic["live"] = life.topic["live"][: len(life.events)]
    first = seen[20]
    n = next(n for n, s in enumerate(seen) if n > 20 and s.channel == first.channel)
    seen[20], seen[n] = seen[n], seen[20]


@breaks("G6")
def an_event_published_but_not_stored(life: History) -> None:
    """It was published before its commit, which failed."""
    last = max(life.events, key=lambda event: (event.log_partition, event.log_offset))
    life.topic["live"].append(_published(life, replace(last, log_offset=last.log_offset + 1)))


@breaks("G6")
def another_event_on_the_topic(life: History) -> None:
    """What is published is not what is stored."""
    seen = life.topic["live"][15]
    life.topic["live"][15] = replace(seen, event=seen.event | {"data": {"amount": "1"}})


@breaks("G6")
def an_event_of_another_epoch(life: History) -> None:
    """A zombie published under the epoch before."""
    seen = life.topic["live"][15]
    life.topic["live"].append(replace(seen, event=seen.event | {"logepoch": "0000"}))


@breaks("G6")
def an_event_at_another_address(life: History) -> None:
    """Subscribers would not find it."""
    seen = life.topic["live"][15]
    life.topic["live"][15] = replace(seen, channel="elsewhere")


@breaks("G6")
def a_relay_that_stands_still(life: History) -> None:
    """Its mark does not reach the end."""
    partition = next(iter(life.heads))
    life.checkpoints["$relay"] = life.heads | {partition: 1}


@breaks("G7")
def a_checkpoint_beyond_the_log(life: History) -> None:
    """A view claims to hold what is not there."""
    partition = next(iter(life.heads))
    ahead = life.heads | {partition: life.heads[partition] + 1}
    life.checkpoints["bank_totals__1"] = ahead


@breaks("G7")
def a_view_event_skipped(life: History) -> None:
    """A line of a statement is missing."""
    _statement(life)["ledger"].pop(1)


@breaks("G7")
def a_view_event_doubled(life: History) -> None:
    """A line of a statement is there twice."""
    ledger = _statement(life)["ledger"]
    ledger.append(ledger[-1])


@breaks("G7")
def a_view_in_another_order(life: History) -> None:
    """Two lines of a statement changed places."""
    ledger = _statement(life)["ledger"]
    n = next(n for n in range(len(ledger) - 1) if ledger[n] != ledger[n + 1])
    ledger[n], ledger[n + 1] = ledger[n + 1], ledger[n]


@breaks("G7")
def a_row_of_nobody(life: History) -> None:
    """A view has an account that the log does not have."""
    life.accounts.append(("A-99", life.accounts[0][1]))


@breaks("G7")
def a_deposit_totalled_twice(life: History) -> None:
    """A day's row counts an event twice."""
    day, row = life.totals[0]
    more = {name: row[name] + 100 for name in ("deposits_cents", "held_cents")}
    life.totals[0] = day, row | more


@breaks("G7")
def an_account_parked(life: History) -> None:
    """A projector could not go on with it."""
    life.parked.append({"projector": "account_query", "aggregate_id": "A-1"})


@breaks("money")
def money_from_nowhere(life: History) -> None:
    """An account holds more than was ever paid in."""
    row = _statement(life)
    row["balance"] = str(Decimal(row["balance"]) + 5)


def transferred(life: History, event_type: str) -> tuple[StoredEvent, StoredOutcome]:
    """Return the last event of a kind that a transfer made, and its command's outcome."""
    event = [each for each in life.events if each.event_type == event_type][-1]
    return event, next(row for row in life.outcomes if row.command_id == event.command_id)


def append(life: History, event: StoredEvent, **fields: Any) -> None:
    """Append an event of another command of the same transfer, with all that goes with it."""
    strange = "00000000-0000-4000-8000-000000000000"
    stream = [each for each in life.events if each.account == event.account]
    offset = life.heads[event.log_partition] + 1
    numbers = {"sequence": len(stream) + 1, "log_offset": offset, "command_id": strange}
    fields |= numbers
    added = replace(event, **fields)
    life.events.append(added)
    life.topic["live"].append(_published(life, added))
    life.heads[event.log_partition] = offset
    for marks in life.checkpoints.values():
        marks[event.log_partition] = offset
    outcome = _outcome(strange, event.account) | {"sequence": added.sequence}
    _tell(outcome, added)
    life.outcomes.append(StoredOutcome(strange, "", outcome))


@breaks("G11")
def money_that_arrives_twice(life: History) -> None:
    """What an event caused was decided twice."""
    event, _ = transferred(life, "CustomerReceivedMoney")
    balances = [e.payload for e in life.events if e.account == event.account]
    held = next(each["balance"] for each in reversed(balances) if "balance" in each)
    balance = str(Decimal(held) + Decimal(event.payload["amount"]))
    append(life, event, payload=event.payload | {"balance": balance})


@breaks("G11")
def a_deadline_that_fired_and_was_cancelled(life: History) -> None:
    """A transfer that has ended is told that it takes too long."""
    event, _ = transferred(life, "TransferEnded")
    append(life, event, event_type="TransferDelayed", payload={"reason": "too_long"})


@breaks("G11")
def a_transfer_that_stands_still(life: History) -> None:
    """Money has arrived, and its process never heard of it."""
    last = {event.log_partition: event for event in life.events}
    gone = next(e for e in last.values() if e.event_type == "TransferEnded")
    life.events.remove(gone)
    life.outcomes = [row for row in life.outcomes if row.command_id != gone.command_id]
    life.topic["live"] = [s for s in life.topic["live"] if s.event["commandid"] != gone.command_id]
    life.heads[gone.log_partition] -= 1
    for marks in life.checkpoints.values():
        marks[gone.log_partition] = life.heads[gone.log_partition]


@breaks("G11")
def money_that_nobody_received(life: History) -> None:
    """The process says that it arrived, and the account holds it as its own that came back."""
    event, _ = transferred(life, "CustomerReceivedMoney")
    payload = event.payload | {"to_account": event.payload["from_account"]}
    came_back = replace(event, event_type="TransferCameBack", payload=payload)
    life.events[life.events.index(event)] = came_back


@breaks("G11")
def a_refusal_that_nobody_gave(life: History) -> None:
    """A transfer came back, and no command to the other account was refused."""
    sent = {each.id for each in life.sent}
    refused = [r for r in life.outcomes if code_of(r.outcome) == "account_not_open"]
    life.outcomes.remove(next(row for row in refused if row.command_id not in sent))


@breaks("G11")
def a_row_left_behind(life: History) -> None:
    """What was caused waits for ever."""
    life.scheduled.append({"aggregate_id": "A-1", "timer": None, "body": "{}"})


@breaks("G11")
def a_reactor_that_stands_still(life: History) -> None:
    """It has not seen the end of the log."""
    partition = next(iter(life.heads))
    life.checkpoints["reactor:transfer"][partition] -= 1


@breaks("G12")
def two_holders(life: History) -> None:
    """Two accounts have one IBAN in the end."""
    iban = bank_of(life)["A-1"].iban
    assert iban is not None
    index, event = next(
        (n, e)
        for n, e in reversed(list(enumerate(life.events)))
        if e.event_type == "IbanAssigned" and e.aggregate_id != "A-1"
    )
    life.events[index] = replace(event, payload={"iban": iban})


@breaks("G12")
def a_holder_that_the_table_has_forgotten(life: History) -> None:
    """The next one to ask would get it."""
    life.unique_keys.pop()


@breaks("G12")
def two_at_once_for_a_while(life: History) -> None:
    """One account was told that it has it before the other had given it up."""
    given = [e for e in life.events if e.event_type == "IbanAssigned"]
    first, following = next(
        (a, b)
        for a in given
        for b in given
        if a.account == b.account and b.sequence > a.sequence and a.payload != b.payload
    )
    told = {r.outcome["command_id"]: r.at for r in reversed(life.replies)}
    ends = next(s.at for s in life.sent if s.id == following.command_id)
    index = next(
        n
        for n, event in enumerate(life.events)
        if event.event_type == "IbanAssigned"
        and event.account != first.account
        and told[first.command_id] < told[event.command_id]
    )
    other = life.events[index]
    life.events[index] = replace(other, payload=first.payload)
    life.replies = [
        replace(r, at=ends - 1e-6) if r.outcome["command_id"] == other.command_id else r
        for r in life.replies
    ]


@breaks("G12")
def a_refusal_of_what_is_free(life: History) -> None:
    """Nobody ever had it."""
    taken = next(r for r in life.outcomes if code_of(r.outcome) == "iban_taken")
    iban = next(s for s in life.sent if s.id == taken.command_id).message["payload"]["iban"]
    for n, event in enumerate(life.events):
        if event.payload.get("iban") == iban:
            life.events[n] = replace(event, payload={"iban": "GB00"})


def bank_of(life: History) -> dict[str, bank.Account]:
    """Return what each account is in the end."""
    found: dict[str, bank.Account] = defaultdict(bank.Account)
    for event in life.events:
        if event.aggregate_type == "account":
            found[event.aggregate_id] = found[event.aggregate_id].after(
                event.event_type, event.payload
            )
    return found


@breaks("G9")
def a_failed_command_without_a_dead_letter(life: History) -> None:
    """Nobody would ever know."""
    life.dead_letters.pop()


@breaks("G9")
def a_dead_letter_of_a_good_command(life: History) -> None:
    """It was decided, and is set aside all the same."""
    body = next(s.message for s in life.sent if s.id == accepted(life)[1].command_id)
    life.dead_letters.append({"source": "commands", "body": orjson.dumps(body).decode()})


@breaks("G9")
def an_attempt_left_open(life: History) -> None:
    """The next redelivery would count against it."""
    life.attempts[life.outcomes[0].command_id] = 1


def _statement(life: History) -> Json:
    return max((row for _, row in life.accounts), key=lambda row: len(row["ledger"]))


@pytest.mark.parametrize(
    ("promise", "mutation"), MUTATIONS, ids=[mutation.__name__ for _, mutation in MUTATIONS]
)
def test_a_broken_promise_is_found(promise: str, mutation: Mutation) -> None:
    """Whichever way a good life is spoiled, the promise that it breaks is named."""
    for seed, broker in enumerate(("redis", "amqp")):
        life = good_life(seed, broker)
        mutation(life)
        assert promise in {each.promise for each in contradictions(life)}


def test_the_shortest_contradiction_is_shown() -> None:
    """Whoever reads the failure sees the few records that make it, and the count of all."""
    life = good_life(1, "redis")
    an_internal_error(life)
    a_head_that_lags(life)
    with pytest.raises(AssertionError) as failure:
        assert_promises_held(life)
    shortest = contradictions(life)[0]
    assert str(failure.value).startswith(str(shortest))
    assert len(str(shortest).splitlines()) <= 2
    assert "contradictions in all" in str(failure.value)


def test_the_judge_imports_nothing_of_what_it_judges() -> None:
    """Otherwise an error of theirs would be an error of its own."""
    program = (
        "import sys, tests.history.checker, tests.history.recorder, tests.history.traffic;"
        "print(*sys.modules.keys() & {'cqrs_es', 'domain', 'projectors', 'worker'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, check=True, capture_output=True
    )
    assert done.stdout == b"\n"
