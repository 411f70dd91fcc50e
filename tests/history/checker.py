"""Decides from the records of a service's life whether every promise to its users held.

An independent judge: it knows the contract (`docs/`) and the bank's rules, and imports
nothing of what it judges. Each check yields contradictions with the records that make
them, as few as will do; the shortest is what is shown first.

Its place in time: the service is healed and drained, so whatever was taken has to be
decided, published and projected, and what that has caused too.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING

from tests.history import bank

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.history.records import (
        Account,
        History,
        Json,
        Reply,
        Seen,
        Sent,
        StoredEvent,
        StoredOutcome,
    )

RELAY = "$relay"
TOTALS = "bank_totals"
REACTOR = "reactor:transfer"
CAUSED = ("account", "transfer")  # whom transfers send commands; `transfers_end_once` counts them
SHOWN_CHARACTERS = 400


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A promise, how it was broken, and the records that show it."""

    promise: str
    says: str
    records: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Show it as a paragraph."""
        return "\n    ".join([f"{self.promise}: {self.says}", *self.records])


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command was decided: after which event, and its own last one; equal without."""

    before: int
    after: int


@dataclass(slots=True)
class Known:
    """The records again, by what they are looked up by."""

    history: History
    sent: dict[str, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    replies: dict[str, list[Reply]] = field(default_factory=lambda: defaultdict(list))
    outcomes: dict[str, StoredOutcome] = field(default_factory=dict[str, "StoredOutcome"])
    streams: dict[Account, list[StoredEvent]] = field(default_factory=lambda: defaultdict(list))
    log: dict[int, list[StoredEvent]] = field(default_factory=lambda: defaultdict(list))
    caused: dict[str, list[StoredEvent]] = field(default_factory=lambda: defaultdict(list))
    # The sending whose content was decided: with one id there may be several.
    decided: dict[str, Sent] = field(default_factory=dict[str, "Sent"])
    # What each account is after 0, 1, 2 … events.
    states: dict[Account, list[bank.Account]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of(cls, history: History) -> Known:
        """Sort the records."""
        known = cls(history)
        for each in sorted(history.sent, key=lambda sent: sent.at):
            known.sent[each.id].append(each)
        for reply in history.replies:
            known.replies[reply.outcome["command_id"]].append(reply)
        known.outcomes = {row.command_id: row for row in history.outcomes}
        for command_id, row in known.outcomes.items():
            for each in known.sent.get(command_id, [])[::-1]:
                if content_hash(each) == row.request_hash:
                    known.decided[command_id] = each
        for event in sorted(history.events, key=lambda e: (e.account, e.sequence)):
            known.streams[event.account].append(event)
            known.caused[event.command_id].append(event)
        for event in sorted(history.events, key=lambda e: (e.log_partition, e.log_offset)):
            known.log[event.log_partition].append(event)
        for account, stream in known.streams.items():
            known.states[account] = _states(stream)
        return known

    def state(self, account: Account, sequence: int) -> bank.Account | None:
        """Return an account after so many events; None where the log does not go so far."""
        states = self.states.get(account) or [bank.Account()]
        return states[sequence] if 0 <= sequence < len(states) else None

    def place(self, command_id: str) -> Place | None:
        """Return where a command was decided; None where no account was looked at."""
        row = self.outcomes.get(command_id)
        if row is None or not isinstance(row.outcome["sequence"], int):
            return None
        after = row.outcome["sequence"]
        return Place(after - len(row.outcome["events"]), after)

    def was_lost(self, sent: Sent, until: float) -> bool:
        """Tell whether the broker lost everything between a sending and a moment."""
        return any(sent.at <= loss <= until for loss in self.history.losses)


def contradictions(history: History) -> list[Contradiction]:
    """Return every contradiction, those with the fewest records first."""
    known = Known.of(history)
    found = [each for check in CHECKS for each in check(known)]
    return sorted(found, key=lambda each: len(each.records))


def assert_promises_held(history: History) -> None:
    """Fail with the shortest contradiction, and the number of all by promise."""
    found = contradictions(history)
    if found:
        counts = defaultdict[str, int](int)
        for each in found:
            counts[each.promise] += 1
        raise AssertionError(f"{found[0]}\n  contradictions in all: {dict(counts)}")


# --- Commands and their outcomes ---------------------------------------------------------


def commands_are_kept(known: Known) -> Iterator[Contradiction]:
    """G1: what the broker had confirmed has an outcome, unless the broker then lost it."""
    for command_id, sendings in known.sent.items():
        last = sendings[-1]
        confirmed = any(
            each.accepted_at is not None and not known.was_lost(each, float("inf"))
            for each in sendings
        )
        if confirmed and command_id not in known.outcomes:
            records = [_sent(last), *map(_reply, known.replies.get(command_id, []))]
            yield Contradiction("G1", "a command was lost", tuple(records))


def one_outcome(known: Known) -> Iterator[Contradiction]:
    """G2: each command id has one row, and belongs to something that was sent."""
    rows = known.history.outcomes
    for earlier, later in pairwise(sorted(rows, key=lambda row: row.command_id)):
        if earlier.command_id == later.command_id:
            yield Contradiction("G2", "two outcomes of one command", (_row(earlier), _row(later)))
    for row in rows:
        if row.command_id not in known.sent:
            if row.outcome["aggregate_type"] not in CAUSED:
                yield Contradiction("G2", "an outcome of a command that nobody sent", (_row(row),))
        elif row.command_id not in known.decided:
            sent = _sent(known.sent[row.command_id][0])
            yield Contradiction("G2", "request_hash is of another content", (sent, _row(row)))
        elif row.outcome["command_id"] != row.command_id or row.outcome["duplicate"]:
            yield Contradiction("G2", "the row does not hold its own, first outcome", (_row(row),))


def same_everywhere(known: Known) -> Iterator[Contradiction]:
    """G2: replies, the table and `cqrs-es outcome` say the same of a command."""
    for command_id, replies in known.replies.items():
        for reply in replies:
            if (found := _wrong_with(known, command_id, reply)) is not None:
                yield found
    for command_id, outcome in known.history.shown.items():
        row = known.outcomes.get(command_id)
        if row is None or _plain(row.outcome) != _plain(outcome):
            records = (f"shown     {_short(outcome)}", *([_row(row)] if row else []))
            yield Contradiction("G2", "`outcome` says something else than the table", records)


def _wrong_with(known: Known, command_id: str, reply: Reply) -> Contradiction | None:
    sendings = known.sent.get(command_id)
    if not sendings:
        return Contradiction("G2", "a reply to a command that nobody sent", (_reply(reply),))
    if code_of(reply.outcome) == "id_reused":
        if len({content_hash(each) for each in sendings}) > 1:
            return None
        return Contradiction("G2", "no other content was sent", (*map(_sent, sendings),))
    row = known.outcomes.get(command_id)
    if row is None:
        return Contradiction("G2", "a reply without a stored outcome", (_reply(reply),))
    if _plain(row.outcome) != _plain(reply.outcome):
        records = (_sent(sendings[0]), _reply(reply), _row(row))
        return Contradiction("G2", "a reply says something else than the table", records)
    if reply.at < sendings[0].at:
        early = (_reply(reply), _sent(sendings[0]))
        return Contradiction("G2", "a reply came before the command was sent", early)
    return None


def all_or_nothing(known: Known) -> Iterator[Contradiction]:
    """G4: an outcome's events are in the log, they and no others, where it says they are."""
    for command_id, events in known.caused.items():
        if command_id not in known.outcomes:
            records = tuple(map(_event, events))
            yield Contradiction("G4", "events of a command without an outcome", records)
    for row in known.history.outcomes:
        events = known.caused.get(row.command_id, [])
        listed = [(each["type"], each["sequence"]) for each in row.outcome["events"]]
        last = events[-1] if events else None
        where = (last.log_partition, str(last.log_offset)) if last else (None, None)
        told = (row.outcome["partition"], row.outcome["offset"])
        account = (row.outcome["aggregate_type"], row.outcome["aggregate_id"])
        if (
            listed != [(event.event_type, event.sequence) for event in events]
            or told != where
            or any(event.account != account for event in events)
        ):
            records = (_row(row), *map(_event, events))
            yield Contradiction("G4", "outcome and log differ about a command's events", records)


# --- Decisions and their order -----------------------------------------------------------


def decisions_are_the_models(known: Known) -> Iterator[Contradiction]:
    """G3: each decision is that of the rules on the account as it was at its place."""
    for row in known.history.outcomes:
        sent = known.decided.get(row.command_id)
        if sent is None:
            continue  # said by `one_outcome`, or nobody's but a transfer's
        place = known.place(row.command_id)
        state = known.state(sent.account, place.before) if place else None
        expected = bank.without_account(sent.message)
        if expected is None and state is not None:
            expected = bank.verdict(sent.message, state)
        if expected is None:
            yield Contradiction("G3", "decided on a state that never was", (_sent(sent), _row(row)))
        elif wrong := _unlike(expected, known, row):
            yield Contradiction("G3", wrong, (_sent(sent), f"account   {state}", _row(row)))


def _unlike(expected: bank.Verdict, known: Known, row: StoredOutcome) -> str | None:
    """Say how an outcome and its events differ from what they have to be."""
    outcome, events = row.outcome, known.caused.get(row.command_id, [])
    found = (outcome["status"], code_of(outcome))
    if expected.or_code is not None and found == ("rejected", expected.or_code):
        expected = bank.Verdict(*found)
    if found != (expected.status, expected.code):
        return f"the rules say {expected.status}, {expected.code}"
    if not expected.loaded and outcome["sequence"] is not None:
        return "it has the sequence of an account that it was not decided on"
    payloads = tuple((event.event_type, bank.read_event(event.payload)) for event in events)
    if payloads != expected.events or any(event.event_version != "1.0" for event in events):
        return f"the rules say {expected.events}, the log {payloads}"
    sent = known.decided.get(row.command_id)
    metadata: dict[str, str] = sent.message.get("metadata", {}) if sent else {}
    if any(not metadata.items() <= event.metadata.items() for event in events):
        return "the event does not have the command's metadata"
    return None


def decided_in_the_order_sent(known: Known) -> Iterator[Contradiction]:
    """G8: what one sender sent to one account is decided in that order.

    Which a broker that lost everything is free from: what was sent again after
    the loss came later than what was sent first.
    """
    lines: dict[tuple[str, Account], dict[str, list[Sent]]] = defaultdict(dict)
    for each in sorted(known.history.sent, key=lambda sent: sent.at):
        lines[each.sender, each.account].setdefault(each.id, []).append(each)
    for line in lines.values():
        furthest: tuple[Place, Sent] | None = None
        for command_id, sendings in line.items():
            place, first = known.place(command_id), sendings[0]
            if place is None or content_hash(first) != known.outcomes[command_id].request_hash:
                continue
            # Another sender may have sent the same before: then that came first.
            began = known.sent[command_id][0]
            if furthest and furthest[0].after > place.before and _before(furthest[1], began):
                yield _overtaken(known, furthest[1], first)
            kept = not known.was_lost(first, known.sent[command_id][-1].at)
            if kept and (furthest is None or place.after >= furthest[0].after):
                furthest = place, next((s for s in sendings if s.accepted_at is not None), first)


def _before(earlier: Sent, later: Sent) -> bool:
    return earlier.accepted_at is not None and earlier.accepted_at <= later.at


def _overtaken(known: Known, earlier: Sent, later: Sent) -> Contradiction:
    rows = [_row(known.outcomes[each.id]) for each in (earlier, later)]
    records = (_sent(earlier), _sent(later), *rows)
    return Contradiction("G8", "a command overtook another of its sender", records)


def decided_on_the_present(known: Known) -> Iterator[Contradiction]:
    """G3: a command sent after another's outcome was received is decided after that one."""
    for sendings in _by_account(known).values():
        answers = sorted(
            ((_answered_at(known, each), each) for each in sendings), key=lambda pair: pair[0]
        )
        latest: tuple[Place, Sent] | None = None
        for later in sorted(sendings, key=lambda each: each.at):
            while answers and answers[0][0] < later.at:
                _, each = answers.pop(0)
                place = known.place(each.id)
                if place and (latest is None or place.after > latest[0].after):
                    latest = place, each
            place = known.place(later.id)
            if latest and place and latest[0].after > place.before:
                yield _stale(known, latest[1], later)


def _answered_at(known: Known, sent: Sent) -> float:
    return min((reply.at for reply in known.replies.get(sent.id, [])), default=float("inf"))


def _stale(known: Known, earlier: Sent, later: Sent) -> Contradiction:
    answer = min(known.replies[earlier.id], key=lambda reply: reply.at)
    records = (_reply(answer), _sent(later), _row(known.outcomes[later.id]))
    return Contradiction("G3", "decided on a past that its sender knew to be over", records)


def _by_account(known: Known) -> dict[Account, list[Sent]]:
    found: dict[Account, list[Sent]] = defaultdict(list)
    for sendings in known.sent.values():
        found[sendings[0].account].append(sendings[0])
    return found


# --- The log and the topic ---------------------------------------------------------------


def no_holes(known: Known) -> Iterator[Contradiction]:
    """G5: sequences and offsets are 1, 2, 3 …, each partition's up to its head."""
    for account, stream in known.streams.items():
        yield from _holes(stream, [event.sequence for event in stream], f"{account}'s sequences")
        for earlier, later in pairwise(stream):
            if earlier.log_offset >= later.log_offset:
                records = (_event(earlier), _event(later))
                yield Contradiction("G5", "the log has an account's events out of order", records)
    for partition, events in known.log.items():
        offsets = [event.log_offset for event in events]
        yield from _holes(events, offsets, f"partition {partition}'s offsets")
        for event in events:
            if partition_of(event.account, known.history.partitions) != partition:
                yield Contradiction("G5", "an event in a partition not its own", (_event(event),))
    for partition in known.history.heads.keys() | known.log.keys():
        head, count = known.history.heads.get(partition), len(known.log.get(partition, []))
        if head != count:
            says = f"partition {partition} has head {head} and {count} events"
            yield Contradiction("G5", says, tuple(map(_event, known.log.get(partition, [])[-1:])))


def _holes(events: list[StoredEvent], numbers: list[int], what: str) -> Iterator[Contradiction]:
    for index, (event, number) in enumerate(zip(events, numbers, strict=True)):
        if number != index + 1:
            records = tuple(map(_event, [*events[max(0, index - 1) : index], event]))
            yield Contradiction("G5", f"{what} go on with {number}, not {index + 1}", records)
            return


def topic_is_the_log(known: Known) -> Iterator[Contradiction]:
    """G6: each subscriber that keeps the contract's rule gets the log, complete and in order."""
    for subscriber, seen in known.history.topic.items():
        handled: dict[int, int] = defaultdict(int)
        for each in seen:
            partition, offset = each.event["partition"], int(each.event["offset"])
            log = known.log.get(partition, [])
            stored = log[offset - 1] if 0 < offset <= len(log) else None
            if wrong := _unlike_stored(known.history, each, stored):
                records = (_seen(each), *([_event(stored)] if stored else []))
                yield Contradiction("G6", f"{subscriber}: {wrong}", records)
            elif offset == handled[partition] + 1:
                handled[partition] = offset
        for partition, events in known.log.items():
            if handled[partition] < len(events):
                missing = events[handled[partition]]
                says = f"{subscriber}: an event never came in its place"
                yield Contradiction("G6", says, (_event(missing),))


def _unlike_stored(history: History, seen: Seen, stored: StoredEvent | None) -> str | None:
    if stored is None:
        return "an event that is not in the log"
    expected = _on_topic(history, stored)
    found = seen.event | {"metadata": json.loads(seen.event.get("metadata", "null"))}
    different = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if different:
        return f"{', '.join(different)} differ from the log"
    if (seen.channel, seen.key) != _address(history, stored):
        return f"it should be at {_address(history, stored)}"
    return None


def _on_topic(history: History, event: StoredEvent) -> Json:
    """Write an event as the contract has it on the topic; `metadata` is not yet text."""
    name = f"{event.aggregate_type}/{event.aggregate_id}"
    told = {
        attribute: event.metadata[key]
        for key, attribute in (
            ("correlation_id", "correlationid"),
            ("traceparent", "traceparent"),
            ("tracestate", "tracestate"),
        )
        if key in event.metadata
    }
    return told | {
        "specversion": "1.0",
        "id": f"{name}/{event.sequence}",
        "source": f"/{history.service}",
        "type": event.event_type,
        "subject": event.aggregate_id,
        "time": event.recorded_at,
        "datacontenttype": "application/json",
        "data": event.payload,
        "aggregatetype": event.aggregate_type,
        "aggregatesequence": str(event.sequence),
        "eventversion": event.event_version,
        "partition": event.log_partition,
        "offset": str(event.log_offset),
        "logepoch": history.logepoch,
        "partitionkey": name,
        "commandid": event.command_id,
        "metadata": event.metadata,
    }


def _address(history: History, event: StoredEvent) -> tuple[str, str]:
    partition, offset = event.log_partition, event.log_offset
    if history.broker == "redis":
        return f"{history.service}:events:{partition}", f"{offset}-0"
    return f"{event.aggregate_type}.{event.event_type}.{partition}", f"{partition}-{offset}"


# --- Views, money, and what was set aside ------------------------------------------------


def checkpoints_are_at_the_end(known: Known) -> Iterator[Contradiction]:
    """G6, G7, G11: marks of the relay, checkpoints of live views and reactors are the heads."""
    followers = (*known.history.views, REACTOR)
    names = {RELAY: RELAY} | {name: known.history.live.get(name, name) for name in followers}
    for name, key in names.items():
        checkpoints = known.history.checkpoints.get(key, {})
        for partition, head in known.history.heads.items():
            if checkpoints.get(partition, 0) != head:
                says = f"{name} is at {checkpoints.get(partition, 0)} of partition {partition}"
                promise = {RELAY: "G6", REACTOR: "G11"}.get(name, "G7")
                yield Contradiction(promise, f"{says}, the log at {head}")
    for marker in known.history.parked:
        yield Contradiction("G7", "an account is parked", (f"parked    {_short(marker)}",))


def statements_are_a_fold(known: Known) -> Iterator[Contradiction]:
    """G7: `account_query` has each account's row as its events make it, and no other."""
    rows: dict[str, list[Json]] = defaultdict(list)
    for view_id, payload in known.history.accounts:
        rows[view_id].append(bank.read_statement(payload))
    streams = {name: stream for (kind, name), stream in known.streams.items() if kind == "account"}
    for account in sorted(rows.keys() | streams.keys()):
        events = [(event.event_type, event.payload) for event in streams.get(account, [])]
        expected = [bank.statement(events)] if events else []
        if rows.get(account, []) != expected:
            yield Contradiction(
                "G7",
                f"account_query is wrong about {account}",
                (f"row       {_first_difference(rows.get(account, []), expected)}",),
            )


def _first_difference(found: list[Json], expected: list[Json]) -> str:
    """Say in which field, and from which line on, a statement is another."""
    if len(found) != 1 or len(expected) != 1:
        return f"there are {len(found)} rows, not {len(expected)}"
    left, right = found[0], expected[0]
    name = next(name for name in (*right, *left) if left.get(name) != right.get(name))
    if name not in {"ledger", "written_checks"}:
        return f"{name} is {left.get(name)}, not {right.get(name)}"
    line = next(
        n for n in range(len(left[name]) + 1) if left[name][: n + 1] != right[name][: n + 1]
    )
    return f"{name}, line {line}: {left[name][line:][:2]}, not {right[name][line:][:2]}"


def totals_are_a_fold(known: Known) -> Iterator[Contradiction]:
    """G7: `bank_totals`, where it is, has a row for each day on which something was booked."""
    if TOTALS not in known.history.views:
        return
    expected: dict[str, dict[str, int]] = defaultdict(lambda: dict(bank.EMPTY_DAY))
    for event in known.history.events:
        if event.aggregate_type != "account":
            continue
        bank.add_to_day(expected[_day(event)], event.event_type, event.payload)
    rows: dict[str, list[dict[str, int]]] = defaultdict(list)
    for day, row in known.history.totals:
        rows[day].append(row)
    for day in sorted(rows.keys() | expected.keys()):
        wanted = [expected[day]] if day in expected else []
        if rows.get(day, []) != wanted:
            records = (f"row       {rows.get(day)}", f"log       {wanted}")
            yield Contradiction("G7", f"bank_totals is wrong about {day}", records)


def _day(event: StoredEvent) -> str:
    try:
        return date.fromisoformat(event.metadata.get("booked_on", "")).isoformat()
    except ValueError:
        return event.recorded_at[:10]


def money_is_conserved(known: Known) -> Iterator[Contradiction]:
    """Money: what accepted commands moved is what the log and the views hold."""
    moved = Decimal(0)
    for command_id, row in known.outcomes.items():
        sent = known.decided.get(command_id)
        if sent is None or sent.message["type"] == "TransferMoney":
            continue
        if row.outcome["status"] == "accepted" and "amount" in sent.message["payload"]:
            sign = 1 if sent.message["type"] == "DepositMoney" else -1
            moved += sign * Decimal(sent.message["payload"]["amount"])
    held = {
        "the log": sum((Decimal(_balance(s)) for s in known.streams.values()), Decimal(0)),
        "account_query": sum(
            (Decimal(p["balance"]) for _, p in known.history.accounts), Decimal(0)
        ),
    }
    if TOTALS in known.history.views:
        held[TOTALS] = Decimal(sum(row["held_cents"] for _, row in known.history.totals)) / 100
    for name, amount in held.items():
        if amount != moved:
            yield Contradiction("money", f"{name} holds {amount}; commands moved {moved} in")


def _balance(stream: Sequence[StoredEvent]) -> str:
    """Return the balance that the last event to state one states."""
    stated = [event.payload["balance"] for event in stream if "balance" in event.payload]
    return str(stated[-1]) if stated else "0"


def nothing_is_set_aside_silently(known: Known) -> Iterator[Contradiction]:
    """G9: each failed command is a dead letter, nothing else is, and no attempt is left open."""
    failed = {r.command_id for r in known.history.outcomes if r.outcome["status"] == "failed"}
    letters: dict[str, list[Json]] = defaultdict(list)
    for letter in known.history.dead_letters:
        letters[json.loads(letter["body"])["id"]].append(letter)
    for command_id in sorted(failed - letters.keys()):
        yield Contradiction("G9", "no dead letter for it", (_row(known.outcomes[command_id]),))
    for command_id, found in letters.items():
        if command_id not in failed or len(found) > 1:
            records = tuple(f"letter    {_short(letter)}" for letter in found)
            yield Contradiction("G9", "a dead letter that should not be", records)
    for command_id, attempts in known.history.attempts.items():
        if command_id in known.outcomes:
            records = (f"attempts  {command_id}: {attempts}", _row(known.outcomes[command_id]))
            yield Contradiction("G9", "attempts at a command that was decided", records)


# --- What events cause, and unique keys ----------------------------------------------------


def transfers_end_once(known: Known) -> Iterator[Contradiction]:
    """G11: each transfer ends once, by as many commands as that takes, and nothing is left."""
    caused = _caused(known)
    moves: dict[str, list[StoredEvent]] = defaultdict(list)
    for event in known.history.events:
        if event.event_type in {"CustomerReceivedMoney", "TransferCameBack"}:
            moves[event.metadata.get("process", "")].append(event)
            yield from _wrong_balance(known, event)
    for event in known.history.events:
        if event.event_type == "CustomerSentMoney":
            moved = moves.pop(f"transfer/{event.command_id}", [])
            yield from _wrong_transfer(known, event, moved, caused)
    for name, events in moves.items():
        says = f"money moved for {name or 'no transfer'}, which nobody began"
        yield Contradiction("G11", says, tuple(map(_event, events)))
    for rows in caused.values():
        for row in rows:
            says = "an outcome of a command that nobody sent, and nothing caused"
            yield Contradiction("G2", says, (_row(row),))
    for left in known.history.scheduled:
        yield Contradiction("G11", "a scheduled command is left", (f"row       {_short(left)}",))


def _caused(known: Known) -> dict[Account, list[StoredOutcome]]:
    """List the outcomes of commands that nobody sent, by whom they were for."""
    found: dict[Account, list[StoredOutcome]] = defaultdict(list)
    for row in known.history.outcomes:
        account = (row.outcome["aggregate_type"], row.outcome["aggregate_id"])
        if row.command_id not in known.sent and account[0] in CAUSED:
            found[account].append(row)
    return found


def _wrong_transfer(
    known: Known,
    began: StoredEvent,
    moved: list[StoredEvent],
    caused: dict[Account, list[StoredOutcome]],
) -> Iterator[Contradiction]:
    """Compare what a transfer did with its steps; take its commands from those that were caused."""
    process = ("transfer", began.command_id)
    stream, rows = known.streams.get(process, []), caused.pop(process, [])
    wrong = _wrong_steps(known, began, stream, moved, caused)
    if wrong is None and len(rows) != len(stream):
        wrong = f"its process decided {len(rows)} commands, not {len(stream)}"
    if wrong is not None:
        records = (_event(began), *map(_event, stream), *map(_event, moved), *map(_row, rows))
        yield Contradiction("G11", wrong, records)
    for each in moved:
        of = caused.get(each.account, [])
        of[:] = [row for row in of if row.command_id != each.command_id]


def _wrong_steps(
    known: Known,
    began: StoredEvent,
    stream: list[StoredEvent],
    moved: list[StoredEvent],
    caused: dict[Account, list[StoredOutcome]],
) -> str | None:
    """Say what is wrong with a transfer; take the refusal that it had from what was caused."""
    source, target = began.payload["from_account"], began.payload["to_account"]
    amount = Decimal(began.payload["amount"])
    arrived = len(stream) == 2
    expected: list[tuple[str, Json]] = [
        ("TransferBegan", {"from_account": source, "to_account": target, "amount": amount}),
        ("TransferEnded", {"arrived": arrived}),
    ]
    if not arrived:
        expected.insert(1, ("TransferRefused", {"reason": "account_not_open"}))
        refusals = caused.get(("account", target), [])
        refused = next((row for row in refusals if _is_refusal(known, row)), None)
        if refused is None:
            return "it came back, and nobody had refused it"
        refusals.remove(refused)
    if [(each.event_type, bank.read_event(each.payload)) for each in stream] != expected:
        return "the process of a transfer did not do its steps, each once"
    end = (target, "CustomerReceivedMoney") if arrived else (source, "TransferCameBack")
    if [(e.aggregate_id, e.event_type, Decimal(e.payload["amount"])) for e in moved] != [
        (*end, amount)
    ]:
        return f"its money is to be in {end[0]}, once"
    return None


def _is_refusal(known: Known, row: StoredOutcome) -> bool:
    place = known.place(row.command_id)
    account = (row.outcome["aggregate_type"], row.outcome["aggregate_id"])
    state = known.state(account, place.before) if place else None
    return code_of(row.outcome) == "account_not_open" and state is not None and not state.opened_as


def _wrong_balance(known: Known, event: StoredEvent) -> Iterator[Contradiction]:
    """Look at the balance after an event of a command that nobody sent."""
    state = known.state(event.account, event.sequence)
    if state is None or Decimal(event.payload["balance"]) != state.balance:
        yield Contradiction("G3", f"the account holds {state}", (_event(event),))


def keys_have_one_holder(known: Known) -> Iterator[Contradiction]:
    """G12: no two accounts have an IBAN at once, and the table has who has which."""
    holders: dict[str, list[str]] = defaultdict(list)
    for (_, name), states in known.states.items():
        if (iban := states[-1].iban) is not None:
            holders[iban].append(name)
    for iban, names in holders.items():
        if len(names) > 1:
            yield Contradiction("G12", f"{' and '.join(names)} have {iban}")
    rows = sorted(row["aggregate_id"] for row in known.history.unique_keys)
    if rows != sorted(name for names in holders.values() for name in names):
        yield Contradiction("G12", f"unique_keys has {rows}, the log {dict(holders)}")
    yield from _held_by_two(known)
    claimed = {(e.payload["iban"], e.account) for e in _assigned(known)}
    for row in known.history.outcomes:
        sent = known.decided.get(row.command_id)
        if sent is not None and code_of(row.outcome) == "iban_taken":
            iban = sent.message["payload"]["iban"]
            if not any(iban == held and account != sent.account for held, account in claimed):
                says = "it is refused as taken, and no other account ever had it"
                yield Contradiction("G12", says, (_sent(sent), _row(row)))


def _held_by_two(known: Known) -> Iterator[Contradiction]:
    """Compare the times in which an account had an IBAN for certain, as its senders saw it.

    That is from when one was told that it has it, until somebody sent what took another.
    """
    spans: dict[str, list[tuple[float, float, StoredEvent]]] = defaultdict(list)
    following: dict[Account, float] = {}
    for event in reversed(_assigned(known)):
        replies = known.replies.get(event.command_id, [])
        since = min((reply.at for reply in replies), default=float("inf"))
        until = following.get(event.account, float("inf"))
        if since < until:
            spans[event.payload["iban"]].append((since, until, event))
        sendings = known.sent.get(event.command_id, [])
        following[event.account] = sendings[0].at if sendings else 0.0
    for found in spans.values():
        for earlier, later in pairwise(sorted(found, key=lambda span: span[0])):
            if later[0] < earlier[1] and earlier[2].account != later[2].account:
                records = (_event(earlier[2]), _event(later[2]))
                yield Contradiction("G12", "two accounts had it at once", records)


def _assigned(known: Known) -> list[StoredEvent]:
    """List who was given an IBAN, each account's in their order."""
    streams = known.streams.values()
    return [each for stream in streams for each in stream if each.event_type == "IbanAssigned"]


CHECKS: tuple[Callable[[Known], Iterator[Contradiction]], ...] = (
    commands_are_kept,
    one_outcome,
    same_everywhere,
    all_or_nothing,
    decisions_are_the_models,
    decided_in_the_order_sent,
    decided_on_the_present,
    no_holes,
    topic_is_the_log,
    checkpoints_are_at_the_end,
    statements_are_a_fold,
    totals_are_a_fold,
    money_is_conserved,
    transfers_end_once,
    keys_have_one_holder,
    nothing_is_set_aside_silently,
)


# --- Arithmetic of the contract ----------------------------------------------------------


def partition_of(account: Account, partitions: int) -> int:
    """Compute the partition of an aggregate."""
    return zlib.crc32("/".join(account).encode()) % partitions


def content_hash(sent: Sent) -> str:
    """Hash what makes two messages with one id the same command."""
    message = sent.message
    content = [
        message["type"],
        message["aggregate_type"],
        message["aggregate_id"],
        message["payload"],
        message.get("expected_sequence"),
    ]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _states(stream: list[StoredEvent]) -> list[bank.Account]:
    states = [bank.Account()]
    for event in stream:
        states.append(states[-1].after(event.event_type, event.payload))
    return states


def code_of(outcome: Json) -> str | None:
    """Return the code of an outcome's error."""
    error: Json | None = outcome["error"]
    return None if error is None else str(error["code"])


def _plain(outcome: Json) -> Json:
    """Leave out what a duplicate's outcome says beside the first one."""
    return {name: value for name, value in outcome.items() if name != "duplicate"}


# --- Records in words ---------------------------------------------------------------------


def _short(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _sent(sent: Sent) -> str:
    confirmed = "not confirmed" if sent.accepted_at is None else f"confirmed {sent.accepted_at:.3f}"
    return f"sent      {sent.at:.3f} ({confirmed}) by {sent.sender}: {_short(sent.message)}"


def _reply(reply: Reply) -> str:
    return f"reply     {reply.at:.3f}: {_short(reply.outcome)}"


def _row(row: StoredOutcome) -> str:
    return f"outcome   {_short(row.outcome)}"


def _event(event: StoredEvent) -> str:
    where = f"{event.log_partition}:{event.log_offset}"
    name = f"{event.aggregate_type}/{event.aggregate_id}/{event.sequence}"
    return (
        f"event     {where} {name} {event.event_type} {_short(event.payload)} of {event.command_id}"
    )


def _seen(seen: Seen) -> str:
    return f"seen      {seen.channel} {seen.key}: {_short(seen.event)}"
